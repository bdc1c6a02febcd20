"""sizes: a number computed from sizes carries the expression that computes it at any other size."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moefx import sizes

UNARY: dict[str, Callable[[Any], Any]] = {
    "neg": operator.neg,
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
CHOICES = {"min": builtins.min, "max": builtins.max}


@dataclass
class Tensor:
    """What an expression asks of a tensor."""

    shape: tuple[int, ...]

    def size(self, dim: int) -> int:
        return self.shape[dim]


def recorded(tensor: Tensor) -> tuple[list[Any], sizes.Log]:
    """The sizes of `tensor`, and the log that they write to."""
    log = sizes.Log([], [])
    leaves = [sizes.Expr(sizes.size_of, (tensor, dim)) for dim in range(len(tensor.shape))]
    return [sizes.make(n, leaf, log) for n, leaf in zip(tensor.shape, leaves)], log


def evaluate(value: Any) -> Any:
    """An expression at the sizes that its tensors have now."""
    if isinstance(value, (sizes.Size, sizes.Fraction)):
        return evaluate(value.expr)
    if isinstance(value, sizes.Expr):
        return value.fn(*(evaluate(a) for a in value.args))
    return value


def run(program: Any, leaves: list[Any]) -> Any:
    """A nested (operator, operands ...) on the given leaves; {"size": i} is a leaf."""
    if isinstance(program, dict):
        return leaves[program["size"]]
    if not isinstance(program, tuple):
        return program
    name, *parts = program
    operands = [run(p, leaves) for p in parts]
    logs = [o.log for o in operands if isinstance(o, (sizes.Size, sizes.Fraction))]
    if logs:  # Python gives `1.5 * size` to float, who knows nothing of expressions
        operands = [sizes.make(o, sizes.Expr(float, (o,)), logs[0]) if type(o) is float else o for o in operands]
    if name in CHOICES and any(isinstance(o, (sizes.Size, sizes.Fraction)) for o in operands):
        return sizes.apply(CHOICES[name], *operands)  # what capture makes of min and max
    return {**UNARY, **BINARY, **CHOICES}[name](*operands)


leaf = st.builds(lambda i: {"size": i}, st.integers(0, 1))
number = st.integers(-9, 9) | st.sampled_from([0.5, 1.25, 2.0])
programs = st.recursive(
    leaf | number,
    lambda part: st.one_of(
        st.tuples(st.sampled_from(sorted(UNARY)), part),
        st.tuples(st.sampled_from(sorted([*BINARY, *CHOICES])), part, part),
    ),
    max_leaves=8,
)
shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@given(programs, shapes, shapes)
@settings(max_examples=400)
def test_expression_computes_the_value_at_any_size(program, first, second):
    tensor = Tensor(first)
    leaves, log = recorded(tensor)
    try:
        expected, elsewhere = run(program, list(first)), run(program, list(second))
    except (ZeroDivisionError, OverflowError):
        assume(False)
    value = run(program, leaves)
    assert value == expected
    assert evaluate(value) == expected
    tensor.shape = second
    assert evaluate(value) == elsewhere
    assert not log.truncations


@given(shapes, st.sampled_from(["eq", "ne", "lt", "le", "gt", "ge"]), st.integers(1, 300), st.booleans())
def test_a_comparison_is_a_guard(shape, name, bound, reflected):
    tensor = Tensor(shape)
    (rows, _), log = recorded(tensor)
    compare = getattr(operator, name)
    outcome = compare(bound, rows * 2) if reflected else compare(rows * 2, bound)
    assert outcome is (compare(bound, 2 * shape[0]) if reflected else compare(2 * shape[0], bound))
    ((guard, kept),) = log.guards
    assert kept is outcome and evaluate(guard) is outcome
    for other in (0, bound // 2, bound - bound // 2, 1000):  # the guard tells where the outcome would be another one
        tensor.shape = (other, 1)
        assert evaluate(guard) is (compare(bound, 2 * other) if reflected else compare(2 * other, bound))


def test_truth_is_a_guard():
    tensor = Tensor((4,))
    (rows,), log = recorded(tensor)
    assert "some" == ("some" if rows % 3 else "none")
    ((guard, outcome),) = log.guards
    assert outcome is True
    tensor.shape = (6,)
    assert evaluate(guard) is False


@pytest.mark.parametrize("cut", [int, math.trunc], ids=["int", "trunc"])
def test_cutting_a_fraction_is_logged(cut):
    tensor = Tensor((53,))
    (rows,), log = recorded(tensor)
    capacity = cut(rows * 1.25 / 8)
    assert capacity == 8 and type(capacity) is int
    ((expr, value),) = log.truncations
    assert value == 8 and evaluate(expr) == 8
    tensor.shape = (106,)
    assert evaluate(expr) == 16


def test_negative_fractions_are_cut_towards_zero():
    tensor = Tensor((3,))
    (rows,), log = recorded(tensor)
    assert int(-rows / 2) == -1
    assert evaluate(log.truncations[0][0]) == -1


def test_powers_and_sums():
    tensor = Tensor((3, 5))
    (a, b), _ = recorded(tensor)
    values = [a**2, 2**a, sum([a, b]), math.prod([a, b, 2])]
    assert [evaluate(v) for v in values] == [9, 8, 8, 30]
    tensor.shape = (4, 6)
    assert [evaluate(v) for v in values] == [16, 16, 10, 48]


def test_sizes_are_ints_where_python_wants_ints():
    (rows,), _ = recorded(Tensor((3,)))
    assert ["a", "b", "c", "d"][rows] == "d" and list(range(rows)) == [0, 1, 2] and "x" * rows == "xxx"
    assert {3: "found"}[rows] == "found" and hash(rows) == hash(3) and isinstance(rows, int)


def test_plain_takes_the_expression_off():
    (rows,), _ = recorded(Tensor((3,)))
    assert type(sizes.plain(rows)) is int and sizes.plain(rows) == 3
    assert type(sizes.plain(rows / 2)) is float and sizes.plain(rows / 2) == 1.5
    assert sizes.plain("other") == "other"


def test_what_a_size_does_not_know_stays_pythons_affair():
    (rows,), _ = recorded(Tensor((3,)))
    assert rows != "3"
    with pytest.raises(TypeError):
        rows + "3"


def test_a_plain_float_on_the_left_loses_the_expression():
    """Python's rule, which no subclass of int can change: capture has to see such products coming."""
    (rows,), _ = recorded(Tensor((3,)))
    assert type(1.5 * rows) is float and type(rows * 1.5) is sizes.Fraction


def test_expressions_print():
    (rows,), _ = recorded(Tensor((3,)))
    assert str((rows // 2 + 1).expr) == "add(floordiv(size_of(Tensor(shape=(3,)), 0), 2), 1)"
