"""Routing metadata on the device: a stable sort by expert without host synchronisation or atomics.

Few slots are each compared with all others, in one launch. Many are sorted by counting, in two: the T*K slots are cut into
blocks of BLOCK slots, and the blocks into at most GROUPS groups; `count_kernel` counts the experts of each group,
`place_kernel` puts each slot at

    row = (slots of smaller experts)
        + (slots of this expert before: in earlier groups, in earlier blocks of the group, in the block itself).

Ids outside [0, E) count as expert E and so come last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moefx.codegen.triton_launch import cdiv, compiling, compiling_every_size, launch, on_device, power_of_2

BLOCK = 256
GROUPS = 64
FEW_SLOTS = 1024  # up to here all are compared with all


@triton.jit
def _experts_of(ids, slot, slots, experts):
    """The expert of each slot as int32; `experts` for an id outside [0, experts) and for a slot past the end."""
    id = tl.load(ids + slot, mask=slot < slots, other=-1)
    return tl.where((id >= 0) & (id < experts), id, experts).to(tl.int32)


@triton.jit(do_not_specialize=["slots"])
def place_few_kernel(ids, order, offsets, position, slots, experts, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Writes order [slots], position [slots], offsets [experts + 1]. Grid ((slots + experts + 1) / BLOCK,).

    Slot s of expert e has the key e * slots + s, and expert e begins at the key e * slots. The place of each in the sorted
    order is the number of smaller keys of slots.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bound = mine - slots  # from 0 on: an expert's begin, or the end of the last one
    expert = _experts_of(ids, mine, slots, experts)
    key = tl.where(bound < 0, expert * slots + mine, bound * slots)
    place = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, slots, STEP):
        other = start + tl.arange(0, STEP)
        other_key = _experts_of(ids, other, slots, experts) * slots + other
        smaller = (other < slots)[None, :] & (other_key[None, :] < key[:, None])
        place += tl.sum(smaller.to(tl.int32), axis=1)
    tl.store(order + place, mine.to(tl.int64), mask=bound < 0)
    tl.store(position + mine, tl.where(expert < experts, place, -1).to(tl.int64), mask=bound < 0)
    tl.store(offsets + bound, place, mask=(bound >= 0) & (bound <= experts))


@triton.jit(do_not_specialize=["slots", "group_blocks"])
def count_kernel(ids, before, counts, slots, group_blocks, experts, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """ids [slots] -> before [blocks, BINS], counts [groups, BINS]. Grid (groups,): program g counts group g.

    counts[g, e]: slots of expert e in group g; before[b, e]: those in the blocks of b's group before block b.
    """
    group = tl.program_id(0)
    bins = tl.arange(0, BINS)
    seen = tl.zeros((BINS,), dtype=tl.int32)
    for i in range(group_blocks):
        block = group * group_blocks + i
        tl.store(before + block * BINS + bins, seen)
        expert = _experts_of(ids, block * BLOCK + tl.arange(0, BLOCK), slots, experts)
        seen += tl.histogram(expert, BINS)
    tl.store(counts + group * BINS + bins, seen)


@triton.jit(do_not_specialize=["slots", "group_blocks", "groups"])
def place_kernel(
    ids, before, counts, order, offsets, position, slots, group_blocks, groups, experts,
    BLOCK: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, GROUP_STEP: tl.constexpr,
):  # fmt: skip
    """Writes order [slots], position [slots], offsets [experts + 1]. Grid (blocks,): program b places block b."""
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)

    total = tl.zeros((BINS,), dtype=tl.int32)  # slots of each expert
    earlier = tl.load(before + block * BINS + bins)  # ... in the blocks before this one
    for g0 in range(0, groups, GROUP_STEP):
        g = g0 + tl.arange(0, GROUP_STEP)[:, None]
        count = tl.load(counts + g * BINS + bins[None, :], mask=g < groups, other=0)
        total += tl.sum(count, axis=0)
        earlier += tl.sum(tl.where(g < block // group_blocks, count, 0), axis=0)
    first = tl.cumsum(total, axis=0) - total  # first row of each expert
    if block == 0:
        tl.store(offsets + bins, first, mask=bins <= experts)

    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    expert = _experts_of(ids, slot, slots, experts)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)  # slots of the same expert before this one in the block
    for l0 in range(0, BLOCK, STEP):
        other_lane = l0 + tl.arange(0, STEP)
        other = _experts_of(ids, block * BLOCK + other_lane, slots, experts)
        same = (expert[:, None] == other[None, :]) & (other_lane[None, :] < lane[:, None])
        rank += tl.sum(same.to(tl.int32), axis=1)

    row = tl.gather(first + earlier, expert, 0) + rank
    tl.store(order + row, slot.to(tl.int64), mask=slot < slots)
    tl.store(position + slot, tl.where(expert < experts, row, -1).to(tl.int64), mask=slot < slots)


def route(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids [T, K] -> order [T*K] int64, offsets [E+1] int32, position [T, K] int64; see `moefx.ops.route`."""
    ids = ids.contiguous()
    slots = ids.numel()
    allocate = ids.new_zeros if compiling() else ids.new_empty  # what takes rows by these numbers runs in either case
    order = allocate(slots, dtype=torch.int64)
    offsets = allocate(experts + 1, dtype=torch.int32)
    position = allocate(ids.shape, dtype=torch.int64)
    with on_device(ids):
        if slots <= FEW_SLOTS or compiling_every_size():
            grid = (cdiv(slots + experts + 1, 32),)
            launch(place_few_kernel, grid, ids, order, offsets, position, slots, experts, BLOCK=32, STEP=128)
        if slots > FEW_SLOTS or compiling_every_size():
            _count_and_place(ids, experts, order, offsets, position)
    return order, offsets, position


def _count_and_place(
    ids: torch.Tensor, experts: int, order: torch.Tensor, offsets: torch.Tensor, position: torch.Tensor
) -> None:
    slots = ids.numel()
    blocks = max(1, cdiv(slots, BLOCK))
    group_blocks = cdiv(blocks, GROUPS)
    groups = cdiv(blocks, group_blocks)
    bins = power_of_2(experts + 1, least=128)

    before = ids.new_empty((groups * group_blocks, bins), dtype=torch.int32)
    counts = ids.new_empty((groups, bins), dtype=torch.int32)
    launch(count_kernel, (groups,), ids, before, counts, slots, group_blocks, experts, BLOCK=BLOCK, BINS=bins)
    launch(
        place_kernel, (blocks,),
        ids, before, counts, order, offsets, position, slots, group_blocks, groups, experts,
        BLOCK=BLOCK, BINS=bins, STEP=32, GROUP_STEP=power_of_2(8192 // bins, least=8, most=GROUPS),
    )  # fmt: skip


@triton.jit
def regroup_kernel(
    received, order, offsets, position, experts, cells,
    CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes order [R], position [R] and offsets [experts + 1]. Grid (cells, any number): the programs of a cell take turns."""
    cell = tl.program_id(0)
    rank, expert = cell // experts, cell % experts
    others = tl.arange(0, CELLS)
    rows = tl.load(received + others, mask=others < cells, other=0)
    of_rank, of_expert = others // experts, others % experts
    count = tl.load(received + cell)
    lies = tl.sum(tl.where(others < cell, rows, 0), axis=0)
    goes = tl.sum(tl.where((of_expert < expert) | ((of_expert == expert) & (of_rank < rank)), rows, 0), axis=0)
    if (tl.program_id(1) == 0) & (rank == 0):  # the first rows of an expert
        tl.store(offsets + expert, goes.to(tl.int32))
        if expert == 0:
            tl.store(offsets + experts, tl.sum(rows, axis=0).to(tl.int32))
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(order + goes + i, lies + i, mask=i < count)
        tl.store(position + lies + i, goes + i, mask=i < count)


def regroup(received: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """received [P, E] int64 -> order [rows] int64, offsets [E+1] int32, position [rows, 1] int64; see `moefx.ops.regroup`."""
    ranks, experts = received.shape
    received, cells = received.contiguous(), ranks * experts
    allocate = received.new_zeros if compiling() else received.new_empty
    order, position = allocate(rows), allocate(rows, 1)
    offsets = allocate(experts + 1, dtype=torch.int32)
    with on_device(received):
        grid = cells, min(8, max(1, cdiv(rows, cells * BLOCK)))
        launch(regroup_kernel, grid, received, order, offsets, position, experts, cells, CELLS=power_of_2(cells), BLOCK=BLOCK)
    return order, offsets, position
