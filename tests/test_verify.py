"""verify: a rewritten block that is wrong somewhere is refuted, and the refutation names the case."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefx.errors import Decline
from moefx.probe import Example, probe_copy
from moefx.trace import precision
from moefx.verify import (
    TOLERANCE,
    Case,
    Outcome,
    adversarial_cases,
    compare,
    relative_error,
    run_once,
    verify,
)

D, E, K = 8, 4, 2
EXAMPLE = Example((torch.randn(2, 29, D, generator=torch.Generator().manual_seed(0)),), {})


class Skip(Exception):
    pass


class Block(nn.Module):
    """Top-2 of four linear experts, at most `capacity` tokens each."""

    def __init__(self, factor: float = 0.75) -> None:
        super().__init__()
        self.factor = factor
        self.router = nn.Linear(D, E)
        self.experts = nn.Parameter(torch.randn(E, D, D))

    def capacity(self, tokens: int) -> int:
        return math.ceil(self.factor * K * tokens / E)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        gates = self.gates(tokens)
        return torch.einsum("te,td,edf->tf", gates, tokens, self.experts).view_as(x)

    def gates(self, tokens: Tensor) -> Tensor:
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        gates = torch.zeros(len(tokens), E, dtype=tokens.dtype).scatter(1, chosen, weights)
        taken = (gates > 0).cumsum(0) <= self.capacity(len(tokens))
        return gates * taken


Forward = Callable[[Any, Tensor], Tensor]


def right(self: Block, x: Tensor) -> Tensor:
    tokens = x.reshape(-1, D)
    gates = self.gates(tokens)
    return sum(gates[:, e, None] * (tokens @ self.experts[e]) for e in range(E)).view_as(x)


def judge(forward: Forward, **more: Any) -> dict[str, float]:
    block = probe_copy(Block(more.get("factor", 0.75)))
    run = lambda a, k: forward(block, *a, **k)  # noqa: E731
    return verify(block, run, more.get("example", EXAMPLE), E, torch.float64, more.get("skip", Skip))


def test_a_right_block_passes():
    errors = judge(right)
    assert 0 <= errors["forward"] < 1e-12 and 0 <= errors["gradient"] < 1e-12


def test_a_wrong_output_is_refuted_on_the_first_case():
    with pytest.raises(Decline, match=r"^on 2x23 tokens random output 0 differs by 1.0e-01 \(allowed 1e-09\)"):
        judge(lambda self, x: right(self, x) * 1.1)


def test_a_wrong_gradient_of_a_parameter_is_refuted():
    def detached(self: Block, x: Tensor) -> Tensor:
        y = right(self, x)
        gates = self.gates(x.reshape(-1, D)).detach()
        return y.detach() + (
            y * 0 + torch.einsum("te,td,edf->tf", gates, x.reshape(-1, D), self.experts).view_as(x) - y.detach()
        )

    with pytest.raises(Decline, match="on 2x23 tokens random the gradient of router.weight differs by"):
        judge(detached)


def test_a_wrong_gradient_of_an_input_is_refuted():
    with pytest.raises(Decline, match="on 2x23 tokens random the gradient of input 0 differs by"):
        judge(lambda self, x: right(self, x) + (x - x.detach()))


def test_a_missing_gradient_is_refuted():
    with pytest.raises(Decline, match="the gradient of experts differs"):
        judge(lambda self, x: right(self, x.detach()).detach() + 0 * right(self, x).sum())


def test_a_capacity_that_does_not_grow_is_refuted():
    """The capacity of the example's 58 tokens, as if it were a constant."""

    def constant(self: Block, x: Tensor) -> Tensor:
        self.capacity = lambda _tokens: math.ceil(0.75 * K * 58 / E)  # type: ignore[method-assign]
        y = right(self, x)
        del self.capacity
        return y

    with pytest.raises(Decline, match="tokens .* output 0 differs"):
        judge(constant)


def test_a_capacity_that_is_forgotten_is_refuted():
    def forgotten(self: Block, x: Tensor) -> Tensor:
        self.capacity = lambda tokens: tokens  # type: ignore[method-assign]
        y = right(self, x)
        del self.capacity
        return y

    with pytest.raises(Decline, match="tokens .* output 0 differs"):
        judge(forgotten)


def test_a_capacity_wrong_by_one_shows_when_all_tokens_want_the_same():
    def off_by_one(self: Block, x: Tensor) -> Tensor:
        self.capacity = lambda tokens: Block.capacity(self, tokens) + 1  # type: ignore[method-assign]
        y = right(self, x)
        del self.capacity
        return y

    with pytest.raises(Decline, match="on 2x23 tokens alike output 0 differs"):
        judge(off_by_one, factor=1.75)


def test_nan_of_an_idle_expert_is_refuted():
    """0/0 where no token came: harmless while every expert has some."""

    def averaging(self: Block, x: Tensor) -> Tensor:
        count = (self.gates(x.reshape(-1, D)) > 0).sum(0).to(x.dtype)
        return right(self, x) * (count / count).mean()

    with pytest.raises(Decline, match="on 2x23 tokens alike output 0 differs by inf"):
        judge(averaging)


def test_failing_on_no_tokens_is_refuted():
    with pytest.raises(Decline, match="the rewritten block fails on 0x1 tokens random: IndexError"):
        judge(lambda self, x: right(self, x) + 0 * x.reshape(-1, D)[0])


def test_a_number_of_outputs_or_a_shape_or_a_dtype_that_differs():
    with pytest.raises(Decline, match="returns 1 values, the rewritten one 2"):
        judge(lambda self, x: (right(self, x), x))
    with pytest.raises(
        Decline, match=r"output 0 is torch.float64\[2, 23, 8\] in the original and torch.float64\[46, 8\]"
    ):
        judge(lambda self, x: right(self, x).reshape(-1, D))
    with pytest.raises(Decline, match="and torch.float32"):
        judge(lambda self, x: right(self, x).float())


def test_cases_that_the_rewriting_declines_itself_are_left_out():
    def picky(self: Block, x: Tensor) -> Tensor:
        if x.shape[0] == 5:
            raise Skip
        return right(self, x)

    assert judge(picky)["forward"] < 1e-12
    with pytest.raises(Decline, match="Skip"):
        judge(picky, skip=KeyError)


def test_too_few_cases_are_no_proof():
    def never(self: Block, x: Tensor) -> Tensor:
        raise Skip

    with pytest.raises(Decline, match="too few cases"):
        judge(never)


def test_the_module_is_left_as_it_was():
    block = probe_copy(Block())
    before = torch.get_rng_state()
    verify(block, lambda a, k: right(block, *a), EXAMPLE, E, torch.float64, Skip)
    assert not any(p.requires_grad or p.grad is not None for p in block.parameters())
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ parts


def test_cases_cover_one_token_none_and_skew():
    cases = adversarial_cases(EXAMPLE)
    counts = {math.prod(c.token_shape) for c in cases}
    assert {0, 1} <= counts and max(counts) > 200
    assert {c.tokens for c in cases} == {"random", "alike", "near", "one"}
    assert str(cases[0]) == "2x23 tokens random"
    assert adversarial_cases(Example((3,), {})) == [Case((), "random", True)]


def test_run_once_draws_the_same_random_numbers():
    layer = nn.Dropout(0.5)
    x = torch.ones(100)
    first, again = (run_once(lambda a, k: layer(*a), layer, (x,), {}, True) for _ in range(2))
    assert torch.equal(first.outputs[0], again.outputs[0]) and 0 < int((first.outputs[0] == 0).sum()) < 100


def test_run_once_lets_a_block_write_to_its_input():
    layer = nn.ReLU(inplace=True)
    x = torch.randn(9)
    before = x.clone()
    outcome = run_once(lambda a, k: layer(*a), layer, (x,), {}, True)
    assert torch.equal(x, before) and outcome.gradients["input 0"] is not None


@pytest.mark.parametrize(
    ("a", "b", "floor", "expected"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.0, 0.25),
        ([1.0, -4.0], [1.0, -3.0], 4.0, 0.125),
        ([0.0, 0.0], [0.0, 0.0], 0.0, 0.0),
        ([], [], 0.0, 0.0),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0, 0.0),
        ([math.nan, 1.0], [math.nan, 2.0], 0.0, 1.0),
        ([1.0, 1.0], [math.nan, 1.0], 0.0, math.inf),
        ([math.inf, 1.0], [1.0, 1.0], 0.0, math.inf),
        ([math.nan], [math.nan], 0.0, 0.0),
        ([1, 2], [1, 2], 0.0, 0.0),
        ([1, 2], [1, 3], 0.0, math.inf),
    ],
)
def test_relative_error(a, b, floor, expected):
    dtype = torch.int64 if any(isinstance(v, int) for v in a) else torch.float64
    assert relative_error(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), floor) == pytest.approx(expected)


@pytest.mark.parametrize("pair", [(math.inf, -math.inf), (math.inf, math.nan)])
def test_infinities_that_differ_are_an_error(pair):
    a, b = (torch.tensor([v, 1.0]) for v in pair)
    assert relative_error(a, b) == math.inf


def test_compare_counts_an_absent_gradient_as_zero():
    y, zero, one = torch.ones(2), torch.zeros(2), torch.ones(2)
    outcome = lambda g: Outcome([y], {"p": g})  # noqa: E731
    assert compare(outcome(None), outcome(zero), 1e-9, "here")["gradient"] == 0
    assert compare(outcome(zero), outcome(None), 1e-9, "here")["gradient"] == 0
    with pytest.raises(Decline, match="on here the gradient of p differs"):
        compare(outcome(one), outcome(None), 1e-9, "here")
    with pytest.raises(Decline, match="on here the gradient of p differs"):
        compare(outcome(None), outcome(one), 1e-9, "here")


def test_small_gradients_are_measured_against_the_largest():
    a, b = torch.tensor([1e-12]), torch.tensor([2e-12])
    large = torch.tensor([1.0])
    errors = compare(Outcome([], {"p": a, "q": large}), Outcome([], {"p": b, "q": large}), 1e-9, "here")
    assert errors["gradient"] < 1e-8


def test_compare_constants():
    assert compare(Outcome([3, None, "a"], {}), Outcome([3, None, "a"], {}), 1e-9, "here") == {
        "forward": 0,
        "gradient": 0,
    }
    with pytest.raises(Decline, match="on here output 0 is 3 in the original and 4 rewritten"):
        compare(Outcome([3], {}), Outcome([4], {}), 1e-9, "here")


def test_precision_is_the_least_precise():
    tensors = [torch.zeros(1, dtype=d) for d in (torch.float64, torch.bfloat16, torch.float32, torch.int8)]
    assert precision(tensors) == torch.bfloat16 and precision(tensors[:1]) == torch.float64
    assert precision([]) == torch.float64 and list(TOLERANCE.values()) == sorted(TOLERANCE.values())


class Fixed(nn.Module):
    """Reads no tensor: the number of rows is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, rows: int) -> Tensor:
        return self.w.expand(rows, 3).reshape(6, -1)  # an even number of rows only


def test_a_block_without_token_sizes_has_one_case():
    block = Fixed()
    seen: list[int] = []

    def run(args: Any, kwargs: Any) -> Tensor:
        seen.append(*args)
        return block.w.repeat(args[0]).view(6, -1)

    verify(block, run, Example((4,), {}), 1, torch.float64, Skip)
    assert seen == [4]
    with pytest.raises(Decline, match="differs"):
        verify(block, lambda a, k: 2 * run(a, k), Example((4,), {}), 1, torch.float64, Skip)


def test_a_block_that_could_not_be_compared_at_all_is_declined():
    with pytest.raises(Decline):
        verify(Fixed(), lambda a, k: None, Example((3,), {}), 1, torch.float64, Skip)
