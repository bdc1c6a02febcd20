"""probe: private copies, inputs in the example's pattern, and a user's module that is left as it was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefx.errors import Decline, InputError
from moefx.probe import (
    SHAPES,
    Emulated,
    Example,
    bind,
    draw,
    guess_experts,
    own_cores,
    plain_einsum,
    probe_copy,
    random_like,
    shapes_for,
    state_kept,
)

D, E = 8, 4


class Block(nn.Module):
    """A buffer of each kind, plain attributes, a list, a submodule with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.experts = nn.Parameter(torch.ones(E, D, D))
        self.register_buffer("load", torch.zeros(E))
        self.register_buffer("table", torch.arange(6))
        self.register_buffer("varied", torch.linspace(0, 1, 5))
        self.calls = 0
        self.losses: list[float] = []
        self.seen: dict[str, int] = {}

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        self.load += 1
        self.calls += 1
        self.losses.append(1.0)
        self.seen["rows"] = len(x)
        self.last = torch.rand(()) * scale
        return self.inner(x)


def test_random_values_differ_between_experts_however_large():
    large = random_like(torch.empty(3, 700, 1000), torch.float32, torch.Generator().manual_seed(0))
    assert not torch.equal(large[0], large[1]) and not torch.equal(large[1], large[2])
    assert float(large.std()) == pytest.approx(1000**-0.5, rel=0.02)


def test_vectors_lie_around_one():
    values = random_like(torch.empty(500), torch.float64, torch.Generator().manual_seed(0))
    assert values.dtype == torch.float64 and 0.5 < float(values.min()) and float(values.max()) < 1.5


def test_probe_copy_is_float64_random_and_private():
    block = Block()
    twin: Any = probe_copy(block)
    assert twin.experts.dtype == torch.float64 and not torch.equal(twin.experts[0], twin.experts[1])
    assert bool((block.experts == 1).all()) and block.experts.dtype == torch.float32
    twin.losses.append(2.0)
    twin.load += 1
    assert block.losses == [] and float(block.load.sum()) == 0


def test_probe_copy_keeps_integer_buffers_and_perturbs_constant_ones():
    block = Block()
    twin: Any = probe_copy(block)
    assert torch.equal(twin.table, block.table) and twin.table.dtype == torch.int64
    assert torch.equal(twin.varied, block.varied.double())
    assert len(twin.load.unique()) == E


def test_probe_copy_is_the_same_for_the_same_seed():
    block = Block()
    assert torch.equal(probe_copy(block, 3).experts, probe_copy(block, 3).experts)
    assert not torch.equal(probe_copy(block, 3).experts, probe_copy(block, 4).experts)


def test_probe_copy_keeps_ties():
    block = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    block[1].weight = block[0].weight
    twin = probe_copy(block)
    assert twin[1].weight is twin[0].weight


def test_probe_copy_has_no_hooks_and_its_own_forward():
    block = Block()
    block.inner.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    block.inner.register_forward_pre_hook(lambda *_: pytest.fail("the hook ran"))
    block.forward = lambda *_: pytest.fail("the instance's forward ran")  # type: ignore[method-assign]
    twin = probe_copy(block)
    twin(torch.zeros(2, D, dtype=torch.float64))
    assert "forward" in vars(block) and len(block.inner._forward_hooks) == 1


def test_probe_copy_declines_what_cannot_be_copied():
    block = nn.Linear(D, D)
    block.file = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(Decline, match="cannot be copied for analysis: TypeError"):
        probe_copy(block)


def test_probe_copy_declines_complex_parameters():
    with pytest.raises(Decline, match="complex"):
        probe_copy(nn.Linear(D, D, dtype=torch.complex64))


# ------------------------------------------------------------------------------------------------ state


@pytest.mark.parametrize("fails", [False, True])
def test_state_is_kept(fails):
    block = Block()
    block.losses.append(0.5)
    block.seen["rows"] = 7
    losses, seen, load = block.losses, block.seen, block.load
    before = torch.get_rng_state()
    try:
        with state_kept(block):
            block(torch.zeros(3, D))
            block.losses = []
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert block.calls == 0 and not hasattr(block, "last")
    assert block.losses is losses and losses == [0.5]
    assert block.seen is seen and seen == {"rows": 7}
    assert block.load is load and float(load.sum()) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_state_of_submodules_is_kept():
    block = nn.Sequential(nn.BatchNorm1d(D), Block())
    with state_kept(block):
        block.train()(torch.randn(5, D))
        assert block[1].calls == 1 and int(block[0].num_batches_tracked) == 1
    assert block[1].calls == 0 and int(block[0].num_batches_tracked) == 0 and bool((block[0].running_mean == 0).all())


def test_a_buffer_that_was_replaced_is_put_back():
    block = Block()
    load = block.load
    with state_kept(block):
        block.load = torch.ones(E)
    assert block.load is load


# ------------------------------------------------------------------------------------------------ calls


def test_bind_normalises_a_call():
    x, mask = torch.zeros(2, D), torch.ones(2, 1)
    assert bind(Block(), (), {"mask": mask, "x": x}) == ((x, mask), {"scale": 1.0})
    assert bind(Block(), (x,), {"scale": 2.0}) == ((x, None), {"scale": 2.0})


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [((), {}, "missing a required argument: 'x'"), ((1, 2, 3), {}, "too many positional"), ((1,), {"y": 2}, "'y'")],
)
def test_bind_names_module_and_signature(args, kwargs, why):
    with pytest.raises(InputError, match=r"Block\.forward\(self, x: .*does not take these inputs") as caught:
        bind(Block(), args, kwargs)
    assert why in str(caught.value)


def test_example_is_a_copy():
    x = torch.zeros(2, D, requires_grad=True)
    options = {"list": [1]}
    example = Example.of((x, options), {})
    options["list"].append(2)
    with torch.no_grad():
        x += 1
    kept, kept_options = example.args
    assert float(kept.sum()) == 0 and not kept.requires_grad and kept_options == {"list": [1]}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((torch.zeros(2, 5, D),), (2, 5)),
        ((torch.zeros(5, D),), (5,)),
        ((torch.zeros(5, 5, D),), (5,)),
        ((torch.zeros(2, 5, D), torch.zeros(2, 5, dtype=torch.int64)), (2, 5)),
        ((torch.zeros(2, 5, dtype=torch.int64),), (2, 5)),
        ((torch.zeros(D), 3), ()),
    ],
)
def test_token_sizes(args, expected):
    assert Example(args, {}).token_sizes == expected


def test_shapes_to_draw_have_the_examples_rank_and_one_of_a_single_token():
    for rank, shapes in SHAPES.items():
        assert all(len(s) == rank for s in shapes)
    assert (1, 1) in shapes_for(Example((torch.zeros(2, 5, D),), {}))
    square = Example((torch.zeros(3, 3, D),), {})  # one size stands for two dimensions: of 7 x 7 tokens, not 53 x 53
    assert square.repeats == 2
    assert shapes_for(square) == ((7,), (6,), (1,), (15,))
    assert Example((torch.zeros(3, 5, D), torch.zeros(3, 3)), {}).repeats == 1
    with pytest.raises(Decline, match="4 different leading sizes"):
        shapes_for(Example((torch.zeros(2, 3, 4, 5, D),), {}))


@pytest.mark.parametrize(
    ("module", "experts"),
    [
        (Block(), E),
        (nn.ModuleList(nn.Linear(D, 3) for _ in range(6)), 6),
        (nn.Linear(D, 3), 1),
        (nn.Module(), 1),
    ],
)
def test_guess_experts(module, experts):
    assert guess_experts(module) == experts


# ------------------------------------------------------------------------------------------------ draws


def test_draw_resizes_tokens_only():
    x, condition = torch.randn(2, 5, D), torch.randn(2, 5, 3)
    (a, b, flag), kwargs = draw(Example((x, condition, "flag"), {"eps": 0.5}), (3, 7), 0, E)
    assert a.shape == (3, 7, D) and b.shape == (3, 7, 3) and flag == "flag" and kwargs == {"eps": 0.5}
    assert a.dtype == torch.float64 and len(a.reshape(-1, D).unique(dim=0)) == 21


@pytest.mark.parametrize(("shape", "sizes", "token_shape", "drawn"), [
    ((2, 6, 5, 7), (2, 5, 7), (3, 4, 1), (3, 6, 4, 1)),
    ((2, 5, 5, 5), (2, 5), (3, 4), (3, 5, 4, 4)),  # as many features as rows and columns
])  # fmt: skip
def test_images_keep_their_channels(shape, sizes, token_shape, drawn):
    example = replace(Example.of((torch.randn(shape),), {}), features=1)
    assert example.token_sizes == sizes
    (image,), _ = draw(example, token_shape, 0, 4)
    assert image.shape == drawn
    (alike,), _ = draw(example, token_shape, 0, 4, "alike")
    assert alike.shape == drawn and torch.equal(alike, alike[:1, :, :1, :1].expand_as(alike))
    assert alike[0, :, 0, 0].unique().numel() > 1


def test_draw_is_the_same_for_the_same_seed():
    example = Example((torch.randn(5, D),), {})
    first, again, other = (draw(example, (7,), seed, E)[0][0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_draw_leaves_the_example_alone():
    example = Example((torch.zeros(5, D), torch.ones(5, dtype=torch.int64)), {})
    draw(example, (5,), 0, E)[0][1].add_(1)
    assert float(example.args[0].sum()) == 0 and int(example.args[1].sum()) == 5


def test_tokens_alike_near_and_none():
    example = Example((torch.randn(2, 5, D),), {})
    alike = draw(example, (3, 7), 0, E, "alike")[0][0].reshape(-1, D)
    near = draw(example, (3, 7), 0, E, "near")[0][0].reshape(-1, D)
    assert len(alike.unique(dim=0)) == 1 and len(near.unique(dim=0)) == 21
    assert 0 < float((near - near.mean(0)).abs().max()) < 0.1
    assert draw(example, (0, 7), 0, E)[0][0].shape == (0, 7, D)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_an_example_of_one_value_is_still_data(constant):
    """`torch.ones(2, 5, D)` as an example input is no mask: nothing else could be the tokens."""
    drawn = draw(Example((torch.full((2, 5, D), constant),), {}), (3, 7), 0, E)[0][0]
    assert len(drawn.reshape(-1, D).unique(dim=0)) == 21


def routed_example(top_k: int) -> Example:
    """x [T, D], ids [T, K], weights [T, K]: routing is an input of the block."""
    ids = torch.stack([torch.randperm(E)[:top_k] for _ in range(9)])
    return Example((torch.randn(9, D), ids, torch.full((9, top_k), 0.5)), {})


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_drawn_ids_are_distinct_experts_and_weights_positive(top_k):
    x, ids, weights = draw(routed_example(top_k), (40,), 0, E)[0]
    assert x.shape == (40, D) and ids.shape == weights.shape == (40, top_k) and ids.dtype == torch.int64
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert set(ids.flatten().tolist()) == set(range(E))
    assert bool((weights > 0).all())


def test_all_tokens_to_the_same_experts():
    ids = draw(routed_example(2), (40,), 0, E, "one")[0][1]
    assert len(ids.unique(dim=0)) == 1


def test_drawn_ids_stay_in_the_range_of_the_example():
    tokens = torch.randint(0, 5, (2, 9))
    drawn = draw(Example((torch.randn(2, 9, D), tokens), {}), (4, 30), 0, E)[0][1]
    assert drawn.shape == (4, 30) and set(drawn.flatten().tolist()) <= set(tokens.flatten().tolist())
    assert len(drawn.unique()) > 1


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_stay_masks(kind):
    mask = torch.rand(2, 9) > 0.3
    drawn = draw(Example((torch.randn(2, 9, D), mask.to(kind)), {}), (4, 30), 0, E)[0][1]
    assert drawn.shape == (4, 30) and set(drawn.flatten().tolist()) == {0, 1}


def test_infinite_masks_stay_infinite():
    mask = torch.where(torch.rand(2, 9) > 0.3, 0.0, float("-inf"))
    drawn = draw(Example((torch.randn(2, 9, D), mask), {}), (4, 30), 0, E)[0][1]
    assert set(drawn.flatten().tolist()) == {0.0, float("-inf")}


def test_masks_over_experts_reach_every_expert():
    one_hot = torch.zeros(9, E, dtype=torch.bool)
    one_hot[:, 0] = True
    drawn = draw(Example((torch.randn(9, D), one_hot), {}), (60,), 0, E)[0][1]
    assert drawn.shape == (60, E) and bool((drawn.sum(-1) == 1).all()) and bool(drawn.any(0).all())


def test_what_only_a_gpu_has_runs_on_probes():
    """Code counts with integers on a GPU, and torch's grouped_mm has no float64."""
    ids = torch.tensor([0, 3, 3, 1])
    with Emulated():
        counts = torch.histc(ids.int(), bins=4, min=0, max=3)
        product = torch.nn.functional.grouped_mm(
            torch.ones(3, 16, dtype=torch.float64), torch.ones(2, 16, 8, dtype=torch.float64), offs=torch.tensor([1, 3]).int()
        )
    assert counts.tolist() == [1, 1, 0, 2]
    assert counts.dtype == torch.int32
    assert torch.equal(product, torch.full((3, 8), 16.0, dtype=torch.float64))


def test_einsum_is_followed_in_the_order_of_its_operands(monkeypatch):
    """opt_einsum would sum over the slots of a token and the features of its experts at once."""
    import opt_einsum

    asked = []
    contract_path = opt_einsum.contract_path
    monkeypatch.setattr(opt_einsum, "contract_path", lambda *a, **k: (asked.append(1), contract_path(*a, **k))[1])
    operands = torch.randn(3, 2, 4), torch.randn(3, 2, 4, 5), torch.randn(3, 2)
    einsum = lambda: torch.einsum("tkh,tkhd,tk->td", *operands)  # noqa: E731
    y = einsum()
    assert len(asked) == 1
    with plain_einsum():
        torch.testing.assert_close(einsum(), y)
        with plain_einsum():
            einsum()
        einsum()
    assert len(asked) == 1
    einsum()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("ranks", "threads", "inside"), [(None, 1, 1), (None, 6, 6), (None, 8, 6), ("2", 1, 3), ("3", 1, 2), ("16", 1, 1), ("2", 4, 3)]
)
def test_analysis_leaves_cores_to_others(ranks: str | None, threads: int, inside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 cores: where torchrun has set few threads, more than those; never more than the user wants."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(Decline), own_cores():
            assert torch.get_num_threads() == inside
            with own_cores():
                assert torch.get_num_threads() == inside
            raise Decline("whatever ends it")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
