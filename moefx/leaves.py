"""The user's parameters seen as stacked leaves [E, ...], in place where possible, and their gradients.

Parameters stay the user's objects. Three cases, decided per leaf:
 - in one parameter at a constant distance: a strided view;
 - in E parameters, at the same place in each: the parameters are made views of one buffer (`pack`), then as above.
   Moving or casting the model dissolves the buffer; it is noticed by address and the parameters are packed again;
 - anything else (parameters tied, of unequal strides or subclasses): a copy per call, right but slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, repeat
from operator import attrgetter, is_not

import torch
from torch import Tensor

from moefx.ir import Leaf, numel

_dtype = attrgetter("dtype")


def packed(params: Sequence[Tensor]) -> bool:
    """Whether the parameters lie one behind the other in one storage."""
    first = params[0]
    step = first.numel() * first.element_size()
    start = first.data_ptr()
    # At each call, for hundreds of parameters: loops in C.
    if [*map(Tensor.data_ptr, params)] != [start + i * step for i in range(len(params))]:
        return False
    if any(map(is_not, map(_dtype, params), repeat(first.dtype))):
        return False
    # Two storages may happen to be neighbours: the first one must reach to the end.
    room = first.untyped_storage().nbytes() - first.storage_offset() * first.element_size()
    return room >= step * len(params) and all(map(Tensor.is_contiguous, params))


def packable(params: Sequence[Tensor]) -> bool:
    """Distinct plain parameters of one shape, dtype and device, contiguous, and not computed from others."""
    first = params[0]
    alike = all(
        type(p) in (Tensor, torch.nn.Parameter)
        and p.is_leaf
        and (p.shape, p.dtype, p.device) == (first.shape, first.dtype, first.device)
        and p.is_contiguous()
        for p in params
    )
    return alike and first.numel() > 0 and len({id(p) for p in params}) == len(params)


def pack(params: Sequence[Tensor]) -> None:
    """Makes the parameters views of one new buffer, each keeping its object and values."""
    # Inference tensors could never be trained again, so not even inside inference_mode.
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.empty((len(params), *params[0].shape), dtype=params[0].dtype, device=params[0].device)
        for place, p in zip(buffer, params):
            place.copy_(p)
            p.data = place


@dataclass(frozen=True)
class Lattice:
    """The elements offset + sum of i_d * strides[d], 0 <= i_d < shape[d]."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def injective(self) -> bool:
        """Sufficient: every stride steps over all that the smaller strides reach."""
        reach = 0
        for stride, size in sorted((s, n) for s, n in zip(self.strides, self.shape) if n > 1):
            if stride <= reach:
                return False
            reach += stride * (size - 1)
        return True

    def disjoint(self, other: Lattice) -> bool:
        """Sufficient: side by side, or the two together are one injective lattice with one dimension more."""
        if self.strides != other.strides:
            a, b = sorted((self, other), key=lambda x: x.offset)
            return a.offset + sum(s * (n - 1) for s, n in zip(a.strides, a.shape)) < b.offset
        shape = tuple(max(m, n) for m, n in zip(self.shape, other.shape))
        return Lattice(0, (2, *shape), (abs(self.offset - other.offset), *self.strides)).injective()


@dataclass(frozen=True)
class Group:
    """Parameters `names` (one, or E of equal shape) that hold leaves as strided views; `leaves`: their numbers."""

    names: tuple[str, ...]
    leaves: tuple[int, ...]


def _placed(leaf: Leaf) -> bool:
    """Whether the leaf is one strided view of its parameter or of its packed parameters."""
    if leaf.stacked:
        return leaf.experts == 1 or leaf.expert_stride is not None
    return len(set(leaf.params)) == leaf.experts and len(set(leaf.offsets)) == 1


class LeafBinder:
    """Binds the leaves of a region to parameters given by name. Immutable, but for what it remembers of sizes."""

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves = leaves
        self.names = tuple(dict.fromkeys(name for leaf in leaves for name in leaf.params))
        self.groups, self.loose = self._group()
        self._lattices: dict[tuple[int, int], Lattice] = {}
        self._direct: dict[tuple[Group, int], list[int]] = {}
        self._blocks: dict[frozenset[str], list[tuple[str, ...]]] = {}
        # Each leaf lies in one parameter: what is bound, and what gradients look like, follows from the parameters' geometry.
        self.in_parameters = not self.loose and all(len(group.names) == 1 for group in self.groups)

    def _group(self) -> tuple[tuple[Group, ...], tuple[int, ...]]:
        """Leaves that share their list of parameters form a group; a parameter belongs to one group at most."""
        by_params: dict[tuple[str, ...], list[int]] = {}
        owner: dict[str, tuple[str, ...]] = {}
        loose = []
        for i, leaf in enumerate(self.leaves):
            names = leaf.params[:1] if leaf.stacked else leaf.params
            if _placed(leaf) and all(owner.setdefault(name, names) == names for name in names):
                by_params.setdefault(names, []).append(i)
            else:
                loose.append(i)
        return tuple(Group(names, tuple(leaves)) for names, leaves in by_params.items()), tuple(loose)

    # -------------------------------------------------------------------------------------------- values

    def bind(self, params: dict[str, Tensor], may_pack: bool = True) -> tuple[list[Tensor], list[str]]:
        """Every leaf as [E, ...] ([1, ...] when shared), without gradient; and notes on what had to be copied.

        may_pack: whether the parameters may be made views of one buffer; else those that are not are copied.
        """
        bound: dict[int, Tensor] = {}
        notes = []
        for group in self.groups:
            members = [params[name] for name in group.names]
            if len(members) > 1 and not packed(members):
                if not may_pack or not packable(members):
                    why = "not packable" if may_pack else "not packed before"
                    notes.append(f"copied at each call, {why}: {group.names[0]} ... {group.names[-1]}")
                    bound.update((i, self._copied(i, params)) for i in group.leaves)
                    continue
                pack(members)
            base = members[0].detach()
            if not base.is_contiguous():
                notes.append(f"copied at each call, not contiguous: {group.names[0]}")
                base = base.contiguous()
            bound.update((i, self._view(i, base, base.numel(), int(base.storage_offset()))) for i in group.leaves)
        for i in self.loose:
            notes.append(f"copied at each call, no constant distance between experts: leaf{i}")
            bound[i] = self._copied(i, params)
        return [bound[i] for i in range(len(self.leaves))], notes

    def shaped(self, params: dict[str, Tensor]) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes that `bind` gives: what a run on shapes alone needs."""
        return [
            params[leaf.params[0]].new_empty(self._lattice(i, 0).shape) for i, leaf in enumerate(self.leaves)
        ]

    def _lattice(self, i: int, member_numel: int) -> Lattice:
        """Where leaf i lies in its group's storage of [members, member_numel]."""
        known = self._lattices.get((i, member_numel))
        if known is None:
            leaf = self.leaves[i]
            shape, strides = (leaf.shape, leaf.strides) if leaf.shape else ((1,), (1,))
            step = member_numel if not leaf.stacked else (leaf.expert_stride or 0)
            known = Lattice(leaf.offsets[0], (1 if leaf.shared else leaf.experts, *shape), (step, *strides))
            self._lattices[i, member_numel] = known
        return known

    def _view(self, i: int, base: Tensor, member_numel: int, start: int) -> Tensor:
        lattice = self._lattice(i, member_numel)
        return base.as_strided(lattice.shape, lattice.strides, start + lattice.offset)

    def _copied(self, i: int, params: dict[str, Tensor]) -> Tensor:
        return torch.stack([piece.contiguous() for piece in self._pieces(i, params)])

    def _pieces(self, i: int, values: dict[str, Tensor]) -> Iterator[Tensor]:
        """The leaf of each expert, as a view into `values` where these are contiguous."""
        leaf = self.leaves[i]
        shape, strides = (leaf.shape, leaf.strides) if leaf.shape else ((1,), (1,))
        experts = list(zip(leaf.params, leaf.offsets))[: 1 if leaf.shared else None]
        for name, offset in experts:
            value = values[name].detach().contiguous()
            yield value.as_strided(shape, strides, value.storage_offset() + offset)

    # -------------------------------------------------------------------------------------------- gradients

    def blocks(self, params: Mapping[str, Tensor], wanted: set[str]) -> list[tuple[str, ...]]:
        """The parameters whose gradients are made together, as one tensor [n, *shape]: those `wanted` and their kind."""
        if not self.in_parameters:
            return self._blocks_of(params, wanted)
        key = frozenset(wanted)
        if key not in self._blocks:
            self._blocks[key] = self._blocks_of(params, wanted)
        return self._blocks[key]

    def _blocks_of(self, params: Mapping[str, Tensor], wanted: set[str]) -> list[tuple[str, ...]]:
        together = self._together(params, wanted)
        names = {name: None for group in together for name in group.names}
        apart = {n: None for i in self._apart(together, wanted) for n in self.leaves[i].params if n not in names}
        return [group.names for group in together] + [(name,) for name in apart]

    def _together(self, params: Mapping[str, Tensor], wanted: set[str]) -> list[Group]:
        """The groups whose parameters are alike."""

        def alike(group: Group) -> bool:
            first, *rest = (params[name] for name in group.names)
            return all(m.shape == first.shape and m.dtype == first.dtype for m in rest)

        return [group for group in self.groups if not wanted.isdisjoint(group.names) and alike(group)]

    def _apart(self, together: list[Group], wanted: set[str]) -> list[int]:
        """Leaves that the blocks of the groups have no place for."""
        placed = {i for group in together for i in group.leaves}
        return [i for i, leaf in enumerate(self.leaves) if i not in placed and not wanted.isdisjoint(leaf.params)]

    def gradients(self, params: dict[str, Tensor], wanted: set[str]) -> LeafGradients:
        """Buffers for the gradients of the parameters `wanted`."""
        result = LeafGradients([None] * len(self.leaves), [], [])
        together = self._together(params, wanted)
        loose = self._apart(together, wanted)
        for group in together:
            first, members = params[group.names[0]], len(group.names)
            direct = self._written(group, first.numel())
            filled = sum(numel(self._lattice(i, first.numel()).shape) for i in direct) == first.numel() * members
            buffer = (first.new_empty if filled else first.new_zeros)((members, *first.shape))
            for i in direct:
                result.leaves[i] = self._view(i, buffer, first.numel(), 0)
            loose += [i for i in group.leaves if i not in direct]
            result.blocks.append((group.names, buffer))
        for names in self.blocks(params, wanted)[len(together) :]:
            like = params[names[0]]
            result.blocks.append((names, torch.zeros((1, *like.shape), dtype=like.dtype, device=like.device)))
        for i in loose:
            first = params[self.leaves[i].params[0]]
            shape = self._lattice(i, 0).shape
            temporary = torch.zeros(shape, dtype=first.dtype, device=first.device)
            result.leaves[i] = temporary
            result.pending.append((temporary, list(self._pieces(i, result.params))))
        return result

    def _written(self, group: Group, member_numel: int) -> list[int]:
        """Leaves that may be written straight into the group's buffer: none overlaps itself or another."""
        if (group, member_numel) not in self._direct:
            lattices = {i: self._lattice(i, member_numel) for i in group.leaves}
            own = [i for i, lattice in lattices.items() if lattice.injective()]
            clash = {j for i, j in combinations(own, 2) if not lattices[i].disjoint(lattices[j])}
            self._direct[group, member_numel] = [i for i in own if i not in clash]
        return self._direct[group, member_numel]


@dataclass(frozen=True)
class LeafGradients:
    """leaves: where the gradient of each leaf goes (None: nobody wants it); blocks: see `LeafBinder.blocks`."""

    leaves: list[Tensor | None]
    blocks: list[tuple[tuple[str, ...], Tensor]]
    pending: list[tuple[Tensor, list[Tensor]]]

    @property
    def params(self) -> dict[str, Tensor]:
        """Each parameter's gradient, a view of its block."""
        return {name: piece for names, block in self.blocks for name, piece in zip(names, block)}

    def finish(self) -> dict[str, Tensor]:
        """Adds what was computed apart; the gradients by parameter name."""
        for temporary, pieces in self.pending:
            for value, piece in zip(temporary, pieces):
                piece.add_(value)
        return self.params
