"""Sizes that remember where they came from.

While a block is recorded, `x.shape[0]` is a `Size`: an int that carries its expression. Arithmetic on it builds larger
expressions, so that a recorded `x.view(b * s, d)` can be replayed at any token count. A comparison specialises the trace;
it is kept as a guard and checked again at every replay. `int()` of a fraction loses the expression (Python insists on a
plain int): such truncations are logged, so that a baked-in constant can be traced back to the one that explains it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Expr:
    """`fn(*args)`, where an argument is a number, another Expr, or (for fn `size_of`) a recorded Value and a dimension."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.fn.__name__}({', '.join(str(a) for a in self.args)})"


def size_of(tensor: Any, dim: int) -> int:
    """The leaf of every expression: size `dim` of a recorded tensor."""
    return int(tensor.size(dim))


@dataclass
class Log:
    """What sizes did to the Python code around them while recording."""

    guards: list[tuple[Expr, Any]]
    truncations: list[tuple[Expr, int]]


class Size(int):
    """An int that knows its expression."""

    expr: Expr
    log: Log


class Fraction(float):
    """A float computed from sizes."""

    expr: Expr
    log: Log


def make(value: Any, expr: Expr, log: Log) -> Any:
    """Wraps a number computed from sizes; anything else is returned as it is."""
    if isinstance(value, bool):
        log.guards.append((expr, value))
        return value
    if isinstance(value, (int, float)):
        wrapped: Any = Size(value) if isinstance(value, int) else Fraction(value)
        wrapped.expr, wrapped.log = expr, log
        return wrapped
    return value


def plain(value: Any) -> Any:
    """The bare number behind a Size or Fraction."""
    return int.__int__(value) if isinstance(value, Size) else float(value) if isinstance(value, Fraction) else value


def constant(value: float, log: Log) -> Fraction:
    """A float that keeps what is computed from it and a size: Python gives `1.5 * size` to float, which forgets."""
    return make(value, Expr(float, (value,)), log)


def _of_sizes(expr: Any) -> bool:
    """Whether any size is in it."""
    return isinstance(expr, Expr) and (expr.fn is size_of or any(_of_sizes(a) for a in expr.args))


def _expression(value: Any) -> Any:
    return value.expr if isinstance(value, (Size, Fraction)) else value


def _bare(value: Any) -> Any:
    if isinstance(value, Size):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, Fraction) else value


def apply(fn: Callable[..., Any], *operands: Any) -> Any:
    """fn(*operands) with its expression; at least one operand is a Size or Fraction."""
    log = next(o.log for o in operands if isinstance(o, (Size, Fraction)))
    value, expr = fn(*(_bare(o) for o in operands)), Expr(fn, tuple(_expression(o) for o in operands))
    return make(value, expr, log) if _of_sizes(expr) or type(value) is float else value


def _method(fn: Callable[..., Any], reflected: bool = False) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(o, (int, float)) for o in others):
            return NotImplemented
        operands = (*others, self) if reflected else (self, *others)
        return apply(fn, *operands)

    return method


def _truncate(self: Any) -> int:
    value = math.trunc(_bare(self))
    if _of_sizes(self.expr):
        expr = self.expr if isinstance(self, Size) else Expr(math.trunc, (self.expr,))
        self.log.truncations.append((expr, value))
    return value


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    for _kind in (Size, Fraction):
        setattr(_kind, f"__{_name}__", _method(getattr(operator, _name)))
        setattr(_kind, f"__r{_name}__", _method(getattr(operator, _name), reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    for _kind in (Size, Fraction):
        setattr(_kind, f"__{_name}__", _method(getattr(operator, _name)))
for _kind in (Size, Fraction):
    setattr(_kind, "__neg__", _method(operator.neg))
    setattr(_kind, "__abs__", _method(operator.abs))
    setattr(_kind, "__bool__", _method(operator.truth))
    setattr(_kind, "__ceil__", _method(math.ceil))
    setattr(_kind, "__floor__", _method(math.floor))
    setattr(_kind, "__hash__", lambda self: hash(_bare(self)))
    setattr(_kind, "__int__", _truncate)
    setattr(_kind, "__trunc__", _truncate)
