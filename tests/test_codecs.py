"""Codecs in torch: rate, bound, determinism, and what must stay visible, for every codec alike."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moefx.codegen.codecs import (
    CODECS,
    DTYPES,
    Cast,
    Codec,
    Fp8,
    Int8,
    Zfp,
    codec_for,
    from_planes,
    hadamard,
    to_planes,
)
from torch import Tensor

from moefx.errors import InputError

# The registered ones, and rates and blocks that are not.
ALL: dict[str, Codec] = {**CODECS, "zfp3": Zfp(3), "zfp8": Zfp(8), "zfp16": Zfp(16), "fp8_5": Fp8(5)}
every_codec = pytest.mark.parametrize("name", ALL)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
F32 = torch.float32


def sample(kind: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of one kind, in range of the dtype: numbers like noise, with outliers, all alike, smooth, huge, tiny, none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    most = min(torch.finfo(dtype).max, torch.finfo(F32).max)
    if kind == "outliers":
        x = x * 10 ** torch.randint(-6, 5, x.shape, generator=generator)
    elif kind == "alike":
        x = torch.ones_like(x) * x[:, :1]
    elif kind == "smooth":
        x = torch.sin(torch.linspace(0, 3, width, dtype=torch.float64)) + x[:, :1]
    elif kind == "huge":
        x = x.sign() * most * (1 - 0.5 * torch.rand(x.shape, generator=generator))
    elif kind == "tiny":
        x = x * 2.0 ** torch.randint(-150, -100, x.shape, generator=generator)
    elif kind == "zero":
        x = torch.zeros_like(x)
    return x.clamp(-most, most).to(dtype)


KINDS = ("noise", "outliers", "alike", "smooth", "huge", "tiny", "zero")


def there_and_back(codec: Codec, rows: Tensor) -> Tensor:
    return codec.decode(codec.encode(rows), rows.shape[1], rows.dtype)


@every_codec
@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.sampled_from([0, 1, 2, 5]),
    width=st.sampled_from([0, 1, 3, 15, 16, 17, 31, 32, 33, 100]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_rate_bound_and_determinism(name: str, kind: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    codec, x = ALL[name], sample(kind, rows, width, dtype, seed)
    kept = x.clone()
    wire = codec.encode(x)
    assert wire.dtype == torch.uint8 and wire.is_contiguous() and torch.equal(x, kept)
    assert wire.shape == (rows, codec.wire_bytes(width, dtype))
    assert torch.equal(wire, codec.encode(x.clone()))
    back = codec.decode(wire, width, dtype)
    assert back.shape == x.shape and back.dtype == dtype and back.is_contiguous()
    bound = codec.error_bound(x)
    assert bound.shape == (rows,) and bound.dtype == torch.float64
    error = (back.double() - x.double()).abs()
    assert ((error <= bound[:, None]) | bound.isinf()[:, None]).all()
    if kind != "huge":  # only there may a cast overflow
        assert bound.isfinite().all()
    # Rows are independent: cut and reordered on the wire, they decode to the same bits.
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    again = codec.decode(wire[order].contiguous(), width, dtype)
    assert torch.equal(again, back[order])


@every_codec
@every_dtype
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_visible(name: str, dtype: torch.dtype, bad: float) -> None:
    x = sample("noise", 3, 40, dtype, 0)
    x[1, 37] = bad
    back = there_and_back(ALL[name], x)
    assert not back[1, 37].isfinite() and back[0].isfinite().all() and back[2].isfinite().all()
    if isinstance(ALL[name], Cast):
        assert torch.equal(back[1, 37].isnan(), x[1, 37].isnan())


@every_codec
@every_dtype
def test_nothing_finite_becomes_infinite_but_by_a_cast(name: str, dtype: torch.dtype) -> None:
    x = torch.full((2, 20), min(torch.finfo(dtype).max, torch.finfo(F32).max), dtype=dtype)
    x[1] *= -1
    back = there_and_back(ALL[name], x)
    overflows = isinstance(ALL[name], Cast) and not ALL[name].error_bound(x).isfinite().all()
    assert back.isinf().all() if overflows else back.isfinite().all()
    assert torch.equal(back.sign(), x.sign())


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8", "fp8_block", "zfp"])
def test_float64_beyond_float32_is_visible(name: str) -> None:
    x = torch.full((1, 16), 1e300, dtype=torch.float64)
    assert not there_and_back(CODECS[name], x).isfinite().any() and CODECS[name].error_bound(x).isinf().all()


@every_codec
def test_zeros_are_exact(name: str) -> None:
    assert torch.equal(there_and_back(ALL[name], torch.zeros(3, 33)), torch.zeros(3, 33))


@every_codec
def test_other_dtypes_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="can be encoded, not of torch.int32"):
        ALL[name].encode(torch.zeros(1, 16, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "dtype", "ratio"),
    [
        *[("none", dtype, 1.0) for dtype in DTYPES],
        *[("bf16", F32, 2.0), ("fp16", F32, 2.0), ("bf16", torch.bfloat16, 1.0)],
        *[("int8", F32, 4 / (1 + 4 / 4096)), ("int8", torch.bfloat16, 2 / (1 + 4 / 4096))],
        *[("fp8", torch.bfloat16, 2 / (1 + 1 / 4096)), ("fp8_block", torch.bfloat16, 2 / (1 + 1 / 32))],
        *[("zfp", dtype, 4.0) for dtype in DTYPES],
    ],
    ids=str,
)
def test_ratio(name: str, dtype: torch.dtype, ratio: float) -> None:
    assert 4096 * dtype.itemsize / CODECS[name].wire_bytes(4096, dtype) == pytest.approx(ratio)


# ------------------------------------------------------------------------------------------------ one by one


@every_dtype
def test_none_is_exact_and_copies_nothing(dtype: torch.dtype) -> None:
    x = sample("outliers", 4, 7, dtype, 0)
    wire = CODECS["none"].encode(x)
    assert wire.data_ptr() == x.data_ptr() and torch.equal(CODECS["none"].decode(wire, 7, dtype), x)


def test_rows_with_strides() -> None:
    x = torch.randn(40, 10).T
    for name, codec in ALL.items():
        assert torch.equal(there_and_back(codec, x), there_and_back(codec, x.contiguous())), name


def test_int8_hits_the_bound_and_the_ends() -> None:
    x = torch.tensor([[127.0, -127.0, 63.5, 0.25, 1.0]])
    wire = Int8().encode(x)
    assert wire[0, :5].view(torch.int8).tolist() == [127, -127, 64, 0, 1]
    assert Int8().decode(wire, 5, F32).tolist() == [[127.0, -127.0, 64.0, 0.0, 1.0]]
    least = torch.full((1, 4), 180 * 2.0**-149)  # whose step, 1.4 * 2^-149, would round to 2^-149
    assert Int8().encode(least)[0, :4].tolist() == [0] * 4


def test_fp8_is_exact_for_its_own_numbers() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = numbers[numbers.isfinite()][None]
    for factor in (1.0, 2.0**-90, 2.0**100):
        assert torch.equal(there_and_back(Fp8(None), x * factor), x * factor)


def test_fp8_error_is_relative() -> None:
    x = torch.randn(50, 64) * 2.0 ** torch.randint(-4, 1, (50, 64))
    relative = (there_and_back(Fp8(None), x) - x).abs() / x.abs()
    assert relative.max() <= 1 / 16 and relative.max() > 1 / 18


def test_a_block_of_its_own_keeps_small_numbers() -> None:
    x = torch.cat([torch.full((1, 32), 1e6), torch.full((1, 32), 1e-3)], dim=1)
    assert there_and_back(Fp8(None), x)[0, 32:].eq(0).all()
    assert (there_and_back(Fp8(32), x) - x).abs().max() < 1e6 / 16 and there_and_back(Fp8(32), x)[0, 63] > 0.9e-3


def test_hadamard() -> None:
    signs = [[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]
    x = torch.randint(-(2**19), 2**19 + 1, (500, 16)).float()
    x[0] = 2.0**19
    assert torch.equal(hadamard(x).double(), x.double() @ torch.tensor(signs, dtype=torch.float64))
    x = torch.randint(-(2**15), 2**15, (5, 16)).float()
    assert torch.equal(hadamard(hadamard(x)), 16 * x)


@pytest.mark.parametrize("planes", [2, 3, 7, 8, 9, 16])
def test_planes(planes: int) -> None:
    values = torch.randint(-(2 ** (planes - 1)), 2 ** (planes - 1), (3, 4, 8), dtype=torch.int32)
    wire = to_planes(values, planes)
    assert torch.equal(from_planes(wire), values)
    bits = [
        [sum(((int(v) >> bit) & 1) << i for i, v in enumerate(row)) for bit in reversed(range(planes))]
        for row in values[0]
    ]
    assert wire[0].tolist() == bits


@pytest.mark.parametrize("bits", [2, 17, 0, -1])
def test_zfp_rates(bits: int) -> None:
    with pytest.raises(InputError, match="3 to 16 bits"):
        Zfp(bits)


def rms(codec: Codec, x: Tensor) -> float:
    return ((there_and_back(codec, x) - x).double().pow(2).mean() / x.double().pow(2).mean()).sqrt().item()


def test_zfp_gains_a_digit_for_each_bit() -> None:
    x = torch.randn(64, 256)
    errors = [rms(Zfp(bits), x) for bits in range(3, 17)]
    assert all(b < 0.7 * a for a, b in zip(errors, errors[1:]))
    assert errors[8 - 3] < 0.015 and errors[16 - 3] < 1e-4


def test_zfp_is_better_where_there_is_something_to_gain() -> None:
    """One large number in each block: the transform spreads it, where a common scale drowns its neighbours."""
    x = torch.randn(64, 256)
    x[:, ::16] *= 100
    others = torch.ones(256, dtype=torch.bool)
    others[::16] = False
    zfp, int8 = (there_and_back(codec, x)[:, others] - x[:, others] for codec in (Zfp(8), Int8()))
    assert zfp.norm() < 0.8 * int8.norm()
    smooth = sample("smooth", 64, 256, F32, 0)
    assert rms(Zfp(4), smooth) < 0.5 * rms(Zfp(4), torch.randn(64, 256))


def test_which_codec() -> None:
    assert codec_for("int8") is CODECS["int8"] and codec_for("int8", "cuda", "torch") is CODECS["int8"]
    with pytest.raises(InputError, match="no codec 'int7'; known: none, bf16"):
        codec_for("int7")
    with pytest.raises(InputError, match="kernels must be"):
        codec_for("int8", kernels="fast")
