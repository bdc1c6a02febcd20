"""What each pointwise aten op means in a Triton kernel, and its gradient: one table, `RULES`.

All values are fp32 blocks; truth values are int1 blocks. NaN behaves as in torch: bounds let it through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------------ functions of kernels


@triton.jit
def tanh(x):
    """tanh without cancellation: a series near 0, else 1 - 2 / (exp(2|x|) + 1) with the sign of x."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0: a series near 0."""
    return tl.where(x < 0.01, x * (1.0 - x * (0.5 - x * (1.0 / 3 - x * 0.25))), tl.log(1.0 + x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def at_least(x, low):
    """max(x, low); NaN stays NaN, as in torch."""
    return tl.where(x < low, low, x)


@triton.jit
def at_most(x, high):
    """min(x, high); NaN stays NaN, as in torch."""
    return tl.where(x > high, high, x)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def normal_pdf(x):
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def gelu_tanh(x):
    return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def gelu_tanh_grad(x):
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)


# What generated modules import from here.
FUNCTIONS = ("at_least", "at_most", "gelu_tanh", "gelu_tanh_grad", "normal_cdf", "normal_pdf", "softplus", "tanh")

# ------------------------------------------------------------------------------------------------ derivative table


@dataclass(frozen=True)
class Formula:
    """value: an expression. partials[n]: gradient of value argument n, {g} the gradient of the value, {y} the value.

    A partial is None where no gradient flows. mask: the value is a truth value.
    """

    value: str
    partials: tuple[str | None, ...] = ()
    mask: bool = False


Rule = Callable[..., Formula]


def literal(x: Any) -> str:
    """A number as source; what is beyond fp32 becomes infinite."""
    x = float(x)
    if math.isnan(x) or abs(x) > torch.finfo(torch.float32).max:
        return f'float("{x if math.isnan(x) else math.copysign(math.inf, x)}")'
    return repr(x) if x >= 0 else f"({x!r})"


def _unary(value: str, partial: str | None, mask: bool = False) -> Rule:
    def rule(x: str) -> Formula:
        return Formula(value.replace("{x}", x), (partial and partial.replace("{x}", x),), mask)

    return rule


def _binary(value: str, partial_a: str | None, partial_b: str | None, mask: bool = False) -> Rule:
    def put(text: str, a: str, b: str) -> str:
        return text.replace("{a}", a).replace("{b}", b)

    def rule(a: str, b: str) -> Formula:
        return Formula(put(value, a, b), tuple(p and put(p, a, b) for p in (partial_a, partial_b)), mask)

    return rule


def _add(a: str, b: str, alpha: str = "1.0") -> Formula:
    if alpha == "1.0":
        return Formula(f"{a} + {b}", ("{g}", "{g}"))
    return Formula(f"{a} + {alpha} * {b}", ("{g}", f"{alpha} * {{g}}"))


def _sub(a: str, b: str, alpha: str = "1.0") -> Formula:
    if alpha == "1.0":
        return Formula(f"{a} - {b}", ("{g}", "-{g}"))
    return Formula(f"{a} - {alpha} * {b}", ("{g}", f"-{alpha} * {{g}}"))


def _rsub(a: str, b: str, alpha: str = "1.0") -> Formula:
    turned = _sub(b, a, alpha)
    return Formula(turned.value, (turned.partials[1], turned.partials[0]))


def _gelu(x: str, approximate: str = "none") -> Formula:
    if approximate == "tanh":
        return Formula(f"gelu_tanh({x})", (f"{{g}} * gelu_tanh_grad({x})",))
    return Formula(f"{x} * normal_cdf({x})", (f"{{g}} * (normal_cdf({x}) + {x} * normal_pdf({x}))",))


def _clamp(x: str, low: str | None = None, high: str | None = None) -> Formula:
    """The gradient flows where low <= x <= high; the upper bound wins when low > high."""
    value, inside = x, []
    if low is not None:
        value = f"at_least({value}, {low})"
        inside.append(f"({x} >= {low})")
    if high is not None:
        value = f"at_most({value}, {high})"
        inside.append(f"({x} <= {high})")
    return Formula(value, (f"tl.where({' & '.join(inside)}, {{g}}, 0.0)" if inside else "{g}",))


def _hardtanh(x: str, low: str = "(-1.0)", high: str = "1.0") -> Formula:
    """Like clamp, but without gradient at the bounds themselves."""
    return Formula(_clamp(x, low, high).value, (f"tl.where(({x} > {low}) & ({x} < {high}), {{g}}, 0.0)",))


def _leaky_relu(x: str, slope: str = "0.01") -> Formula:
    return Formula(f"tl.where({x} > 0, {x}, {x} * {slope})", (f"tl.where({x} > 0, {{g}}, {{g}} * {slope})",))


def _elu(x: str, alpha: str = "1.0", scale: str = "1.0", input_scale: str = "1.0") -> Formula:
    value = f"{scale} * tl.where({x} > 0, {x}, {alpha} * (tl.exp({x} * {input_scale}) - 1.0))"
    slope = f"tl.where({x} > 0, 1.0, {alpha} * {input_scale} * tl.exp({x} * {input_scale}))"
    return Formula(value, (f"{{g}} * {scale} * {slope}",))


def _softplus(x: str, beta: str = "1.0", threshold: str = "20.0") -> Formula:
    value = f"tl.where({x} * {beta} > {threshold}, {x}, softplus({x} * {beta}) / {beta})"
    return Formula(value, (f"tl.where({x} * {beta} > {threshold}, {{g}}, {{g}} * tl.sigmoid({x} * {beta}))",))


def _pow(x: str, exponent: str) -> Formula:
    n = float(exponent.strip("()"))
    if n == 0:
        return Formula(f"{x} * 0.0 + 1.0", (None,))
    if n < 0:
        turned = _pow(x, repr(-n)).value
        return Formula(f"1.0 / ({turned})", (f"{{g}} * {literal(n)} * {{y}} / {x}",))
    if n == 0.5:
        return Formula(f"tl.sqrt({x})", ("{g} * 0.5 / {y}",))
    if n.is_integer() and n <= 8:
        lower = " * ".join([x] * (int(n) - 1)) or "1.0"
        return Formula(" * ".join([x] * int(n)), (f"{{g}} * {literal(n)} * ({lower})",))
    slope = f"tl.exp({literal(n - 1)} * tl.log({x}))"
    return Formula(f"tl.exp({literal(n)} * tl.log({x}))", (f"{{g}} * {literal(n)} * {slope}",))


def _where(condition: str, a: str, b: str) -> Formula:
    return Formula(
        f"tl.where({condition}, {a}, {b})",
        (None, f"tl.where({condition}, {{g}}, 0.0)", f"tl.where({condition}, 0.0, {{g}})"),
    )


def _masked_fill(x: str, condition: str, value: str) -> Formula:
    return Formula(f"tl.where({condition}, {value}, {x})", (f"tl.where({condition}, 0.0, {{g}})", None))


def _extremum(sign: str) -> Rule:
    """maximum (">") or minimum ("<"): NaN wins; equal arguments share the gradient."""

    def rule(a: str, b: str) -> Formula:
        share = "tl.where({x} {sign} {o}, {{g}}, tl.where({x} == {o}, 0.5 * {{g}}, 0.0))"
        return Formula(
            f"tl.where(({a} {sign} {b}) | ({a} != {a}), {a}, {b})",
            (share.format(x=a, o=b, sign=sign), share.format(x=b, o=a, sign=sign)),
        )

    return rule


_IDENTITY = _unary("{x}", "{g}")

# Keyed by aten name without overload. {x} or {a}, {b}: the arguments; {y}: the value; {g}: its gradient.
RULES: dict[str, Rule] = {
    # activations
    "silu": _unary("{x} * tl.sigmoid({x})", "{g} * tl.sigmoid({x}) * (1.0 + {x} * (1.0 - tl.sigmoid({x})))"),
    "gelu": _gelu,
    "relu": _unary("at_least({x}, 0.0)", "tl.where({x} <= 0, 0.0, {g})"),
    "sigmoid": _unary("tl.sigmoid({x})", "{g} * {y} * (1.0 - {y})"),
    "tanh": _unary("tanh({x})", "{g} * (1.0 - {y} * {y})"),
    "hardtanh": _hardtanh,
    "relu6": lambda x: _hardtanh(x, "0.0", "6.0"),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "log_sigmoid": _unary("-softplus(-{x})", "{g} * tl.sigmoid(-{x})"),
    "mish": _unary(
        "{x} * tanh(softplus({x}))",
        "{g} * (tanh(softplus({x})) + {x} * tl.sigmoid({x}) * (1.0 - tanh(softplus({x})) * tanh(softplus({x}))))",
    ),
    # arithmetic
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _binary("{a} * {b}", "{g} * {b}", "{g} * {a}"),
    "div": _binary("{a} / {b}", "{g} / {b}", "-{g} * {a} / ({b} * {b})"),
    "neg": _unary("-{x}", "-{g}"),
    "reciprocal": _unary("1.0 / {x}", "-{g} * {y} * {y}"),
    "abs": _unary("tl.abs({x})", "tl.where({x} > 0, {g}, tl.where({x} < 0, -{g}, 0.0))"),
    "square": _unary("{x} * {x}", "2.0 * {g} * {x}"),
    "pow": _pow,
    "sqrt": _unary("tl.sqrt({x})", "{g} * 0.5 / {y}"),
    "rsqrt": _unary("tl.rsqrt({x})", "-0.5 * {g} * {y} * {y} * {y}"),
    "exp": _unary("tl.exp({x})", "{g} * {y}"),
    "log": _unary("tl.log({x})", "{g} / {x}"),
    "erf": _unary("tl.erf({x})", "{g} * 1.1283791670955126 * tl.exp(-{x} * {x})"),
    "sin": _unary("tl.sin({x})", "{g} * tl.cos({x})"),
    "cos": _unary("tl.cos({x})", "-{g} * tl.sin({x})"),
    # bounds and choices
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "maximum": _extremum(">"),
    "minimum": _extremum("<"),
    "where": _where,
    "masked_fill": _masked_fill,
    "lt": _binary("{a} < {b}", None, None, mask=True),
    "le": _binary("{a} <= {b}", None, None, mask=True),
    "gt": _binary("{a} > {b}", None, None, mask=True),
    "ge": _binary("{a} >= {b}", None, None, mask=True),
    "eq": _binary("{a} == {b}", None, None, mask=True),
    "ne": _binary("{a} != {b}", None, None, mask=True),
    "logical_and": _binary("{a} & {b}", None, None, mask=True),
    "logical_or": _binary("{a} | {b}", None, None, mask=True),
    "bitwise_and": _binary("{a} & {b}", None, None, mask=True),
    "bitwise_or": _binary("{a} | {b}", None, None, mask=True),
    "logical_not": _unary("{x} == 0", None, mask=True),
    "bitwise_not": _unary("{x} == 0", None, mask=True),
    # copies and casts
    "_to_copy": _IDENTITY,
    "clone": _IDENTITY,
    "alias": _IDENTITY,
    "detach": _unary("{x}", None),
}
# Arguments that are truth values; everywhere else a truth value counts as 0 or 1.
MASK_ARGUMENTS = {"where": {0}, "masked_fill": {1}}
MASK_ARGUMENTS |= dict.fromkeys(("logical_and", "logical_or", "bitwise_and", "bitwise_or"), {0, 1})
# Keyword arguments that say nothing about values.
STORAGE_KEYWORDS = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}
