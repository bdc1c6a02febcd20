"""Codecs: rows of numbers to rows of bytes for the wire, and back. One row never needs another, and its size is fixed.

R rows, D features, W bytes of a row on the wire (scales and exponents included):

    wire = codec.encode(rows)                         # [R, D] -> [R, W] uint8
    rows = codec.decode(wire, D, dtype)               # [R, W] -> [R, D], dtype that of the rows that were encoded

so that an exchange may cut and reorder wire rows like any others. Everything here is torch and runs on any device; the same
bytes come from Triton's kernels (`moefx.codegen.triton_codecs`). No gradient passes through a codec: both phases of a
layer call it on values.
"""

from __future__ import annotations

import importlib
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


def from_bytes(wire: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of `as_bytes`."""
    if wire.numel() == 0:  # whose strides may be any
        return wire.new_empty(wire.shape[0], wire.shape[1] // dtype.itemsize, dtype=dtype)
    aligned = wire.is_contiguous() and wire.storage_offset() % dtype.itemsize == 0
    return (wire if aligned else wire.clone(memory_format=torch.contiguous_format)).view(dtype)


class Cast:
    """Each number in another floating format; None: as it is.

    "none" is exact. "bf16" rounds to 8 significant bits: |error| <= 2^-9 |x| + 2^-134. "fp16" rounds to 11:
    |error| <= 2^-11 |x| + 2^-25. What is too large for the format becomes infinite, as in any cast, so that an overflow is
    seen: from 65520 on in fp16, close to the end of float32 in bf16 (and of float16, for float16 rows in bf16).
    """

    def __init__(self, target: torch.dtype | None) -> None:
        self.target = target

    def encode(self, rows: Tensor) -> Tensor:
        check_dtype(rows.dtype)
        return as_bytes(rows.to(self._wire_dtype(rows.dtype)))

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        return from_bytes(wire, self._wire_dtype(dtype)).to(dtype)

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return d_model * self._wire_dtype(dtype).itemsize

    def error_bound(self, rows: Tensor) -> Tensor:
        if self._wire_dtype(rows.dtype) == rows.dtype:
            return rows.new_zeros(rows.shape[0], dtype=torch.float64)
        most = row_max(rows)
        format = torch.finfo(self._wire_dtype(rows.dtype))
        bound = format.eps / 2 * most + format.smallest_normal * format.eps / 2
        back = most.to(rows.dtype).to(self._wire_dtype(rows.dtype)).to(rows.dtype)
        return bound.masked_fill(~back.isfinite(), float("inf"))

    def _wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.target is None else self.target


CODECS.register("none", Cast(None))
CODECS.register("bf16", Cast(torch.bfloat16))
CODECS.register("fp16", Cast(torch.float16))


# ------------------------------------------------------------------------------------------------ shared scales
#
# The codecs below compute in float32: float64 rows are rounded to it first. Numbers that share a scale share the fate of
# an infinity or NaN among them: all are decoded as NaN. What was finite is decoded finite, at most the dtype's largest.


def row_max(rows: Tensor) -> Tensor:
    """[..., n] -> [...] float64: the largest magnitude, NaN if there is one, 0 where n = 0."""
    return largest(rows.double())


def largest(values: Tensor) -> Tensor:
    """[..., n] -> [...]: the largest magnitude, NaN if there is one, 0 where n = 0."""
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    return values.abs().amax(-1)


def blocks(rows: Tensor, size: int) -> Tensor:
    """[R, D] -> [R, ceil(D / size), size] float32, filled up with zeros."""
    count = -(-rows.shape[1] // size)
    padded = torch.nn.functional.pad(rows.float(), (0, count * size - rows.shape[1]))
    return padded.view(rows.shape[0], count, size)


def bits(values: Tensor) -> Tensor:
    """The int32 that holds the same bits as a float32."""
    return values.view(torch.int32)


def power_of_2(exponent: Tensor) -> Tensor:
    """2^exponent as float32, for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).view(torch.float32)


def times_power_of_2(values: Tensor, exponent: Tensor) -> Tensor:
    """values * 2^exponent, for exponents in [-252, 254]: in two steps, since the power alone may be out of range."""
    half = exponent >> 1
    return (values * power_of_2(half)).mul_(power_of_2(exponent - half))


def nearest_(values: Tensor) -> Tensor:
    """In place the nearest whole number, halves upwards; 0 for NaN and beyond int32."""
    return values.add_(0.5).floor_().nan_to_num_(0.0, 0.0, 0.0)


def as_rows_(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32, which is overwritten -> dtype; beyond its range its largest number: nothing finite becomes infinite."""
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.clamp_(-most, most).to(dtype)


def rounding(rows: Tensor, most: Tensor) -> Tensor:
    """What float32 and the dtype itself may add to an error, for largest magnitudes `most`; infinite beyond float32."""
    format = torch.finfo(torch.float32 if rows.dtype == torch.float64 else rows.dtype)
    bound = format.eps * most + format.smallest_normal * format.eps
    return bound.masked_fill(most > torch.finfo(torch.float32).max, float("inf"))


class Int8:
    """127 steps on each side of zero: |error| <= a/254, a the row's largest magnitude, beside roundings of float32.

    Wire: D bytes of two's complement, then the step, a/127 (at least 2^-126) in float32; a NaN there: the row was not finite.
    """

    def encode(self, rows: Tensor) -> Tensor:
        check_dtype(rows.dtype)
        x = rows.float()
        step = (largest(x) / 127).clamp(min=2.0**-126)
        step = step.masked_fill(~step.isfinite(), float("nan"))[:, None]
        codes = nearest_(x / step).to(torch.int8)
        return torch.cat([as_bytes(codes), as_bytes(step)], dim=1)

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        step = from_bytes(wire[:, d_model:], torch.float32)
        return as_rows_(wire[:, :d_model].view(torch.int8) * step, dtype)

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return d_model + 4

    def error_bound(self, rows: Tensor) -> Tensor:
        most = row_max(rows)
        return most / 254 * (1 + 2**-14) + 2.0**-127 + rounding(rows, most)


class Fp8:
    """e4m3 (4 bits of exponent, 3 of mantissa) with a power of two as scale: |error| <= |x|/16, or 2^-10 of the scale.

    Numbers that share a scale: `block` neighbours in a row, or the whole row (None). The scale 2^s is the smallest with
    a / 2^s <= 448, a their largest magnitude, and s >= -126; so small numbers lose digits from a/2^15 down. Blocks of 32 are
    MXFP8 of the OCP Microscaling Formats, but for the choice of s, which there lets numbers saturate.
    Wire: D bytes of e4m3, then a byte s + 127 for each scale; 255 there: not all of them were finite.
    """

    def __init__(self, block: int | None) -> None:
        self.block = block

    def encode(self, rows: Tensor) -> Tensor:
        check_dtype(rows.dtype)
        x = blocks(rows, self._size(rows.shape[1]))  # [R, B, size]
        most = largest(x)
        finite = most.isfinite()
        scale = e4m3_scale(most)
        scaled = (x * power_of_2(-scale)[..., None]).masked_fill_(~finite[..., None], 0.0)
        codes = as_bytes(scaled.flatten(1)[:, : rows.shape[1]].to(torch.float8_e4m3fn))
        return torch.cat([codes, torch.where(finite, scale + 127, 255).to(torch.uint8)], dim=1)

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        codes, scales = wire[:, :d_model].contiguous(), wire[:, d_model:].int()
        scale = torch.where(scales == 255, float("nan"), power_of_2(scales.clamp(max=254) - 127))
        numbers = torch.arange(256, dtype=torch.uint8, device=wire.device).view(torch.float8_e4m3fn).float()
        values = numbers.index_select(0, codes.flatten().int()).view(codes.shape)
        x = blocks(values, self._size(d_model)) * scale[..., None]
        return as_rows_(x.flatten(1)[:, :d_model], dtype).contiguous()

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return d_model + -(-d_model // self._size(d_model))

    def error_bound(self, rows: Tensor) -> Tensor:
        most = row_max(rows)
        return most / 16 + 2.0**-136 + rounding(rows, most)

    def _size(self, d_model: int) -> int:
        return self.block or max(d_model, 1)


def e4m3_scale(most: Tensor) -> Tensor:
    """The smallest s >= -126 with most / 2^s <= 448 = 1.75 * 2^8, int32, for float32 magnitudes."""
    return ((bits(most) >> 23) - 127 - 8 + ((bits(most) & 0x7FFFFF) > 0x600000).int()).clamp(-126, 120)


CODECS.register("int8", Int8())
CODECS.register("fp8", Fp8(None))
CODECS.register("fp8_block", Fp8(32))


# ------------------------------------------------------------------------------------------------ block transform

BLOCK = 16
FIXED_POINT = 18  # bits behind the point, so that sums of 16 numbers below 2 stay below 2^24


class Zfp:
    """A quarter of the bytes: blocks of 16 in fixed point, a transform that decorrelates, and its topmost bit planes.

    After ZFP's fixed-rate mode (Lindstrom, "Fixed-Rate Compressed Floating-Point Arrays", 2014), with two differences that
    let all blocks run in step: the transform is Walsh and Hadamard's, which is of the same family and exact in integers, and
    planes are cut off without group tests, starting at the block's topmost plane instead of its exponent's. It suits
    outliers: one large number is spread over 16 coefficients, a quarter of its size each, so that its 15 neighbours keep
    two bits more than under a common scale.

    `bits` for each number, 3 to 16; by default a quarter of the dtype's (8 for float32, 4 for the halves). A block of 16 takes
    2*bits bytes: one tells s, the exponent of the plane step, the others hold bits-1/2 planes: byte 2k plane k, from the top,
    of the 8 coefficients of low sequency and byte 2k+1 of the 8 others, in two's complement. 255 for s: not all were finite.

    With x the block's numbers, c = H x their transform and b = bits-1 the planes of all, s is the smallest such
    that |c| / 2^s rounds to at most 2^(b-1) - 1, and |error| <= 3/8 * 2^s, plus the fixed point's rounding, 2^-19 of the largest
    number's power of two. Since |c| <= 16 max|x|, that is at most 12 max|x| / (2^(b-1) - 1/2). It is a bound for the worst
    block: Gaussian numbers come back with a root mean square error of 1.2 % at 8 bits and 21 % at 4. Below about 2^-120
    the error stays what it is there.
    """

    def __init__(self, bits: int | None = None) -> None:
        if bits is not None and not 3 <= bits <= 16:
            raise InputError(f"a number takes 3 to 16 bits; got {bits}")
        self.bits = bits

    def rate(self, dtype: torch.dtype) -> int:
        """Bits a number."""
        check_dtype(dtype)
        return self.bits or 2 * dtype.itemsize

    def encode(self, rows: Tensor) -> Tensor:
        planes = self.rate(rows.dtype) - 1  # of every coefficient; those of low sequency have one more
        coefficients, exponent, finite = self._transformed(rows)
        shift = self._shift(coefficients, exponent, planes)
        low, high = coefficients[..., 0::2], coefficients[..., 1::2]  # [R, B, 8]
        wire = rows.new_zeros(*shift.shape, 2 * (planes + 1), dtype=torch.uint8)
        wire[..., 0] = torch.where(finite, shift + exponent - least_step(planes), 255)
        wire[..., 1::2] = to_planes(shifted_(low, (shift - 1)[..., None]), planes + 1)
        wire[..., 2::2] = to_planes(shifted_(high, shift[..., None]), planes)
        return wire.flatten(1)

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        planes = self.rate(dtype) - 1
        block = wire.view(wire.shape[0], -(-d_model // BLOCK), 2 * (planes + 1))
        low, high = from_planes(block[..., 1::2]), 2 * from_planes(block[..., 2::2])
        numbers = hadamard(torch.stack([low, high], dim=-1).flatten(-2).float())
        exponent = block[..., 0].int() + least_step(planes) - 1 - FIXED_POINT - 4  # the transform twice is 16 = 2^4
        x = times_power_of_2(numbers, exponent[..., None])
        x = x.masked_fill((block[..., 0] == 255)[..., None], float("nan"))
        return as_rows_(x.flatten(1)[:, :d_model], dtype).contiguous()

    def wire_bytes(self, d_model: int, dtype: torch.dtype) -> int:
        return -(-d_model // BLOCK) * 2 * self.rate(dtype)

    def error_bound(self, rows: Tensor) -> Tensor:
        coefficients, exponent, _ = self._transformed(rows)
        shift = self._shift(coefficients, exponent, self.rate(rows.dtype) - 1)
        steps = (0.375 * 2.0 ** shift.double() + 0.5) * 2.0 ** (exponent.double() - FIXED_POINT)
        return largest(steps) + rounding(rows, row_max(rows))

    def _transformed(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients [R, B, 16] int32 of the numbers times 2^(18 - exponent), exponent [R, B] int32, finite [R, B]."""
        x = blocks(rows, BLOCK)
        most = largest(x)
        finite = most.isfinite()
        exponent = ((bits(most) >> 23) - 127).clamp(-126, 127)
        fixed = nearest_(times_power_of_2(x, (FIXED_POINT - exponent)[..., None])).mul_(finite[..., None])
        return hadamard(fixed).int(), exponent, finite

    @staticmethod
    def _shift(coefficients: Tensor, exponent: Tensor, planes: int) -> Tensor:
        """[R, B]: how many bits below the last plane are cut off."""
        most = largest(coefficients)
        width = ((bits(most.float()) >> 23) - 126).clamp(min=0)  # of most in binary
        shift = (width - (planes - 1)).clamp(min=1)
        shift += (shifted_(most.clone(), shift) > 2 ** (planes - 1) - 1).int()
        return torch.maximum(shift, least_step(planes) - exponent)


def most_shift(planes: int) -> int:
    """The shift of the largest coefficient there is, 2^23: such that it rounds to at most 2^(planes-1) - 1."""
    largest = 2 ** (FIXED_POINT + 5)
    return next(shift for shift in range(1, 32) if (largest + 2**shift // 2) >> shift <= 2 ** (planes - 1) - 1)


def least_step(planes: int) -> int:
    """The exponent of the plane step that byte 0 stands for; the largest, byte 254, is that of the largest float32."""
    return 127 + most_shift(planes) - 254


def hadamard(values: Tensor) -> Tensor:
    """[..., 16] float32 -> [..., 16]: c[i] = sum over j of (-1)^(ones in i & j) * values[j]. Twice is 16 times the identity.

    Exact for whole numbers up to 2^20: all sums are below 2^24. On CUDA float32 may be multiplied with fewer bits.
    """
    dtype = torch.float64 if values.is_cuda else torch.float32
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in range(BLOCK)] for i in range(BLOCK)]
    return (values.to(dtype) @ torch.tensor(signs, dtype=dtype, device=values.device)).float()


def shifted_(values: Tensor, shift: Tensor) -> Tensor:
    """In place values / 2^shift, rounded; int32."""
    return values.add_(torch.ones_like(shift) << shift >> 1).__irshift__(shift)


def to_planes(values: Tensor, planes: int) -> Tensor:
    """[..., 8] int32 -> [..., planes] uint8: bit i of byte k is bit planes-1-k of values[i]."""
    parts = [transposed((values >> first).to(torch.uint8)) for first in range(0, planes, 8)]
    return torch.cat(parts, dim=-1)[..., :planes].flip(-1)


def from_planes(wire: Tensor) -> Tensor:
    """The reverse of `to_planes`, int32, two's complement."""
    planes = wire.shape[-1]
    parts = torch.nn.functional.pad(wire.flip(-1), (0, -planes % 8)).split(8, dim=-1)
    values = transposed(parts[0]).int()
    for number, part in enumerate(parts[1:], 1):
        values |= transposed(part).int() << 8 * number
    sign = 1 << (planes - 1)
    return (values ^ sign).sub_(sign)


def transposed(bytes: Tensor) -> Tensor:
    """[..., 8] uint8 -> [..., 8]: bit i of byte k is bit k of byte i. Blocks of 1, 2 and 4 bits change places in a word."""
    x = bytes.reshape(-1, 8).contiguous().view(torch.int64)
    for distance, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        change = (x ^ (x >> distance)) & mask
        x = x ^ change ^ (change << distance)
    return x.view(torch.uint8).view(bytes.shape)


CODECS.register("zfp", Zfp())


# ------------------------------------------------------------------------------------------------ kernels


def codec_for(name: str, device_type: str = "cpu", kernels: str = "auto") -> Codec:
    """The named codec for a device: with Triton's kernels, where it has some, on CUDA ("auto") or anywhere ("triton")."""
    if kernels not in ("auto", "torch", "triton"):
        raise InputError(f"kernels must be 'auto', 'torch' or 'triton'; got {kernels!r}")
    codec = CODECS[name]
    if kernels == "torch" or (kernels == "auto" and device_type != "cuda"):
        return codec
    with_kernels: Codec = importlib.import_module("moefx.codegen.triton_codecs").with_kernels(codec)
    return with_kernels
