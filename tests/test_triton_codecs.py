"""The kernels of the codecs: the bytes and the numbers of the torch codecs, bit for bit."""

from __future__ import annotations

from triton_here import DEVICE, DTYPES, needs_triton  # first: it chooses Triton's interpreter

# isort: split

import math

import pytest
import torch
from moefx.codegen import codecs, triton_codecs
from moefx.codegen.codecs import CODECS, Codec, Fp8, Zfp, codec_for
from test_codecs import KINDS, sample
from torch import Tensor

from moefx.errors import InputError

ALL: dict[str, Codec] = {
    **{name: CODECS[name] for name in ("int8", "fp8", "fp8_block", "zfp")},
    **{"fp8_5": Fp8(5), "zfp3": Zfp(3), "zfp8": Zfp(8), "zfp16": Zfp(16)},
}

pytestmark = needs_triton


def same(codec: Codec, x: Tensor) -> None:
    kernels = triton_codecs.with_kernels(codec)
    assert kernels is not codec and isinstance(kernels, type(codec))
    wire = codec.encode(x)
    assert torch.equal(kernels.encode(x), wire)
    got, want = (c.decode(wire, x.shape[1], x.dtype) for c in (kernels, codec))
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num()) and torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_of_torch(name: str, dtype: torch.dtype, kind: str) -> None:
    for rows, width in [(0, 16), (1, 1), (2, 83)]:
        x = sample(kind, rows, width, dtype, rows)
        same(ALL[name], x.to(DEVICE))


@pytest.mark.parametrize("name", ALL)
def test_long_rows_strides_and_what_is_not_finite(name: str) -> None:
    x = sample("outliers", 4, 1100, torch.float32, 0).to(DEVICE)
    x[1, 1050], x[2, 3], x[3, 600] = math.inf, math.nan, -math.inf
    same(ALL[name], x)
    same(ALL[name], x.T[:40])
    same(ALL[name], x[:, 3:90])


def test_e4m3_rounds_as_torch_does() -> None:
    """Every number that e4m3 has, the points halfway between neighbours, and those beside them."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, middles, torch.nextafter(middles, middles * 2), torch.nextafter(middles, middles * 0)])
    x = torch.cat([x, -x, torch.tensor([448.0])])[None].to(DEVICE)
    same(Fp8(None), x)


def test_which_codec() -> None:
    assert isinstance(codec_for("zfp", "cpu", "triton"), triton_codecs.Zfp)
    assert isinstance(codec_for("fp8_block", "cuda"), triton_codecs.Fp8)
    assert codec_for("bf16", "cuda") is CODECS["bf16"]

    class Own(codecs.Int8):
        """Another codec, which happens to build on one."""

    own = Own()
    assert triton_codecs.with_kernels(own) is own


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU computes bfloat16 right")
@pytest.mark.parametrize("name", ALL)
def test_the_interpreter_is_not_given_bfloat16(name: str) -> None:
    with pytest.raises(InputError, match="interpreter computes bfloat16 wrongly"):
        triton_codecs.with_kernels(ALL[name]).encode(torch.zeros(1, 16, dtype=torch.bfloat16))
