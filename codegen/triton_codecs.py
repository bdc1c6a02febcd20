"""Triton's kernels of the codecs: the same bytes as `moefx.codegen.codecs`, each in one pass over a row, or two for its scale.

Integer arithmetic and roundings are written out, so that they are those of the torch codecs on every GPU and in Triton's
interpreter. That one computes bfloat16 wrongly: rows of it are refused there.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from moefx.codegen import codecs
from moefx.codegen.codecs import BLOCK, FIXED_POINT, Codec, check_dtype, least_step, most_shift
from moefx.codegen.triton_launch import cdiv, interpreted, launch, on_device, power_of_2, unit_columns
from torch import Tensor

from moefx.errors import InputError

COLUMNS = 1024  # of a row that a program handles at a time, at most
BLOCKS = 64  # blocks of 16 that a program handles


def check(dtype: torch.dtype) -> None:
    """InputError unless the kernels take rows of this dtype."""
    check_dtype(dtype)
    if dtype is torch.bfloat16 and interpreted():
        raise InputError("Triton's interpreter computes bfloat16 wrongly; use the torch codecs there")


def most_of(dtype: torch.dtype) -> float:
    """The largest number that is decoded."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _power_of_2(exponent):
    """2^exponent as float32, for exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x):
    return tl.floor(x + 0.5)


@triton.jit
def _magnitudes(x):
    """The bits of |x|, int32: in the order of the magnitudes, with infinity and NaN above all numbers."""
    return _bits(x) & 0x7FFFFFFF


@triton.jit
def _stored(x, most):
    """x within the range of the dtype; NaN stays."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -most), most))


# ------------------------------------------------------------------------------------------------ int8


@triton.jit
def int8_encode_kernel(x, wire, width, stride_x, stride_w, BN: tl.constexpr):
    """wire [R, D + 4] of x [R, D]. Grid (R,): a row each."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BN,), dtype=tl.int32)
    for n0 in range(0, width, BN):
        column = n0 + tl.arange(0, BN)
        value = tl.load(x + row * stride_x + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _magnitudes(value))
    top = tl.max(largest, axis=0)
    finite = top < 0x7F800000
    step = tl.maximum(tl.div_rn(top.to(tl.float32, bitcast=True), 127.0), 1.1754943508222875e-38)  # 2^-126
    for n0 in range(0, width, BN):
        column = n0 + tl.arange(0, BN)
        value = tl.load(x + row * stride_x + column, mask=column < width, other=0.0).to(tl.float32)
        code = _nearest(tl.div_rn(tl.where(finite, value, 0.0), tl.where(finite, step, 1.0)))
        tl.store(wire + row * stride_w + column, code.to(tl.int32).to(tl.uint8), mask=column < width)
    word = tl.where(finite, _bits(step), 0x7FC00000)  # NaN
    part = tl.arange(0, 4)
    tl.store(wire + row * stride_w + width + part, ((word >> (8 * part)) & 255).to(tl.uint8))


@triton.jit
def int8_decode_kernel(wire, x, width, stride_w, most, BN: tl.constexpr):
    """x [R, D] of wire [R, D + 4]. Grid (R, D / BN)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.arange(0, 4)
    word = tl.sum(tl.load(wire + row * stride_w + width + part).to(tl.int32) << (8 * part), axis=0)
    code = tl.load(wire + row * stride_w + column, mask=column < width, other=0).to(tl.int32)
    value = ((code ^ 128) - 128).to(tl.float32) * word.to(tl.float32, bitcast=True)
    tl.store(x + row * width + column, _stored(value, most).to(x.dtype.element_ty), mask=column < width)


class Int8(codecs.Int8):
    """See `moefx.codegen.codecs.Int8`."""

    def encode(self, rows: Tensor) -> Tensor:
        check(rows.dtype)
        rows, width = unit_columns(rows), rows.shape[1]
        wire = rows.new_empty(rows.shape[0], self.wire_bytes(width, rows.dtype), dtype=torch.uint8)
        if rows.shape[0]:
            run(int8_encode_kernel, (rows.shape[0],), rows, wire, width, rows.stride(0), wire.stride(0), BN=_bn(width))
        return wire

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        check(dtype)
        rows = wire.new_empty(wire.shape[0], d_model, dtype=dtype)
        if rows.numel():
            grid = (wire.shape[0], cdiv(d_model, _bn(d_model)))
            run(int8_decode_kernel, grid, wire, rows, d_model, wire.stride(0), most_of(dtype), BN=_bn(d_model))
        return rows


def _bn(width: int) -> int:
    return power_of_2(width, least=16, most=COLUMNS)


def run(kernel: Any, grid: tuple[int, ...], first: Tensor, *args: Any, **options: Any) -> None:
    """Launch on the device of `first`."""
    with on_device(first):
        launch(kernel, grid, first, *args, **options)


# ------------------------------------------------------------------------------------------------ fp8


@triton.jit
def _e4m3(x):
    """The byte of |x| <= 448 in e4m3, rounded to even: halfway cases by adding half a unit, or the odd last bit more."""
    size = _magnitudes(x)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the unit is 2^-9, that of float32 at 2^14.
    subnormal = _bits(size.to(tl.float32, bitcast=True) + 16384.0) - 0x46800000
    code = tl.where(size < 0x3C800000, subnormal, normal)
    return code | ((_bits(x) >> 24) & 128)


@triton.jit
def _from_e4m3(code):
    """float32 of a byte; e4m3's NaN does not occur."""
    size = code & 127
    subnormal = size.to(tl.float32) * 0.001953125  # 2^-9
    normal = ((size + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, subnormal, normal)
    return tl.where(code >= 128, -value, value)


@triton.jit
def fp8_encode_kernel(x, wire, width, size, count, stride_x, stride_w, BB: tl.constexpr, BN: tl.constexpr):
    """Codes and scales of BB blocks of `size` numbers. Grid (R, count / BB)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BB + tl.arange(0, BB)
    start = (block * size)[:, None]
    end = tl.minimum(start + size, width)
    largest = tl.zeros((BB, BN), dtype=tl.int32)
    for n0 in range(0, size, BN):
        column = start + n0 + tl.arange(0, BN)[None, :]
        value = tl.load(x + row * stride_x + column, mask=column < end, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _magnitudes(value))
    top = tl.max(largest, axis=1)
    finite = top < 0x7F800000
    scale = (top >> 23) - 127 - 8 + ((top & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = tl.minimum(tl.maximum(scale, -126), 120)
    for n0 in range(0, size, BN):
        column = start + n0 + tl.arange(0, BN)[None, :]
        value = tl.load(x + row * stride_x + column, mask=column < end, other=0.0).to(tl.float32)
        code = _e4m3(tl.where(finite[:, None], value, 0.0) * _power_of_2(-scale)[:, None])
        tl.store(wire + row * stride_w + column, code.to(tl.uint8), mask=column < end)
    told = tl.where(finite, scale + 127, 255).to(tl.uint8)
    tl.store(wire + row * stride_w + width + block, told, mask=block < count)


@triton.jit
def fp8_decode_kernel(wire, x, width, size, stride_w, most, BN: tl.constexpr):
    """x [R, D] of wire. Grid (R, D / BN)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    code = tl.load(wire + row * stride_w + column, mask=column < width, other=0).to(tl.int32)
    scale = tl.load(wire + row * stride_w + width + column // size, mask=column < width, other=127).to(tl.int32)
    value = _from_e4m3(code) * _power_of_2(tl.minimum(scale, 254) - 127)
    value = tl.where(scale == 255, float("nan"), _stored(value, most))
    tl.store(x + row * width + column, value.to(x.dtype.element_ty), mask=column < width)


class Fp8(codecs.Fp8):
    """See `moefx.codegen.codecs.Fp8`."""

    def encode(self, rows: Tensor) -> Tensor:
        check(rows.dtype)
        rows, width, size = unit_columns(rows), rows.shape[1], self._size(rows.shape[1])
        wire = rows.new_empty(rows.shape[0], self.wire_bytes(width, rows.dtype), dtype=torch.uint8)
        if wire.numel():
            count, bn = cdiv(width, size), _bn(size)
            bb = COLUMNS // bn
            run(
                fp8_encode_kernel, (rows.shape[0], cdiv(count, bb)),
                rows, wire, width, size, count, rows.stride(0), wire.stride(0), BB=bb, BN=bn,
            )  # fmt: skip
        return wire

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        check(dtype)
        rows = wire.new_empty(wire.shape[0], d_model, dtype=dtype)
        if rows.numel():
            bn, size = _bn(d_model), self._size(d_model)
            grid = (wire.shape[0], cdiv(d_model, bn))
            run(fp8_decode_kernel, grid, wire, rows, d_model, size, wire.stride(0), most_of(dtype), BN=bn)
        return rows


# ------------------------------------------------------------------------------------------------ block transform


@triton.jit
def _hadamard(values, BB: tl.constexpr):
    """[BB, 16] int32 -> [BB, 16]: each step adds and subtracts neighbours and moves the index bit that it did to the top."""
    for _ in tl.static_range(4):
        a, b = tl.split(tl.reshape(values, (BB, 8, 2)))
        values = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (BB, 16))
    return values


@triton.jit
def _shifted(values, shift):
    """values / 2^shift, rounded, for int32 values and shifts in [0, 30]."""
    one = values * 0 + 1
    return (values + ((one << shift) >> 1)) >> shift


@triton.jit(do_not_specialize=["blocks"])
def zfp_encode_kernel(
    x, wire, blocks, width, row_blocks, stride_x, LEAST: tl.constexpr, MOST: tl.constexpr, POINT: tl.constexpr,
    PLANES: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """BB blocks of 16 numbers, 2 (PLANES + 1) bytes each, out of R * row_blocks. Grid (blocks / BB,)."""
    block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    live = block < blocks
    column = (block % row_blocks)[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = live[:, None] & (column < width)
    value = tl.load(x + (block // row_blocks)[:, None] * stride_x + column, mask=mask, other=0.0).to(tl.float32)

    top = tl.max(_magnitudes(value), axis=1)  # [BB]
    finite = top < 0x7F800000
    exponent = tl.minimum(tl.maximum((top >> 23) - 127, -126), 127)
    up = POINT - exponent
    half = up >> 1
    fixed = value * _power_of_2(half)[:, None] * _power_of_2(up - half)[:, None]
    coefficient = _hadamard(tl.where(finite[:, None], _nearest(fixed), 0.0).to(tl.int32), BB)

    most = tl.max(tl.abs(coefficient), axis=1)
    shift = tl.full((BB,), 1, dtype=tl.int32)
    for tried in tl.static_range(1, MOST):
        shift += (_shifted(most, tried) > (1 << (PLANES - 1)) - 1).to(tl.int32)
    shift = tl.maximum(shift, LEAST - exponent)

    # The last bit of the index tells coefficients of low and of high sequency.
    high = tl.arange(0, 2)[None, None, :]
    kept = _shifted(tl.reshape(coefficient, (BB, 8, 2)), (shift[:, None, None] - 1) + high)
    place = tl.arange(0, 8)[None, :, None]
    start = wire + block * (2 * PLANES + 2)
    tl.store(start, tl.where(finite, shift + exponent - LEAST, 255).to(tl.uint8), mask=live)
    half_of = tl.arange(0, 2)[None, :]
    for k in tl.static_range(PLANES + 1):
        plane = tl.maximum(PLANES - k - high, 0)
        byte = tl.sum(((kept >> plane) & 1) << place, axis=1)  # [BB, 2]
        written = live[:, None] & (2 * k + 1 + half_of < 2 * PLANES + 2)
        tl.store(start[:, None] + 1 + 2 * k + half_of, byte.to(tl.uint8), mask=written)


@triton.jit(do_not_specialize=["blocks"])
def zfp_decode_kernel(
    wire, x, blocks, width, row_blocks, most, LEAST: tl.constexpr, POINT: tl.constexpr, PLANES: tl.constexpr,
    BB: tl.constexpr,
):  # fmt: skip
    """The reverse of `zfp_encode_kernel`."""
    block = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    live = block < blocks
    start = wire + block * (2 * PLANES + 2)
    step = tl.load(start, mask=live, other=0).to(tl.int32)
    high, half_of = tl.arange(0, 2)[None, None, :], tl.arange(0, 2)[None, :]
    place = tl.arange(0, 8)[None, :, None]
    kept = tl.zeros((BB, 8, 2), dtype=tl.int32)
    for k in tl.static_range(PLANES + 1):
        written = live[:, None] & (2 * k + 1 + half_of < 2 * PLANES + 2)
        byte = tl.load(start[:, None] + 1 + 2 * k + half_of, mask=written, other=0).to(tl.int32)
        kept += ((byte[:, None, :] >> place) & 1) << tl.maximum(PLANES - k - high, 0)
    sign = tl.full((1, 1, 2), 1, dtype=tl.int32) << (PLANES - high)
    kept = ((kept ^ sign) - sign) << high
    number = _hadamard(tl.reshape(kept, (BB, 16)), BB).to(tl.float32)
    exponent = step + LEAST - 1 - POINT - 4
    half = exponent >> 1
    value = number * _power_of_2(half)[:, None] * _power_of_2(exponent - half)[:, None]
    value = tl.where((step == 255)[:, None], float("nan"), _stored(value, most))
    column = (block % row_blocks)[:, None] * 16 + tl.arange(0, 16)[None, :]
    mask = live[:, None] & (column < width)
    tl.store(x + (block // row_blocks)[:, None] * width + column, value.to(x.dtype.element_ty), mask=mask)


class Zfp(codecs.Zfp):
    """See `moefx.codegen.codecs.Zfp`."""

    def encode(self, rows: Tensor) -> Tensor:
        check(rows.dtype)
        rows, width, planes = unit_columns(rows), rows.shape[1], self.rate(rows.dtype) - 1
        wire = rows.new_empty(rows.shape[0], self.wire_bytes(width, rows.dtype), dtype=torch.uint8)
        if wire.numel():
            row_blocks = cdiv(width, BLOCK)
            blocks = rows.shape[0] * row_blocks
            run(
                zfp_encode_kernel, (cdiv(blocks, BLOCKS),),
                rows, wire, blocks, width, row_blocks, rows.stride(0), LEAST=least_step(planes),
                MOST=most_shift(planes), POINT=FIXED_POINT, PLANES=planes, BB=BLOCKS,
            )  # fmt: skip
        return wire

    def decode(self, wire: Tensor, d_model: int, dtype: torch.dtype) -> Tensor:
        check(dtype)
        planes = self.rate(dtype) - 1
        rows = wire.new_empty(wire.shape[0], d_model, dtype=dtype)
        if rows.numel():
            row_blocks = cdiv(d_model, BLOCK)
            blocks = rows.shape[0] * row_blocks
            run(
                zfp_decode_kernel, (cdiv(blocks, BLOCKS),),
                wire, rows, blocks, d_model, row_blocks, most_of(dtype), LEAST=least_step(planes),
                POINT=FIXED_POINT, PLANES=planes, BB=BLOCKS,
            )  # fmt: skip
        return rows


def with_kernels(codec: Codec) -> Codec:
    """The codec with Triton's kernels, if it is one that has some; else itself: a cast is one kernel in torch."""
    if type(codec) is codecs.Int8:
        return Int8()
    if type(codec) is codecs.Fp8:
        return Fp8(codec.block)
    if type(codec) is codecs.Zfp:
        return Zfp(codec.bits)
    return codec
