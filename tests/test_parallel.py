"""Experts spread over gloo ranks: outputs and all gradients are those of one process.

As a script it runs the whole grid, and delays at random, and prints what is right:

    python tests/test_parallel.py [grid] [delays]
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from moefx.codegen.all_to_all import Hierarchical, make_all_to_all
from moefx.models import BLOCKS, TinyMoELM
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moefx
from moefx import api
from moefx.block import rewritten
from moefx.errors import InputError
from moefx.exchange import experts_of
from moefx.parallel import as_mesh, distribute, expert_parameters, sync_gradients
from moefx.report import Report

VOCAB, WIDTH = 64, 16
EXACT = 1e-10  # float64


def language_model(name: str, layers: int = 2, d_model: int = WIDTH, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = TinyMoELM(lambda d: BLOCKS[name](d, **sizes), vocab=VOCAB, d_model=d_model, layers=layers)  # type: ignore[call-arg]
    return model.double()


def batch(rank: int, length: int = 9) -> Tensor:
    """Every rank has another number of tokens."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, VOCAB, (1 + rank % 2, length + 2 * rank), generator=generator)


def gradients(model: nn.Module, ids: Tensor, run: Any = None) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and gradients for fixed random cotangents. run: what is called, if it is not the model itself."""
    model.zero_grad(set_to_none=True)
    y = (model if run is None else run)(ids)
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    y.backward(gy.pin_memory().to(y.device, non_blocking=True) if y.is_cuda else gy)
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) if b.numel() else 0.0


def own_part(name: str, total: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of the summed gradient of a parameter."""
    if isinstance(parameter, DTensor):
        rows = experts_of(total.shape[0], dist.get_world_size(), dist.get_rank())
        return total[rows.start : rows.stop]
    return total


def differences(original: nn.Module, model: nn.Module, ids: Tensor, run: Any = None) -> dict[str, float]:
    """Relative errors of the logits and of every gradient against the original on one process."""
    y, mine = gradients(model, ids, run)
    reference_y, reference = gradients(original, ids)
    experts = {name for name, _ in expert_parameters(model)}
    errors = {"logits": relative(y, reference_y)}
    parameters = dict(model.named_parameters())
    for name, g in reference.items():
        total = torch.zeros_like(original.get_parameter(name)) if g is None else g.clone()
        if name in experts or name not in parameters:  # a sum over the tokens of all ranks
            dist.all_reduce(total)
        if name not in parameters:
            continue  # another rank's expert
        grad = mine[name]
        if grad is None:
            grad = torch.zeros_like(parameters[name])
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        errors[name] = relative(local, own_part(name, total, parameters[name]))
    return errors


def compare(name: str, options: dict[str, Any], sizes: dict[str, Any], layers: int = 2) -> dict[str, float]:
    original = language_model(name, layers, **sizes)
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(policy="fifo", **options), mesh=dist.group.WORLD)
    report = moefx.explain(model)
    assert len(report.found) == layers, str(report)
    worst: dict[str, float] = {}
    for seed in (0, 7):
        for what, error in differences(original, model, batch(dist.get_rank() + seed, 5 + seed)).items():
            worst[what] = max(worst.get(what, 0.0), error)
    return worst


def assert_exact(results: list[dict[str, float]]) -> None:
    """Of ranks, or of cases."""
    for rank, errors in enumerate(results):
        wrong = {what: error for what, error in errors.items() if not error <= EXACT}
        assert not wrong, f"rank {rank}: {wrong}"


MODELS = ["mixtral", "deepseek", "gpt_oss", "switch"]
DEGREES = [1, 2, 3, 4, 8]
CAPACITIES = [None, 64]


def case(degree: int, capacity: int | None = None, backward: int | None = None, **more: Any) -> dict[str, Any]:
    return {"degree": degree, "backward_degree": backward, "capacity": capacity, "policy": "fifo", **more}


def all_cases() -> list[dict[str, Any]]:
    """Every degree without and with a capacity: the all-to-alls, of which one with another degree in backward; the policies."""
    cases = []
    for i, degree in enumerate(DEGREES):
        for capacity in CAPACITIES:
            cases += [case(degree, capacity, all_to_all=name) for name in ("direct", "hierarchical")]
            cases.append(case(degree, capacity, DEGREES[i - 1], all_to_all="pipe"))
            cases += [case(degree, capacity, policy=policy) for policy in ("serial", "auto")]
    return cases


SAMPLE = [case(2), case(3, 64, 2, all_to_all="pipe"), case(8, None, 1), case(1, 64, 3), case(3, policy="auto")]


def grid(name: str, cases: list[dict[str, Any]], sizes: dict[str, Any]) -> list[dict[str, float]]:
    """The errors of every case against the original on one process. The model is analysed once, then spread in each way."""
    os.environ["MOEFX_NODE"] = str(dist.get_rank() * 2 // dist.get_world_size())
    original = language_model(name, **sizes)
    ids = batch(dist.get_rank())
    analysed, report = copy.deepcopy(original), Report()
    seen = api._run_example(analysed, (ids,))
    api._rewrite(analysed, seen, moefx.Options(), report, replace=True, wide=True)
    assert len(report.found) == 2, str(report)
    mesh, profile, results = as_mesh(dist.group.WORLD), _profile_file(), []
    for options in cases:
        model, own = copy.deepcopy((analysed, report))
        given = moefx.Options(**options, profile=profile if options["policy"] == "auto" else None)
        distribute(model, mesh, given, own, seen.examples)
        results.append(differences(original, model, batch(dist.get_rank() + 7, 12)))
    return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_models_equal_one_process(name: str, ranks: int) -> None:
    """Degrees that cut unevenly, chunks without rows, forward and backward cut apart, places without a row."""
    for results in run_ranks(ranks, grid, name, SAMPLE, {"experts": 7 if name == "mixtral" else 8}):
        assert_exact(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_whole_grid(name: str, ranks: int) -> None:
    for results in run_ranks(ranks, grid, name, all_cases(), {"experts": 8}, timeout_s=900):
        assert_exact(results)


def over_capacity() -> tuple[str, float]:
    """Rank 1 has more tokens than there are places. Then, with fewer, all is well."""
    original = language_model("switch", layers=1, experts=4, capacity_factor=2.0)
    model = copy.deepcopy(original)
    options = moefx.Options(degree=2, policy="fifo", capacity=8)
    moefx.optimize(model, (batch(0),), options, mesh=dist.group.WORLD)
    text = message(lambda: model(torch.full((1, 40 if dist.get_rank() else 4), 3)))
    few = torch.full((1, 8), 3)
    return text, relative(model(few), original(few))


def test_a_capacity_that_is_exceeded_is_an_error_on_all_ranks() -> None:
    for text, error in run_ranks(2, over_capacity):
        assert text.startswith("layers.0.block: rank 1 has 20 rows for one expert, and capacity=8 is too few"), text
        assert error < EXACT


def test_one_rank() -> None:
    assert_exact(run_ranks(1, compare, "gpt_oss", {"degree": 3, "backward_degree": 2}, {}))


@pytest.mark.parametrize(("codec", "bound"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_codecs_change_little(codec: str, bound: float) -> None:
    options = {"degree": 2, "codec": codec, "backward_codec": codec}
    for errors in run_ranks(2, compare, "mixtral", options, {"experts": 4}):
        assert 1e-9 < max(errors.values()) < bound


def delayed(runs: int, options: dict[str, Any]) -> tuple[int, int]:
    """Random delays before every task and record; how many runs differ from the first, and how many delays there were."""
    torch.manual_seed(0)
    model = language_model("deepseek")
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(**options), mesh=dist.group.WORLD)
    rng, delays = random.Random(dist.get_rank()), [0]

    def delay(lane: str) -> None:
        delays[0] += 1
        time.sleep(rng.random() * 2e-3)

    for module in model.modules():
        forward = rewritten(module)
        for variant in forward.variants.values() if forward else ():
            variant.compiled.delays = delay  # type: ignore[union-attr]
    first, different = None, 0
    for _ in range(runs):
        y, grads = gradients(model, ids)
        local = [y, *(g.to_local() if isinstance(g, DTensor) else g for g in grads.values() if g is not None)]
        different += first is not None and not all(torch.equal(a, b) for a, b in zip(first, local))
        first = first or [t.clone() for t in local]
    return different, delays[0]


DELAYED = [case(3, None, 2), case(4, 64), case(2, all_to_all="hierarchical"), case(3, 64, 2, all_to_all="pipe")]


@pytest.mark.parametrize("options", DELAYED[:1] + DELAYED[3:], ids=["dropless", "capacity"])
def test_delays_change_nothing(options: dict[str, Any]) -> None:
    for different, delays in run_ranks(2, delayed, 6, options):
        assert different == 0 and delays > 100


def many_layers() -> dict[str, float]:
    return compare("mixtral", {"degree": 2}, {"experts": 4, "hidden": 8}, layers=24)


def test_24_layers_in_one_backward() -> None:
    assert_exact(run_ranks(2, many_layers, timeout_s=120))


# ------------------------------------------------------------------------------------------------ shared experts


class Logged:
    """The direct all-to-all, with a list of what happens."""

    events: list[str] = []

    def __init__(self, group: Any, topology: Any) -> None:
        self.direct = make_all_to_all("direct", group, topology)

    def start(self, send: Tensor, sent_rows: Any, received_rows: Any) -> Any:
        Logged.events.append("start")
        return _Logged(self.direct.start(send, sent_rows, received_rows))


class _Logged:
    def __init__(self, pending: Any) -> None:
        self.pending = pending

    def wait(self) -> Tensor:
        Logged.events.append("wait")
        return self.pending.wait()


class LikeQwen(nn.Module):
    """The experts are a module of their own; the shared expert comes before the router, and with a gate."""

    def __init__(self, dim: int, experts: int = 4) -> None:
        super().__init__()
        self.shared_expert, self.shared_gate = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 1, bias=False)
        self.up, self.router = nn.Linear(dim, dim, bias=False), nn.Linear(dim, experts, bias=False)
        self.experts = Experts(dim, experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        shared = self.shared_expert(self.up(tokens).relu())
        w, ids = self.router(tokens).softmax(-1).topk(2, dim=-1)
        shared = self.shared_gate(tokens).sigmoid() * shared
        return (self.experts(tokens, ids, w) + shared).view_as(x)


class Experts(nn.Module):
    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.w_in, self.w_out = (nn.Parameter(torch.randn(experts, *s) * 0.2) for s in ((24, dim), (dim, 24)))

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(len(self.w_in)):
            token, slot = torch.where(ids == e)
            h = nn.functional.silu(x[token] @ self.w_in[e].T) @ self.w_out[e].T
            y.index_add_(0, token, h * w[token, slot, None])
        return y


def beside_exchanges(name: str, checkpointed: bool) -> tuple[dict[str, float], list[list[str]]]:
    """What happens in forward and in backward; and errors."""
    moefx.register_all_to_all("logged", Logged)
    torch.manual_seed(0)
    original = language_model(name, 1) if name == "deepseek" else TinyMoELM(LikeQwen, VOCAB, WIDTH, 1).double()
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    options = moefx.Options(policy="fifo", degree=2, all_to_all="logged")
    moefx.optimize(model, (ids,), options, mesh=dist.group.WORLD)
    (block,) = (module for module in model.modules() if rewritten(module))
    errors = differences(original, model, ids)
    shared = block.shared_expert if name != "deepseek" else block.shared_expert.down_proj
    shared.register_forward_hook(lambda *_: Logged.events.append("shared"))
    shared.weight.register_hook(lambda _: Logged.events.append("shared"))
    seen = []
    Logged.events.clear()
    y = torch.utils.checkpoint.checkpoint(model, ids, use_reentrant=False) if checkpointed else model(ids)
    seen.append(Logged.events[:])
    Logged.events.clear()
    y.square().sum().backward()
    seen.append(Logged.events[:])
    return errors, seen


@pytest.mark.parametrize("name", ["deepseek", "like_qwen"])
def test_a_shared_expert_runs_during_the_exchange(name: str) -> None:
    """Forward and backward: rows of both chunks are on their way when it runs, and nothing has been waited for."""
    for errors, (forward, backward) in run_ranks(2, beside_exchanges, name, False):
        assert max(errors.values()) <= EXACT
        # counts travel by another all-to-all
        assert forward[:3] == ["start", "start", "shared"] and forward.count("wait") == 4, forward
        assert backward[:3] == ["start", "start", "shared"] and backward.count("wait") == 4, backward


def test_a_shared_expert_under_checkpointing() -> None:
    """Backward runs forward again before it begins."""
    for errors, (forward, backward) in run_ranks(2, beside_exchanges, "deepseek", True):
        assert max(errors.values()) <= EXACT
        assert forward[:3] == ["start", "start", "shared"]
        assert backward[:3] == ["start", "start", "shared"] and backward.count("shared") == 2


# ------------------------------------------------------------------------------------------------ torch.compile


def compiled_around(name: str) -> tuple[dict[str, float], int, str]:
    """torch.compile breaks its graphs at the blocks; how many graphs, and what fullgraph=True says."""
    original = language_model(name)
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    errors = differences(original, model, ids, compiled)
    torch._dynamo.reset()
    try:
        torch.compile(model, backend=backend, fullgraph=True)(ids)
        text = "no error"
    except torch._dynamo.exc.Unsupported as error:
        text = str(error)
    return errors, len(graphs), text


@pytest.mark.parametrize("name", ["deepseek"])
def test_torch_compile_breaks_its_graphs_at_the_blocks(name: str) -> None:
    for errors, graphs, text in run_ranks(2, compiled_around, name):
        assert max(errors.values()) <= EXACT
        assert graphs >= 2  # before and behind blocks
        assert "experts on several ranks exchange rows" in text


# ------------------------------------------------------------------------------------------------ errors


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except moefx.MoefxError as error:
        return str(error)
    return "no error"


def mismatch(what: str) -> str:
    rank = dist.get_rank()
    model = language_model("mixtral", layers=1, experts=4 + 4 * (what == "model" and rank))
    if what == "dtype" and rank:
        model = model.float()
    if what == "plug-in":
        moefx.register_all_to_all("mine", Gathered if rank else Logged)
    options = moefx.Options(
        all_to_all="mine" if what == "plug-in" else "direct", degree=2 + (what == "degree" and rank),
        capacity=64 + rank if what == "capacity" else None,
        policy="auto" if what == "profile" else "fifo", profile=_profile_file(1.0 + rank) if what == "profile" else None,
    )  # fmt: skip
    text = message(lambda: moefx.optimize(model, (batch(rank),), options, mesh=dist.group.WORLD))
    assert not any(rewritten(module) for module in model.modules()), "the model is as it was"
    model = moefx.optimize(model, None, options, mesh=dist.group.WORLD)
    assert message(lambda: model(batch(rank))) == text, "the same at the first call"
    assert not any(rewritten(module) for module in model.modules())
    return text


MISMATCHES = [
    ("degree", "options"), ("capacity", "options"), ("plug-in", "plug-ins"), ("profile", "profile"), ("model", "blocks"),
    ("dtype", "parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "named"), MISMATCHES)
def test_ranks_that_differ_are_told(what: str, named: str) -> None:
    for text in run_ranks(2, mismatch, what):
        assert f"ranks 0 and 1 differ in {named}" in text


FEW = ["mixtral", "switch", "gpt_oss"]  # stacked; modules; interleaved with biases


class LastAxis(nn.Module):
    """Experts whose axis is the last one: no piece of dim 0 is whole experts."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(width, 24, experts) / 4)
        self.down = nn.Parameter(torch.randn(24, width, experts) / 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        w, ids = self.router(tokens).softmax(-1).topk(2, -1)
        y = torch.zeros_like(tokens)
        for expert in range(self.up.shape[2]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            hidden = torch.relu(tokens[token] @ self.up[..., expert])
            y = y.index_add(0, token, hidden @ self.down[..., expert] * w[token, slot, None])
        return y.view_as(x)


def stays_whole() -> tuple[list[tuple[str, ...]], list[str], dict[str, float], float]:
    """Notes of the blocks, the parameters that were spread, errors against one process, and of gradients that are synced."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Embedding(VOCAB, WIDTH), LastAxis(WIDTH), BLOCKS["mixtral"](WIDTH)).double()
    model, ids = copy.deepcopy(original), batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)
    notes = [found.notes for found in moefx.explain(model).found]
    spread = [name for name, _ in expert_parameters(model)]
    errors = differences(original, model, batch(dist.get_rank() + 7, 12))
    sync_gradients(model, dist.group.WORLD)
    mean = original[1].up.grad.clone()  # of this rank's tokens
    dist.all_reduce(mean)
    return notes, spread, errors, relative(model[1].up.grad, mean / dist.get_world_size())


def test_experts_that_cannot_be_spread_stay_whole() -> None:
    results = run_ranks(2, stays_whole)
    for notes, spread, _, synced in results:
        assert [any("every rank keeps all experts: leaf" in note for note in of) for of in notes] == [True, False]
        assert spread and all(name.startswith("2.") for name in spread)
        assert synced < EXACT
    assert_exact([errors for _, _, errors, _ in results])


@pytest.mark.parametrize(("name", "experts"), [("mixtral", 5), ("switch", 3), ("gpt_oss", 3)])
def test_ranks_without_experts(name: str, experts: int) -> None:
    """Three experts on four ranks, and five, of which the last rank gets none."""
    for results in run_ranks(4, grid, name, [case(2), case(2, 64, 3)], {"experts": experts}):
        assert_exact(results)


class OneScale(nn.Module):
    """Top-1 experts, modules of their own, that share a scale between their products; the router is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3, bias=False).requires_grad_(False)
        self.experts = nn.ModuleList(nn.ModuleList([nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)]) for _ in range(3))
        self.scale = nn.Parameter(torch.rand(24))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for e, (up, down) in enumerate(self.experts):
            if (mine := chosen == e).any():
                y[mine] = down(up(x[mine]).relu() * self.scale) * weight[mine, None]
        return y


def one_scale() -> dict[str, float]:
    """Inputs without gradients: a rank without experts takes part in backward all the same."""
    torch.manual_seed(0)
    original = OneScale().double()
    model = copy.deepcopy(original)
    x = torch.randn(11 + dist.get_rank(), WIDTH, dtype=torch.float64)
    moefx.optimize(model, (x,), moefx.Options(policy="fifo", degree=2), mesh=dist.group.WORLD)
    assert len(moefx.explain(model).found) == 1, moefx.explain(model)
    for m in (original, model):
        m(x).square().sum().backward()
    sync_gradients(model, dist.group.WORLD)
    errors = {}
    for name, p in original.named_parameters():
        if p.requires_grad:
            total = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(total)
            mine = dict(model.named_parameters()).get(name)
            if mine is not None:
                errors[name] = relative(mine.grad * dist.get_world_size(), total)  # type: ignore[operator]
    return errors


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_parameter_that_all_experts_share(ranks: int) -> None:
    """On ranks with two experts, with one and with none."""
    results = run_ranks(ranks, one_scale)
    assert all("scale" in errors for errors in results)
    assert_exact(results)


def restored_without_experts(name: str) -> tuple[str, bool]:
    """The model is whole again, and the gradients of `sync_gradients` are there for parameters that are cut to nothing."""
    original = language_model(name, layers=1, experts=3)
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(policy="fifo", degree=1), mesh=dist.group.WORLD)
    gradients(model, ids)
    sync_gradients(model, dist.group.WORLD)
    (found,) = moefx.explain(model).found
    moefx.restore(model)
    state = original.state_dict()
    return found.notes[-1], all(torch.equal(value, state[n]) for n, value in model.state_dict().items())


@pytest.mark.parametrize("name", FEW)
def test_a_rank_without_experts_restores(name: str) -> None:
    notes, equal = zip(*run_ranks(4, restored_without_experts, name))
    assert all(equal)
    assert notes[2] == "experts 2 to 2 of 3 on rank 2 of 4" and notes[3] == "none of 3 experts on rank 3 of 4"


def restored() -> float:
    original = language_model("switch")
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in original.parameters())
    block, forward = next((m, f) for m in model.modules() if (f := rewritten(m)))
    variant = next(iter(forward.variants.values()))
    setting = next(s for s in variant.settings if s.root == "" and type(s.value) in (int, float))  # type: ignore[union-attr]
    setattr(block, setting.name, setting.value + 1)
    with pytest.raises(InputError, match=rf"moefx.restore\(model\) first \(self.{setting.name} is"):
        model(ids)
    setattr(block, setting.name, setting.value)
    moefx.restore(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values()))
    return relative(model(ids), original(ids))


def test_restore_brings_the_experts_back() -> None:
    assert run_ranks(2, restored) == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------ checkpoints


def hugging_face() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=6, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(config)  # its grouped products have no float64


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "hugging_face": hugging_face,  # stacked experts
    "switch": lambda: language_model("switch"),  # experts that are modules
}


def spread(model: nn.Module) -> nn.Module:
    """Optimised over all ranks there are."""
    ids = batch(dist.get_rank())
    example = {"input_ids": ids} if hasattr(model, "config") else (ids,)
    return moefx.optimize(model, example, moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)


def save(kind: str, folder: str) -> None:
    import torch.distributed.checkpoint as checkpoint

    model = spread(BUILDERS[kind]())
    with torch.no_grad():
        for _, p in expert_parameters(model):
            p.mul_(1.5)  # something that only training can have done
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)


def load(kind: str, folder: str) -> dict[str, Tensor]:
    """All parameters after loading into a model spread over these ranks, whose own values are others."""
    import torch.distributed.checkpoint as checkpoint

    model = spread(BUILDERS[kind]())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    state = {"model": model.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    moefx.restore(model)
    return dict(model.state_dict())


def trained(kind: str) -> dict[str, Tensor]:
    model = BUILDERS[kind]()
    ids = batch(0)
    moefx.optimize(model, {"input_ids": ids} if hasattr(model, "config") else (ids,))
    experts = {
        (f"{name}." if name else "") + n
        for name, module in model.named_modules()
        if (forward := rewritten(module))
        for v in forward.variants.values()
        for leaf in v.region.leaves  # type: ignore[union-attr]
        for n in leaf.params
    }
    return {n: p * 1.5 if n in experts else p for n, p in BUILDERS[kind]().state_dict().items()}


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_checkpoints_load_at_other_numbers_of_ranks(kind: str, tmp_path: Any) -> None:
    """Saved by 4 ranks, of which one has no experts; loaded by 2 and by 1, and by a model that nobody optimised."""
    import torch.distributed.checkpoint as checkpoint

    run_ranks(4, save, kind, str(tmp_path))
    expected = trained(kind)
    for ranks in (2, 1):
        for state in run_ranks(ranks, load, kind, str(tmp_path)):
            assert list(state) == list(expected)
            assert all(torch.equal(state[name], value) for name, value in expected.items())
    plain = BUILDERS[kind]()
    state = {"model": {n: torch.zeros_like(p) for n, p in plain.state_dict().items()}}
    checkpoint.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    plain.load_state_dict(state["model"])
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in expected.items())


# ------------------------------------------------------------------------------------------------ plug-ins


class Negated:
    """A toy codec: the bytes of the negated numbers."""

    def encode(self, rows: Tensor) -> Tensor:
        return (-rows).contiguous().view(torch.uint8)

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        return -wire.view(dtype)

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return d_model * dtype.itemsize

    def error_bound(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(rows.shape[0], dtype=torch.float64)


class Gathered:
    """A toy all-to-all: everybody gets everything and keeps what is theirs."""

    calls = 0

    def __init__(self, group: Any, topology: Any) -> None:
        self.group = group

    def start(self, send: Tensor, sent_rows: Any, received_rows: Any, all_rows: Any = None) -> Any:
        Gathered.calls += 1
        everything: list[Any] = [None] * self.group.size()
        dist.all_gather_object(everything, send.split(list(sent_rows)), group=self.group)
        self.rows = torch.cat([pieces[self.group.rank()] for pieces in everything])
        return _Arrived(self.rows)


class _Arrived:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def wait(self) -> Tensor:
        return self.rows


def last_chunk_first(graph: Any) -> Any:
    """A toy policy: chunks in reverse order, as far as dependencies allow."""
    from moefx.ir import Schedule

    lanes: dict[str, list[str]] = {}
    todo = sorted(graph.tasks, key=lambda t: -t.chunk)
    done: set[str] = set()
    while todo:
        task = next(t for t in todo if done.issuperset(t.deps))
        todo.remove(task)
        done.add(task.name)
        lanes.setdefault(task.resource, []).append(task.name)
    return Schedule(graph.phase, graph.degree, tuple((lane, tuple(names)) for lane, names in lanes.items()))


def from_outside() -> dict[str, float]:
    moefx.register_codec("negated", Negated())
    moefx.register_all_to_all("gathered", Gathered)
    moefx.register_policy("last_chunk_first", last_chunk_first)
    options = moefx.Options(
        degree=3, policy="last_chunk_first", all_to_all="gathered", codec="negated", backward_codec="negated",
        profile=_profile_file(),
    )  # fmt: skip
    original = language_model("mixtral", experts=4)
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), options, mesh=dist.group.WORLD)
    (first, *_) = moefx.explain(model).found
    assert "compute: encode_2 C1_2" in first.schedule
    assert "rt.encode(" in first.source
    before = Gathered.calls
    errors = differences(original, model, ids)
    assert Gathered.calls == before + 2 * 2 * 2 * 3  # layers, phases, exchanges, chunks
    return errors


def _profile_file(launch_ms: float = 1.0) -> str:
    """A profile of made-up costs; each rank writes its own copy."""
    import tempfile
    from pathlib import Path

    from moefx.profile import from_links

    profile = from_links("a machine", launch_ms, 10.0, 0.1, 0.1, 5.0, 50.0, 2)
    path = Path(tempfile.mkdtemp()) / f"profile_{dist.get_rank()}.json"
    return str(profile.save(path))


def test_plug_ins_from_outside() -> None:
    """A codec, an all-to-all and a schedule policy that the package does not know."""
    assert_exact(run_ranks(2, from_outside))


@pytest.mark.parametrize("all_to_all", ["hierarchical", "pipe"])
def test_all_to_alls(all_to_all: str) -> None:
    for results in run_ranks(4, on_two_nodes, all_to_all):
        assert_exact(results)


def on_two_nodes(all_to_all: str) -> list[dict[str, float]]:
    """Counts of rows are exchanged once, by the plan: no algorithm asks for them again."""
    Hierarchical._counts = None  # type: ignore[assignment,method-assign]
    cases = [case(2, all_to_all=all_to_all), case(2, 64, 3, all_to_all=all_to_all)]
    return grid("mixtral", cases, {"experts": 8})


# ------------------------------------------------------------------------------------------------ faults


def with_a_dead_rank(phase: str) -> str:
    model = language_model("mixtral", layers=2, experts=6)
    ids = batch(0)
    moefx.optimize(model, (ids,), moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)
    y = model(ids)
    if phase == "forward" and dist.get_rank() == 1:
        os._exit(1)
    if phase == "forward":
        return message(lambda: model(ids))
    if dist.get_rank() == 1:
        time.sleep(1000)  # stalls
    return message(lambda: y.sum().backward())


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_lost_rank_is_named(phase: str) -> None:
    """Dead in forward, stalled in backward: the others say which layer, task, chunk and peer, in time."""
    texts = run_ranks(3, with_a_dead_rank, phase, group_timeout_s=8.0, lost=[1])
    for rank in (0, 2):
        layer = "layers.0.block" if phase == "forward" else "layers.1.block"
        assert layer in texts[rank]
        assert f"{phase}, task " in texts[rank]
        assert "rank 1" in texts[rank]


# ------------------------------------------------------------------------------------------------ beside other wrappers


def data_parallel(kind: str) -> dict[str, float]:
    """Gradients under DistributedDataParallel against those of `sync_gradients`."""
    ids = batch(dist.get_rank())
    options = moefx.Options(degree=2, policy="fifo")
    models = [moefx.optimize(language_model(kind), (ids,), options, mesh=dist.group.WORLD) for _ in range(2)]
    wrapped = nn.parallel.DistributedDataParallel(models[0])
    gradients(wrapped, ids)
    gradients(models[1], ids)
    sync_gradients(models[1], dist.group.WORLD)
    experts = {name for name, _ in expert_parameters(models[0])}
    assert experts
    errors = {}
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters()):
        if a.grad is None:
            assert b.grad is None or not b.grad.any()
            continue
        mine, other = (g.to_local() if isinstance(g, DTensor) else g for g in (a.grad, b.grad))
        errors[name] = relative(mine / (dist.get_world_size() if name in experts else 1), other)
    return errors


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_distributed_data_parallel(kind: str) -> None:
    assert_exact(run_ranks(2, data_parallel, kind))


def fully_sharded(kind: str) -> dict[str, float]:
    """FSDP2 around a model with experts on ranks: the experts are its ignored parameters."""
    from torch.distributed.fsdp import fully_shard

    ids = batch(dist.get_rank())
    options = moefx.Options(degree=2, policy="fifo")
    models = [moefx.optimize(language_model(kind), (ids,), options, mesh=dist.group.WORLD) for _ in range(2)]
    experts = dict(expert_parameters(models[0]))
    fully_shard(models[0], ignored_params=set(experts.values()))
    y, _ = gradients(models[0], ids)
    z, _ = gradients(models[1], ids)
    sync_gradients(models[1], dist.group.WORLD)
    errors = {"logits": relative(y, z)}
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters()):
        if a.grad is None:
            continue
        if name in experts:
            mine, other = (g.to_local() if isinstance(g, DTensor) else g for g in (a.grad, b.grad))
            errors[name] = relative(mine / dist.get_world_size(), other)
        else:
            errors[name] = relative(a.grad.full_tensor(), b.grad)
    return errors


@pytest.mark.parametrize("kind", ["mixtral", "switch"])
def test_fsdp(kind: str) -> None:
    assert_exact(run_ranks(2, fully_sharded, kind))


# ------------------------------------------------------------------------------------------------ on a GPU


@contextlib.contextmanager
def nothing_read(checked: bool) -> Iterator[None]:
    """With a capacity the host never waits for the device: torch raises where it does."""
    torch.cuda.set_sync_debug_mode("error" if checked else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_a_gpu(options: dict[str, Any]) -> dict[str, float]:
    """NCCL with itself: lanes are streams, kernels are Triton's; against the plan of one rank, under random delays."""
    torch.cuda.set_device(0)
    # After a layer with a codec some tokens choose other experts, so the errors of a second one say nothing.
    layers = 1 if "codec" in options else 2
    original = language_model("mixtral", layers, d_model=64, hidden=128).float().cuda()
    model = copy.deepcopy(original)
    ids = batch(0, 301).cuda()
    moefx.optimize(original, (ids,), moefx.Options(degree=1))
    moefx.optimize(model, (ids,), moefx.Options(policy="fifo", **options), mesh=dist.group.WORLD)
    rng = random.Random(0)

    def delay(lane: str) -> None:
        torch.cuda._sleep(rng.randrange(200_000))

    worst: dict[str, float] = {}
    for _ in range(6):
        for module in model.modules():
            forward = rewritten(module)
            for variant in forward.variants.values() if forward else ():
                variant.compiled.delays = delay  # type: ignore[union-attr]
        with nothing_read("capacity" in options):
            y, mine = gradients(model, ids)
        z, reference = gradients(original, ids)
        errors = {"logits": relative(y, z)}
        for name, g in reference.items():
            if g is not None:
                other = mine[name]
                errors[name] = relative(other.to_local() if isinstance(other, DTensor) else other, g)  # type: ignore[union-attr,arg-type]
        worst = {what: max(worst.get(what, 0.0), error) for what, error in errors.items()}
    return worst


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("codec", "capacity"), [("none", None), ("int8", None), ("none", 301)])
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (3, 3), (3, 2)])
def test_streams(forward: int, backward: int, codec: str, capacity: int | None) -> None:
    options: dict[str, Any] = {"degree": forward, "backward_degree": backward}
    options |= {"capacity": capacity} if capacity else {}
    options |= {"codec": codec, "backward_codec": codec} if codec != "none" else {}
    (errors,) = run_ranks(1, on_a_gpu, options, backend="nccl", timeout_s=180)
    assert max(errors.values()) < (1e-4 if codec == "none" else 0.05), errors


# ------------------------------------------------------------------------------------------------ as a script


def run_grid() -> bool:
    """The whole grid; prints how many cases are right."""
    right = total = 0
    cases = all_cases()
    for ranks in (1, 2, 3, 4):
        for name in MODELS:
            by_rank = run_ranks(ranks, grid, name, cases, {"experts": 8}, timeout_s=1800)
            worst = [max(max(results[i].values()) for results in by_rank) for i in range(len(cases))]
            good = sum(error <= EXACT for error in worst)
            right, total = right + good, total + len(worst)
            print(f"P={ranks} {name}: {good} of {len(worst)} right, largest error {max(worst):.0e}", flush=True)
    print(f"{right} of {total} right")
    return right == total


def run_delays(runs: int = 1000) -> bool:
    """Runs of a model under random delays; prints how many differ."""
    different = delays = 0
    for options in DELAYED:
        outcomes = run_ranks(2, delayed, runs // len(DELAYED), options, timeout_s=1800)
        different += sum(d for d, _ in outcomes)
        delays += sum(n for _, n in outcomes)
    print(f"{runs} runs of 2 layers, forward and backward, on 2 ranks, {delays} delays: {different} differ")
    return different == 0


if __name__ == "__main__":
    import sys

    chosen = [part for name, part in (("grid", run_grid), ("delays", run_delays)) if name in (sys.argv[1:] or [name])]
    outcomes = [part() for part in chosen]  # all parts run
    sys.exit(not all(outcomes))
