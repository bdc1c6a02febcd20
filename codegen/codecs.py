"""Codecs: rows of numbers to rows of bytes for the wire, and back. One row never needs another, and its size is fixed.

R rows, D features, W bytes of a row on the wire (scales and exponents included):

    wire = codec.encode(rows)                         # [R, D] -> [R, W] uint8
    rows = codec.decode(wire, D, dtype)               # [R, W] -> [R, D], dtype that of the rows that were encoded

so that an exchange may cut and reorder wire rows like any others. Everything here is torch and runs on any device; the same
bytes come from Triton's kernels (`moefx.codegen.triton_codecs`). No gradient passes through a codec: both phases of a
layer call it on values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moefx.errors import InputError
from moefx.registry import Registry

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Codec(Protocol):
    """A row-wise code of fixed rate."""

    def encode(self, rows: Tensor) -> Tensor:
        """[R, D] floating -> [R, W] uint8, contiguous; it may share the memory of `rows`. The same rows give the same bytes."""
        ...

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        """[R, W] uint8, contiguous -> [R, d_model] of `dtype`, the dtype of the rows that were encoded."""
        ...

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        """W, the bytes of an encoded row of `d_model` features of `dtype`."""
        ...

    def error_bound(self, rows: Tensor) -> Tensor:
        """[R] float64: no feature of a row changes by more than this; meant for finite rows. Infinite: the row overflows."""
        ...


CODECS: Registry[Codec] = Registry("codec", requires=("encode", "decode", "wire_bytes", "error_bound"))


def check_dtype(dtype: torch.dtype) -> None:
    """InputError unless rows of this dtype can be encoded."""
    if dtype not in DTYPES:
        raise InputError(f"rows of {', '.join(map(str, DTYPES))} can be encoded, not of {dtype}")


def as_bytes(values: Tensor) -> Tensor:
    """[R, n] of any dtype -> [R, n * bytes of an element] uint8, sharing memory where it can."""
    return values.contiguous().view(torch.uint8)


class Cast:
    """Each number in another floating format; None: as it is.

    "none" is exact. "bf16" rounds to 8 significant bits: |error| <= 2^-9 |x| + 2^-134, and overflows above 3.39e38, where only
    rows of float32 and float64 reach. "fp16" rounds to 11: |error| <= 2^-11 |x| + 2^-25; what is 65520 or more
    becomes infinite, as a cast does, so that an overflow is seen.
    """

    def __init__(self, target: torch.dtype | None) -> None:
        self.target = target

    def encode(self, rows: Tensor) -> Tensor:
        check_dtype(rows.dtype)
        return as_bytes(rows.to(self._wire_dtype(rows.dtype)))

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        return wire.view(self._wire_dtype(dtype)).to(dtype)

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return d_model * self._wire_dtype(dtype).itemsize

    def error_bound(self, rows: Tensor) -> Tensor:
        if self._wire_dtype(rows.dtype) == rows.dtype:
            return rows.new_zeros(rows.shape[0], dtype=torch.float64)
        largest = row_max(rows)
        format = torch.finfo(self._wire_dtype(rows.dtype))
        bound = format.eps / 2 * largest + format.smallest_normal * format.eps / 2
        return bound.masked_fill(largest >= format.max * (1 + format.eps / 4), float("inf"))

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.target is None else self.target


def row_max(rows: Tensor) -> Tensor:
    """[R] float64: the largest magnitude of each row, 0 where D = 0."""
    return torch.cat([rows.double().abs(), rows.new_zeros(rows.shape[0], 1, dtype=torch.float64)], dim=1).amax(1)


CODECS.register("none", Cast(None))
CODECS.register("bf16", Cast(torch.bfloat16))
CODECS.register("fp16", Cast(torch.float16))
