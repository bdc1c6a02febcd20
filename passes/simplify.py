"""simplify: the same function with fewer launches: no dead instruction or leaf, linears on the same rows joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template
from moefx.segments import leaf_refs, live, operands


def simplify(region: Region) -> Region:
    """region --> region without dead parts, in which linears that can share a launch do."""
    region = _drop_dead(region)
    while (joined := _join_two_linears(region)) is not None:
        region = joined
    return _drop_dead(region)


def _renumber(value: Any, values: dict[int, int], leaves: dict[int, int]) -> Any:
    if isinstance(value, Ref):
        return Ref(values[value.index])
    if isinstance(value, LeafRef):
        return LeafRef(leaves[value.index])
    if isinstance(value, (tuple, list)):
        return tuple(_renumber(v, values, leaves) for v in value)
    return value


def _move(instr: Instr, values: dict[int, int], leaves: dict[int, int]) -> Instr:
    """`instr` with its references renumbered."""
    args = _renumber(instr.args, values, leaves)
    return replace(instr, args=args, kwargs=tuple((k, _renumber(v, values, leaves)) for k, v in instr.kwargs))


def _drop_dead(region: Region) -> Region:
    instrs = region.template.instrs
    alive = live(region.template)
    used = sorted({r.index for i in alive for r in leaf_refs(operands(instrs[i]))})
    values = {old: new for new, old in enumerate(alive)}
    leaves = {old: new for new, old in enumerate(used)}
    template = Template(tuple(_move(instrs[i], values, leaves) for i in alive))
    return replace(region, template=template, leaves=tuple(region.leaves[i] for i in used))


def join_leaves(a: Leaf, b: Leaf) -> tuple[Leaf, tuple[int, int, int], tuple[int, int, int]] | None:
    """One wider matrix leaf holding the columns of `a` and `b`, with each one's (start, stop, step), or None.

    Possible when both lie in the same parameters at a constant distance: side by side, or column by column in turn.
    """
    same = a.params == b.params and len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[0]
    distances = {q - p for p, q in zip(a.offsets, b.offsets)}
    if not same or a.strides != b.strides or len(distances) != 1:
        return None
    distance, step = distances.pop(), a.strides[1]
    width_a, width_b = a.shape[1], b.shape[1]
    total = width_a + width_b
    if distance == width_a * step:
        return replace(a, shape=(a.shape[0], total)), (0, width_a, 1), (width_a, total, 1)
    if width_a == width_b and 2 * distance == step:
        wide = replace(a, shape=(a.shape[0], total), strides=(a.strides[0], distance))
        return wide, (0, total, 2), (1, total, 2)
    return None


def _join_two_linears(region: Region) -> Region | None:
    """Joins the first two linears on the same rows whose leaves join; None when there are none."""
    instrs = region.template.instrs
    linears = [i for i, instr in enumerate(instrs) if instr.kind == "linear"]
    for i in linears:
        for j in linears:
            (rows_i, leaf_i), (rows_j, leaf_j) = instrs[i].args, instrs[j].args
            if i == j or rows_i != rows_j or leaf_i == leaf_j:
                continue
            if joined := join_leaves(region.leaves[leaf_i.index], region.leaves[leaf_j.index]):
                return _with_joined(region, i, j, joined[0], joined[1], joined[2])
    return None


def _with_joined(
    region: Region, i: int, j: int, wide: Leaf, columns_i: tuple[int, int, int], columns_j: tuple[int, int, int]
) -> Region:
    """Linears i and j become columns of one linear with the new last leaf `wide`, put where the first one stood."""
    instrs: list[Instr] = []
    values: dict[int, int] = {}
    same_leaves = {n: n for n in range(len(region.leaves))}
    together = -1
    for old, instr in enumerate(region.template.instrs):
        if old in (i, j):
            if together < 0:
                together = len(instrs)
                rows = _renumber(instr.args[0], values, {})
                leaf = LeafRef(len(region.leaves))
                instrs.append(Instr("linear", args=(rows, leaf), width=wide.shape[1]))
            columns = columns_i if old == i else columns_j
            instrs.append(Instr("columns", args=(Ref(together), *columns), width=instr.width))
        else:
            instrs.append(_move(instr, values, same_leaves))
        values[old] = len(instrs) - 1
    return _drop_dead(replace(region, template=Template(tuple(instrs)), leaves=(*region.leaves, wide)))
