"""Step 4 of `find`: a gate matrix, explained by recorded router values: ids and weights of slots, or a dense tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from moefx.passes._experts import Bank
from moefx.passes._gates import (
    Gates,
)
from torch import Tensor

from moefx.routing import Routing, dense_gates, of_all_tokens, slots
from moefx.trace import Trace, Value, values_in

MAX_LABEL = 1 << 14  # larger integers are not expert ids
MAX_SLOTS = 64  # routing slots K considered per token


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
    yield from _dense(gates, bank, [*floats, *masks], [None])
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
    """G is a recorded [T, E] tensor, or a mask [T, E] times one recorded weight per token; tokens without gates may pass."""
    (tokens, experts), support = gates.matrix.shape, gates.support
    if float(support.float().mean()) > 0.95:
        return
    rest = gates.identity is not None
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
                made = made[:, list(order)]
                scale = gates.scale_of(made, _passing(made, gates))
                if scale is not None:
                    kept = None if order == tuple(range(columns.shape[1])) else order
                    most = int(support.sum(1).max())
                    from_end = axis - mask.tensor.dim()
                    if factor is None:
                        yield Routing("dense", most, None, mask, scale, axis=from_end, order=kept, rest=rest)
                    else:
                        yield Routing("masked", most, mask, factor, scale, axis=from_end, order=kept, rest=rest)


def _passing(made: Tensor, gates: Gates) -> Tensor:
    """How much of each token passes [T]: nothing, or where some do all of those without a gate."""
    return (made == 0).all(1).double() if gates.identity is not None else torch.zeros(len(made), dtype=torch.float64)


def _column_order(made: Tensor, gates: Gates, bank: Bank) -> tuple[int, ...] | None:
    """For each expert the column of `made` that is its gate."""
    experts = gates.matrix.shape[1]
    if bank.stacked or made.shape[1] == experts and gates.scale_of(made, _passing(made, gates)) is not None:
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
    """Each expert picks its tokens, of all or of each sequence."""
    tokens, experts = gates.matrix.shape
    if gates.identity is not None:
        return
    for ids in integers:
        t = ids.tensor
        if t.dim() < 2 or t.numel() % experts or int(t.min()) < 0:
            continue
        for apart in (False, True) if t.dim() > 2 and t.shape[0] > 1 and tokens % t.shape[0] == 0 else (False,):
            if int(t.max()) >= (tokens // t.shape[0] if apart else tokens):
                continue
            picked = of_all_tokens(t, tokens) if apart else t
            for axis in (1 if apart else 0, t.dim() - 1):
                if t.shape[axis] == experts:
                    yield from _choice(gates, ids, picked, axis, floats, apart)


def _choice(gates: Gates, ids: Value, picked: Tensor, axis: int, floats: list[Value], apart: bool) -> Iterator[Routing]:
    """Axis `axis` of the tokens `picked`, which `ids` stands for, counts experts."""
    tokens, experts = gates.matrix.shape
    chosen = picked.movedim(axis, 0).reshape(experts, -1).long()
    if chosen.shape[1] > tokens:
        return
    for w in [*floats, None]:
        if w is not None and w.shape != ids.shape:
            continue
        weights = torch.ones(chosen.shape) if w is None else w.tensor.movedim(axis, 0).reshape(experts, -1)
        made = torch.zeros(experts, tokens, dtype=torch.float64).scatter_add_(1, chosen, weights.double()).t()
        if (scale := gates.scale_of(made, torch.zeros(tokens))) is not None:
            yield Routing("choice", chosen.shape[1], ids, w, scale, axis=axis, apart=apart)


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
