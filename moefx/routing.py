"""How router values of any layout become the region's inputs: ids [T, K] and weights w [T, K]."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moefx.ir import Region
from moefx.trace import Trace, Value


@dataclass(frozen=True)
class Routing:
    """How recorded values explain the gate matrix G [T, E].

    kind "slots":   G[t, ids[t,k]] += scale * w[t,k];  w None means weight 1; ids_transposed: ids and w are [K, T].
    kind "gather":  G[t, ids[t,k]] += scale * w[t, ids[t,k]]   with w [T, E'].
    kind "dense":   G = scale * w, whose axis `axis` counts experts; further axes beside the tokens are summed out.
    kind "masked":  G = scale * ids * w    with a mask ids [T, E] and one weight w per token; axes as for "dense".
    kind "choice":  G[ids[e,c], e] += scale * w[e,c]           (expert choice); apart: ids [B, ...] number the tokens of each of
                    B sequences.
    keep: a mask of slots (kinds "slots" and "gather"); the others are dropped, as where a capacity is exceeded.
    rest: tokens without any gate pass the experts unchanged (kinds "dense" and "masked").
    order[l] is the expert that label l of the router means (None: the labels are the experts' own order).
    """

    kind: str
    top_k: int
    ids: Value | None
    w: Value | None
    scale: float = 1.0
    ids_transposed: bool = False
    axis: int = -1
    order: tuple[int, ...] | None = None
    keep: Value | None = None
    rest: bool = False
    apart: bool = False
    scaled: bool = field(init=False, repr=False)  # a constant for Dynamo, which numbers may not be

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaled", self.scale != 1.0)

    @property
    def values(self) -> tuple[Value, ...]:
        """The recorded values it is made of."""
        return tuple(v for v in (self.ids, self.w, self.keep) if v is not None)

    def alone(self) -> Routing:
        """Without the recorded values, and so without the run that they are of."""
        return replace(self, ids=None, w=None, keep=None)

    def slots(self, experts: int) -> int:
        """Slots per token of the region's ids: K, or one per expert where the gates are dense."""
        return self.top_k if self.kind in ("slots", "gather") else experts + self.rest

    def __str__(self) -> str:
        text = {
            "slots": f"top-{self.top_k} ids and weights",
            "gather": f"top-{self.top_k} ids, weights gathered from dense scores",
            "dense": "dense gate matrix with zeros",
            "masked": "dense mask, one weight per token",
            "choice": f"expert choice: each expert picks its tokens{' of each sequence' if self.apart else ''}",
        }[self.kind]
        return (
            text
            + ("" if self.w is not None else ", weight 1")
            + (", the rest passes" if self.rest else "")
            + (f", scaled by {self.scale:g}" if self.scaled else "")
        )


@dataclass(frozen=True)
class Hypothesis:
    """`combined` equals the region's output for tokens `x` and routing `routing`; everything else of the trace stays."""

    trace: Trace
    region: Region
    x: Value
    routing: Routing
    combined: Value
    residual: float


def slots(t: Tensor, k: int, transposed: bool) -> Tensor:
    """[T, K] from any layout with K last, or K first when `transposed`."""
    return t.reshape(k, -1).t() if transposed else t.reshape(-1, k)


def dense_gates(w: Tensor, axis: int, tokens: int) -> Tensor | None:
    """[T, E] from a tensor whose axis `axis` counts experts; axes between or behind the token axes are summed out."""
    moved = w.movedim(axis, -1)
    lead, count = 0, 1
    while lead < moved.dim() - 1 and count < tokens:
        count *= moved.shape[lead]
        lead += 1
    if count != tokens:
        return None
    return moved.reshape(tokens, -1, moved.shape[-1]).sum(1)


def of_all_tokens(ids: Tensor, tokens: int) -> Tensor:
    """Numbers of tokens from ids [B, ...] that number those of each of B sequences."""
    sequences = ids.shape[0]
    first = torch.arange(sequences, device=ids.device) * (tokens // max(sequences, 1))
    return ids + first.view(-1, *[1] * (ids.dim() - 1))


def region_inputs(
    routing: Routing, experts: int, tokens: int, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(ids [T, K], w [T, K] or None for weight 1) in the experts' own numbering; slots to skip carry id `experts`, and weight 0
    where tokens may pass."""
    if routing.kind == "choice":
        assert ids is not None
        found, weights = _of_choice(routing, experts, tokens, ids, w)
    elif routing.kind in ("dense", "masked"):
        assert w is not None
        found, weights = _of_dense(routing, experts, tokens, ids, w)
    else:
        assert ids is not None
        found, weights = _of_slots(routing, experts, tokens, ids, w, keep)
    if not routing.scaled:
        return found, weights
    if weights is None:
        return found, torch.full(found.shape, routing.scale, device=found.device)
    return found, weights * routing.scale


def _of_choice(routing: Routing, experts: int, tokens: int, ids: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Tokens ids [E, C] that each expert picks, with weights w [E, C]; [B, E, C] where it picks those of each sequence."""
    ids = of_all_tokens(ids, tokens) if routing.apart else ids
    ids = ids.movedim(routing.axis, 0).reshape(experts, -1).long()
    dtype = torch.get_default_dtype() if w is None else w.dtype
    weights = torch.ones(ids.shape, dtype=dtype, device=ids.device)
    if w is not None:
        weights = w.movedim(routing.axis, 0).reshape(experts, -1)
    gates = torch.zeros(experts, tokens, dtype=dtype, device=ids.device).scatter_add(1, ids, weights).t()
    chosen = torch.zeros(experts, tokens, dtype=torch.bool, device=ids.device).scatter(1, ids, True).t()
    every = torch.arange(experts, device=ids.device).expand(tokens, experts)
    return torch.where(chosen, every, experts), gates


def _of_dense(routing: Routing, experts: int, tokens: int, ids: Tensor | None, w: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gates w [T, E], or a mask ids [T, E] times w [T]: one slot per expert, and one for tokens that pass."""
    columns = w if routing.kind == "dense" or ids is None else ids
    if tokens == 0:
        slots = routing.slots(experts)
        return torch.zeros(0, slots, dtype=torch.int64, device=w.device), w.new_zeros(0, slots)
    gates = dense_gates(columns, columns.dim() + routing.axis, tokens)
    assert gates is not None
    gates = gates[:, list(routing.order)] if routing.order is not None else gates[:, :experts]
    without = (gates == 0).all(1, keepdim=True)
    if routing.kind == "masked":
        gates = gates * w.reshape(-1, 1)
    every = torch.arange(experts, device=w.device).expand(tokens, experts)
    labels = torch.where(gates != 0, every, experts)
    if routing.rest:
        labels = torch.cat([labels, labels.new_full((tokens, 1), experts)], 1)
        gates = torch.cat([gates, without.to(gates.dtype)], 1)
    return labels, gates


def _of_slots(
    routing: Routing, experts: int, tokens: int, ids: Tensor, w: Tensor | None, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Expert labels ids [T, K] with weights per slot, or gathered from dense scores."""
    labels = slots(ids, routing.top_k, routing.ids_transposed)
    weights: Tensor | None = None
    if routing.kind == "gather" and w is not None:
        weights = w.reshape(tokens, w.shape[-1]).gather(1, labels.long())
    elif w is not None:
        weights = slots(w, routing.top_k, routing.ids_transposed)
    if keep is not None:
        kept = slots(keep, routing.top_k, routing.ids_transposed)
        labels = torch.where(kept, labels, -1)
        weights = None if weights is None else torch.where(kept, weights, 0)
    if routing.order is not None:
        meaning = torch.tensor([*(e if e >= 0 else experts for e in routing.order), experts], device=labels.device)
        inside = (labels >= 0) & (labels < len(routing.order))
        labels = meaning[torch.where(inside, labels, len(routing.order)).long()]
    return labels, weights
