"""Which experts a rank holds: the region that its leaves make, and what becomes of each parameter.

Rank p of P holds experts p*m to (p+1)*m - 1, m = ceil(E / P), the last ones fewer or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefx.errors import Decline
from moefx.exchange import experts_of
from moefx.ir import Leaf, Region
from moefx.leaves import LeafBinder, LeafGradients


@dataclass(frozen=True)
class Holding:
    """What a rank holds of a region: stacked parameters to cut on dim 0, parameters that are others' own, and those that all
    experts share, of which every rank has a copy."""

    region: Region
    stacked: tuple[str, ...]
    elsewhere: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def own(self) -> frozenset[str]:
        """The parameters of which this rank alone has a part, empty where it holds no experts."""
        here = {n for leaf in self.region.leaves for n in leaf.params if n not in self.shared}
        return frozenset(here.union(self.stacked))


@dataclass(frozen=True)
class Absent(Leaf):
    """A leaf on a rank without experts, of what dtype and device they are elsewhere. part: the parameter, if it is here, cut
    to nothing or shared. trained: elsewhere, so that all ranks have a backward to run."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    part: str = ""
    trained: bool = False


class NoExperts(LeafBinder):
    """Leaves of no expert, [0, ...], so that a rank without experts runs the plan of all. Gradients of what it has are zero."""

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves, self.groups, self.loose = leaves, (), ()
        self.absent = [leaf for leaf in leaves if isinstance(leaf, Absent)]
        self.names = tuple(dict.fromkeys(leaf.part for leaf in self.absent if leaf.part))

    def bind(self, params: dict[str, Tensor], may_pack: bool = True) -> tuple[list[Tensor], list[str]]:
        here = [params[leaf.part] if leaf.part else leaf for leaf in self.absent]  # they move with the model
        sizes = [(0, *(leaf.shape or (1,))) for leaf in self.absent]
        return [torch.empty(size, dtype=at.dtype, device=at.device) for size, at in zip(sizes, here)], []

    def gradients(self, params: dict[str, Tensor], wanted: set[str]) -> LeafGradients:
        result = LeafGradients([None] * len(self.leaves), [], [])
        for name in self.names:
            if name in wanted:
                result.blocks.append(((name,), torch.zeros_like(params[name]).unsqueeze(0)))
        return result


def holding(region: Region, params: Mapping[str, Tensor], ranks: int, rank: int) -> Holding:
    """This rank's experts as a region of their own (K = 1, without weights). Decline, on all ranks, where they cannot be spread."""
    _check_owners(region, params, ranks)
    experts = region.experts
    held = experts_of(experts, ranks, rank)
    stacked, elsewhere, shared, leaves = dict[str, None](), dict[str, None](), dict[str, None](), list[Leaf]()
    for i, leaf in enumerate(region.leaves):
        name, here, offsets = leaf.params[0], range(held.start, held.stop), leaf.offsets
        if leaf.shared:
            shared[name] = None
            here = range(len(held))
        elif leaf.stacked:
            step = _expert_size(i, leaf, params[name], ranks)
            stacked[name] = None
            offsets = tuple(offset - held.start * step for offset in offsets)
        else:
            elsewhere.update(dict.fromkeys(leaf.params[e] for e in range(experts) if e not in held))
        local = replace(leaf, params=tuple(leaf.params[e] for e in here), offsets=tuple(offsets[e] for e in here))
        if not held:
            at, part = params[name], name if leaf.shared or leaf.stacked else ""
            local = Absent(leaf.shape, leaf.strides, (), (), leaf.read_as, at.dtype, at.device, part, at.requires_grad)
        leaves.append(local)
    local_region = replace(
        region, experts=len(held), top_k=1, leaves=tuple(leaves), weight_position="none", identity=False
    )  # fmt: skip
    return Holding(local_region, tuple(stacked), tuple(elsewhere), tuple(shared))


def _check_owners(region: Region, params: Mapping[str, Tensor], ranks: int) -> None:
    """Declines experts in what is no parameter, and such that are modules of their own and share a parameter with those of another
    rank."""
    if other := next((n for leaf in region.leaves for n in leaf.params if n not in params), ""):
        raise Decline(f"{other} is no parameter: it is a buffer, or computed at each call (torch.nn.utils.parametrize)")
    owner: dict[str, int] = {}
    for leaf in region.leaves:
        if not (leaf.shared or leaf.stacked):
            for rank in range(ranks):
                for name in (leaf.params[e] for e in experts_of(region.experts, ranks, rank)):
                    if owner.setdefault(name, rank) != rank:
                        raise Decline(f"experts of several ranks use the parameter {name}")


def _expert_size(i: int, leaf: Leaf, param: Tensor, ranks: int) -> int:
    """Elements of one expert in a parameter that stacks them on dim 0. Decline where its pieces are not whole experts."""
    experts, name = leaf.experts, leaf.params[0]
    step = param.numel() // experts
    reach = sum(s * (n - 1) for s, n in zip(leaf.strides, leaf.shape))
    apart = all(e * step <= o and o + reach < (e + 1) * step for e, o in enumerate(leaf.offsets))
    rows = param.shape[0] // experts if param.dim() else 0
    whole = rows and param.shape[0] % experts == 0 and -(-param.shape[0] // ranks) == rows * -(-experts // ranks)
    if not (apart and whole and min(leaf.strides, default=1) > 0):
        raise Decline(
            f"leaf{i} of {name} {tuple(param.shape)}: its {experts} experts do not lie one behind the other on dim 0 in a way "
            f"that {ranks} equal pieces would be whole experts"
        )
    return step
