"""Steps 2 and 3 of `find`: which recorded tensor holds the tokens, and the gate matrix for which the experts' outputs make a later
tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from moefx.passes._experts import Bank
from moefx.passes._keys import hash_rows
from moefx.passes._lift import Lifter, Piece
from torch import Tensor

from moefx.trace import Trace, Value

MAX_ORDERS = 3  # in which the same tokens are tried
MAX_SUMS = 12  # candidate combined outputs that are explained per token base
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# how exact solved gates are, relative to the largest, where the experts compute in 16 bits on purpose; else 1e-5
NOISE = {torch.float16: 1e-2, torch.bfloat16: 3e-2}


# ------------------------------------------------------------------------------------------------ 2. tokens


def token_bases(trace: Trace, lifter: Lifter, bank: Bank) -> list[tuple[Value, torch.dtype]]:
    """Recorded tensors that hold every row fed to the experts, and in which dtype the experts read it (their own, unless
    the block casts on the way): those of the fewest rows first, of each number of rows the earliest of each order of them."""
    width = token_width(lifter, bank.tv)
    hashes = lifter.token_hashes()
    tokens = {lifter.rows[r].token for rows in lifter.uses[bank.tv].values() for r in rows} - {None, 0}
    wanted = torch.tensor([hashes[t] for t in tokens if t is not None])
    found: dict[int, list[tuple[Value, torch.dtype]]] = {}
    orders: set[tuple[int, ...]] = set()
    for value in trace.values:
        if is_rows(value, width) and not value.tainted and value.origin in ("input", "call"):
            rows = value.tensor.reshape(-1, width)
            bases = found.setdefault(rows.shape[0], [])
            if len(bases) == MAX_ORDERS:
                continue
            for dtype in sorted({rows.dtype} | lifter.token_dtypes, key=lambda d: d is not rows.dtype):
                held = hash_rows(rows.to(dtype))
                if bool(torch.isin(wanted, held).all()) and (order := tuple(held.tolist())) not in orders:
                    orders.add(order)
                    bases.append((value, dtype))
                    break
    return [base for n in sorted(found) for base in found[n]]


def scaled_bases(trace: Trace, lifter: Lifter, bank: Bank) -> list[tuple[Value, Tensor]]:
    """For weights on the input side: tensors of which every row fed to an expert is a multiple, and the factors G [T, E]."""
    width = token_width(lifter, bank.tv)
    fed = {
        e: _rows_fed(trace, lifter, bank.tv, b, width) for e, b in enumerate(bank.bindings) if b in lifter.uses[bank.tv]
    }
    found: list[tuple[Value, Tensor]] = []
    for value in trace.values:
        if (
            not is_rows(value, width)
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
        if wanted and is_rows(value, width):
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


def is_rows(value: Value, width: int) -> bool:
    return value.tensor.is_floating_point() and value.tensor.dim() >= 1 and value.shape[-1] == width


def token_width(lifter: Lifter, tv: int) -> int:
    node = lifter.nodes[tv]
    if node.kind == "x":
        return node.width
    return next((w for child, _ in node.children if (w := token_width(lifter, child))), 0)


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
    rows = [v for v in trace.values if v.tainted and is_rows(v, width) and v.tensor.numel() == tokens * width]
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
