"""The ops of `moefx.ops` on shapes and dtypes alone: what `torch.compile` runs an emitted file on while it traces.

R, the number of routed rows, is always T*K here (see `moefx.region_op` for what the CPU does about it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K] -> order [T*K] int64, offsets [E+1] int32, position [T, K] int64."""
    order = ids.new_empty((ids.numel(),), dtype=torch.int64)
    return order, ids.new_empty((experts + 1,), dtype=torch.int32), ids.new_empty(ids.shape, dtype=torch.int64)


def gather_rows(x: Tensor, order: Tensor, top_k: int, offsets: Tensor, w: Tensor | None = None) -> Tensor:
    """x [T, D] -> [R, D]."""
    return x.new_empty((order.numel(), x.shape[1]))


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """rows [R, I], weight [E, I, O] -> [R, O]."""
    return rows.new_empty((rows.shape[0], weight.shape[2]))


def gather_linear(x: Tensor, order: Tensor, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [T, I], weight [E, I, O] -> [R, O]."""
    return x.new_empty((order.numel(), weight.shape[2]))


def expert_rows(leaf: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """leaf [E, n] -> [R, n]."""
    return leaf.new_empty((rows, leaf.shape[1]))


def combine(
    h: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype, bias: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """h [R, O], position [T, K] -> [T, O]."""
    return h.new_empty((position.shape[0], h.shape[1]), dtype=out_dtype)


def linear_combine(
    rows: Tensor, weight: Tensor, offsets: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype, *_: Any, **__: Any
) -> Tensor:
    """rows [R, I], weight [E, I, O], position [T, K] -> [T, O]."""
    return rows.new_empty((position.shape[0], weight.shape[2]), dtype=out_dtype)


def identity_add(y: Tensor, x: Tensor, position: Tensor, w: Tensor) -> Tensor:
    """y [T, O] -> [T, O]."""
    return torch.empty_like(y)


SHAPE_OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (route, gather_rows, grouped_linear, gather_linear, expert_rows, combine, linear_combine, identity_add)
}
