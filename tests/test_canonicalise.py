"""canonicalise: the block as a graph in which the routed part is one node, and the rest is as the user wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moefx.passes.canonicalise import GuardFailed, Rewrite, canonicalise, placeholder_names
from test_find import STYLES, D, E, H, K, ListMoe, best, best_of_style, evaluate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import moefx
from moefx.errors import Decline
from moefx.routing import Hypothesis, region_inputs


class Routed:
    """The `moe` of a canonical block, computed by definition; it counts its calls."""

    def __init__(self, hypothesis: Hypothesis, block: nn.Module) -> None:
        self.h, self.parameters, self.calls = hypothesis, dict(block.named_parameters()), 0

    def routed(self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None) -> Tensor:
        self.calls += 1
        region = self.h.region
        tokens = x.reshape(-1, region.d_model)
        labels, weights = region_inputs(self.h.routing, region.experts, len(tokens), ids, w, keep)
        weights = torch.ones(labels.shape, dtype=x.dtype) if weights is None else weights
        y = torch.zeros(len(tokens), region.d_out, dtype=x.dtype)
        for e in range(region.experts):
            y = y + (weights * (labels == e)).sum(-1, keepdim=True) * evaluate(self.h, e, tokens, self.parameters)
        return y.reshape(*x.shape[:-1], region.d_out)


def rewrite(block: nn.Module) -> tuple[Hypothesis, Rewrite, nn.Module]:
    """The first hypothesis about a block as a graph, and the probe copy that it was found on."""
    hypothesis = best(block)
    return hypothesis, canonicalise(hypothesis, ("x",)), hypothesis.trace.module


def run(hypothesis: Hypothesis, made: Rewrite, block: nn.Module, x: Tensor) -> Any:
    moe = Routed(hypothesis, block)
    result = made.structure.put_together(made.forward(block, moe, x))
    assert moe.calls == 1
    return result


def tokens(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ the graph


@pytest.mark.parametrize("style", STYLES)
def test_source_of_the_canonical_block(style, golden):
    golden(f"canonicalise_{style}", canonicalise(best_of_style(style), ("x",)).source)


@pytest.mark.parametrize("shape", [(3, 17), (2, 5), (1, 1), (4, 40)], ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_the_canonical_block_computes_the_block(style, shape):
    hypothesis = best_of_style(style)
    made, block = canonicalise(hypothesis, ("x",)), hypothesis.trace.module
    x = tokens(*shape)
    torch.testing.assert_close(run(hypothesis, made, block, x), block(x))


class Extended(ListMoe):
    """A shared expert in a submodule, a normalisation before, and the router's logits returned."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Any:
        tokens = self.norm(x).reshape(-1, D)
        logits = self.router(tokens)
        routed = self.combine(tokens, logits.softmax(-1))
        return {"y": (routed + self.shared(tokens)).view_as(x), "logits": logits, "experts": E}


def test_what_is_outside_stays_a_module_call():
    hypothesis, made, block = rewrite(Extended())
    assert made.kept == ("norm", "router", "shared")
    assert set(made.swallowed) == {f"experts.{e}{tail}" for e in range(E) for tail in ("", ".0", ".1", ".2")}
    assert "self.shared(" in made.source and "experts" not in made.source and made.source.count("moe.routed(") == 1
    x = tokens(3, 5)
    actual, expected = run(hypothesis, made, block, x), block(x)
    assert actual["experts"] == E
    torch.testing.assert_close(actual, expected)


def test_hooks_on_kept_modules_fire():
    hypothesis, made, block = rewrite(Extended())
    seen: list[str] = []
    for name in ("router", "shared", "shared.1", "experts.0"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    run(hypothesis, made, block, tokens(3, 5))
    assert seen == ["router", "shared.1", "shared"]


def test_gradients_are_those_of_the_block():
    hypothesis, made, block = rewrite(Extended())
    x = tokens(3, 5).requires_grad_()
    wanted = [x, block.router.weight.requires_grad_(), block.norm.weight.requires_grad_()]
    expected = torch.autograd.grad(block(x)["y"].square().sum(), wanted)
    actual = torch.autograd.grad(run(hypothesis, made, block, x)["y"].square().sum(), wanted)
    torch.testing.assert_close(actual, expected)


def test_dead_work_of_the_experts_is_gone():
    """What counted the experts' tokens, and nothing else, is not in the graph."""

    class Counting(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            counts = torch.bincount(probs.topk(K, -1).indices.flatten(), minlength=E)
            assert counts.sum() == len(x) * K
            return super().combine(x, probs)

    _, made, _ = rewrite(Counting())
    assert "bincount" not in made.source and "index_add" not in made.source and "where" not in made.source


def test_a_sum_over_one_slot_is_part_of_the_region():
    class TopOne(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            weights, ids = probs.topk(1, -1)
            y = torch.zeros(len(x), D, dtype=x.dtype)
            for e, expert in enumerate(self.experts):
                token = torch.where(ids[:, 0] == e)[0]
                y[token] = expert(x[token]) * weights[token]
            return y.view(len(x), 1, D).sum(1)

    _, made, _ = rewrite(TopOne())
    assert "sum" not in made.source


def test_regions_without_gradient_stay_so():
    class NoGradChoice(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            with torch.no_grad():
                shifted = probs * 3
            return super().combine(x, probs) + shifted.sum()

    hypothesis, made, block = rewrite(NoGradChoice())
    assert "no_grad_mul" in made.source
    x = tokens(3, 5).requires_grad_()
    torch.testing.assert_close(
        torch.autograd.grad(run(hypothesis, made, block, x).sum(), x), torch.autograd.grad(block(x).sum(), x)
    )


def test_buffers_keep_updating():
    class Counting(ListMoe):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("load", torch.zeros(E, dtype=torch.float64))

        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            with torch.no_grad():
                self.load += probs.sum(0)
            return super().combine(x, probs)

    hypothesis, made, block = rewrite(Counting())
    x = tokens(3, 5)
    block.load.zero_()
    run(hypothesis, made, block, x)
    torch.testing.assert_close(block.load, block.router(x).softmax(-1).sum((0, 1)))


def test_writes_before_and_after_the_region_are_kept_in_order():
    class Writing(ListMoe):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, D) * 1
            tokens[:, 0] = 1.0
            y = self.combine(tokens, self.router(tokens).softmax(-1))
            y += tokens
            y[y.abs() < 0.1] = 0
            return y.view_as(x)

    hypothesis, made, block = rewrite(Writing())
    x = tokens(3, 5)
    torch.testing.assert_close(run(hypothesis, made, block, x), block(x))


def test_capacities_grow_with_the_tokens():
    class Capacity(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            capacity = math.ceil(len(x) / 3)
            weights, ids = probs.topk(K, -1)
            chosen = F.one_hot(ids, E).sum(1)
            kept = (chosen.cumsum(0) <= capacity).gather(1, ids)
            y = torch.zeros_like(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where((ids == e) & kept)
                y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
            return y

    hypothesis, made, block = rewrite(Capacity())
    assert "ceil" in made.source
    for shape in ((3, 17), (2, 5), (9, 9), (1, 1)):
        torch.testing.assert_close(run(hypothesis, made, block, tokens(*shape)), block(tokens(*shape)))


def test_sizes_that_branch_are_guarded():
    class Branching(ListMoe):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 if x.shape[1] > 4 else super().forward(x)

    hypothesis, made, block = rewrite(Branching())
    assert made.guards == 1
    torch.testing.assert_close(run(hypothesis, made, block, tokens(3, 5)), block(tokens(3, 5)))
    with pytest.raises(GuardFailed):
        run(hypothesis, made, block, tokens(3, 4))


def test_truncated_sizes_become_expressions():
    class Truncating(ListMoe):
        def forward(self, x: Tensor) -> Tensor:
            half = int(x.shape[1] / 2)
            return super().forward(x) + x[:, half].unsqueeze(1)

    hypothesis = best(Truncating())
    block = hypothesis.trace.module
    x = tokens(2, 30)
    made = canonicalise(hypothesis, ("x",))
    torch.testing.assert_close(run(hypothesis, made, block, x), block(x))
    literal = canonicalise(hypothesis, ("x",), restore_truncated=False)
    assert "trunc" in made.source and "trunc" not in literal.source
    assert not torch.allclose(run(hypothesis, literal, block, x), block(x))


def test_the_dtype_of_the_model_is_not_baked_in():
    class Casting(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            return super().combine(x, probs) + torch.zeros(len(x), D, dtype=x.dtype)

    hypothesis, made, block = rewrite(Casting())
    assert "float64" not in made.source and "cpu" not in made.source
    assert run(hypothesis, made, block.float(), tokens(3, 5).float()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ reasons to decline


class Penalised(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.experts[0][0].weight.square().sum()


class Remembering(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return super().forward(x)


class CountingChild(ListMoe):
    """The side effect is in a module that the region swallows."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        self.experts[0].calls = 1
        return super().combine(x, probs)


class Looking(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.sum().item() > 1e9 else y * 2


class UsesGlobal(ListMoe):
    SCALE = torch.ones(D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * UsesGlobal.SCALE


class Wrapped:
    def __init__(self, y: Tensor) -> None:
        self.y = y


class ReturnsObject(ListMoe):
    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, Wrapped(y)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Penalised, r"still needs the experts' parameter experts\.0\.0\.weight"),
        (Remembering, r"changes self\.last: a Python side effect"),
        (CountingChild, r"changes self\.experts\.0\.calls: a Python side effect"),
        (Looking, r"Python reads values of the tokens \(item\) and may branch on them"),
        (UsesGlobal, r"a tensor that no torch function made"),
        (ReturnsObject, r"returns a Wrapped, whose tensors cannot be followed"),
    ],
)
def test_reasons_to_decline(block, reason):
    with pytest.raises(Decline, match=reason):
        rewrite(block())


def test_side_effects_that_repeat_are_noticed():
    """Setting the same number at every run is a side effect too, however often the analysis ran the block before."""

    class Measuring(ListMoe):
        def forward(self, x: Tensor) -> Tensor:
            self.rows = x.shape[0]
            return super().forward(x)

    block = moefx.optimize(Measuring(), (torch.randn(2, 29, D),))
    block(torch.randn(5, 7, D))
    assert block.rows == 5


def test_a_host_read_is_located():
    with pytest.raises(Decline) as caught:
        rewrite(Looking())
    assert caught.value.location == f"{__file__}:{Looking.forward.__code__.co_firstlineno + 2}"


def test_python_may_steer_the_experts():
    """`.tolist()` and `.any()` of the router's choice end with the experts that they steered."""

    class Steering(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            weights, ids = probs.topk(K, -1)
            y = torch.zeros_like(x)
            for e in ids.unique().tolist():
                mask = ids == e
                if mask.any():
                    token, slot = torch.where(mask)
                    y = y.index_add(0, token, self.experts[e](x[token]) * weights[token, slot, None])
            return y

    hypothesis, made, block = rewrite(Steering())
    assert "tolist" not in made.source
    torch.testing.assert_close(run(hypothesis, made, block, tokens(3, 5)), block(tokens(3, 5)))


def test_side_effects_of_kept_modules_are_kept():
    class Router(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    block = ListMoe()
    block.router = Router(D, E)
    hypothesis, made, twin = rewrite(block)
    before = twin.router.calls
    run(hypothesis, made, twin, tokens(3, 5))
    assert twin.router.calls == before + 1


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1,), {}, ("x",)),
        ((1, (2, 3)), {"flag": None}, ("x", "pair_0", "pair_1", "flag")),
        ((1, 2), {"options": {"a": 1, "b": 2}}, ("x", "pair", "options_0", "options_1")),
        ((1, None), {}, ("x", "pair")),
        ((1, ()), {}, ("x",)),
    ],
)
def test_placeholder_names(args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[str, ...]):
    names: Callable[..., tuple[str, ...]] = placeholder_names
    assert names(args, kwargs, ["x", "pair"]) == expected
    assert len(expected) == len(pytree.tree_leaves((args, kwargs)))
