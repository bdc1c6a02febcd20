"""Products that have rows as wide as the model inside of them: where these are large, half of their columns at a time.

R = T K rows of width D are the largest values of a step with narrow experts. Half of them take half the memory; the other
operand is read twice for it, about a tenth of such a product's time.
"""

from __future__ import annotations

import torch
from moefx.codegen.triton_grouped import grouped_linear, grouped_wgrad
from moefx.codegen.triton_launch import compiling_every_size
from moefx.codegen.triton_permute import combine_into, gather_rows
from torch import Tensor

LARGE_BYTES = 1 << 28  # of rows that are made in halves


def column_parts(rows: int, width: int, itemsize: int) -> list[slice]:
    """The columns that are made together; while those of every size are made ready all that another number of rows would have."""
    whole, halves = [slice(0, width)], [slice(0, width // 2), slice(width // 2, width)]
    if width % 512:  # blocks of 256 columns, of which none should be left over
        return whole
    if compiling_every_size():
        return whole + halves
    return halves if rows * width * itemsize > LARGE_BYTES else whole


def linear_combine(
    rows: Tensor, weight: Tensor, offsets: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype,
    bias: Tensor | None = None, ids: Tensor | None = None, in_parts: bool = False,
) -> Tensor:  # fmt: skip
    """y [T, O], `combine` of `grouped_linear`; see `moefx.ops.linear_combine`."""
    width = weight.shape[2]
    out = rows.new_empty(position.shape[0], width, dtype=out_dtype)
    for part in column_parts(rows.shape[0], width, rows.element_size()) if in_parts else [slice(0, width)]:
        h = grouped_linear(rows, weight[:, :, part], offsets)
        combine_into(out[:, part], h, position, w, None if bias is None else bias[:, part], ids)
        del h
    return out


def gather_wgrad(x: Tensor, order: Tensor, top_k: int, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """`grouped_wgrad` of gathered rows; see `moefx.ops.gather_wgrad`."""
    for part in column_parts(order.numel(), x.shape[1], x.element_size()):
        rows = gather_rows(x[:, part], order, top_k, offsets)
        grouped_wgrad(rows, grad, offsets, out[:, part])
        del rows
