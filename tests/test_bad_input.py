"""What moefx cannot or must not rewrite, and what it is asked wrongly: declined or refused, and the model as it was."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from moefx.models import TinyMoELM
from test_api import blocks_of, ids, picture, small_lm
from test_block import CLOSE, D, E, Expert, K, ListBlock, Router, assert_same, relative, run_experts, tokens
from torch import Tensor, nn

import moefx

# ------------------------------------------------------------------------------------------------ nothing to find


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return x


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("make", [Dense, Identity, lambda: nn.Linear(D, D), lambda: nn.LSTM(D, D)])
def test_no_moe(make: Callable[[], nn.Module]) -> None:
    model = make()
    before, expected = picture(model), model(tokens())
    assert moefx.optimize(model, (tokens(),)) is model
    report = moefx.explain(model)
    assert report.found == []
    assert "no MoE block was rewritten; the model is unchanged" in str(report)
    actual = model(tokens())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    moefx.restore(model)
    assert picture(model) == before


def test_no_moe_and_no_example() -> None:
    model = Dense()
    moefx.optimize(model)
    model(tokens())
    report = moefx.explain(model)
    assert not report.pending and report.found == []
    assert "unchanged" in str(report)


# ------------------------------------------------------------------------------------------------ wrong arguments


@pytest.mark.parametrize("model", [None, 3, "mixtral", Dense, torch.zeros(2), {}, lambda x: x], ids=lambda m: type(m).__name__)
def test_not_a_module(model: Any) -> None:
    kind = type(model).__name__
    for call in (moefx.optimize, moefx.explain):
        with pytest.raises(ValueError, match=rf"torch.nn.Module; got {kind}"):
            call(model, (tokens(),))
    with pytest.raises(moefx.MoefxError, match=kind):
        moefx.restore(model)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"degree": 0}, {"degree": -1}, {"degree": 1.5}, {"degree": "2"}, {"degree": True}, {"degree": None},
    {"kernels": "cuda"}, {"kernels": None}, {"seed": "x"}, {"seed": None},
    {"capacity": 0}, {"capacity": 1.5}, {"capacity": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_OPTIONS, ids=str)
def test_bad_options(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"Options\.{name}"):
        moefx.Options(**wrong)


@pytest.mark.parametrize("options", ["fast", {"degree": 2}, 3, moefx.Options], ids=str)
def test_options_of_another_type(options: Any) -> None:
    model = ListBlock()
    before = picture(model)
    for call in (moefx.optimize, moefx.explain):
        with pytest.raises(moefx.MoefxError, match="Options"):
            call(model, (tokens(),), options)
        with pytest.raises(moefx.MoefxError, match="Options"):
            call(model, None, options)
    assert picture(model) == before


@pytest.mark.parametrize("example", [ids(1, 3), 5, "text", {1, 2}], ids=lambda e: type(e).__name__)
def test_example_inputs_of_another_type(example: Any) -> None:
    """A bare tensor is the likely mistake: the message says what is expected."""
    model = small_lm()
    before = picture(model)
    with pytest.raises(ValueError, match=f"dict of keyword arguments; got {type(example).__name__}"):
        moefx.optimize(model, example)
    assert picture(model) == before


WRONG_EXAMPLES: list[tuple[Any, tuple[str, ...]]] = [
    ((), ("TinyMoELM.forward", "tokens: ", "missing")),
    ((ids(2, 3), ids(2, 3)), ("TinyMoELM.forward", "tokens: ")),
    ({"input_ids": ids(2, 3)}, ("TinyMoELM.forward", "tokens: ")),
    ((torch.randn(2, 3),), ("embedding", "Embedding.forward", "input: ")),
    ((torch.full((2, 3), 99),), ("embedding", "Embedding.forward", "IndexError")),
    (("text",), ("embedding", "Embedding.forward")),
    ((None,), ("embedding", "Embedding.forward")),
]


@pytest.mark.parametrize(("example", "words"), WRONG_EXAMPLES, ids=range(len(WRONG_EXAMPLES)))
@pytest.mark.parametrize("call", [moefx.optimize, moefx.explain], ids=["optimize", "explain"])
def test_wrong_example_inputs(call: Callable[..., Any], example: Any, words: tuple[str, ...]) -> None:
    """The error names the submodule that failed and its signature; the model stays as it was and can be used."""
    model = small_lm()
    before = picture(model)
    with pytest.raises(ValueError) as error:
        call(model, example)
    assert isinstance(error.value, moefx.MoefxError)
    for word in words:
        assert word in str(error.value), word
    assert picture(model) == before
    assert len(moefx.explain(moefx.optimize(model, (ids(2, 7),))).found) == 2


def test_wrong_example_inputs_deep_inside() -> None:
    """The failing submodule is the innermost one, by its full name."""
    model = TinyMoELM(lambda dim: ListBlock(), vocab=32, d_model=8, layers=2, heads=2)  # blocks of another width
    with pytest.raises(ValueError, match=r"layers\.0\.block\.router\.proj \(Linear\.forward\(self, input"):
        moefx.optimize(model, (ids(2, 3),))
    assert blocks_of(model) == []
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------ declined blocks


class Counts(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Keeps(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.numel())
        return super().forward(x)


class WritesToAnother(ListBlock):
    """Its log belongs to an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.log = types.SimpleNamespace(calls=0)

    def forward(self, x: Tensor) -> Tensor:
        self.log.calls += 1
        return super().forward(x)


CALLS: list[int] = []


class WritesToGlobal(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(x.numel())
        return super().forward(x)


class ExpertCounts(Expert):
    """The side effect is an expert's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return super().forward(x)


class CountingExperts(ListBlock):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(ExpertCounts() for _ in range(E))


def _effects(model: nn.Module) -> Any:
    return {
        Counts: lambda: model.calls,
        Keeps: lambda: list(model.seen),  # type: ignore[call-overload]
        WritesToAnother: lambda: model.log.calls,  # type: ignore[union-attr]
        WritesToGlobal: lambda: list(CALLS),
        CountingExperts: lambda: [expert.rows for expert in model.experts],  # type: ignore[union-attr]
    }[type(model)]()


@pytest.mark.parametrize("make", [Counts, Keeps, CountingExperts, WritesToAnother])
def test_python_side_effects(make: type[nn.Module]) -> None:
    """Every call has its effect, the search has none; the reason names the side effect."""
    torch.manual_seed(0)
    original = make()
    mine = copy.deepcopy(original)
    moefx.optimize(mine, (tokens(),))
    if make is WritesToAnother:  # the run on the example is the model's own, and objects are not put back
        mine.log.calls = original.log.calls  # type: ignore[union-attr]
    assert _effects(mine) == _effects(original), "the search left a trace"
    for seed in range(3):
        assert relative(mine(tokens(seed=seed)), original(tokens(seed=seed))) <= CLOSE
        assert _effects(mine) == _effects(original)
    (declined,) = moefx.explain(mine).declined
    assert "side effect" in str(declined)
    assert blocks_of(mine) == []


class WritesThroughAFunction(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        _remember(x)
        return super().forward(x)


def _remember(x: Tensor) -> None:
    CALLS.append(x.numel())


class RebindsGlobal(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS = [*CALLS, x.numel()]
        return super().forward(x)


class CountsOnItsClass(ListBlock):
    total = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).total += 1
        return super().forward(x)


@pytest.mark.parametrize("make", [WritesToGlobal, WritesThroughAFunction, RebindsGlobal])
def test_side_effects_on_globals(make: type[nn.Module]) -> None:
    """They would be lost when the block's Python no longer runs; the search leaves none."""
    torch.manual_seed(0)
    CALLS.clear()
    mine = moefx.optimize(make(), (tokens(1, 4),))
    (declined,) = moefx.explain(mine).declined
    assert "side effect" in str(declined)
    assert "CALLS" in str(declined)
    assert CALLS == [], "the run on the example, like the search, puts back what it did"
    mine(tokens(1, 5))
    mine(tokens(1, 6))
    assert CALLS == [5 * D, 6 * D]


def test_side_effects_on_the_class() -> None:
    mine = moefx.optimize(CountsOnItsClass(), (tokens(),))
    before = CountsOnItsClass.total
    mine(tokens(1, 5))
    assert CountsOnItsClass.total == before + 1
    (declined,) = moefx.explain(mine).declined
    assert "CountsOnItsClass.total" in str(declined)


class RouterWithLog(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        CALLS.append(x.shape[0])
        return super().forward(x)


class LoggedRouter(ListBlock):
    """The router is still called as a module: its effects are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.router = RouterWithLog()


def test_side_effects_of_a_kept_router_stay() -> None:
    mine = moefx.optimize(LoggedRouter(), (tokens(1, 4),))
    assert blocks_of(mine)
    CALLS.clear()
    mine(tokens(1, 5))
    assert CALLS == [5]


class InPlaceAdd(ListBlock):
    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


class InPlaceScale(ListBlock):
    """The change comes before the routing, through a view."""

    def forward(self, x: Tensor) -> Tensor:
        x.view(-1, D).mul_(0.5)
        return super().forward(x)


class InPlaceIndexAdd(ListBlock):
    """The residual stream is the buffer of the combine."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, D)
        weights, chosen = self.router(flat.clone())
        source = flat.clone()
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            flat.index_add_(0, token, expert(source[token]) * weights[token, slot, None])
        return x


@pytest.mark.parametrize("make", [InPlaceAdd, InPlaceScale, InPlaceIndexAdd])
def test_in_place_changes_of_the_input(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    original = make()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    assert blocks_of(mine) == []
    (declined,) = moefx.explain(mine).declined
    assert "in place" in str(declined) or "input" in str(declined), str(declined)
    a, b = tokens(4), tokens(4)
    with torch.no_grad():
        torch.testing.assert_close(mine(a), original(b))
    torch.testing.assert_close(a, b)
    assert not torch.equal(a, tokens(4))


class HalfTheSmallest(ListBlock):
    """A number that a probe in float64 gets, and that float32 has no room for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=torch.finfo(x.dtype).min / 2)


def test_a_number_of_the_probes_dtype() -> None:
    torch.manual_seed(0)
    model = HalfTheSmallest()
    expected = model(tokens())
    (declined,) = moefx.explain(moefx.optimize(model, (tokens(),))).declined
    assert "the rewritten block fails on its own weights (torch.float32, cpu): RuntimeError" in declined.reason
    torch.testing.assert_close(model(tokens()), expected, rtol=0, atol=0)


def test_kernels_that_cannot_be_made_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for another number of rows would fail in some later call, so that the run which follows says nothing of it."""

    def fails(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("moefx.block.Variant.precompile", fails)
    (declined,) = moefx.explain(moefx.optimize(ListBlock(), (tokens(),))).declined
    assert "its own weights (torch.float32, cpu): RuntimeError: no such instruction" in declined.reason


def test_the_example_is_not_changed() -> None:
    """Not even by a block that writes into its input: the user's tensor is the user's."""
    example = tokens()
    moefx.optimize(ListBlock(), (example,))
    assert torch.equal(example, tokens()) and not example.requires_grad and example.grad is None


class RowsOfOneExpert(ListBlock):
    """The shape of the result depends on the routing."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat)
        return run_experts(self.experts, flat, weights, chosen)[(chosen == 0).any(-1)]


class NonzeroRows(ListBlock):
    """A result beside the output has a shape that depends on the data."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, (y.sum(-1) > 0).nonzero()


class BranchesOnData(ListBlock):
    """Which code runs depends on the values of the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if bool(x.sum() > 0) else y


class LoadAsNumber(ListBlock):
    """A Python number that was computed from the routing."""

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat)
        load = float((chosen == 0).float().mean())
        return run_experts(self.experts, flat, weights, chosen).view_as(x), load


@pytest.mark.parametrize("make", [RowsOfOneExpert, NonzeroRows, BranchesOnData, LoadAsNumber])
@pytest.mark.parametrize("train", [False, True])
def test_results_that_depend_on_the_data(make: type[nn.Module], train: bool) -> None:
    """Declined or right, on inputs that take the other branch too."""
    torch.manual_seed(0)
    original = make().train(train)
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    for seed in range(4):
        for x in (tokens(2, 9, seed=seed), tokens(7, seed=seed), -tokens(2, 9, seed=seed)):
            torch.testing.assert_close(mine(x), original(x))


class ComplexWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ParameterList(torch.randn(D, D, dtype=torch.complex64) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat.real).softmax(-1).topk(K)
        out = torch.zeros_like(flat)
        for index, matrix in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out = out.index_add(0, token, (flat[token] @ matrix) * weights[token, slot, None])
        return out.view_as(x)


class ComplexInside(ListBlock):
    """Real outside; the experts work on a spectrum."""

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x.reshape(-1, D))
        weights, chosen = self.router(x.reshape(-1, D))
        out = torch.zeros_like(spectrum)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            rows = spectrum[token] @ expert.up.weight.to(spectrum.dtype)  # type: ignore[union-attr]
            out = out.index_add(0, token, rows * weights[token, slot, None])
        return torch.fft.ifft(out).real.view_as(x)


class RotatesBefore(ListBlock):
    """Complex numbers before the router only, as in rotary embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        turns = torch.polar(torch.ones(D // 2), torch.arange(D // 2.0))
        turned = torch.view_as_complex(x.reshape(-1, D // 2, 2)) * turns
        return super().forward(torch.view_as_real(turned).reshape(x.shape))


def test_complex_experts() -> None:
    torch.manual_seed(0)
    original = ComplexWeights()
    x = torch.complex(tokens(), tokens(seed=2))
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    assert blocks_of(mine) == []
    (declined,) = moefx.explain(mine).declined
    assert "complex" in declined.reason
    assert torch.equal(mine(x), original(x))


def test_complex_inside() -> None:
    torch.manual_seed(0)
    original = ComplexInside()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    (declined,) = moefx.explain(mine).declined
    assert "moefx itself failed" not in declined.reason, declined.reason
    assert blocks_of(mine) == []
    assert relative(mine(tokens()), original(tokens())) <= CLOSE


def test_complex_before_the_router() -> None:
    """Declined or right; the table of turns is float32, so a probe in float64 may not run."""
    torch.manual_seed(0)
    original = RotatesBefore()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    assert_same(original, mine, tokens())


class Fails(ListBlock):
    """Runs on the example's number of tokens only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != 33 * D:
            raise ValueError("33 tokens, please")
        return super().forward(x)


def test_a_block_that_fails_on_other_sizes() -> None:
    """It is declined for that, and its error stays its own."""
    torch.manual_seed(0)
    original = Fails()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    (declined,) = moefx.explain(mine).declined
    assert "token count" in str(declined) or "33 tokens, please" in str(declined)
    assert torch.equal(mine(tokens()), original(tokens()))
    with pytest.raises(ValueError, match="33 tokens, please"):
        mine(tokens(2))


def test_declined_blocks_stay_as_they_were() -> None:
    """A model with a good and a bad block: one is rewritten, the other untouched, both are reported."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = ListBlock(), Counts()

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(x + self.good(x))

    torch.manual_seed(0)
    original = Both()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    assert blocks_of(mine) == ["good"]
    report = moefx.explain(mine)
    assert "bad" in [block.name for block in report.declined]
    assert "forward" not in mine.bad.__dict__  # type: ignore[operator]
    assert_same(original, mine, tokens())
    assert mine.bad.calls == original.bad.calls  # type: ignore[union-attr]
