"""Closed forms of pipelines in first-in-first-out order, derived with sympy and tested equal to `moefx.simulate`.

One derivation gives them all. r equal chunks pass the stages 1 .. n; stage s takes t_s seconds a chunk on its resource. A
resource that serves several stages does all r chunks of one before the first chunk of the next. A path through such a
timeline moves from chunk to chunk within a stage, from stage to stage within a chunk, or from the last chunk of a stage to
the first chunk of the next stage on the same resource. The makespan is the longest path. Where on its way a path changes
the stage is free, its length is linear in these places, so the longest path changes at the first chunk or at the last:
a few dozen corners (`fifo_terms`) whatever r is.

    PipeMoE (INFOCOM 2023)   A1 E A2                 max(2 r a, 2 a + r e)                              always
    ScheMoE (EuroSys 2024)   C1 A1 (D1 E C2) A2 D2   the theorem's order: `fifo_terms` of these stages  always
    FSMoE (ASPLOS 2025)      A1 AG E RS A2           the maximum of four terms                          where t_ag = t_rs

With times t = alpha + beta*n/r every term is c0 + c1*r + c2/r with c >= 0: the makespan is convex in r.
Letters: r degree, a all-to-all, e experts, g gradient all-reduce, all seconds a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from moefx.errors import InputError

r = sympy.Symbol("r", positive=True, integer=True)
a, e, g, ag, rs = sympy.symbols("a e g ag rs", nonnegative=True)
alpha_a, beta_a, n_d, alpha_e, beta_e, n_e = sympy.symbols("alpha_a beta_a n_d alpha_e beta_e n_e", positive=True)


@dataclass(frozen=True)
class Stage:
    """One step of every chunk: `seconds` a chunk (a number or an expression) on `resource`.

    gap_s: other work of the resource after this stage's last chunk, before its next stage (slices of the gradients).
    """

    resource: str
    seconds: Any
    gap_s: Any = 0


def fifo_terms(stages: Sequence[Stage], degree: Any = r) -> list[Any]:
    """Terms whose maximum is the makespan of the stages in fifo order: the corners described at the head of this file."""
    if not stages:
        raise InputError("a pipeline has at least one stage")
    terms: dict[Any, None] = {}
    last = len(stages) - 1

    def walk(stage: int, at_end: bool, length: Any) -> None:
        """length: the path up to the end of the first chunk of `stage`, or of its last chunk (at_end)."""
        here = stages[stage]
        if not at_end:
            walk(stage, True, length + (degree - 1) * here.seconds)
        elif stage == last:
            terms[sympy.expand(length)] = None
        else:
            after = (s for s in range(stage + 1, last + 1) if stages[s].resource == here.resource)
            if (following := next(after, None)) is not None:
                walk(following, False, length + here.gap_s + stages[following].seconds)
        if stage < last:
            walk(stage + 1, at_end, length + stages[stage + 1].seconds)

    walk(0, False, stages[0].seconds)
    return list(terms)


def fifo_time(stages: Sequence[Stage], degree: int) -> float:
    """The makespan in seconds of stages with times in numbers: what `simulate` gives for this order, free of r's size."""
    if degree < 1 or not stages:
        raise InputError(f"a pipeline has at least one stage and one chunk; got {len(stages)} and {degree}")
    first = [-math.inf] * len(stages)  # the longest path to the end of each stage's first chunk, and of its last
    end = [-math.inf] * len(stages)
    first[0] = stages[0].seconds
    for s, stage in enumerate(stages):
        if s:
            first[s] = max(first[s], first[s - 1] + stage.seconds)
            end[s] = end[s - 1] + stage.seconds
        end[s] = max(end[s], first[s] + (degree - 1) * stage.seconds)
        following = next((t for t in range(s + 1, len(stages)) if stages[t].resource == stage.resource), None)
        if following is not None:
            first[following] = max(first[following], end[s] + stage.gap_s + stages[following].seconds)
    return float(end[-1])


def never_above(term: Any, bounds: Sequence[Any], orders: Sequence[dict[Any, Any]], degree: Any = r) -> bool:
    """A proof that term <= max(bounds) for every r >= 2 and all times >= 0.

    orders: substitutions that together cover all cases (for example e = a + d and a = e + d, d >= 0). In each of them
    one bound minus the term must be a polynomial with coefficients >= 0 in the times and in r - 2.
    """
    more = sympy.Symbol("more", nonnegative=True)
    return all(
        any(
            all(c >= 0 for c in sympy.Poly(difference, *difference.free_symbols).coeffs())
            if (difference := sympy.expand((bound - term).subs(order).subs(degree, 2 + more))).free_symbols
            else difference >= 0
            for bound in bounds
        )
        for order in orders
    )


# ------------------------------------------------------------------------------------------------ PipeMoE


def pipemoe_stages() -> list[Stage]:
    """A1 E A2: both all-to-alls on the link."""
    return [Stage("link", a), Stage("compute", e), Stage("link", a)]


def pipemoe_terms() -> list[Any]:
    """PipeMoE's T(r) as the two terms that remain: the link never idles, or the experts never idle.

    The others of `fifo_terms(pipemoe_stages())` are never above both (`never_above`; r = 1 by substitution).
    """
    return [2 * r * a, 2 * a + r * e]


def pipemoe_symbolic() -> Any:
    """T(r) = max(2 r alpha_a + 2 beta_a n_d, 2 alpha_a + 2 beta_a n_d / r + r alpha_e + beta_e n_e), in seconds."""
    chunk = {a: alpha_a + beta_a * n_d / r, e: alpha_e + beta_e * n_e / r}
    return sympy.Max(*(sympy.expand(term.subs(chunk)) for term in pipemoe_terms()))


def pipemoe_free_minimum() -> Any:
    """Where the second term of T(r) is least: sqrt(2 beta_a n_d / alpha_e). The first rises with r, so r* is not above."""
    x = sympy.Symbol("x", positive=True)
    second = 2 * alpha_a + 2 * beta_a * n_d / x + x * alpha_e + beta_e * n_e
    (minimum,) = sympy.solve(sympy.diff(second, x), x)
    return minimum


@dataclass(frozen=True)
class PipeMoE:
    """One layer under PipeMoE's model: alpha_s + beta_s * units of a whole all-to-all, and of a whole layer of experts.

    An expert of two products has alpha_e = 2 alpha of one product. All in seconds, for the whole chunk-free message.
    """

    alpha_a_s: float
    send_s: float
    alpha_e_s: float
    work_s: float

    def __post_init__(self) -> None:
        for name in ("alpha_a_s", "send_s", "alpha_e_s", "work_s"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"PipeMoE.{name} is a time in seconds, finite and not negative; got {value}")

    def seconds(self, degree: int) -> float:
        """T(r); send_s = beta_a * n_d and work_s = beta_e * n_e."""
        if degree < 1:
            raise InputError(f"a degree is at least 1; got {degree}")
        link = 2 * degree * self.alpha_a_s + 2 * self.send_s
        experts = 2 * self.alpha_a_s + 2 * self.send_s / degree + degree * self.alpha_e_s + self.work_s
        return max(link, experts)

    def best_degree(self, capacity: int) -> int:
        """r*, the smallest of the best integers 1 <= r <= capacity, in time free of the capacity.

        T is convex: its real minimum is that of the second term, or where the rising first term meets it before. The best
        integer is next to it. (Both terms equal: r (alpha_e - 2 alpha_a) + 2 beta n_d / r + 2 alpha_a + beta_e n_e
        - 2 beta n_d = 0, a quadratic.)
        """
        if capacity < 1:
            raise InputError(f"the capacity is the largest degree, at least 1; got {capacity}")
        free = math.sqrt(2 * self.send_s / self.alpha_e_s) if self.alpha_e_s > 0 else math.inf
        real = min([float(capacity), free, *(x for x in self._crossings() if x >= 1)])
        near = {int(real) + d for d in (-1, 0, 1, 2)} | {1, capacity}
        near |= {int(x) + d for x in (free, *self._crossings()) if 0 < x < capacity for d in (-1, 0, 1, 2)}
        allowed = sorted(x for x in near if 1 <= x <= capacity)
        best = min(self.seconds(x) for x in allowed)
        return next(x for x in allowed if self.seconds(x) <= best * (1 + 1e-12))

    def _crossings(self) -> list[float]:
        """Real r at which both terms are equal."""
        square = self.alpha_e_s - 2 * self.alpha_a_s
        linear = 2 * self.alpha_a_s + self.work_s - 2 * self.send_s
        constant = 2 * self.send_s
        if square == 0:
            return [-constant / linear] if linear < 0 else []
        inside = linear * linear - 4 * square * constant
        if inside < 0:
            return []
        return sorted((-linear + sign * math.sqrt(inside)) / (2 * square) for sign in (-1, 1))


# ------------------------------------------------------------------------------------------------ FSMoE


def fsmoe_stages() -> list[Stage]:
    """A1 AG E RS A2, the gradient all-reduce between the two all-to-alls."""
    return [Stage("inter", a, g), Stage("intra", ag), Stage("compute", e), Stage("intra", rs), Stage("inter", a)]


def fsmoe_terms() -> list[Any]:
    """FSMoE's four: the inter-node link, the experts, the link with an idle moment, the intra-node link set the pace."""
    return [2 * r * a + g, 2 * a + ag + rs + r * e, 2 * r * a + ag + rs, 2 * a + r * (ag + rs)]


@dataclass(frozen=True)
class FSMoE:
    """Seconds a chunk of FSMoE's tasks: all-to-all, all-gather, experts, reduce-scatter; all_reduce_s for all slices."""

    all_to_all_s: float
    all_gather_s: float
    experts_s: float
    reduce_scatter_s: float
    all_reduce_s: float = 0.0

    def holds(self) -> bool:
        """Whether the published formula holds for every r: t_ag = t_rs. Otherwise use `seconds` (or simulate)."""
        x, y = self.all_gather_s, self.reduce_scatter_s
        return abs(x - y) <= 1e-9 * max(x, y)

    def published_seconds(self, degree: int) -> float:
        """The maximum of the four terms; InputError where it does not hold."""
        if not self.holds():
            raise InputError(
                f"FSMoE's four-way maximum needs t_ag = t_rs; got {self.all_gather_s} s and {self.reduce_scatter_s} s: "
                "use FSMoE.seconds or moefx.simulate"
            )
        return self.four_way_maximum(degree)

    def four_way_maximum(self, degree: int) -> float:
        """The maximum of the four terms, right or wrong."""
        x, y, z = self.all_to_all_s, self.all_gather_s, self.reduce_scatter_s
        return max(
            2 * degree * x + self.all_reduce_s,
            2 * x + y + z + degree * self.experts_s,
            2 * degree * x + y + z,
            2 * x + degree * (y + z),
        )

    def seconds(self, degree: int) -> float:
        """The makespan for any times: all corners of the timeline, of which the paper's four are some."""
        x, y, w, z = self.all_to_all_s, self.all_gather_s, self.experts_s, self.reduce_scatter_s
        gap = self.all_reduce_s
        stages = [Stage("inter", x, gap), Stage("intra", y), Stage("compute", w), Stage("intra", z), Stage("inter", x)]
        return fifo_time(stages, degree)
