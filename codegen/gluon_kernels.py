"""Warp-specialised kernels of grouped products for Hopper, in Gluon: one group of warps brings operands, two multiply.

Letters as in `triton_launch`. A program is persistent, one a multiprocessor, and has three parts that run side by side and meet at
barriers in shared memory only. The producer, a warp, fills a ring of `num_stages` buffers by the copy engine (four warps where
rows are gathered, which no copy engine does on this chip). Each of two consumers, four warps, multiplies half of a tile's rows by
all its columns, and writes its half while the producer already brings the next tile's operands. `full` counts what has come into
a stage, `empty` which consumers are done with it; `n` numbers the fillings of the ring, and n // num_stages says in which round.

This module needs Gluon (`triton.experimental.gluon`); `gluon_grouped` imports it where there is one. What later releases of Triton
call otherwise than 3.6 is bound here to one name.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = ["TensorDescriptor", "absent", "linear_kernel", "wgrad_kernel"]

NEEDED = {
    gl: "BlockedLayout NVMMADistributedLayout NVMMASharedLayout SliceLayout SwizzledSharedLayout allocate_shared_memory "
    "arange associative_scan constexpr full load max maximum minimum num_programs num_warps program_id static_range sum "
    "warp_specialize where zeros",
    mbarrier: "MBarrierLayout arrive expect init wait",
    tma: "store_wait",
    async_copy: "mbarrier_arrive",
}


def absent() -> list[str]:
    """What the kernels use and this release does not have: it would show only when they are compiled."""
    return [f"{m.__name__}.{name}" for m, names in NEEDED.items() for name in names.split() if not hasattr(m, name)]


def _either(module, new, old):
    """The function, by its name in later releases or by that in 3.6."""
    found = getattr(module, new, None) or getattr(module, old, None)
    if found is None:
        raise ImportError(f"{module.__name__} has neither {new} nor {old}")
    return found


thread_barrier = _either(gl, "barrier", "thread_barrier")
load_block = _either(tma, "async_load", "async_copy_global_to_shared")
store_block = _either(tma, "async_store", "async_copy_shared_to_global")
load_pointers = _either(async_copy, "async_load", "async_copy_global_to_shared")

# A block of rows whose copy engine's descriptor is `described_rows`: see triton.tools.ragged_tma, whose functions are not Gluon's.
BILLION = gl.constexpr(0x40000000)


# ------------------------------------------------------------------------------------------------ what both kernels use


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def swizzle(program, tiles_m, tiles_n, GROUP: gl.constexpr):
    """As `triton_grouped.swizzle`; also for no tiles at all."""
    group = program // (GROUP * tiles_n)
    height = gl.maximum(gl.minimum(tiles_m - group * GROUP, GROUP), 1)
    inside = program % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@gluon.jit
def free_stage(empty, n, STAGES: gl.constexpr):
    """The stage of filling n, once both consumers are done with the one before it there."""
    stage = n % STAGES
    mbarrier.wait(empty.index(stage), (n // STAGES + 1) & 1)
    return stage


@gluon.jit
def full_stage(full, n, STAGES: gl.constexpr):
    """The stage of filling n, once that has come."""
    stage = n % STAGES
    mbarrier.wait(full.index(stage), (n // STAGES) & 1)
    return stage


@gluon.jit
def multiply(left, right, total, empty, n, more, STAGES: gl.constexpr):
    """Starts total + left @ right (left @ right if not `more`), and gives back the stage of the product before, which is done."""
    total = warpgroup_mma(left, right, total, use_acc=more, is_async=True)
    total = warpgroup_mma_wait(num_outstanding=1, deps=(total,))
    if more:
        mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
    return total


@gluon.jit
def halves(block, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """The left and the right half [ROWS, COLUMNS] of a block [ROWS, 2 * COLUMNS]."""
    return block.reshape([ROWS, 2, COLUMNS]).permute(0, 2, 1).split()


@gluon.jit
def quarters(block, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Four blocks [ROWS, COLUMNS] of a block [ROWS, 4 * COLUMNS], from left to right."""
    left, right = halves(block, ROWS, 2 * COLUMNS)
    first, second = halves(left, ROWS, COLUMNS)
    third, fourth = halves(right, ROWS, COLUMNS)
    return first, second, third, fourth


@gluon.jit
def put(out, buffer, place, block, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Starts to write a block [ROWS, COLUMNS] to `place` of out, through a buffer. A consumer takes its two buffers in turns: the
    last write but one, from this buffer, is waited for."""
    tma.store_wait(1)
    thread_barrier()
    buffer.reshape([ROWS, COLUMNS]).store(block.to(out.dtype))
    fence_async_shared()
    thread_barrier()
    store_block(out, place, buffer)


@gluon.jit
def ring(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """(full, empty): the barriers of each stage. ARRIVALS: at `full`, of a filling."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


# ------------------------------------------------------------------------------------------------ rows @ weight


@gluon.jit
def first_tiles(offsets, experts, BLOCK_E: gl.constexpr, BM: gl.constexpr):
    """As `triton_launch.first_tiles`, with the table in shared memory, where all warps find it."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    e = gl.arange(0, BLOCK_E, layout)
    start = gl.load(offsets + e, mask=e < experts, other=0).to(gl.int32)
    end = gl.load(offsets + e + 1, mask=e < experts, other=0).to(gl.int32)
    tiles = (end - start + BM - 1) // BM
    before = gl.associative_scan(tiles, 0, add) - tiles
    first = gl.allocate_shared_memory(gl.int32, [BLOCK_E], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    first.store(gl.where(e < experts, before, 1 << 30))
    return first, gl.sum(tiles, 0)


@gluon.jit
def find_tile(first, offsets, t, tiles, tiles_n, BLOCK_E: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr):
    """(expert, first row, end of the expert's rows, tile of columns) of tile t, or of the last one where t is behind it. Every
    warp finds it by itself: the table is spread over its lanes."""
    lanes: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([BLOCK_E // 32, 1], [32, 1], [1, gl.num_warps()], [0, 1]))
    tile, tile_n = swizzle(gl.maximum(gl.minimum(t, tiles * tiles_n - 1), 0), tiles, tiles_n, GROUP)
    starts = first.load(lanes)
    before = starts <= tile
    expert = gl.sum(before.to(gl.int32), 0) - 1
    start = tile - gl.max(gl.where(before, starts, 0), 0)
    at = offsets + expert
    return expert, gl.load(at).to(gl.int32) + start * BM, gl.load(at + 1).to(gl.int32), tile_n


@gluon.jit
def tile_tokens(order, row0, end, top_k, BM: gl.constexpr, LAYOUT: gl.constexpr):
    """The tokens of a tile's rows [BM]. Rows past the expert's end repeat the first one: read, never stored."""
    row = row0 + gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))
    return gl.load(order + gl.where(row < end, row, row0)).to(gl.int32) // top_k


@gluon.jit
def linear_producer(
    rows, order, weight, offsets, first, n_in, eighths, tiles, tiles_n, top_k, a, b, full, empty,
    GATHER: gl.constexpr, INNER_LAST: gl.constexpr, GROUP: gl.constexpr, BLOCK_E: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring. Where the next tile lies is asked for before the loop over a tile's inner dimension, and known behind it."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    n = 0
    expert, row0, end, tile_n = find_tile(first, offsets, gl.program_id(0), tiles, tiles_n, BLOCK_E, GROUP, BM)
    if GATHER:
        token = tile_tokens(order, row0, end, top_k, BM, layout)
    for t in range(gl.program_id(0), tiles * tiles_n, gl.num_programs(0)):
        here, row, column = expert, row0, tile_n * BN
        if GATHER:
            left = rows + token.to(gl.int64)[:, None] * (eighths * 8) + gl.arange(0, BK, gl.SliceLayout(0, layout))[None, :]
        expert, row0, end, tile_n = find_tile(first, offsets, t + gl.num_programs(0), tiles, tiles_n, BLOCK_E, GROUP, BM)
        if GATHER:
            token = tile_tokens(order, row0, end, top_k, BM, layout)
        for i0 in range(0, n_in, BK):
            stage = free_stage(empty, n, STAGES)
            arrived = full.index(stage)
            if GATHER:
                mbarrier.expect(arrived, BN * BK * 2)
            else:
                mbarrier.expect(arrived, (BM + BN) * BK * 2)
                load_block(rows, [row, i0], arrived, a.index(stage))
            if INNER_LAST:
                load_block(weight, [here, column, i0], arrived, b.index(stage))
            else:
                load_block(weight, [here, i0, column], arrived, b.index(stage))
            if GATHER:
                load_pointers(a.index(stage), left + i0)
                async_copy.mbarrier_arrive(arrived, increment_count=False)
            n += 1


@gluon.jit
def linear_consumer(
    HALF: gl.constexpr, out, offsets, first, n_in, tiles, tiles_n, a, b, full, empty, buffers,
    GATHER: gl.constexpr, INNER_LAST: gl.constexpr, GROUP: gl.constexpr, BLOCK_E: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows HALF * BM / 2 and on of each tile. Where a tile lies is found while its last product runs."""
    ROWS: gl.constexpr = BM // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    n = 0
    for t in range(gl.program_id(0), tiles * tiles_n, gl.num_programs(0)):
        total = gl.zeros([ROWS, BN], gl.float32, layout)
        for i0 in range(0, n_in, BK):
            stage = full_stage(full, n, STAGES)
            if GATHER:
                fence_async_shared()  # what came by pointers is not yet known to those who multiply
            left = a.index(stage).slice(HALF * ROWS, ROWS)
            if INNER_LAST:
                total = multiply(left, b.index(stage).reshape([BN, BK]).permute((1, 0)), total, empty, n, i0 > 0, STAGES)
            else:
                total = multiply(left, b.index(stage).reshape([BK, BN]), total, empty, n, i0 > 0, STAGES)
            n += 1
        expert, row0, end, tile_n = find_tile(first, offsets, t, tiles, tiles_n, BLOCK_E, GROUP, BM)
        start = row0 + HALF * ROWS
        count = gl.maximum(gl.minimum(end - start, ROWS), 0)
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
        parts = quarters(total, ROWS, BN // 4)
        for part in gl.static_range(4):
            place = [BILLION, start + count, BILLION - count, tile_n * BN + part * (BN // 4)]
            put(out, buffers.index(2 * HALF + part % 2), place, parts[part], ROWS, BN // 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_in", "eighths", "experts", "tiles_n", "top_k"])
def linear_kernel(
    rows, order, weight, offsets, out, n_in, eighths, experts, tiles_n, top_k,
    GATHER: gl.constexpr, INNER_LAST: gl.constexpr, GROUP: gl.constexpr, BLOCK_E: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    num_stages: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`triton_grouped.block_linear_kernel`, warp-specialised. rows: a descriptor; with GATHER a pointer, to rows that are 8 *
    `eighths` elements apart. out: a descriptor of rows by experts, of a quarter of a tile's columns and half its rows. num_warps:
    4, of each consumer."""
    first, tiles = first_tiles(offsets, experts, BLOCK_E, BM)
    left: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    a = gl.allocate_shared_memory(weight.dtype, [num_stages, BM, BK], left)
    b = gl.allocate_shared_memory(weight.dtype, [num_stages] + weight.block_shape, weight.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [4] + out.block_shape, out.layout)
    full, empty = ring(num_stages, 129 if GATHER else 1)  # the copy engine's bytes, and the threads that gather
    fence_async_shared()
    thread_barrier()
    LONE: gl.constexpr = 4 if GATHER else 1
    MANY: gl.constexpr = 224 if GATHER else 232
    FEW: gl.constexpr = 56 if GATHER else 40
    gl.warp_specialize([
        (linear_consumer, (0, out, offsets, first, n_in, tiles, tiles_n, a, b, full, empty, buffers,
                           GATHER, INNER_LAST, GROUP, BLOCK_E, BM, BN, BK, num_stages)),
        (linear_consumer, (1, out, offsets, first, n_in, tiles, tiles_n, a, b, full, empty, buffers,
                           GATHER, INNER_LAST, GROUP, BLOCK_E, BM, BN, BK, num_stages)),
        (linear_producer, (rows, order, weight, offsets, first, n_in, eighths, tiles, tiles_n, top_k, a, b, full, empty,
                           GATHER, INNER_LAST, GROUP, BLOCK_E, BM, BN, BK, num_stages)),
    ], [4, LONE], [MANY, FEW])  # fmt: skip


# ------------------------------------------------------------------------------------------------ rows^T @ grad


@gluon.jit
def rows_of(offsets, t, tiles, tiles_i, tiles_o):
    """(first row, how many) of the expert of tile t, or of the last one where t is behind it."""
    at = offsets + gl.minimum(t, tiles - 1) // (tiles_i * tiles_o)
    start = gl.load(at).to(gl.int32)
    return start, gl.load(at + 1).to(gl.int32) - start


@gluon.jit
def place_of(t, tiles_i, tiles_o, GROUP: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr):
    """(expert, row, column) in out at which tile t begins."""
    of_expert = tiles_i * tiles_o
    tile_i, tile_o = swizzle(t % of_expert, tiles_i, tiles_o, GROUP)
    return t // of_expert, tile_i * BI, tile_o * BO


@gluon.jit
def wgrad_producer(
    rows, grad, offsets, old, tiles, tiles_i, tiles_o, a, b, full, empty,
    ADD: gl.constexpr, GROUP: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, BR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fills the ring; with ADD then brings what out holds, the half of each consumer as a filling of its own."""
    n = 0
    start, count = rows_of(offsets, gl.program_id(0), tiles, tiles_i, tiles_o)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, i, o = place_of(t, tiles_i, tiles_o, GROUP, BI, BO)
        end, held = start + count, count
        start, count = rows_of(offsets, t + gl.num_programs(0), tiles, tiles_i, tiles_o)
        for r0 in range(0, held, BR):
            stage = free_stage(empty, n, STAGES)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (BI + BO) * BR * 2)
            load_block(rows, [BILLION, end, BILLION - held + r0, i], arrived, a.index(stage))
            load_block(grad, [BILLION, end, BILLION - held + r0, o], arrived, b.index(stage))
            n += 1
        if ADD:
            for half in gl.static_range(2):
                stage = free_stage(empty, n, STAGES)
                arrived = full.index(stage)
                mbarrier.expect(arrived, BI // 2 * BO * 2)
                load_block(old, [0, expert, i + half * (BI // 2), o], arrived, b.index(stage))
                n += 1


@gluon.jit
def wgrad_consumer(
    HALF: gl.constexpr, out, offsets, tiles, tiles_i, tiles_o, a, b, full, empty, buffers,
    ADD: gl.constexpr, GROUP: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, BR: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Rows HALF * BI / 2 and on of each tile."""
    ROWS: gl.constexpr = BI // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BO, 16])
    n = 0
    _, count = rows_of(offsets, gl.program_id(0), tiles, tiles_i, tiles_o)
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        expert, i, o = place_of(t, tiles_i, tiles_o, GROUP, BI, BO)
        held = count
        _, count = rows_of(offsets, t + gl.num_programs(0), tiles, tiles_i, tiles_o)
        total = gl.zeros([ROWS, BO], gl.float32, layout)
        for r0 in range(0, held, BR):
            stage = full_stage(full, n, STAGES)
            left = a.index(stage).reshape([BR, BI]).permute((1, 0)).slice(HALF * ROWS, ROWS)
            total = multiply(left, b.index(stage).reshape([BR, BO]), total, empty, n, r0 > 0, STAGES)
            n += 1
        total = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        if held > 0:
            mbarrier.arrive(empty.index((n - 1) % STAGES), count=1)
        if ADD:
            for half in gl.static_range(2):
                stage = full_stage(full, n, STAGES)  # the other half's too: a stage is given back once it is filled, not before
                if half == HALF:
                    total += b.index(stage).reshape([ROWS, BO]).load(layout).to(gl.float32)
                    fence_async_shared()
                    thread_barrier()  # all have read it
                mbarrier.arrive(empty.index(stage), count=1)
                n += 1
        parts = quarters(total, ROWS, BO // 4)
        for part in gl.static_range(4):
            place = [expert, i + HALF * ROWS, o + part * (BO // 4)]
            put(out, buffers.index(2 * HALF + part % 2), place, parts[part], ROWS, BO // 4)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tiles_i", "tiles_o", "tiles"])
def wgrad_kernel(
    rows, grad, offsets, out, old, tiles_i, tiles_o, tiles,
    ADD: gl.constexpr, GROUP: gl.constexpr, BI: gl.constexpr, BO: gl.constexpr, BR: gl.constexpr,
    num_stages: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """`triton_grouped.block_wgrad_kernel`, warp-specialised. out: a descriptor of [E, I, O], of a quarter of a tile's columns and
    half its rows; old: with ADD one of the same memory [1, E, I, O] in blocks like grad's, which are half a tile (BR = BI / 2)."""
    a = gl.allocate_shared_memory(rows.dtype, [num_stages] + rows.block_shape, rows.layout)
    b = gl.allocate_shared_memory(grad.dtype, [num_stages] + grad.block_shape, grad.layout)
    buffers = gl.allocate_shared_memory(out.dtype, [4] + out.block_shape, out.layout)
    full, empty = ring(num_stages, 1)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize([
        (wgrad_consumer, (0, out, offsets, tiles, tiles_i, tiles_o, a, b, full, empty, buffers,
                          ADD, GROUP, BI, BO, BR, num_stages)),
        (wgrad_consumer, (1, out, offsets, tiles, tiles_i, tiles_o, a, b, full, empty, buffers,
                          ADD, GROUP, BI, BO, BR, num_stages)),
        (wgrad_producer, (rows, grad, offsets, old, tiles, tiles_i, tiles_o, a, b, full, empty,
                          ADD, GROUP, BI, BO, BR, num_stages)),
    ], [4, 1], [232, 40])  # fmt: skip
