"""The K largest of few scores: a router's choice of experts, in one launch.

torch selects by radix and then sorts, in two launches that are made for long rows. A row of scores fits into registers:
here each program takes the largest K times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from moefx.codegen.triton_launch import cdiv, check_dtypes, launch, on_device, power_of_2
from torch import Tensor

from moefx.errors import InputError
from moefx.ops import MOST_CHOICES, MOST_SCORES

ELEMENTS = 1024  # scores a program
ONE_WARP = 256  # from so many scores on a row is one warp's


@triton.jit(do_not_specialize=["rows"])
def topk_kernel(
    x, values, ids, rows, columns, stride,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [T, E] -> values [T, K], ids [T, K] int64. Grid (T / BT,): BT rows each.

    Scores are compared as integers in the order of their values, NaN above all; what is taken, and what lies behind the
    row, is below all.
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    column = tl.arange(0, BE)[None, :]
    held = (row < rows) & (column < columns)
    score = tl.load(x + row.to(tl.int64) * stride + column, mask=held, other=0.0).to(tl.float32)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)  # one zero, whatever its sign
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(score != score, 0x7FFFFFFF, key)
    key = tl.where(held, key, -0x80000000)
    slot = tl.arange(0, BK)[None, :]
    keys = tl.zeros((BT, BK), dtype=tl.int32)
    chosen = tl.zeros((BT, BK), dtype=tl.int32)
    for k in tl.static_range(K):
        top, at = tl.max(key, axis=1, return_indices=True, return_indices_tie_break_left=True)
        keys = tl.where(slot == k, top[:, None], keys)
        chosen = tl.where(slot == k, at[:, None], chosen)
        key = tl.where(column == at[:, None], -0x80000000, key)
    value = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    mask = (row < rows) & (slot < K)
    place = row.to(tl.int64) * K + slot
    tl.store(values + place, value.to(values.dtype.element_ty), mask=mask)
    tl.store(ids + place, chosen.to(tl.int64), mask=mask)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [..., E] in descending order, and where they are, int64; see `moefx.ops.topk`.

    Of equal scores the first ones are taken, in their order. Raises InputError for more scores or choices than
    `moefx.ops.MOST_SCORES` and `MOST_CHOICES`.
    """
    check_dtypes("topk", {"x": x})
    columns = x.shape[-1]
    if not 0 < k <= min(columns, MOST_CHOICES) or columns > MOST_SCORES:
        raise InputError(f"topk: {k} of {columns} scores; it takes up to {MOST_CHOICES} of up to {MOST_SCORES}")
    values, ids = x.new_empty(*x.shape[:-1], k), x.new_empty(*x.shape[:-1], k, dtype=torch.int64)
    x = x.reshape(-1, columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, wide = x.shape[0], power_of_2(columns)
    block = max(1, ELEMENTS // wide) if wide < ONE_WARP else 1
    if rows:
        with on_device(x):
            launch(
                topk_kernel, (cdiv(rows, block),), x, values, ids, rows, columns, x.stride(0),
                K=k, BT=block, BE=wide, BK=power_of_2(k), num_warps=4 if wide < ONE_WARP else 1,
            )  # fmt: skip
    return values, ids
