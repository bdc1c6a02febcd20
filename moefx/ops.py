"""The meaning of every moefx op in plain torch. Triton kernels have the same names and signatures and must agree.

Routed rows: slot (t, k) is number t*K + k. `route` sorts the slots by expert; row r of expert e lies in
offsets[e] <= r < offsets[e+1]. Slots whose id is outside [0, E) have no row. R is the number of rows held in memory:
on the CPU exactly offsets[-1]; on CUDA always T*K, so that no size depends on data and the host never waits. There,
rows from offsets[-1] on hold arbitrary values and no op lets them reach a result.

All results are the same bit for bit from run to run: nothing is scattered onto a colliding index.
Sums are taken in fp32 at least. A token's NaN stays with the token: padding is masked, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Up to this many slots per token, combine walks the slots; beyond (dense gates have K = E slots, most of them empty)
# it walks the rows.
MANY_SLOTS = 16


def _rows_held(offsets: Tensor, slots: int) -> int:
    """R: how many rows are held for `slots` slots (see the head of this file)."""
    return slots if offsets.is_cuda else int(offsets[-1])


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _bounds(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of the experts that have rows. Reads the offsets on the host."""
    edges = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(zip(edges, edges[1:])) if a < b]


# ------------------------------------------------------------------------------------------------ routing

# Rows of up to MOST_SCORES scores, of which up to MOST_CHOICES are chosen, have a kernel.
MOST_SCORES, MOST_CHOICES = 1024, 32


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x [..., E] in descending order, and where they are [..., k] int64."""
    values, ids = torch.topk(x, k)
    return values, ids


def topk_serves(x: Any, k: Any, dim: Any = -1, largest: Any = True) -> bool:
    """Whether `topk` makes this call of torch.topk: the largest of few scores, along the last axis."""
    if not isinstance(x, Tensor) or x.dim() == 0 or largest is not True:
        return False
    scores = x.shape[-1]
    known = x.dtype in (torch.bfloat16, torch.float16, torch.float32) and isinstance(k, int) and isinstance(scores, int)
    return known and dim in (-1, x.dim() - 1) and 0 < k <= min(scores, MOST_CHOICES) and scores <= MOST_SCORES


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots of `ids` [T, K] (any integer dtype) by expert, stably.

    Returns order [T*K] int64 (slot number of each row; slots without a row come last), offsets [E+1] int32, and
    position [T, K] int64 (row of each slot, -1 when its id is outside [0, E)).
    """
    flat = ids.reshape(-1).long()
    outside = (flat < 0) | (flat >= experts)
    by_expert, order = torch.sort(flat.masked_fill(outside, experts), stable=True)
    edges = torch.arange(experts + 1, device=ids.device)
    offsets = torch.searchsorted(by_expert, edges, out_int32=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=ids.device)
    return order, offsets, position.masked_fill_(outside, -1).view(ids.shape)


def regroup(received: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts rows that lie by (source rank, expert) by expert, stably: received [P, E] int64 of them, R = `rows` in all.

    Returns order [R] int64 (where each row of the result lies), offsets [E+1] int32, and position [R, 1] int64 (where each
    row goes).
    """
    by_expert = received.t()
    lies, goes = (exclusive(t.reshape(-1)).view_as(t) for t in (received, by_expert))
    offsets = torch.nn.functional.pad(received.sum(0).cumsum(0), (1, 0)).int()
    return runs(lies.t(), by_expert, rows), offsets, runs(goes.t(), received, rows).unsqueeze(1)


def exclusive(lengths: Tensor) -> Tensor:
    """Where each of some lengths [n] begins."""
    return lengths.cumsum(0) - lengths


def runs(begins: Tensor, lengths: Tensor, total: int) -> Tensor:
    """[total]: runs of ascending numbers, one behind the other, of some first numbers and lengths (integers of any shape)."""
    begins, lengths = begins.reshape(-1), lengths.reshape(-1)
    shifts = (begins - exclusive(lengths)).repeat_interleave(lengths, output_size=total)
    return shifts + torch.arange(total, device=lengths.device)


# ------------------------------------------------------------------------------------------------ rows in


def gather_rows(x: Tensor, order: Tensor, top_k: int, offsets: Tensor, w: Tensor | None = None) -> Tensor:
    """rows [R, D] of x [T, D] in expert order; with `w` [T, K] each row times its routing weight (x's dtype)."""
    slots = order[: _rows_held(offsets, order.numel())]
    rows = x.index_select(0, slots // top_k)
    if w is None:
        return rows
    return (rows * w.reshape(-1).index_select(0, slots).unsqueeze(1)).to(x.dtype)


def rows_backward(
    g_rows: Tensor, x: Tensor, position: Tensor, order: Tensor, offsets: Tensor, w: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `gather_rows`: (gx [T, D] in x's dtype, gw [T, K] in w's dtype or None) for g_rows [R, D]."""
    gx = combine(g_rows, position, w, x.dtype)
    if w is None:
        return gx, None
    token_rows = x.index_select(0, order[: g_rows.shape[0]] // position.shape[1])
    return gx, slot_products(token_rows, g_rows, order, offsets, w)


# ------------------------------------------------------------------------------------------------ experts


def _grouped_mm_takes(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: leading strides and addresses in multiples of 16 bytes, one unit stride.

    Measured on the CPU (fp32, 1 thread): the loop and grouped_mm tie within 2 % from R/E = 32 rows per expert and
    512 x 1024 weights on; on small experts (64 x 128) grouped_mm takes 0.55 of the loop's time. So it is used
    wherever it is allowed. It has no fp64; fp16 and bf16 go there too.
    """

    def aligned(t: Tensor) -> bool:
        item = t.element_size()
        *_, s, u = t.stride()
        lead, unit = (s, u) if u == 1 else (u, s)
        whole = all(n * item % 16 == 0 for n in (lead, *t.stride()[:-2]))
        return unit == 1 and lead >= max(1, t.shape[-1] if u == 1 else t.shape[-2]) and whole and t.data_ptr() % 16 == 0

    known = rows.dtype in (torch.float32, torch.bfloat16, torch.float16) and rows.dtype == weight.dtype
    return known and rows.shape[0] > 0 and aligned(rows) and aligned(weight)


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O]: each row of rows [R, I] @ the matrix of its expert, weight [E, I, O] with any strides."""
    if _grouped_mm_takes(rows, weight):
        return torch.nn.functional.grouped_mm(rows, weight, offs=offsets[1:])
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    for e, a, b in _bounds(offsets) if rows.shape[0] else ():
        torch.mm(rows[a:b], weight[e], out=out[a:b])
    return out


def grouped_wgrad(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] = rows_e^T @ grad_e for rows [R, I], grad [R, O], out [E, I, O] (any strides, any float dtype).

    Every expert is written: zeros where it has no rows.
    """
    hit = _bounds(offsets)
    if len(hit) < out.shape[0]:
        out.zero_()
    for e, a, b in hit:
        if out.dtype == rows.dtype:
            torch.mm(rows[a:b].t(), grad[a:b], out=out[e])
        else:
            out[e].copy_(torch.mm(rows[a:b].t(), grad[a:b]))


def grouped_wgrad_add(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """out[e] += rows_e^T @ grad_e, as `grouped_wgrad`; each expert's sum is rounded to out's dtype once."""
    for e, a, b in _bounds(offsets):
        if out.dtype == rows.dtype:
            out[e].addmm_(rows[a:b].t(), grad[a:b])
        else:
            out[e].add_(torch.mm(rows[a:b].t(), grad[a:b]))


def gather_linear(x: Tensor, order: Tensor, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, O]: `grouped_linear` of the rows that `gather_rows` takes from x [T, I]."""
    return grouped_linear(gather_rows(x, order, top_k, offsets), weight, offsets)


def gather_wgrad(x: Tensor, order: Tensor, top_k: int, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
    """`grouped_wgrad` of the rows that `gather_rows` takes from x [T, I], with grad [R, O]."""
    grouped_wgrad(gather_rows(x, order, top_k, offsets), grad, offsets, out)


def expert_rows(leaf: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """[R, n]: the vector of each row's expert, leaf [E, n]; `rows` is R."""
    row = torch.arange(rows, device=leaf.device)
    expert = torch.searchsorted(offsets[1:].contiguous(), row, right=True, out_int32=True)
    return leaf.index_select(0, expert.clamp_(max=leaf.shape[0] - 1))


def expert_sum(grad: Tensor, offsets: Tensor, order: Tensor | None = None, w: Tensor | None = None) -> Tensor:
    """[E, n]: the sum of grad's rows [R, n] over each expert's rows, in grad's dtype; with order [T*K] and w [T, K] each row
    times its routing weight."""
    wide = grad.to(_sum_dtype(grad.dtype))
    if order is not None and w is not None:
        wide = wide * w.reshape(-1).index_select(0, order[: len(wide)]).unsqueeze(1)
    if wide.shape[0] == 0:
        return grad.new_zeros(offsets.numel() - 1, grad.shape[1])
    return torch.segment_reduce(wide, "sum", offsets=offsets.contiguous(), axis=0, unsafe=True).to(grad.dtype)


# ------------------------------------------------------------------------------------------------ rows out


def combine(
    h: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype, bias: Tensor | None = None, ids: Tensor | None = None
) -> Tensor:
    """y [T, O] = sum over k of w[t, k] * h[position[t, k]] (w = 1 when None); slots at -1 contribute nothing.

    h [R, O], position [T, K], w [T, K]; summed in fp32 at least (fp64 for fp64), returned as `out_dtype`. With bias [E, O]
    and ids [T, K], bias[ids[t, k]] is added to each slot's row.
    """
    tokens, slots = position.shape
    wide = _sum_dtype(h.dtype if w is None else torch.promote_types(h.dtype, w.dtype))
    if h.shape[0] == 0:
        return h.new_zeros(tokens, h.shape[1], dtype=out_dtype)
    if slots > MANY_SLOTS and not h.is_cuda:
        if bias is not None and ids is not None:
            h = h.to(wide).index_add(0, position[position >= 0], bias.to(wide).index_select(0, ids[position >= 0].long()))
        return _combine_rows(h, position, w, wide).to(out_dtype)
    all_filled = not h.is_cuda and h.shape[0] == position.numel()
    y = torch.zeros(tokens, h.shape[1], dtype=wide, device=h.device)
    for k in range(slots):
        term = h.index_select(0, position[:, k] if all_filled else position[:, k].clamp(min=0)).to(wide)
        if bias is not None and ids is not None:
            term += bias.index_select(0, ids[:, k].long().clamp(0, bias.shape[0] - 1))
        if w is not None:
            term *= w[:, k : k + 1]
        if not all_filled:
            term.masked_fill_(position[:, k : k + 1] < 0, 0)
        y += term
    return y.to(out_dtype)


def linear_combine(
    rows: Tensor, weight: Tensor, offsets: Tensor, position: Tensor, w: Tensor | None, out_dtype: torch.dtype,
    bias: Tensor | None = None, ids: Tensor | None = None, in_parts: bool = False,
) -> Tensor:  # fmt: skip
    """y [T, O]: `combine` of `grouped_linear`. in_parts: it may be made some columns at a time, which takes less memory and
    more time, where rows [R, O] are large; the result is the same."""
    return combine(grouped_linear(rows, weight, offsets), position, w, out_dtype, bias, ids)


def _combine_rows(h: Tensor, position: Tensor, w: Tensor | None, wide: torch.dtype) -> Tensor:
    """`combine` by rows: the filled slots in token order, summed token by token. Work grows with R, not with T*K."""
    filled = position >= 0
    rows = h.index_select(0, position[filled]).to(wide)
    if w is not None:
        rows *= w[filled].unsqueeze(1)
    return torch.segment_reduce(rows, "sum", lengths=filled.sum(1), axis=0, unsafe=True)


def bias_products(gy: Tensor, position: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
    """[T, K], in fp32 at least: <gy[t], bias[e]> for each slot's expert e, what the bias [E, O] of `combine` adds to the gradient
    of w; zero for slots without a row."""
    experts, wide = bias.shape[0], _sum_dtype(gy.dtype)
    owner = torch.searchsorted(offsets[1:].long(), position, right=True).clamp_(max=experts - 1)
    if gy.is_cuda and gy.dtype != wide:
        products = torch.mm(gy, bias.to(gy.dtype).t(), out_dtype=wide)
    else:
        products = gy.to(wide) @ bias.to(wide).t()
    return products.gather(1, owner).masked_fill_(position < 0, 0)


def combine_backward(
    gy: Tensor, h: Tensor, order: Tensor, position: Tensor, offsets: Tensor, w: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `combine`: (gh [R, O] in h's dtype, gw [T, K] in w's dtype or None) for gy [T, O]."""
    slots = order[: h.shape[0]]
    token_rows = gy.index_select(0, slots // position.shape[1])
    if w is None:
        return token_rows.to(h.dtype), None
    gh = token_rows * w.reshape(-1).index_select(0, slots).unsqueeze(1)
    return gh.to(h.dtype), slot_products(token_rows, h, order, offsets, w)


def slot_rows(w: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """[R, 1]: the routing weight of each row's slot, w [T, K]."""
    return w.reshape(-1).index_select(0, order[: _rows_held(offsets, order.numel())]).unsqueeze(1)


def slot_products(a: Tensor, b: Tensor, order: Tensor, offsets: Tensor, w: Tensor) -> Tensor:
    """p like w [T, K]: for each slot <a[r], b[r]> of its row r, zero for slots without one; a, b [R, n]."""
    wide = _sum_dtype(torch.promote_types(a.dtype, b.dtype))
    products = (a.to(wide) * b.to(wide)).sum(1)
    held = torch.arange(products.numel(), device=order.device) < offsets[-1]
    result = products.new_zeros(w.numel())  # an order may be shorter than the slots: see `exchange.Padded`
    result[order[: products.numel()]] = products.where(held, 0)
    return result.view(w.shape).to(w.dtype)


# ------------------------------------------------------------------------------------------------ identity experts


def identity_add(y: Tensor, x: Tensor, position: Tensor, w: Tensor) -> Tensor:
    """y + sum of w[t, k] * x[t] over the slots without a row: experts whose id is outside [0, E) return their input."""
    outside = position < 0
    wide = _sum_dtype(torch.promote_types(x.dtype, w.dtype))
    weight = w.to(wide).where(outside, 0).sum(1, keepdim=True)
    return (y + (x * weight).where(outside.any(1, keepdim=True), 0)).to(y.dtype)


def identity_backward(gy: Tensor, x: Tensor, position: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """What `identity_add` adds to the gradients: (gx [T, D] in x's dtype, gw [T, K] in w's dtype)."""
    outside = position < 0
    wide = _sum_dtype(torch.promote_types(x.dtype, w.dtype))
    weight = w.to(wide).where(outside, 0).sum(1, keepdim=True)
    gx = (gy * weight).where(outside.any(1, keepdim=True), 0)
    gw = (gy.to(wide) * x.to(wide)).sum(1, keepdim=True).where(outside, 0)
    return gx.to(x.dtype), gw.to(w.dtype)


OPS: dict[str, Callable[..., object]] = {
    op.__name__: op
    for op in (
        topk,
        route,
        regroup,
        gather_rows,
        rows_backward,
        grouped_linear,
        grouped_wgrad,
        grouped_wgrad_add,
        gather_linear,
        gather_wgrad,
        expert_rows,
        expert_sum,
        combine,
        linear_combine,
        bias_products,
        combine_backward,
        slot_rows,
        slot_products,
        identity_add,
        identity_backward,
    )
}
