"""find: Trace --> hypotheses of what the block's routed part computes.

    y[t] = sum_e G[t, e] * f(x_t; theta_e)

The proof, step by step; each step is a function below.

1. *experts*   Template values (see `_lift`) with several bindings: f with several theta_e.    -> Bank
2. *tokens*    The smallest recorded tensor that holds every row fed to f.                      -> x [T, D]
3. *gates*     For every later tensor y of T rows, solve the equation for G by least squares.
               A residual of rounding size means: y IS a routed output, and G is the true gate matrix.
4. *routing*   Explain G by recorded router values: ids and weights, or a dense gate tensor.
5. *identity*  Experts beyond the bank pass the token through, if G has such a part.

Nothing here knows how the block spelled its dispatch and combine. A hypothesis may still be wrong outside of the probe
(a capacity that was not reached, say): verification decides, and the next hypothesis gets its turn.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from moefx.passes._lift import Child, Lifter, Node, Piece, hash_rows
from torch import Tensor, nn

from moefx.errors import Decline
from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template
from moefx.routing import Hypothesis, Routing, dense_gates, slots
from moefx.trace import Trace, Value, precision, values_in

log = logging.getLogger(__name__)

MAX_GROUPS = 4  # expert groups tried in one block
MAX_SUMS = 12  # candidate combined outputs that are explained per token base
MAX_LABEL = 1 << 14  # larger integers are not expert ids
MAX_SLOTS = 64  # routing slots K considered per token
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# how exact solved gates are, relative to the largest, where the experts compute in 16 bits on purpose; else 1e-5
NOISE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}


# ------------------------------------------------------------------------------------------------ 1. experts


@dataclass(frozen=True)
class Bank:
    """E experts of one template value: bindings[e] fills the holes of `tv` for expert e."""

    tv: int
    bindings: tuple[tuple[Piece, ...], ...]
    stacked: bool  # labels follow from offsets inside stacked parameters

    @property
    def experts(self) -> int:
        return len(self.bindings)


def expert_groups(lifter: Lifter) -> list[frozenset[str]]:
    """Sets of parameters that take each other's place in some template value: possible experts, deepest first."""
    groups: dict[frozenset[str], tuple[int, int]] = {}
    for tv, uses in lifter.uses.items():
        linears = _depth(lifter, tv)
        token_uses = [b for b, rows in uses.items() if lifter.rows[rows[0]].token is not None]
        if linears == 0 or lifter.nodes[tv].width < 2 or len(token_uses) < 2:
            continue
        varying = [i for i in range(len(token_uses[0])) if len({b[i] for b in token_uses}) > 1]
        names = frozenset(lifter.names[b[i][0]] for b in token_uses for i in varying)
        rank = (linears, tv)
        groups[names] = max(groups.get(names, rank), rank)
    ordered = sorted(groups, key=lambda names: groups[names], reverse=True)
    kept: list[frozenset[str]] = []
    for names in ordered:  # a group that is part of a deeper one is a step on the way to it
        if not any(names < other and groups[names][0] < groups[other][0] for other in kept):
            kept.append(names)
    return kept[:MAX_GROUPS]


def _depth(lifter: Lifter, tv: int) -> int:
    """Number of parameter products on the longest path of a template value."""
    node = lifter.nodes[tv]
    below = max((_depth(lifter, child) for child, _ in node.children), default=0)
    return below + (node.kind == "linear")


def banks(lifter: Lifter) -> list[Bank]:
    """Every template value of at least two experts, the last ones of the computation first."""
    found = []
    for tv, uses in lifter.uses.items():
        if _depth(lifter, tv) == 0 or lifter.nodes[tv].width < 2 or lifter.nodes[tv].kind == "gate":
            continue
        bindings = [b for b, rows in uses.items() if lifter.rows[rows[0]].token is not None]
        for members in _families(bindings):
            bank = _complete(lifter, tv, members)
            if bank is not None:
                found.append(bank)
    return sorted(found, key=lambda b: (_depth(lifter, b.tv), b.tv), reverse=True)


def _families(bindings: list[tuple[Piece, ...]]) -> list[list[tuple[Piece, ...]]]:
    """Bindings into the same parameters belong together: a stack, apart from a shared expert of the same shape."""
    by_params: dict[tuple[int, ...], list[tuple[Piece, ...]]] = {}
    for b in bindings:
        by_params.setdefault(tuple(param for param, _ in b), []).append(b)
    stacks = [members for members in by_params.values() if len(members) >= 2]
    return stacks or ([bindings] if len(bindings) >= 2 else [])


def _complete(lifter: Lifter, tv: int, seen: list[tuple[Piece, ...]]) -> Bank | None:
    """All experts of a template value, the ones no token reached in this run included where stacks show them."""
    positions = range(len(seen[0]))
    varying = [i for i in positions if len({b[i] for b in seen}) > 1]
    stacks = {i: _stack(lifter, [b[i] for b in seen]) for i in varying}
    if any(s is not None for s in stacks.values()):
        index = {}
        for b in seen:
            labels = {(b[i][1] - s[0]) // s[1] for i, s in stacks.items() if s is not None}
            if len(labels) != 1:
                return None
            index[labels.pop()] = b
        experts = min(s[2] for s in stacks.values() if s is not None)
        if max(index) >= experts or not all(
            s is None or _fits(lifter, tv, i, seen[0][i][0], s, experts) for i, s in stacks.items()
        ):
            return None
        if any(s is None for s in stacks.values()) and len(index) < experts:
            return None  # some leaves are listed, and some experts were not reached
        example = seen[0]
        full = []
        for e in range(experts):
            pieces = list(index.get(e, example))
            for i, s in stacks.items():
                if s is not None:
                    pieces[i] = (example[i][0], s[0] + e * s[1])
            full.append(tuple(pieces))
        return Bank(tv, tuple(full), True)
    return Bank(tv, tuple(sorted(seen, key=lambda b: [b[i][0] for i in varying])), False)


def _fits(lifter: Lifter, tv: int, position: int, param: int, stack: tuple[int, int, int], experts: int) -> bool:
    """Whether the last expert's slices still lie inside of the parameter."""
    reach = 0
    for shape, strides in _holes(lifter, tv, position):
        reach = max(reach, sum((n - 1) * s for n, s in zip(shape, strides)))
    return stack[0] + (experts - 1) * stack[1] + reach < lifter.tensors[param].numel()


def _holes(lifter: Lifter, tv: int, position: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes and strides of the parameter slices that stand at `position` of a template value's binding."""
    node = lifter.nodes[tv]
    if node.kind == "vector" and position == 0:
        yield (node.width,), (node.args[0],)
    if node.kind == "linear" and position == len(node.children[0][1]):
        yield (node.args[0], node.width), (node.args[1], node.args[2])
    for child, holes in node.children:
        for inner, outer in enumerate(holes):
            if outer == position:
                yield from _holes(lifter, child, inner)


def _stack(lifter: Lifter, pieces: list[Piece]) -> tuple[int, int, int] | None:
    """(first offset, expert stride, number of experts) of pieces stacked in one parameter; None when they are listed."""
    params = {p for p, _ in pieces}
    offsets = sorted({o for _, o in pieces})
    if len(params) != 1 or len(offsets) < 2:
        return None
    stride = math.gcd(*(b - a for a, b in zip(offsets, offsets[1:])))
    shape = lifter.tensors[params.pop()].shape
    extents = [(math.prod(shape[a + 1 :]), math.prod(shape[a:])) for a in range(len(shape))]
    for inner, outer in extents:  # the axis inside of which the experts are stacked
        if (
            inner <= stride
            and stride % inner == 0
            and outer % stride == 0
            and offsets[-1] // outer == offsets[0] // outer
        ):
            return offsets[0] % stride + offsets[0] // outer * outer, stride, outer // stride
    return None


# ------------------------------------------------------------------------------------------------ the template, evaluated


class Evaluator:
    """Computes template values on token rows with the probe's parameters."""

    def __init__(self, lifter: Lifter) -> None:
        self.lifter = lifter
        self.flat = [t.reshape(-1) for t in lifter.tensors]

    def hole(self, piece: Piece, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return self.flat[piece[0]].as_strided(shape, strides, piece[1])

    def __call__(self, tv: int, binding: tuple[Piece, ...], x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """f(x; binding) [T, width]; `weight` [T, 1] stands at the template's gate, if it has one."""
        memo: dict[tuple[int, tuple[Piece, ...]], Any] = {}

        def value(tv: int, binding: tuple[Piece, ...]) -> Any:
            key = (tv, binding)
            if key not in memo:
                memo[key] = compute(self.lifter.nodes[tv], binding)
            return memo[key]

        def compute(node: Node, binding: tuple[Piece, ...]) -> Any:
            children = [value(child, tuple(binding[i] for i in holes)) for child, holes in node.children]
            if node.kind == "x":
                return x
            if node.kind == "linear":
                contracted, stride, step, _ = node.args
                hole = self.hole(binding[-1], (contracted, node.width), (stride, step))
                return children[0] @ hole.to(children[0].dtype)
            if node.kind == "vector":
                return self.hole(binding[0], (node.width,), (node.args[0],)).unsqueeze(0)
            if node.kind == "columns":
                start, step = node.args
                return children[0][:, start : start + step * node.width : step]
            if node.kind == "item":
                return children[0][node.args[0]]
            if node.kind == "gate":
                return children[0] * weight
            norm = "norm" in node.name.split(".")[1]
            if norm:  # norm weights are vectors, not rows
                children = [c if i == 0 else c.squeeze(0) for i, c in enumerate(children)]
            op: Any = torch.ops.aten
            for part in node.name.split(".")[1:]:
                op = getattr(op, part)
            return op(*_fill(node.args, children), **{k: _fill(v, children) for k, v in node.kwargs})

        return value(tv, binding)


def _fill(args: Any, children: list[Any]) -> Any:
    if isinstance(args, Child):
        return children[args.index]
    return [_fill(a, children) for a in args] if isinstance(args, tuple) else args


def _gates(lifter: Lifter, tv: int) -> list[Node]:
    node = lifter.nodes[tv]
    below = [g for child, _ in node.children for g in _gates(lifter, child)]
    return [node, *below] if node.kind == "gate" else below


# ------------------------------------------------------------------------------------------------ 2. tokens


def token_bases(trace: Trace, lifter: Lifter, bank: Bank) -> list[tuple[Value, torch.dtype]]:
    """Recorded tensors that hold every row fed to the experts, and in which dtype the experts read it (their own, unless
    the block casts on the way): the earliest of each number of rows, fewest first."""
    width = _token_width(lifter, bank.tv)
    hashes = lifter.token_hashes()
    tokens = {lifter.rows[r].token for rows in lifter.uses[bank.tv].values() for r in rows} - {None, 0}
    wanted = torch.tensor([hashes[t] for t in tokens if t is not None])
    found: dict[int, tuple[Value, torch.dtype]] = {}
    for value in trace.values:
        if _is_rows(value, width) and not value.tainted and value.origin in ("input", "call"):
            rows = value.tensor.reshape(-1, width)
            for dtype in sorted({rows.dtype} | lifter.token_dtypes, key=lambda d: d is not rows.dtype):
                if rows.shape[0] not in found and bool(torch.isin(wanted, hash_rows(rows.to(dtype))).all()):
                    found[rows.shape[0]] = value, dtype
    return [found[n] for n in sorted(found)]


def scaled_bases(trace: Trace, lifter: Lifter, bank: Bank) -> list[tuple[Value, Tensor]]:
    """For weights on the input side: tensors of which every row fed to an expert is a multiple, and the factors G [T, E]."""
    width = _token_width(lifter, bank.tv)
    fed = {
        e: _rows_fed(trace, lifter, bank.tv, b, width) for e, b in enumerate(bank.bindings) if b in lifter.uses[bank.tv]
    }
    found: list[tuple[Value, Tensor]] = []
    for value in trace.values:
        if (
            not _is_rows(value, width)
            or value.tainted
            or value.origin not in ("input", "call")
            or value.tensor.numel() == 0
        ):
            continue
        rows = value.tensor.reshape(-1, width)
        if any(v.tensor.numel() == value.tensor.numel() for v, _ in found):
            continue
        factors = _factors(rows, fed, bank.experts)
        if factors is not None and bool((factors != 1).any()):
            found.append((value, factors))
    return sorted(found, key=lambda pair: pair[0].tensor.numel())


def _rows_fed(trace: Trace, lifter: Lifter, tv: int, binding: tuple[Piece, ...], width: int) -> Tensor:
    hashes = lifter.token_hashes()
    wanted = {hashes[t] for r in lifter.uses[tv][binding] if (t := lifter.rows[r].token)}
    rows = []
    for value in trace.values:
        if wanted and _is_rows(value, width):
            candidates = value.tensor.reshape(-1, width)
            keys = hash_rows(candidates).tolist()
            for i, key in enumerate(keys):
                if key in wanted:
                    wanted.discard(key)
                    rows.append(candidates[i])
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def _factors(base: Tensor, fed: dict[int, Tensor], experts: int) -> Tensor | None:
    """G [T, E] with fed[e] = {G[t, e] * base[t]}; None when some row is no multiple of any base row."""
    gates = torch.zeros(base.shape[0], experts, dtype=torch.float64)
    norms = base.double().norm(dim=1).clamp_min(1e-300)
    for e, rows in fed.items():
        if rows.shape[0] == 0:
            continue
        cosine = (rows.double() @ base.double().T) / norms / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-300)
        best = cosine.abs().argmax(1)
        factor = (rows.double() * base[best].double()).sum(1) / norms[best] ** 2
        if not torch.allclose(factor[:, None] * base[best].double(), rows.double(), rtol=1e-6, atol=1e-9):
            return None
        gates[best, e] = factor
    return gates


def _sum_of_one(value: Value) -> bool:
    """Whether it is a sum over a dimension of one slot: equal to what it sums, and torch takes longer over it than over many."""
    call = value.producer
    return call is not None and call.name == "sum" and [v.tensor.numel() for v in call.reads()] == [value.tensor.numel()]


def _is_rows(value: Value, width: int) -> bool:
    return value.tensor.is_floating_point() and value.tensor.dim() >= 1 and value.shape[-1] == width


def _token_width(lifter: Lifter, tv: int) -> int:
    node = lifter.nodes[tv]
    if node.kind == "x":
        return node.width
    return next((w for child, _ in node.children if (w := _token_width(lifter, child))), 0)


# ------------------------------------------------------------------------------------------------ 3. gates


@dataclass(frozen=True)
class Gates:
    """Solved gates: `matrix` [T, E], the `identity` part [T] or None; both exact to `noise` times the largest gate."""

    matrix: Tensor
    identity: Tensor | None
    noise: float = 1e-5

    @property
    def largest(self) -> float:
        return float(self.matrix.abs().max()) if self.matrix.numel() else 0.0

    @property
    def support(self) -> Tensor:
        """Which gates are not zero [T, E]."""
        return self.matrix.abs() > self.noise * self.largest

    def of(self, experts: list[int]) -> Gates:
        """The columns of these experts."""
        return replace(self, matrix=self.matrix[:, experts])

    def equal(self, made: Tensor, solved: Tensor) -> bool:
        """Whether gates that a routing makes are those that were solved."""
        return torch.allclose(made, solved, rtol=10 * self.noise, atol=self.noise * self.largest)

    def scale_of(self, made: Tensor, passed: Tensor) -> float | None:
        """The scale c with c * made == matrix (1 if possible) and c * passed == identity, or None."""
        scale = 1.0
        if not self.equal(made, self.matrix):
            if float(made.abs().max()) == 0:
                return None
            scale = float((made * self.matrix).sum() / (made * made).sum())
            if not math.isfinite(scale) or scale == 0 or not self.equal(scale * made, self.matrix):
                return None
            close = 1e-7 if self.noise < 1e-4 else self.noise
            digits = 6 if self.noise < 1e-4 else 2
            rounded = float(f"{scale:.{digits}g}")
            scale = rounded if math.isclose(scale, rounded, rel_tol=close) else scale
        if self.identity is not None and not self.equal(scale * passed, self.identity):
            return None
        return scale


@dataclass(frozen=True)
class Solution:
    """combined = sum_e gates.matrix[:, e] * f_e(x) + gates.identity * x, up to `residual` (relative)."""

    combined: Value
    gates: Gates
    residual: float


class GateSystem:
    """The linear systems y[t] = sum_e G[t,e] f_e(x_t), one a token, factorised once for all candidates y.

    draws: (outputs [T, E, d_out], value -> y [T, d_out]) for one or more draws of the experts' parameters: where d_out
    equations a token do not determine E gates, the same routing with other parameters gives more.
    """

    def __init__(
        self, draws: list[tuple[Tensor, Callable[[Value], Tensor | None]]], x: Tensor, identity: bool, noise: float = 1e-5
    ) -> None:
        self.draws, self.identity, self.experts, self.noise = draws, identity, draws[0][0].shape[1], noise
        blocks = [torch.cat([f, x[:, None].to(f.dtype)], 1) if identity else f for f, _ in draws]
        self.system = torch.cat(blocks, 2).double()  # [T, unknowns, equations]
        normal = self.system @ self.system.transpose(1, 2)
        self.scale = normal.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        self.normal = normal * self.scale[:, :, None] * self.scale[:, None, :]
        self.factors, self.pivots, _ = torch.linalg.lu_factor_ex(self.normal)

    def first(self, tokens: int) -> GateSystem:
        """The same for the first few tokens."""
        small = copy.copy(self)

        def head(read: Callable[[Value], Tensor | None]) -> Callable[[Value], Tensor | None]:
            return lambda value: None if (t := read(value)) is None else t[:tokens]

        small.draws = [(f[:tokens], head(read)) for f, read in self.draws]
        for name in ("system", "scale", "normal", "factors", "pivots"):
            setattr(small, name, getattr(self, name)[:tokens])
        return small

    def solve(self, value: Value) -> Solution | None:
        """The gates that make `value` a sum of expert outputs, if it is one."""
        parts = [y(value) for _, y in self.draws]
        if any(p is None for p in parts):
            return None
        target = torch.cat([p for p in parts if p is not None], 1).double()
        norm = target.norm()
        if not bool(torch.isfinite(target).all()) or float(norm) == 0:
            return None
        right = (self.system @ target[..., None]) * self.scale[..., None]
        gates = torch.linalg.lu_solve(self.factors, self.pivots, right)
        gates = gates + torch.linalg.lu_solve(self.factors, self.pivots, right - self.normal @ gates)  # one refinement
        gates = (gates * self.scale[..., None]).squeeze(-1)
        residual = float(((gates[:, None] @ self.system).squeeze(1) - target).norm() / norm)
        if not residual <= max(TOLERANCE.get(value.tensor.dtype, 1e-6), 2 * self.noise if self.noise > 1e-4 else 0.0):
            return None
        passed = gates[:, self.experts] if self.identity else None
        return Solution(value, Gates(gates[:, : self.experts], passed, self.noise), residual)


def solve_gates(
    trace: Trace, system: Callable[[bool], GateSystem], tokens: int, width: int, d_model: int
) -> Iterator[Solution]:
    """Every recorded tensor of T rows that is a weighted sum of expert outputs: the most complete sums first."""
    rows = [v for v in trace.values if v.tainted and _is_rows(v, width) and v.tensor.numel() == tokens * width]
    for identity in (False, True) if d_model == width else (False,):
        if not rows:
            return
        full = system(identity)
        few = full.first(24)
        passed = [s for v in rows if (s := few.solve(v)) is not None]
        latest = {s.combined.object: s.combined.index for s in passed}  # a tensor that was filled step by step
        filled = {s.combined: int(s.gates.support.sum()) for s in passed}
        passed.sort(
            key=lambda s: (
                -filled[s.combined],
                s.combined.index != latest[s.combined.object],
                not _sum_of_one(s.combined),
                s.combined.index,
            )
        )
        for candidate in passed[:MAX_SUMS]:
            solution = full.solve(candidate.combined)
            if solution is not None:
                yield solution


# ------------------------------------------------------------------------------------------------ 4. routing


def explanations(trace: Trace, gates: Gates, bank: Bank, before: int) -> list[Routing]:
    """Router values that reproduce the gates: the outermost first, then the simplest.

    before: only Values recorded earlier than this one may explain it.
    """
    depth = _visible_depth(trace)

    def deepest(routing: Routing) -> int:
        return max(depth.get(v, 0) for v in routing.values)

    return sorted(_explanations(trace, depth, gates, bank, before), key=deepest)


def _explanations(
    trace: Trace, depth: dict[Value, int], gates: Gates, bank: Bank, before: int
) -> Iterator[Routing]:
    tokens = gates.matrix.shape[0]
    if gates.largest == 0:
        return
    router = [
        v
        for v in trace.values
        if not v.tainted and v.index < before and v.origin in ("input", "call") and v.tensor.numel()
    ]
    router.sort(key=lambda v: (depth.get(v, 0), v.index))
    floats = [v for v in router if v.tensor.is_floating_point()]
    integers = [
        v
        for v in router
        if not v.tensor.is_floating_point() and not v.tensor.is_complex() and v.tensor.dtype != torch.bool
    ]
    support = gates.support
    for ids in integers:
        if ids.tensor.numel() % tokens or not 1 <= ids.tensor.numel() // tokens <= MAX_SLOTS:
            continue
        k = ids.tensor.numel() // tokens
        for transposed in (False, True) if k > 1 else (False,):
            if transposed != (ids.shape[0] == k and ids.shape[-1] != k) and k > 1:
                continue
            labels = slots(ids.tensor, k, transposed).long()
            if int(labels.max()) > MAX_LABEL or int(labels.min()) < 0 and gates.identity is not None:
                continue
            order = _label_order(labels, support, bank)
            if order is None:
                continue
            masks = [v for v in router if v.tensor.dtype == torch.bool and v.tensor.numel() == ids.tensor.numel()]
            yield from _weights_for(labels, order, gates, ids, k, transposed, floats, masks)
    masks = [v for v in router if not v.tensor.is_floating_point()]
    yield from _dense(gates, bank, [*floats, *(v for v in masks if v.tensor.dtype == torch.bool)], [None])
    yield from _dense(gates, bank, masks, [w for w in floats if w.tensor.numel() == tokens])
    yield from _expert_choice(gates, integers, floats, bank)


def _label_order(labels: Tensor, support: Tensor, bank: Bank) -> tuple[int, ...] | None:
    """The expert that each router label means; None when the labels do not cover the support of G."""
    experts = bank.experts
    width = max(int(labels.max()) + 1, experts)
    hit = torch.zeros(labels.shape[0], width + 1, dtype=torch.bool)
    hit.scatter_(1, labels.clamp(-1, width - 1) % (width + 1), True)
    hit = hit[:, :width]
    if bool((support <= hit[:, :experts]).all()):
        return tuple(range(experts))
    if bank.stacked:
        return None
    order = []
    for label in range(width):
        overlap = (support & hit[:, label : label + 1]).sum(0) - (support & ~hit[:, label : label + 1]).sum(0)
        overlap = torch.where(support.any(0), overlap, -1)
        best = int(overlap.argmax())
        order.append(best if int(overlap[best]) > 0 else -1)
    used = [e for e in order if e >= 0]
    return (
        tuple(order)
        if len(set(used)) == len(used) and set(used) >= set(torch.nonzero(support.any(0)).flatten().tolist())
        else None
    )


def gate_matrix(labels: Tensor, weights: Tensor, order: tuple[int, ...], experts: int) -> tuple[Tensor, Tensor]:
    """(G [T, E], weight on labels outside [0, E) summed per token) for ids and weights [T, K]."""
    meaning = torch.tensor([*(e if e >= 0 else experts for e in order), experts])
    inside = (labels >= 0) & (labels < len(order))
    columns = meaning[torch.where(inside, labels, len(order))]
    gates = torch.zeros(labels.shape[0], experts + 1, dtype=torch.float64).scatter_add_(1, columns, weights.double())
    return gates[:, :experts], gates[:, experts]


def _weights_for(
    labels: Tensor, order: tuple[int, ...], gates: Gates, ids: Value, k: int, transposed: bool,
    floats: list[Value], masks: list[Value],
) -> Iterator[Routing]:  # fmt: skip
    """Weights per slot, weights gathered from dense scores, or weight 1; of all slots, or of those that a mask keeps."""
    tokens, experts = gates.matrix.shape
    kept = None if order == tuple(range(experts)) else order
    base = Routing("slots", k, ids, None, ids_transposed=transposed, order=kept)
    weights: list[tuple[Routing, Tensor]] = []
    for w in floats:
        if w.tensor.numel() == tokens * k:
            weights.append((replace(base, w=w), slots(w.tensor, k, transposed)))
    for w in floats:
        if w.tensor.dim() >= 2 and w.tensor.numel() == tokens * w.shape[-1] and experts <= w.shape[-1]:
            if 0 <= int(labels.min()) and int(labels.max()) < w.shape[-1]:
                weights.append((replace(base, kind="gather", w=w), w.tensor.reshape(tokens, -1).gather(1, labels)))
    weights.append((base, torch.ones(labels.shape, dtype=torch.float64)))
    for keep in (None, *masks):
        mask = torch.ones_like(labels, dtype=torch.bool) if keep is None else slots(keep.tensor, k, transposed)
        for routing, taken in weights:
            made = gate_matrix(labels, torch.where(mask, taken.double(), 0.0), order, experts)
            if (scale := gates.scale_of(*made)) is not None:
                yield replace(routing, scale=scale, keep=keep)


def _dense(
    gates: Gates, bank: Bank, candidates: list[Value], factors: Sequence[Value | None]
) -> Iterator[Routing]:
    """G is a recorded [T, E] tensor, or a mask [T, E] times one recorded weight per token."""
    (tokens, experts), support = gates.matrix.shape, gates.support
    if gates.identity is not None or float(support.float().mean()) > 0.95:
        return
    for mask in candidates:
        if mask.tensor.numel() % (tokens * experts):
            continue
        for axis in range(mask.tensor.dim()):
            if mask.shape[axis] < experts or (columns := dense_gates(mask.tensor, axis, tokens)) is None:
                continue
            for factor in factors:
                made = columns.double() if factor is None else columns.double() * factor.tensor.reshape(-1, 1).double()
                order = _column_order(made, gates, bank)
                if order is None:
                    continue
                scale = gates.scale_of(made[:, list(order)], torch.zeros(tokens))
                if scale is not None:
                    kept = None if order == tuple(range(made.shape[1])) else order
                    most = int(support.sum(1).max())
                    from_end = axis - mask.tensor.dim()
                    if factor is None:
                        yield Routing("dense", most, None, mask, scale, axis=from_end, order=kept)
                    else:
                        yield Routing("masked", most, mask, factor, scale, axis=from_end, order=kept)


def _column_order(made: Tensor, gates: Gates, bank: Bank) -> tuple[int, ...] | None:
    """For each expert the column of `made` that is its gate."""
    experts = gates.matrix.shape[1]
    if bank.stacked or made.shape[1] == experts and gates.scale_of(made, torch.zeros(len(made))) is not None:
        return tuple(range(experts))
    order = []
    for e in range(experts):
        matches = [c for c in range(made.shape[1]) if gates.equal(made[:, c], gates.matrix[:, e])]
        if not matches:
            return None
        order.append(matches[0])
    return tuple(order) if len(set(order)) == experts else None


def _expert_choice(
    gates: Gates, integers: list[Value], floats: list[Value], bank: Bank
) -> Iterator[Routing]:
    tokens, experts = gates.matrix.shape
    for ids in integers:
        t = ids.tensor
        if gates.identity is not None or t.dim() < 2 or t.numel() % experts or int(t.max()) >= tokens or int(t.min()) < 0:
            continue
        for axis in (0, t.dim() - 1):
            if t.shape[axis] != experts:
                continue
            chosen = t.movedim(axis, 0).reshape(experts, -1).long()
            if chosen.shape[1] > tokens:
                continue
            for w in [*floats, None]:
                if w is not None and w.shape != ids.shape:
                    continue
                weights = torch.ones(chosen.shape) if w is None else w.tensor.movedim(axis, 0).reshape(experts, -1)
                made = torch.zeros(experts, tokens, dtype=torch.float64).scatter_add_(1, chosen, weights.double()).t()
                if (scale := gates.scale_of(made, torch.zeros(tokens))) is not None:
                    yield Routing("choice", chosen.shape[1], ids, w, scale, axis=axis)


def _visible_depth(trace: Trace) -> dict[Value, int]:
    """How many module calls deep a Value is visible: 0 when the block's own forward can name it."""
    depth: dict[Value, int] = {}
    for call in trace.calls:
        for v in call.makes():
            depth[v] = min(depth.get(v, len(call.scope)), len(call.scope))
    for module_call in trace.module_calls:
        for v in values_in(module_call.result):
            depth[v] = min(depth.get(v, len(module_call.scope)), len(module_call.scope))
    return depth


# ------------------------------------------------------------------------------------------------ the template, written down


def write_template(
    lifter: Lifter, bank: Bank, read_as: torch.dtype | None = None
) -> tuple[Template, tuple[Leaf, ...]]:
    """The template value as a program, and its holes as leaves for all experts. read_as: the dtype that tokens are cast to."""
    instrs: list[Instr] = []
    leaves: list[Leaf] = []
    written: dict[Any, Ref] = {}
    leaf_of: dict[Any, int] = {}

    def leaf(
        position: int, shape: tuple[int, ...], strides: tuple[int, ...], cast: torch.dtype | None = None
    ) -> LeafRef:
        key = (position, shape, strides, cast)
        if key not in leaf_of:
            leaf_of[key] = len(leaves)
            pieces = [b[position] for b in bank.bindings]
            names, offsets = tuple(lifter.names[p] for p, _ in pieces), tuple(o for _, o in pieces)
            leaves.append(Leaf(shape, strides, names, offsets, cast))
        return LeafRef(leaf_of[key])

    def emit(instr: Instr) -> Ref:
        instrs.append(instr)
        return Ref(len(instrs) - 1)

    def visit(tv: int, holes: tuple[int, ...]) -> Ref | LeafRef:
        key = (tv, holes)
        if key in written:
            return written[key]
        node = lifter.nodes[tv]
        if node.kind == "vector":
            return leaf(holes[0], (node.width,), (node.args[0],))
        children = [visit(child, tuple(holes[i] for i in inner)) for child, inner in node.children]
        if node.kind == "gate":
            ref = children[0]
        elif node.kind == "x":
            ref = emit(Instr("x", width=node.width))
            if read_as is not None:
                ref = emit(Instr("op", "aten._to_copy.default", (ref,), (("dtype", read_as),), node.width))
        elif node.kind == "linear":
            contracted, stride, step, cast = node.args
            hole = leaf(holes[-1], (contracted, node.width), (stride, step), cast)
            ref = emit(Instr("linear", args=(children[0], hole), width=node.width))
        elif node.kind == "columns":
            start, step = node.args
            ref = emit(
                Instr("columns", args=(children[0], start, start + step * (node.width - 1) + 1, step), width=node.width)
            )
        elif node.kind == "item":
            ref = emit(Instr("item", args=(children[0], node.args[0]), width=node.width))
        else:
            kwargs = tuple((k, "model" if v is torch.float64 else _written(v, children)) for k, v in node.kwargs)
            ref = emit(Instr("op", node.name, _written(node.args, children), kwargs, node.width))
        written[key] = ref  # type: ignore[assignment]
        return ref

    visit(bank.tv, tuple(range(len(bank.bindings[0]))))
    return Template(tuple(instrs)), tuple(leaves)


def _written(args: Any, children: list[Any]) -> Any:
    if isinstance(args, Child):
        return children[args.index]
    return tuple(_written(a, children) for a in args) if isinstance(args, tuple) else args


def _layout(leaves: tuple[Leaf, ...]) -> str:
    """One line about where the experts' matrices live."""
    matrices = [leaf for leaf in leaves if len(leaf.shape) == 2]
    vectors = [leaf for leaf in leaves if len(leaf.shape) == 1 and not leaf.shared]
    stacked = all(leaf.stacked for leaf in matrices)
    names = {leaf.params[0] for leaf in matrices}
    orientation = {"[E, in, out]" if leaf.strides[0] > leaf.strides[1] else "[E, out, in]" for leaf in matrices}
    words = [
        "stacked" if stacked else "one module each",
        f"{len(matrices)} matrices in {len(names)} parameters",
        *sorted(orientation),
    ]
    if any(leaf.strides[-1] == 2 or 2 in leaf.strides for leaf in matrices):
        words.append("interleaved")
    return ", ".join([*words, "with biases" if vectors else "no biases"])


# ------------------------------------------------------------------------------------------------ all together


def hypotheses(
    trace: Trace, lifter: Lifter, redraw: Callable[[int], Trace | None], near: list[str]
) -> Generator[Hypothesis, None, str]:
    """Everything the routed part may be, likeliest first. `near` collects why candidates failed.

    Returns the name of a parameter whose expert ran without a gate in this run, or "": it may be a shared expert of the
    same kind, and was taken for one, or it had no luck.
    redraw(seed): the trace of the same run with other expert parameters, for blocks with more experts than outputs.
    """
    evaluate = Evaluator(lifter)
    ungated = ""
    for bank in banks(lifter)[:6]:
        what = f"{bank.experts} experts of {_depth(lifter, bank.tv)} products"
        template, leaves = write_template(lifter, bank)
        if not any(len(leaf.shape) == 2 and not leaf.shared for leaf in leaves):
            near.append(f"{what}: the varying parameters are not matrices")
            continue
        ungated = (yield from _output_side(trace, lifter, evaluate, bank, template, leaves, redraw, near, what)) or ungated
        yield from _input_side(trace, lifter, evaluate, bank, template, leaves, near, what)
    return ungated


def _region(
    lifter: Lifter, bank: Bank, template: Template, leaves: tuple[Leaf, ...], routing: Routing, **more: Any
) -> Region:
    matrices = [leaf.shape for leaf in leaves if len(leaf.shape) == 2 and not leaf.shared]
    width = lifter.nodes[bank.tv].width
    hidden = matrices[0][1] if len(matrices) > 1 else width
    return Region(
        bank.experts, routing.slots(bank.experts), _token_width(lifter, bank.tv), width, hidden, template, leaves,
        routing=str(routing), layout=_layout(leaves), **more,
    )  # fmt: skip


def _output_side(
    trace: Trace, lifter: Lifter, evaluate: Evaluator, bank: Bank, template: Template, leaves: tuple[Leaf, ...],
    redraw: Callable[[int], Trace | None], near: list[str], what: str,
) -> Generator[Hypothesis, None, str]:  # fmt: skip
    """Weights on f's result (or inside f, where f is linear in them). Returns as `hypotheses`."""
    ungated = ""
    width = lifter.nodes[bank.tv].width
    bases = token_bases(trace, lifter, bank)
    if not bases:
        near.append(f"{what}: no recorded tensor holds all rows that the experts read")
    for base, dtype in bases:
        x = base.tensor.reshape(-1, base.shape[-1]).to(dtype)
        read_as = None if dtype is base.tensor.dtype else dtype
        if read_as is not None:
            template, leaves = write_template(lifter, bank, read_as)
        if _gates(lifter, bank.tv) and not _linear_in_weight(evaluate, bank, x):
            near.append(f"{what}: the routing weight enters before a non-linear step")
            return ungated
        system = _gate_systems(trace, evaluate, bank, x, width, redraw)
        found = False
        for solution in solve_gates(trace, system, x.shape[0], width, x.shape[1]):
            found = True
            gates, support = solution.gates, solution.gates.support
            chosen, text, theta = bank, template, leaves
            if not bank.stacked and int(support.any(0).sum()) >= 2 and not bool(support.any(0).all()):
                used = torch.nonzero(support.any(0)).flatten().tolist()  # without the shared expert of the same kind
                ungated = lifter.names[bank.bindings[int((~support.any(0)).nonzero()[0])][0][0]]
                chosen = Bank(bank.tv, tuple(bank.bindings[e] for e in used), False)
                text, theta = write_template(lifter, chosen, read_as)
                gates, support = gates.of(used), support[:, used]
            explained = False
            for routing in explanations(trace, gates, chosen, solution.combined.index):
                if routing.kind in ("slots", "gather") and routing.top_k >= chosen.experts and bool(support.all()):
                    continue
                explained = True
                region = _region(lifter, chosen, text, theta, routing, identity=gates.identity is not None)
                yield Hypothesis(trace, region, base, routing, solution.combined, solution.residual)
            if not explained:
                dense = float(support.float().mean()) > 0.95
                made = f" (the sum is made at {solution.combined.line})"
                near.append(
                    f"{what}: every expert weighs every token (a dense mixture, nothing to route){made}"
                    if dense else f"{what}: residual {solution.residual:.1e}, but no router value explains the gates{made}"
                )  # fmt: skip
        if not found:
            near.append(f"{what}: no tensor of {x.shape[0]} rows is a weighted sum of expert outputs")
    return ungated


def _gate_systems(
    trace: Trace, evaluate: Evaluator, bank: Bank, x: Tensor, width: int, redraw: Callable[[int], Trace | None]
) -> Callable[[bool], GateSystem]:
    """The gate system without or with an identity part, with as many draws of expert parameters as it needs."""

    def outputs() -> Tensor:
        return torch.stack([evaluate(bank.tv, b, x) for b in bank.bindings], 1)

    def reader(t: Trace) -> Callable[[Value], Tensor | None]:
        def read(value: Value) -> Tensor | None:
            same = t.values[value.index].tensor
            return same.reshape(x.shape[0], width) if same.shape == value.shape else None

        return read

    draws = [(outputs(), reader(trace))]
    if width < bank.experts + 3:
        for seed in range(1, min(-(-2 * (bank.experts + 3) // width), 12) + 1):
            again = redraw(seed)
            if again is not None and len(again.values) == len(trace.values):
                draws.append((outputs(), reader(again)))
        redraw(0)  # the first parameters again
    lowest = precision([v.tensor for v in trace.values if v.tainted])
    return lambda identity: GateSystem(draws, x, identity, NOISE.get(lowest, 1e-5))


def _linear_in_weight(evaluate: Evaluator, bank: Bank, x: Tensor) -> bool:
    once, twice = (evaluate(bank.tv, bank.bindings[0], x, w) for w in (1.0, 2.0))
    return torch.allclose(2 * once, twice, rtol=1e-6, atol=1e-9 * float(once.abs().max()))


def _input_side(
    trace: Trace,
    lifter: Lifter,
    evaluate: Evaluator,
    bank: Bank,
    template: Template,
    leaves: tuple[Leaf, ...],
    near: list[str],
    what: str,
) -> Iterator[Hypothesis]:
    """Weights on the experts' input: y[t] = sum_e f(G[t,e] * x_t; theta_e)."""
    width = lifter.nodes[bank.tv].width
    if _gates(lifter, bank.tv):
        return
    for base, gates in scaled_bases(trace, lifter, bank):
        x = base.tensor.reshape(-1, base.shape[-1]).double()
        total = torch.zeros(x.shape[0], width, dtype=torch.float64)
        for e, binding in enumerate(bank.bindings):
            column = gates[:, e : e + 1]
            total += torch.where(
                column != 0, evaluate(bank.tv, binding, (column * x).to(base.tensor.dtype)).double(), 0.0
            )
        for value in trace.values:
            if value.tainted and _is_rows(value, width) and value.tensor.numel() == total.numel():
                y = value.tensor.reshape(total.shape).double()
                residual = float((y - total).norm() / total.norm().clamp_min(1e-300))
                if residual > TOLERANCE.get(value.tensor.dtype, 1e-6):
                    continue
                for routing in explanations(trace, Gates(gates, None), bank, value.index):
                    region = _region(lifter, bank, template, leaves, routing, weight_position="input")
                    yield Hypothesis(trace, region, base, routing, value, residual)
    near.append(f"{what}: nor are weights found on the input side")


class Unreached(Exception):
    """Some listed expert seems to have had no token in this run."""


def check_reached(module: nn.Module, lifter: Lifter) -> None:
    """Raises Unreached when matrices are shaped like those of listed experts, and no expert uses them."""
    found = banks(lifter)
    if not found or found[0].stacked:
        return
    leaves = write_template(lifter, found[0])[1]
    used = {name for leaf in leaves for name in leaf.params}
    tensors = dict(module.named_parameters())
    listed = [leaf for leaf in leaves if len(leaf.shape) == 2 and not leaf.stacked]
    shapes = {tuple(tensors[name].shape) for leaf in listed for name in leaf.params if name in tensors}
    missing = [name for name, p in tensors.items() if name not in used and tuple(p.shape) in shapes]
    if missing:
        raise Unreached(f"no token reached the expert that owns {missing[0]}")


def side_effects(trace: Trace) -> None:
    """Raises Decline for what a replay cannot keep."""
    before = [v for v in trace.inputs if isinstance(v, Value)]
    for old, new in zip(before, trace.inputs_after):
        if old is not new:
            raise Decline(
                "the block changes its input in place, which a rewritten block would not do at the same moment"
            )
    if any(v.tensor.is_complex() for v in before):
        raise Decline("the block takes complex inputs")


__all__ = [
    "Hypothesis",
    "Lifter",
    "Routing",
    "expert_groups",
    "hypotheses",
    "Unreached",
    "check_reached",
    "side_effects",
]
