"""Grouped products: the rows of each expert times the expert's own matrix, and the gradient of that matrix.

All sizes that depend on the routing stay on the device: the grid covers the worst case (`tiles_with_rows`), and each program
finds its expert from the offsets (`find_tile`). Products accumulate in fp32. Tiles come from `triton_tiles`; where one is
`specialised`, `gluon_grouped` makes the product.
"""

from __future__ import annotations

from collections.abc import Hashable

import triton
import triton.language as tl
from moefx.codegen import gluon_grouped
from moefx.codegen.triton_launch import (
    cdiv,
    check_dtypes,
    compiling_every_size,
    described,
    described_rows,
    find_tile,
    first_tiles,
    float32_precision,
    halves,
    interpreted,
    launch,
    launch_block,
    load_rows,
    multiprocessors,
    on_device,
    power_of_2,
    shared_bytes,
    store_rows,
    tiles_with_rows,
    unit_columns,
)
from moefx.codegen.triton_tiles import MANY_ROWS, MOST_ROWS, Tile, pointer_tile, tiles_for
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moefx.errors import InputError

# Stages of block kernels, as the chip turned out to have room for; see `launch_block`.
STAGES: dict[Hashable, int] = {}
BLOCKS_FROM = 25  # rows an expert, at the mean: from here on the copy engine's blocks pay

# ------------------------------------------------------------------------------------------------ tiles


def pointer_tiles(
    rows: Tensor, total_rows: int, experts: int, columns: int, products: int = 1, done: bool = False
) -> list[Tile]:
    """`pointer_tile` for these operands, or none where blocks have done it; while those of every size are made ready all that
    another number of rows would choose; a small tile in the interpreter."""
    if done and not compiling_every_size():
        return []
    if interpreted():
        return [Tile(32, 32, 32, 4, 1)]
    sizes = [cdiv(total_rows, experts)]
    if compiling_every_size():
        sizes = [1 << n for n in range(MOST_ROWS + 1) if not done or 1 << n < 2 * BLOCKS_FROM]  # as tiles are chosen
    of_chip, precision = shared_bytes(rows.device), float32_precision()
    made = [pointer_tile(rows.device, rows.dtype, precision, n, rows.shape[1], columns, of_chip, products) for n in sizes]
    return list(dict.fromkeys(made))


# ------------------------------------------------------------------------------------------------ rows @ weight


@triton.jit
def accumulate(left, right, total, lost, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(total, lost) after adding left @ right. float32 block sums are added with compensation (Kahan): a plain running sum
    over a long inner dimension is several times less exact than the library's. 16-bit inputs gain nothing from it."""
    if left.dtype == tl.float32:
        part = tl.dot(left, right, input_precision=PRECISION) - lost
        grown = total + part
        lost = (grown - total) - part
        total = grown
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total, lost


@triton.jit
def swizzle(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(row tile, column tile) of a program: groups of GROUP row tiles walk over the columns together."""
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def left_rows(rows, order, row, row0, end, top_k, stride_r, GATHER: tl.constexpr):
    """Pointers [BM, 1] to the rows of a tile. Rows past the expert's end repeat the first one: read, never stored.

    With GATHER, row r is token order[r] // top_k: the permuted copy of the tokens is never made.
    """
    row = tl.where(row < end, row, row0).to(tl.int64)
    if GATHER:
        row = tl.load(order + row) // top_k
    return rows + row[:, None] * stride_r


@triton.jit(do_not_specialize=["tiles_n"])
def grouped_linear_kernel(
    rows, order, weight, offsets, out, n_in, n_out, stride_r, stride_e, stride_i, stride_o,
    experts, tiles_n, top_k,
    GATHER: tl.constexpr, EVEN_I: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [R, O] = rows [R, I] @ weight[expert of the row] [I, O]. Grid (tiles of rows * tiles_n,), one tile of out each."""
    first, tiles = first_tiles(offsets, experts, BLOCK_E, BM)
    if tl.program_id(0) < tiles * tiles_n:
        tile, tile_n = swizzle(tl.program_id(0), tiles, tiles_n, GROUP)
        expert, row0, end = find_tile(first, offsets, tile, BM)
        row = row0 + tl.arange(0, BM)
        column = tile_n * BN + tl.arange(0, BN)[None, :]
        inner = tl.arange(0, BK)
        a = left_rows(rows, order, row, row0, end, top_k, stride_r, GATHER) + inner[None, :]
        b = weight + expert.to(tl.int64) * stride_e + inner[:, None] * stride_i + column.to(tl.int64) * stride_o
        total = tl.zeros((BM, BN), dtype=tl.float32)
        lost = tl.zeros((BM, BN), dtype=tl.float32)
        for i0 in range(0, n_in, BK):
            if EVEN_I:
                left = tl.load(a)
                right = tl.load(b, mask=column < n_out, other=0.0)
            else:
                left = tl.load(a, mask=inner[None, :] < n_in - i0, other=0.0)
                right = tl.load(b, mask=(inner[:, None] < n_in - i0) & (column < n_out), other=0.0)
            total, lost = accumulate(left, right, total, lost, PRECISION)
            a += BK
            b += BK * stride_i
        target = out + row.to(tl.int64)[:, None] * n_out + column
        tl.store(target, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < n_out))


@triton.jit(do_not_specialize=["tiles_n"])
def block_linear_kernel(
    rows, order, weight, offsets, out, n_in, stride_r, experts, tiles_n, top_k,
    GATHER: tl.constexpr, INNER_LAST: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`grouped_linear_kernel` for 16-bit operands that the copy engine moves: descriptors of rows [R, I], of weight
    [E, O, I] if INNER_LAST, else [E, I, O], and of out [R, O] by experts. Grid (PROGRAMS,): each makes every PROGRAMS-th
    tile, in one flattened loop, so that the operands of a tile are on their way while the one before is finished. With GATHER
    `rows` is a pointer.

    A tile's rows past the expert's end are other experts': read, never stored.
    """
    first, tiles = first_tiles(offsets, experts, BLOCK_E, BM)
    for t in tl.range(tl.program_id(0), tiles * tiles_n, PROGRAMS, flatten=True):
        tile, tile_n = swizzle(t, tiles, tiles_n, GROUP)
        expert, row0, end = find_tile(first, offsets, tile, BM)
        if GATHER:
            row = row0 + tl.arange(0, BM)
            a = left_rows(rows, order, row, row0, end, top_k, stride_r, True) + tl.arange(0, BK)[None, :]
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for i0 in range(0, n_in, BK):
            if GATHER:
                left = tl.load(a + i0)
            else:
                left = rows.load([row0, i0])
            if INNER_LAST:
                right = weight.load([expert, tile_n * BN, i0]).reshape(BN, BK).T
            else:
                right = weight.load([expert, i0, tile_n * BN]).reshape(BK, BN)
            total = tl.dot(left, right, total)
        for_left, for_right = halves(total, BM, BN // 2)  # half the shared memory that one store would take
        store_rows(out, row0, end - row0, tile_n * BN, for_left, BM, BN // 2)
        store_rows(out, row0, end - row0, tile_n * BN + BN // 2, for_right, BM, BN // 2)


def _launch_block_linear(
    rows: Tensor, order: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor, out: Tensor
) -> bool:
    """The product by `block_linear_kernel`; False where it does not apply."""
    experts, inner, columns = weight.shape
    if columns < 128 or not many_rows(out.shape[0], experts):
        return False
    inner_last = weight.stride(1) == 1
    done = False
    for tile in tiles_for(rows.device, "linear", cdiv(out.shape[0], experts), inner, columns):
        if tile.specialised and gluon_grouped.launch_linear(rows, order, top_k, weight, offsets, out, tile):
            done = True
            continue
        block = (1, tile.columns, tile.inner) if inner_last else (1, tile.inner, tile.columns)
        a = left_operand(rows, order, tile)
        b = described(weight.transpose(1, 2) if inner_last else weight, block)
        o = described_rows(out, (tile.rows, tile.columns // 2))
        if a is None or b is None or o is None:
            return False
        programs = tile.programs * multiprocessors(rows.device)
        key = ("linear", rows.device, inner_last, order is not None, tile)
        with on_device(rows):
            done = launch_block(
                STAGES, key, tile.stages, block_linear_kernel, (programs,),
                a, offsets if order is None else order, b, offsets, o, inner, rows.stride(0), experts,
                cdiv(columns, tile.columns), top_k, GATHER=order is not None, INNER_LAST=inner_last, GROUP=tile.group,
                PROGRAMS=programs, BLOCK_E=power_of_2(experts), BM=tile.rows, BN=tile.columns, BK=tile.inner,
                num_warps=tile.warps,
            )  # fmt: skip
    return done


def left_operand(rows: Tensor, order: Tensor | None, tile: Tile) -> Tensor | TensorDescriptor | None:
    """What a block kernel takes for its rows: their descriptor, or the tokens [T, I] that it gathers by `order`, in whole steps
    and without masks; None where that cannot be."""
    if order is None:
        return described(rows, (tile.rows, tile.inner))
    return None if rows.shape[1] % tile.inner else rows


def many_rows(rows: int, experts: int) -> bool:
    """Whether blocks of 128 rows suit; yes while kernels are only made ready for any number of rows."""
    return compiling_every_size() or cdiv(rows, experts) >= BLOCKS_FROM


def _launch_linear(rows: Tensor, order: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor, op: str) -> Tensor:
    check_dtypes(op, {"rows": rows, "weight": weight}, same=True)
    experts, inner, columns = weight.shape
    if rows.shape[1] != inner or offsets.numel() != experts + 1:
        raise InputError(
            f"{op}: rows {tuple(rows.shape)} and {offsets.numel()} offsets do not fit "
            f"weight [E, I, O] = {tuple(weight.shape)}"
        )
    rows = unit_columns(rows)
    total = rows.shape[0] if order is None else order.numel()
    out = rows.new_empty(total, columns)
    done = not out.numel() or _launch_block_linear(rows, order, top_k, weight, offsets, out)
    for tile in pointer_tiles(rows, total, experts, columns, done=done):
        tiles_m, tiles_n = tiles_with_rows(total, experts, tile.rows), cdiv(columns, tile.columns)
        with on_device(rows):
            launch(
                grouped_linear_kernel, (tiles_m * tiles_n,),
                rows, offsets if order is None else order, weight, offsets, out, inner, columns, rows.stride(0),
                *weight.stride(), experts, tiles_n, top_k, GATHER=order is not None,
                EVEN_I=inner % tile.inner == 0, PRECISION=float32_precision(), GROUP=tile.group, BLOCK_E=power_of_2(experts),
                BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return out


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O]: each row of rows [R, I] @ its expert's matrix, weight [E, I, O]; see `moefx.ops.grouped_linear`."""
    return _launch_linear(rows, None, 1, weight, offsets, "grouped_linear")


def gather_linear(x: Tensor, order: Tensor, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    """grouped_linear(gather_rows(x, order, top_k, offsets), weight, offsets) without the permuted copy of x."""
    return _launch_linear(x, order, top_k, weight, offsets, "gather_linear")


# ------------------------------------------------------------------------------------------------ rows^T @ grad


@triton.jit
def grouped_wgrad_kernel(
    rows, grad, offsets, out, n_in, n_out, stride_r, stride_g, stride_e, stride_i, stride_o,
    tiles_i, tiles_o, ADD: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[e] [I, O] = rows_e [n, I]^T @ grad_e [n, O]. Grid (E * tiles_i * tiles_o,): a tile of out each.

    A program walks over the expert's n rows in order, BR at a time; rows past the end count as zeros, so an expert
    without rows gets zeros. With ADD the sum is added to what out holds.
    """
    expert = tl.program_id(0) // (tiles_i * tiles_o)
    tile_i, tile_o = swizzle(tl.program_id(0) % (tiles_i * tiles_o), tiles_i, tiles_o, GROUP)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    i = tile_i * BI + tl.arange(0, BI)[:, None]
    o = tile_o * BO + tl.arange(0, BO)[None, :]
    total = tl.zeros((BI, BO), dtype=tl.float32)
    lost = tl.zeros((BI, BO), dtype=tl.float32)
    for r0 in range(start, end, BR):
        row = r0 + tl.arange(0, BR)
        held = row < end
        left = tl.load(rows + row.to(tl.int64)[None, :] * stride_r + i, mask=held[None, :] & (i < n_in), other=0.0)
        right = tl.load(grad + row.to(tl.int64)[:, None] * stride_g + o, mask=held[:, None] & (o < n_out), other=0.0)
        total, lost = accumulate(left, right, total, lost, PRECISION)
    target = out + expert.to(tl.int64) * stride_e + i.to(tl.int64) * stride_i + o.to(tl.int64) * stride_o
    mask = (i < n_in) & (o < n_out)
    if ADD:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def block_wgrad_kernel(
    rows, grad, offsets, out, tiles_i, tiles_o, tiles,
    ADD: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`grouped_wgrad_kernel` for 16-bit operands that the copy engine moves: descriptors of rows [R, I] and grad [R, O] by
    experts, whose last step is filled up with zeros, and of out [E, I, O]. PROGRAMS: each makes every PROGRAMS-th tile; 0:
    there are as many programs as tiles."""
    if PROGRAMS:
        for tile in range(tl.program_id(0), tiles, PROGRAMS):
            wgrad_tile(rows, grad, offsets, out, tile, tiles_i, tiles_o, ADD, GROUP, BI, BO, BR)
    else:
        wgrad_tile(rows, grad, offsets, out, tl.program_id(0), tiles_i, tiles_o, ADD, GROUP, BI, BO, BR)


@triton.jit
def wgrad_tile(
    rows, grad, offsets, out, tile, tiles_i, tiles_o,
    ADD: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile [BI, BO] of one expert's gradient."""
    expert = tile // (tiles_i * tiles_o)
    tile_i, tile_o = swizzle(tile % (tiles_i * tiles_o), tiles_i, tiles_o, GROUP)
    start = tl.load(offsets + expert)
    count = tl.load(offsets + expert + 1) - start
    total = tl.zeros((BI, BO), dtype=tl.float32)
    for r0 in range(0, count, BR):
        left = load_rows(rows, start, count, r0, tile_i * BI, BR, BI)
        right = load_rows(grad, start, count, r0, tile_o * BO, BR, BO)
        total = tl.dot(left.T, right, total)
    store_part(out, expert, tile_i * BI, tile_o * BO, halves(total, BI, BO // 2), ADD, BI, BO // 2)


@triton.jit
def store_part(out, expert, i, o, parts, ADD: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr):
    """Writes two parts [BI, BO] side by side into out [E, I, O]; with ADD adds them to what is there."""
    left, right = parts
    if ADD:
        left += out.load([expert, i, o]).reshape(BI, BO).to(tl.float32)
        right += out.load([expert, i, o + BO]).reshape(BI, BO).to(tl.float32)
    out.store([expert, i, o], left.to(out.dtype).reshape(1, BI, BO))
    out.store([expert, i, o + BO], right.to(out.dtype).reshape(1, BI, BO))


def _launch_block_wgrad(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor, add: bool) -> bool:
    """The gradient by `block_wgrad_kernel`; False where it does not apply."""
    experts, inner, columns = out.shape
    if inner < 128 or columns < 128:
        return False
    if out.stride(1) == 1 and out.stride(2) != 1:  # so that neighbouring results lie side by side in memory
        return _launch_block_wgrad(grad, rows, offsets, out.transpose(1, 2), add)
    done = False
    for tile in tiles_for(rows.device, "wgrad", cdiv(rows.shape[0], experts), inner, columns):
        if tile.specialised and gluon_grouped.launch_wgrad(rows, grad, offsets, out, add, tile):
            done = True
            continue
        a, b = described_rows(rows, (tile.inner, tile.rows)), described_rows(grad, (tile.inner, tile.columns))
        o = described(out, (1, tile.rows, tile.columns // 2))
        if a is None or b is None or o is None:
            return False
        tiles_i, tiles_o = cdiv(inner, tile.rows), cdiv(columns, tile.columns)
        count, programs = experts * tiles_i * tiles_o, tile.programs * multiprocessors(rows.device)
        with on_device(rows):
            done = launch_block(
                STAGES, ("wgrad", rows.device, tile), tile.stages, block_wgrad_kernel, (programs or count,),
                a, b, offsets, o, tiles_i, tiles_o, count, ADD=add, GROUP=tile.group, PROGRAMS=programs,
                BI=tile.rows, BO=tile.columns, BR=tile.inner, num_warps=tile.warps,
            )  # fmt: skip
    return done


def _launch_wgrad(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor, op: str, add: bool = False) -> None:
    check_dtypes(op, {"rows": rows, "grad": grad}, same=True)
    check_dtypes(op, {"out": out})
    experts, inner, columns = out.shape
    if rows.shape[1] != inner or grad.shape[1] != columns or offsets.numel() != experts + 1:
        raise InputError(
            f"{op}: rows {tuple(rows.shape)}, grad {tuple(grad.shape)} and {offsets.numel()} offsets do not fit "
            f"out [E, I, O] = {tuple(out.shape)}"
        )
    if not out.numel():
        return
    rows, grad = unit_columns(rows), unit_columns(grad)
    if _launch_block_wgrad(rows, grad, offsets, out, add):
        return
    tile = pointer_tiles(rows, MANY_ROWS * experts, experts, columns)[-1]  # every tile of the matrix is full, whatever the rows
    tiles_i, tiles_o = cdiv(inner, tile.rows), cdiv(columns, tile.columns)
    with on_device(rows):
        launch(
            grouped_wgrad_kernel, (experts * tiles_i * tiles_o,),
            rows, grad, offsets, out, inner, columns, rows.stride(0), grad.stride(0), *out.stride(), tiles_i, tiles_o,
            ADD=add, PRECISION=float32_precision(), GROUP=tile.group, BI=tile.rows, BO=tile.columns, BR=tile.inner,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def grouped_wgrad(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] = rows_e^T @ grad_e for every expert, out [E, I, O] any strides; see `moefx.ops.grouped_wgrad`."""
    _launch_wgrad(rows, grad, offsets, out, "grouped_wgrad")


def grouped_wgrad_add(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] += rows_e^T @ grad_e, rounded to out's dtype once; see `moefx.ops.grouped_wgrad_add`."""
    _launch_wgrad(rows, grad, offsets, out, "grouped_wgrad_add", add=True)
