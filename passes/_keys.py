"""Rows of numbers told apart: what `_lift` looks tokens, handles and operands up by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MANY_ROWS = 4096  # from which on different ones are found by sorting


def hash_rows(rows: Tensor) -> Tensor:
    """A 64-bit number for each row [N, D]; equal rows (bit for bit, -0 = 0) get equal numbers."""
    return mixed(rows.double() + 0.0)


def mixed(rows: Tensor) -> Tensor:
    """A number for each row [N, n] of 64-bit elements."""
    bits = rows.contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(rows.shape[-1])
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) | 1
    products = (bits ^ _shifted(bits, 29)) * factors
    return (products ^ _shifted(products, 31)).sum(-1)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros: torch's own operator repeats the sign, and -1 would be mixed as 0 is."""
    return (bits >> by) & ((1 << 64 - by) - 1)


def runs_of(handles: Tensor) -> list[slice]:
    """Where along the last axis the same handles stand, as slices of equal length that cover it; nothing where they do not."""
    rows = handles.reshape(-1, handles.shape[-1])
    changes = (rows[:, 1:] != rows[:, :-1]).sum(1)
    if not bool((changes > 0).any()):
        return []
    fullest = rows[changes.argmax()]
    places = [torch.nonzero(fullest == h).flatten() for h in dict.fromkeys(fullest.tolist())]
    first, length = places[0], len(places[0])
    step = int(first[1] - first[0]) if length > 1 else 1
    if any(len(p) != length or bool((p - p[0] != step * torch.arange(length)).any()) for p in places):
        return []
    return [slice(int(p[0]), int(p[-1]) + 1, step) for p in places]


def distinct(keys: Tensor) -> tuple[list[tuple[Any, ...]], Tensor]:
    """The different rows of keys [N, n] as they come, and which of them each is; torch.unique of rows takes longer."""
    if len(keys) < MANY_ROWS:
        rows = [tuple(row) for row in keys.tolist()]
        numbers = {row: n for n, row in enumerate(dict.fromkeys(rows))}
        return list(numbers), torch.tensor([numbers[row] for row in rows], dtype=torch.int64)
    unique, inverse = torch.unique(mixed(keys), return_inverse=True)
    first = torch.full((len(unique),), len(keys)).scatter_reduce_(0, inverse, torch.arange(len(keys)), "amin")
    order = first.argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return [tuple(row) for row in keys[first[order]].tolist()], place[inverse]


def flat_offsets(tensor: Tensor) -> Tensor:
    """Flat storage offset of each element."""
    offsets = torch.tensor(tensor.storage_offset())
    for n, stride in zip(tensor.shape, tensor.stride()):
        offsets = offsets[..., None] + torch.arange(n) * stride
    return offsets
