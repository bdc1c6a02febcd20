"""Rows in and out of expert order: gathers and gather-reduces. All are bound by memory; sums are taken in fp32.

Every result element is written by one program that reads what it needs, so there are no atomics and results repeat bit
for bit. Rows behind offsets[E] are neither read nor written. Routing weights may have any floating dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moefx.codegen.triton_launch import (
    cdiv,
    check_dtypes,
    expert_tile,
    launch,
    on_device,
    power_of_2,
    row_tiles,
    unit_columns,
)
from torch import Tensor

# One program handles about this many elements at a time: 16 for each of the 128 threads of 4 warps.
ELEMENTS = 2048


def _blocks(width: int, most: int = 512) -> tuple[int, int]:
    """(rows, columns) of a program's block for rows of `width` features."""
    columns = power_of_2(width, least=16, most=most)
    return ELEMENTS // columns, columns


# ------------------------------------------------------------------------------------------------ rows in


@triton.jit(do_not_specialize=["rows"])
def gather_rows_kernel(
    x, order, w, offsets, out, rows, width, stride_x, experts, top_k,
    WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [R, D] = rows of x [T, D] in expert order, times w [T*K]. Grid (R / BM, D / BN): a block of out each."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    held = row < tl.load(offsets + experts)
    slot = tl.load(order + row, mask=held, other=0)
    mask = held[:, None] & (column < width)[None, :]
    value = tl.load(x + (slot // top_k)[:, None] * stride_x + column[None, :], mask=mask, other=0.0)
    if WEIGHTED:
        scale = tl.load(w + slot, mask=held, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], value, mask=mask)


def gather_rows(x: Tensor, order: Tensor, top_k: int, offsets: Tensor, w: Tensor | None = None) -> Tensor:
    """rows [R, D] of x [T, D] in expert order, times w [T, K] if given; see `moefx.ops.gather_rows`."""
    check_dtypes("gather_rows", {"x": x})
    x = unit_columns(x)
    rows, width = order.numel(), x.shape[1]
    out = x.new_empty(rows, width)
    if out.numel():
        bm, bn = _blocks(width, most=256)
        with on_device(x):
            launch(
                gather_rows_kernel, (cdiv(rows, bm), cdiv(width, bn)),
                x, order, x if w is None else w.contiguous(), offsets, out, rows, width, x.stride(0),
                offsets.numel() - 1, top_k, WEIGHTED=w is not None, BM=bm, BN=bn,
            )  # fmt: skip
    return out


def rows_backward(
    g_rows: Tensor, x: Tensor, position: Tensor, order: Tensor, offsets: Tensor, w: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `gather_rows`: (gx [T, D], gw [T, K] or None); see `moefx.ops.rows_backward`."""
    gx = combine(g_rows, position, w, x.dtype)
    return gx, None if w is None else _token_rows(x, g_rows, order, position, offsets, w, scaled=False)[1]


# ------------------------------------------------------------------------------------------------ rows out


@triton.jit(do_not_specialize=["tokens"])
def combine_kernel(
    h, position, w, bias, ids, out, tokens, width, stride_h, stride_b, stride_o, K: tl.constexpr,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, UNROLL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [T, O] = sum over k of w[t, k] * (h[position[t, k]] + bias[ids[t, k]]). Grid (T / BM, O / BN): a block of out each.

    The K loop is unrolled by UNROLL, so that the loads of several slots are under way together.
    """
    token = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    live = token < tokens
    in_width = (column < width)[None, :]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for k in tl.range(0, K, loop_unroll_factor=UNROLL):
        row = tl.load(position + token * K + k, mask=live, other=-1)
        filled = row >= 0
        value = tl.load(h + row[:, None] * stride_h + column[None, :], mask=filled[:, None] & in_width, other=0.0)
        value = value.to(tl.float32)
        if BIASED:
            expert = tl.load(ids + token * K + k, mask=filled, other=0).to(tl.int64)
            vector = bias + expert[:, None] * stride_b + column[None, :]
            value += tl.load(vector, mask=filled[:, None] & in_width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(w + token * K + k, mask=filled, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(
        out + token[:, None] * stride_o + column[None, :], total.to(out.dtype.element_ty), mask=live[:, None] & in_width
    )


def combine(
    h: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype, bias: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """y [T, O], the weighted sum of each token's rows h [R, O]; see `moefx.ops.combine`."""
    out = h.new_empty(position.shape[0], h.shape[1], dtype=out_dtype)
    combine_into(out, h, position, w, bias, ids)
    return out


def combine_into(
    out: Tensor, h: Tensor, position: Tensor, w: Tensor | None, bias: Tensor | None = None, ids: Tensor | None = None
) -> None:
    """`combine`, written into out [T, O], whose columns lie side by side."""
    check_dtypes("combine", {"h": h, "bias": bias})
    h, biased = unit_columns(h), bias is not None and ids is not None
    bias, ids = (unit_columns(bias), ids.contiguous()) if bias is not None and ids is not None else (h, position)
    tokens, top_k = position.shape
    width = h.shape[1]
    if out.numel():
        bm, bn = _blocks(width)
        with on_device(h):
            launch(
                combine_kernel, (cdiv(tokens, bm), cdiv(width, bn)),
                h, position, h if w is None else w.contiguous(), bias, ids, out, tokens, width, h.stride(0), bias.stride(0),
                out.stride(0), K=top_k, WEIGHTED=w is not None, BIASED=biased, UNROLL=power_of_2(top_k, most=8), BM=bm, BN=bn,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def token_rows_kernel(
    tokens, h, order, w, offsets, scaled, products, rows, width, stride_t, stride_h, experts, top_k,
    SCALED: tl.constexpr, PRODUCTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """For each row r of slot s = order[r] and token t = s // K: scaled [R, O] and products [T*K]. Grid (R / BM,).

    scaled[r] = w[s] * tokens[t] (w = 1 without PRODUCTS); products[s] = <tokens[t], h[r]>, 0 for slots without a row;
    slots that `order` does not name are left as they are. A program walks over the features of its BM rows.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    held = row < tl.load(offsets + experts)
    slot = tl.load(order + row, mask=row < rows, other=0)
    token = slot // top_k
    row_start = row.to(tl.int64)[:, None]
    if PRODUCTS:
        scale = tl.load(w + slot, mask=held, other=0.0).to(tl.float32)[:, None]
    product = tl.zeros((BM,), dtype=tl.float32)
    for n0 in range(0, width, BN):
        column = n0 + tl.arange(0, BN)[None, :]
        mask = held[:, None] & (column < width)
        value = tl.load(tokens + token[:, None] * stride_t + column, mask=mask, other=0.0).to(tl.float32)
        if PRODUCTS:
            other = tl.load(h + row_start * stride_h + column, mask=mask, other=0.0).to(tl.float32)
            product += tl.sum(value * other, axis=1)
            value *= scale
        if SCALED:
            tl.store(scaled + row_start * width + column, value.to(scaled.dtype.element_ty), mask=mask)
    if PRODUCTS:
        tl.store(products + slot, product.to(products.dtype.element_ty), mask=row < rows)


def _token_rows(
    tokens: Tensor, h: Tensor, order: Tensor, position: Tensor, offsets: Tensor, w: Tensor | None, scaled: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(w * token rows [R, O] in h's dtype if `scaled`, <token row, h> [T, K] in w's dtype if w is given)."""
    tokens, h = unit_columns(tokens), unit_columns(h)
    rows, width = order.numel(), h.shape[1]
    result = h.new_empty(rows, width) if scaled else None
    products = None
    if w is not None:  # an order may be shorter than the slots: the kernel writes those that it names
        products = (torch.empty_like if rows == w.numel() else torch.zeros_like)(w, memory_format=torch.contiguous_format)
    if rows:
        bm, bn = _blocks(width)
        with on_device(h):
            launch(
                token_rows_kernel, (cdiv(rows, bm),),
                tokens, h, order, h if w is None else w.contiguous(), offsets, h if result is None else result,
                h if products is None else products, rows, width, tokens.stride(0), h.stride(0), offsets.numel() - 1,
                position.shape[1], SCALED=scaled, PRODUCTS=w is not None, BM=bm, BN=bn,
            )  # fmt: skip
    return result, products


def combine_backward(
    gy: Tensor, h: Tensor, order: Tensor, position: Tensor, offsets: Tensor, w: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `combine`: (gh [R, O], gw [T, K] or None); see `moefx.ops.combine_backward`."""
    check_dtypes("combine_backward", {"gy": gy, "h": h})
    gh, gw = _token_rows(gy, h, order, position, offsets, w, scaled=True)
    assert gh is not None
    return gh, gw


# ------------------------------------------------------------------------------------------------ experts' own vectors


@triton.jit
def expert_rows_kernel(
    leaf, offsets, out, width, stride_e, stride_n, experts, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """out [R, n] = leaf [E, n] of the row's expert. Grid (row tiles, n / BN); a tile of rows has one expert."""
    expert, row0, end = expert_tile(offsets, tl.program_id(0), experts, BLOCK_E, BM)
    if row0 < end:
        row = row0 + tl.arange(0, BM)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        value = tl.load(leaf + expert.to(tl.int64) * stride_e + column * stride_n, mask=column < width, other=0.0)
        mask = (row < end)[:, None] & (column < width)[None, :]
        tl.store(
            out + row.to(tl.int64)[:, None] * width + column[None, :],
            tl.broadcast_to(value[None, :], (BM, BN)),
            mask=mask,
        )


def expert_rows(leaf: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """[R, n]: the vector of each row's expert, leaf [E, n]; see `moefx.ops.expert_rows`."""
    check_dtypes("expert_rows", {"leaf": leaf})
    experts, width = leaf.shape
    out = leaf.new_empty(rows, width)
    if out.numel():
        bm, bn = _blocks(width)
        with on_device(leaf):
            launch(
                expert_rows_kernel, (row_tiles(rows, experts, bm), cdiv(width, bn)),
                leaf, offsets, out, width, leaf.stride(0), leaf.stride(1), experts,
                BLOCK_E=power_of_2(experts), BM=bm, BN=bn,
            )  # fmt: skip
    return out


@triton.jit
def expert_sum_kernel(
    grad, offsets, order, w, out, width, stride_g, WEIGHTED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """out [E, n] = sum of the rows of grad [R, n], times w of their slots, over each expert's rows. Grid (E, n / BN), rows walked
    in order.

    The running sums are compensated (Kahan): an expert may have every row of the batch.
    """
    expert = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    lost = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in range(start, end, BM):
        row = r0 + tl.arange(0, BM)
        mask = (row < end)[:, None] & (column < width)[None, :]
        value = tl.load(grad + row.to(tl.int64)[:, None] * stride_g + column[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if WEIGHTED:
            slot = tl.load(order + row, mask=row < end, other=0)
            value *= tl.load(w + slot, mask=row < end, other=0.0).to(tl.float32)[:, None]
        part = value - lost
        grown = total + part
        lost = (grown - total) - part
        total = grown
    tl.store(
        out + expert.to(tl.int64) * width + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < width
    )


def expert_sum(grad: Tensor, offsets: Tensor, order: Tensor | None = None, w: Tensor | None = None) -> Tensor:
    """[E, n]: the sum of grad's rows [R, n] over each expert's rows; see `moefx.ops.expert_sum`."""
    check_dtypes("expert_sum", {"grad": grad})
    grad = unit_columns(grad)
    experts, width = offsets.numel() - 1, grad.shape[1]
    out = grad.new_empty(experts, width)
    if out.numel():
        bn = power_of_2(width, least=16, most=64)
        with on_device(grad):
            launch(
                expert_sum_kernel, (experts, cdiv(width, bn)),
                grad, offsets, offsets if order is None else order, grad if w is None else w.contiguous(), out, width,
                grad.stride(0), WEIGHTED=w is not None, BM=ELEMENTS // bn, BN=bn,
            )  # fmt: skip
    return out
