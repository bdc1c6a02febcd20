"""optimize, explain, restore and Options on whole models: tiny Hugging Face models and those of moefx.models."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_families import TinyModel, build
from moefx.models import MixtralMoE, TinyMoELM
from test_block import CLOSE, ListBlock, assert_same_gradients, relative, tokens
from torch import Tensor, nn

import moefx
from moefx import probe
from moefx.block import rewritten

MODELS = ("mixtral", "qwen3_moe")  # each is optimised once for all tests (`hf_pair`), and some tests use one of them
every_model = pytest.mark.parametrize("family", MODELS)


@functools.cache
def _optimised(family: str) -> tuple[TinyModel, Any, Any]:
    tiny = build(family)
    original = copy.deepcopy(tiny.model)
    parameters, random = dict(tiny.model.named_parameters()), torch.get_rng_state()
    mine = moefx.optimize(tiny.model, tiny.inputs(2, 9))
    assert mine is tiny.model
    assert all(p is parameters[name] and p.grad is None for name, p in mine.named_parameters())
    assert list(mine.state_dict()) == list(original.state_dict())
    assert mine.training == original.training
    assert torch.equal(torch.get_rng_state(), random), "the caller's random state moved"
    assert blocks_of(mine) == [b.name for b in moefx.explain(mine).found] == list(tiny.blocks)
    return tiny, original, mine


def hf_pair(family: str) -> tuple[TinyModel, Any, Any]:
    """The original and an optimised model, both fresh copies, in eval mode."""
    tiny, original, mine = _optimised(family)
    assert len(blocks_of(mine)) == len(tiny.blocks)
    return tiny, copy.deepcopy(original), copy.deepcopy(mine)


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if rewritten(module) is not None]


def small_lm(layers: int = 2) -> TinyMoELM:
    torch.manual_seed(0)
    return TinyMoELM(lambda dim: MixtralMoE(dim, hidden=8, experts=4), vocab=32, d_model=16, layers=layers, heads=2)


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 32, shape, generator=torch.Generator().manual_seed(seed))


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that explain may not change."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                value = {k: (id(v), v._version) if isinstance(v, Tensor) else id(v) for k, v in value.items()}
            state[f"{name}.{key}"] = value if isinstance(value, (int, float, str, bool, dict)) else id(value)
    return state


def grads_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------ optimize


@every_model
def test_the_same_object_comes_back(family: str) -> None:
    """With the same parameters, keys and mode (checked in _optimised); other token counts give the right outputs."""
    tiny, original, mine = hf_pair(family)
    for shape in ((3, 17), (1, 1)):
        inputs = tiny.inputs(*shape, seed=2)
        assert relative(mine(**inputs).logits, original(**inputs).logits) <= CLOSE


def test_optimizing_twice_changes_nothing() -> None:
    model = small_lm()
    moefx.optimize(model, (ids(2, 7),))
    before, report = picture(model), moefx.explain(model)
    for again in (lambda: moefx.optimize(model, (ids(3, 5),)), lambda: moefx.optimize(model)):
        assert again() is model
        assert picture(model) == before
        assert moefx.explain(model) is report
    assert moefx.optimize(model, options=moefx.Options()) is model
    assert picture(model) == before


def test_other_options_count() -> None:
    """A second call with other options starts anew."""
    model = small_lm()
    expected = model(ids(2, 9))
    moefx.optimize(model, (ids(2, 7),))
    moefx.optimize(model, (ids(2, 7),), moefx.Options(degree=3))
    assert len(moefx.explain(model).found) == 2
    assert all("r=3" in block.partition for block in moefx.explain(model).found)
    assert relative(model(ids(2, 9)), expected) <= CLOSE


def test_a_part_of_an_optimised_model() -> None:
    """optimize on the parent of rewritten blocks finds nothing that is not rewritten yet, and wraps nothing twice."""
    model = small_lm()
    moefx.optimize(model, (ids(2, 7),))
    names, forwards = blocks_of(model), [rewritten(m) for m in model.modules() if rewritten(m)]
    parent = nn.Sequential(model)
    expected = model(ids(2, 9))
    moefx.optimize(parent, (ids(2, 7),))
    assert blocks_of(parent) == [f"0.{name}" for name in names]
    assert [rewritten(m) for m in model.modules() if rewritten(m)] == forwards
    assert torch.equal(parent(ids(2, 9)), expected)
    moefx.restore(parent)
    assert blocks_of(model) == []


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "batch"])
def test_kinds_of_example_inputs(kind: str) -> None:
    """A tuple, a list, a dict, or anything with keys such as the output of a tokenizer."""
    transformers = pytest.importorskip("transformers")
    x, model = ids(2, 7), small_lm()
    examples = {"tuple": (x,), "list": [x], "dict": {"tokens": x}, "batch": transformers.BatchEncoding({"tokens": x})}
    moefx.optimize(model, examples[kind])
    assert len(blocks_of(model)) == 2


def test_keyword_and_positional_calls_are_one() -> None:
    """The example was positional, the call is not; and a block called both ways has one variant a mode."""
    torch.manual_seed(0)
    block = ListBlock().eval()
    expected = block(tokens())
    moefx.optimize(block, (tokens(2, 5),))
    known = len(rewritten(block).variants)  # type: ignore[union-attr]
    assert relative(block(x=tokens()), expected) <= CLOSE
    assert relative(block(tokens()), expected) <= CLOSE
    assert len(rewritten(block).variants) == known  # type: ignore[union-attr]


def test_degree() -> None:
    tiny = build("mixtral")
    original = copy.deepcopy(tiny.model)
    mine = moefx.optimize(tiny.model, tiny.inputs(2, 9), moefx.Options(degree=3))
    assert len(blocks_of(mine)) == len(tiny.blocks)
    for shape in ((3, 17), (1, 1), (1, 2)):
        inputs = tiny.inputs(*shape, seed=2)
        a, b = mine(**inputs).logits, original(**inputs).logits
        assert relative(a, b) <= CLOSE
        assert_same_gradients(grads_of(mine, a.square().mean()), grads_of(original, b.square().mean()), 1e-4)


# ------------------------------------------------------------------------------------------------ the first call


def test_waits_for_the_first_call() -> None:
    tiny = build("mixtral")
    original, inputs = copy.deepcopy(tiny.model), tiny.inputs(2, 9)
    assert moefx.optimize(tiny.model) is tiny.model
    report = moefx.explain(tiny.model)
    assert report.pending and not report.found and "first call" in str(report)
    assert blocks_of(tiny.model) == []
    assert torch.equal(tiny.model(**inputs).logits, original(**inputs).logits), "the first call is the original's"
    assert moefx.explain(tiny.model) is report
    assert not report.pending
    assert blocks_of(tiny.model) == [b.name for b in report.found] == list(tiny.blocks)
    assert relative(tiny.model(**inputs).logits, original(**inputs).logits) <= CLOSE
    other = tiny.inputs(3, 5, seed=4)
    assert relative(tiny.model(**other).logits, original(**other).logits) <= CLOSE


def test_first_call_that_trains() -> None:
    """The gradients of the first call are the original's; nothing of the observation stays behind."""
    original, mine = small_lm(), small_lm()
    hooks = len(mine._forward_hooks) + len(mine._forward_pre_hooks)
    moefx.optimize(mine)
    for step in range(3):
        x = ids(2, 7, seed=step)
        assert_same_gradients(grads_of(mine, mine(x).square().mean()), grads_of(original, original(x).square().mean()))
    assert blocks_of(mine) == ["layers.0.block", "layers.1.block"]
    for module in mine.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert hooks == 0 and "forward" not in mine.__dict__


def test_a_first_call_that_fails() -> None:
    """The user sees the model's own error, and the model goes on waiting."""
    model = small_lm()
    moefx.optimize(model)
    for bad in ((), (ids(2, 7), 1), (torch.randn(2, 3),), (torch.full((2, 3), 99),)):
        with pytest.raises(Exception) as expected:  # whatever the original raises
            small_lm()(*bad)
        with pytest.raises(expected.type) as actual:
            model(*bad)
        assert str(actual.value) == str(expected.value)
        assert moefx.explain(model).pending
    model(ids(2, 7))
    assert len(blocks_of(model)) == 2


def test_waiting_can_be_ended() -> None:
    """By restore, or by a second optimize that brings the inputs."""
    model = small_lm()
    before = picture(model)
    moefx.optimize(model)
    moefx.restore(model)
    assert picture(model) == before
    model(ids(2, 7))
    assert blocks_of(model) == []
    moefx.optimize(model)
    moefx.optimize(model)
    assert moefx.explain(model).pending
    moefx.optimize(model, (ids(2, 7),))
    assert len(blocks_of(model)) == 2
    assert not moefx.explain(model).pending


def test_first_call_by_generate() -> None:
    tiny = build("mixtral")
    original, start = copy.deepcopy(tiny.model), tiny.inputs(2, 5)["input_ids"]
    moefx.optimize(tiny.model)
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    expected = original.generate(start, **options)
    assert torch.equal(tiny.model.generate(start, **options), expected)
    assert len(blocks_of(tiny.model)) == len(tiny.blocks)
    assert torch.equal(tiny.model.generate(start, **options), expected)


# ------------------------------------------------------------------------------------------------ explain, restore


def test_explain_before_changes_nothing() -> None:
    tiny = build("mixtral")
    random = torch.get_rng_state()
    expected = tiny.model(**tiny.inputs(2, 9)).logits
    before = picture(tiny.model)
    report = moefx.explain(tiny.model, tiny.inputs(2, 9))
    assert [b.name for b in report.found] == list(tiny.blocks)
    assert picture(tiny.model) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(tiny.model(**tiny.inputs(2, 9)).logits, expected)
    text = str(report)
    for word in "E= K= D= F= layout routing stands verified partition schedule source".split():
        assert word in text, word
    with pytest.raises(moefx.MoefxError, match="example_inputs"):
        moefx.explain(tiny.model)  # it is not optimised
    after = moefx.explain(_optimised("mixtral")[2])
    assert [(b.name, b.experts, b.top_k, b.d_model, b.d_expert, b.layout, b.routing) for b in after.found] == [
        (b.name, b.experts, b.top_k, b.d_model, b.d_expert, b.layout, b.routing) for b in report.found
    ]


def test_the_report() -> None:
    model = small_lm()
    report = moefx.explain(moefx.optimize(model, (ids(2, 7),)))
    first, second = report.found
    assert (first.name, first.experts, first.top_k, first.d_model, first.d_expert) == ("layers.0.block", 4, 2, 16, 8)
    assert second.same_as == "layers.0.block" and not first.same_as
    assert first.location.split(":")[0].endswith("mixtral.py")
    assert set(first.errors) == {"forward", "gradient", "device"}
    assert all(0 <= error < 1e-5 for error in first.errors.values())
    assert "def forward" in first.source
    compile(first.source, "source", "exec")
    assert report.seconds > 0
    assert "2 MoE block(s) found" in str(report)


def test_explain_needs_inputs() -> None:
    with pytest.raises(moefx.MoefxError, match="example_inputs"):
        moefx.explain(small_lm())


@every_model
def test_restore(family: str) -> None:
    _, original, mine = hf_pair(family)
    tiny = _optimised(family)[0]
    before = picture(original)
    assert moefx.restore(mine) is mine
    for _ in range(2):
        assert all("forward" not in module.__dict__ for module in mine.modules())
        assert picture(mine).keys() == before.keys()
        assert torch.equal(mine(**tiny.inputs(3, 5)).logits, original(**tiny.inputs(3, 5)).logits)
        moefx.restore(mine)
    with pytest.raises(moefx.MoefxError):
        moefx.explain(mine)


def test_restore_keeps_what_was_learned() -> None:
    model = small_lm()
    moefx.optimize(model, (ids(2, 7),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(ids(2, 7)).square().mean().backward()
    optimizer.step()
    learned = model(ids(2, 9)).detach()
    parameters = list(model.parameters())
    moefx.restore(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert relative(model(ids(2, 9)), learned) <= CLOSE
    assert relative(small_lm()(ids(2, 9)), learned) > 1e-3
    moefx.optimize(model, (ids(2, 7),))
    assert len(blocks_of(model)) == 2
    assert relative(model(ids(2, 9)), learned) <= CLOSE


def test_restore_of_a_model_never_optimised() -> None:
    model = small_lm()
    before = picture(model)
    assert moefx.restore(model) is model
    assert picture(model) == before


# ------------------------------------------------------------------------------------------------ what models do


@every_model
def test_router_logits_and_auxiliary_loss(family: str) -> None:
    tiny, original, mine = hf_pair(family)
    inputs = tiny.inputs(3, 7, seed=1)
    inputs |= {"labels": inputs["input_ids"], "output_router_logits": True}
    expected, actual = original.train()(**inputs), mine.train()(**inputs)
    assert len(actual.router_logits) == len(tiny.blocks)
    torch.testing.assert_close(actual.router_logits, expected.router_logits)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    assert float(expected.aux_loss.detach()) > 0
    assert_same_gradients(grads_of(mine, actual.loss), grads_of(original, expected.loss), 1e-4)


@every_model
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    tiny, original, mine = hf_pair(family)
    for model in (original.train(), mine.train()):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    results = []
    for model in (original, mine):
        inputs = tiny.inputs(2, 7, seed=1)
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        results.append((loss, grads_of(model, loss)))
    assert relative(results[1][0], results[0][0]) <= CLOSE
    assert_same_gradients(results[1][1], results[0][1], 1e-4)


@every_model
def test_autocast(family: str) -> None:
    tiny, original, mine = hf_pair(family)
    inputs = tiny.inputs(2, 7, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = mine(**inputs).logits, original(**inputs).logits
    assert relative(a, b) <= 0.05


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtype_moves(family: str, dtype: torch.dtype) -> None:
    tiny, original, mine = hf_pair(family)
    inputs = tiny.inputs(2, 7, seed=1)
    a, b = mine.to(dtype)(**inputs).logits, original.to(dtype)(**inputs).logits
    # half precision may break a tie of the router: most rows, not all
    error = float(((a - b).abs().amax(-1) / b.abs().max()).detach().median())
    assert a.dtype == b.dtype == dtype
    assert error <= {torch.float64: 1e-11, torch.bfloat16: 3e-2, torch.float16: 3e-3}[dtype]


@every_model
def test_generate(family: str) -> None:
    """Equal tokens: greedy, by beams, and sampled from one seed; the cache included."""
    tiny, original, mine = hf_pair(family)
    start = tiny.inputs(2, 5)["input_ids"]
    for options in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        results = []
        for model in (original, mine):
            torch.manual_seed(0)
            results.append(model.generate(start, max_new_tokens=6, min_new_tokens=6, **options))
        assert torch.equal(results[1], results[0]), options


def test_tied_embeddings() -> None:
    """A head tied to the embeddings stays tied, and its gradient is the sum of both uses."""
    tiny = build("mixtral")
    tiny.model.config.tie_word_embeddings = True
    tiny.model.lm_head.weight = tiny.model.model.embed_tokens.weight
    original = copy.deepcopy(tiny.model)
    mine = moefx.optimize(tiny.model, tiny.inputs(2, 9))
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    assert len(blocks_of(mine)) == len(tiny.blocks)
    inputs = tiny.inputs(2, 7, seed=1)
    losses = [model(**inputs, labels=inputs["input_ids"]).loss for model in (original, mine)]
    assert_same_gradients(grads_of(mine, losses[1]), grads_of(original, losses[0]), 1e-4)
    twin = copy.deepcopy(mine)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is not mine.lm_head.weight


@every_model
def test_deepcopy(family: str) -> None:
    """The copy is rewritten too, on parameters of its own, and has its own report."""
    tiny, original, mine = hf_pair(family)
    twin, inputs = copy.deepcopy(mine), tiny.inputs(2, 7, seed=1)
    assert blocks_of(twin) == blocks_of(mine) == list(tiny.blocks)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert relative(mine(**inputs).logits, original(**inputs).logits) <= CLOSE
    assert relative(twin(**inputs).logits, mine(**inputs).logits) > 0.01
    moefx.restore(twin)
    assert blocks_of(twin) == [] and blocks_of(mine) == list(tiny.blocks)
    assert len(moefx.explain(mine).found) == len(tiny.blocks)


def test_pickle_of_a_model() -> None:
    """Optimised or waiting: the loaded model is right, not optimised, and says so."""
    expected = small_lm()(ids(2, 9))
    for example in (None, (ids(2, 7),)):
        loaded = pickle.loads(pickle.dumps(moefx.optimize(small_lm(), example)))
        assert relative(loaded(ids(2, 9)), expected) <= CLOSE
        assert blocks_of(loaded) == []
        moefx.optimize(loaded, (ids(2, 7),))
        assert len(blocks_of(loaded)) == 2
        assert relative(loaded(ids(2, 9)), expected) <= CLOSE


def test_save_pretrained(tmp_path: Any) -> None:
    """What save_pretrained writes of an optimised model loads into a fresh one."""
    tiny, original, mine = hf_pair("mixtral")
    mine.save_pretrained(tmp_path)
    loaded = type(mine).from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    inputs = tiny.inputs(2, 7)
    assert relative(loaded(**inputs).logits, original(**inputs).logits) <= CLOSE


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_what_transformers_changes_by_itself(family: str, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Blocks stay rewritten: saving writes the dtype into the config, training turns its cache off."""
    tiny, _, mine = hf_pair(family)
    inputs = tiny.inputs(2, 7)
    checkpointing = getattr(mine, "activation_checkpointing_enable", mine.gradient_checkpointing_enable)  # as older releases say
    changes: list[Callable[[], Any]] = [
        lambda: mine.save_pretrained(tmp_path),
        checkpointing,
        lambda: setattr(mine.config, "use_cache", False),
        lambda: mine.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False),
        mine.double,
        mine.eval,
        mine.train,
    ]
    for change in changes:
        change()
        mine(**inputs)
    assert not [m for m in caplog.messages if m.startswith("moefx")]


@pytest.mark.parametrize("make", [small_lm], ids=["mixtral"])
def test_training_runs_alike(make: Callable[[], nn.Module]) -> None:
    """Ten steps with clipping and weight decay: one curve."""
    curves = []
    for optimise in (False, True):
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        if optimise:
            moefx.optimize(model)
        curve = []
        for step in range(10):
            x = ids(4, 9, seed=step % 3)
            loss = nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(float(loss.detach()))
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


# ------------------------------------------------------------------------------------------------ several GPUs, one process


class OnItsGpu(nn.Module):
    """A layer whose inputs are moved to where it lies, as accelerate's hooks do: the current device stays what it was."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.device = torch.device("cuda", index)
        self.moe = MixtralMoE(64, hidden=32, experts=4).to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.device) + self.moe(x.to(self.device))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_of_which_one_is_current() -> None:
    torch.manual_seed(0)
    original = nn.Sequential(OnItsGpu(0), OnItsGpu(1))
    mine = copy.deepcopy(original)
    moefx.optimize(mine, (torch.randn(3, 5, 64),))
    assert blocks_of(mine) == ["0.moe", "1.moe"]
    for shape in ((2, 9, 64), (1, 300, 64), (2, 9, 64)):  # the last one from tapes, where a device has them
        x = torch.randn(shape)
        theirs, ours = original(x), mine(x)
        assert ours.device == theirs.device == torch.device("cuda", 1)
        assert relative(ours, theirs) < 1e-4
        expected = grads_of(original, theirs.square().sum())
        for name, gradient in grads_of(mine, ours.square().sum()).items():
            assert gradient is not None and gradient.device == expected[name].device  # type: ignore[union-attr]
            assert relative(gradient, expected[name]) < 1e-4, name
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jetmoe", "switch_transformers"])
def test_no_probe_copy_outlives_optimize(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large experts it takes gigabytes, which no collector of garbage knows of."""
    tiny, copies, probe_copy = build(family), [], probe.probe_copy

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        twin = probe_copy(*args, **kwargs)
        copies.extend(weakref.ref(p) for p in twin.parameters())
        return twin

    monkeypatch.setattr(probe, "probe_copy", watched)
    gc.disable()
    try:
        moefx.optimize(tiny.model, tiny.inputs(2, 9))
    finally:
        gc.enable()
    assert copies and not any(copy() is not None for copy in copies)
