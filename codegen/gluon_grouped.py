"""Grouped products by warp-specialised kernels (`gluon_kernels`): which chips and Triton releases have them, and their launches.

Only where a tile is `specialised` (`triton_tiles`). Gluon is experimental: its names and their meaning change between releases of
Triton. So it is imported when the first product wants it, from releases for which the kernels are known to compile, and whatever
is missing is a reason why the plain kernels of `triton_grouped` run instead.

    why_not(device)                             "" where these kernels can run
    launch_linear(...), launch_wgrad(...)       True, or False where the plain kernel has to run
"""

from __future__ import annotations

import logging
import re
from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from moefx.codegen.triton_launch import (
    cdiv,
    described,
    described_rows,
    descriptor,
    interpreted,
    launch_block,
    multiprocessors,
    on_device,
    power_of_2,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from moefx.codegen.triton_tiles import Tile

log = logging.getLogger(__name__)

RELEASES = (3, 6), (3, 9)  # of Triton, the first and the last that is known
SHAPE = (128, 256, 64)  # rows, columns and inner of a tile: what two consumers of four warps hold in registers
WARPS = 4  # of a consumer
STAGES: dict[Hashable, int] = {}  # as the chip turned out to have room for; see `launch_block`


@cache
def why_not(device: torch.device) -> str:
    """Why no warp-specialised kernel runs on a device; empty where they do. Logged, once."""
    reason = _missing(device)
    if reason:
        log.info("no warp-specialised products on %s: %s", device, reason)
    return reason


def _missing(device: torch.device) -> str:
    if interpreted():
        return "Triton's interpreter does not know Gluon"
    if device.type != "cuda" or torch.version.hip:
        return "it is no CUDA device"
    if (capability := torch.cuda.get_device_capability(device))[0] != 9:
        return f"they are written for compute capability 9.x, and this is {'.'.join(map(str, capability))}"
    return without_kernels()


def without_kernels() -> str:
    """Why this release of Triton does not make the kernels; empty where it does."""
    release = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    if not RELEASES[0] <= release <= RELEASES[1]:
        known = " to ".join(".".join(map(str, r)) for r in RELEASES)
        return f"they are written for the Gluon of Triton {known}, and this is {triton.__version__}"
    try:
        absent = kernels().absent()
    except (ImportError, AttributeError, TypeError) as error:
        return f"Triton {triton.__version__} does not have their Gluon: {type(error).__name__}: {error}"
    return f"the Gluon of Triton {triton.__version__} has no {', '.join(absent)}" if absent else ""


@cache
def kernels() -> Any:
    """The module `gluon_kernels`, which needs Gluon."""
    from moefx.codegen import gluon_kernels

    return gluon_kernels


def laid_out(made: TensorDescriptor | None) -> Any:
    """The same descriptor for Gluon, which also asks how a block lies in shared memory; None stays.

    In rows of 128 bytes, swizzled, as both the copy engine and the tensor cores take them; blocks are at least as wide.
    """
    if made is None:
        return None
    kind, layout = kernels().TensorDescriptor, _layout(len(made.block_shape))
    return descriptor(made.base, made.shape, made.strides, made.block_shape, made.padding, kind, layout)


@cache
def _layout(rank: int) -> Any:
    return kernels().gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def _takes(tile: Tile, device: torch.device) -> bool:
    return (tile.rows, tile.columns, tile.inner) == SHAPE and not why_not(device)


def launch_linear(
    rows: Tensor, order: Tensor | None, top_k: int, weight: Tensor, offsets: Tensor, out: Tensor, tile: Tile
) -> bool:
    """`triton_grouped.block_linear_kernel`'s product; False where this kernel does not apply."""
    if not _takes(tile, rows.device):
        return False
    experts, inner, columns = weight.shape
    inner_last = weight.stride(1) == 1
    block = (1, tile.columns, tile.inner) if inner_last else (1, tile.inner, tile.columns)
    b = laid_out(described(weight.transpose(1, 2) if inner_last else weight, block))
    o = laid_out(described_rows(out, (tile.rows // 2, tile.columns // 4)))
    if order is None:
        a = laid_out(described(rows, (tile.rows, tile.inner)))
    else:  # in whole steps and pieces of 16 bytes, without masks
        whole = inner % tile.inner == 0 and rows.stride(0) % 8 == 0 and rows.data_ptr() % 16 == 0
        a = rows if whole else None
    if a is None or b is None or o is None:
        return False
    block_e = power_of_2(experts, least=128)  # some of each lane of a warp
    key = ("linear", rows.device, inner_last, order is not None, block_e, tile)
    with on_device(rows):
        return launch_block(
            STAGES, key, tile.stages, kernels().linear_kernel, (multiprocessors(rows.device),),
            a, offsets if order is None else order, b, offsets, o, inner, rows.stride(0) // 8, experts,
            cdiv(columns, tile.columns), top_k, GATHER=order is not None, INNER_LAST=inner_last, GROUP=tile.group,
            BLOCK_E=block_e, BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=WARPS,
        )  # fmt: skip


def launch_wgrad(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor, add: bool, tile: Tile) -> bool:
    """`triton_grouped.block_wgrad_kernel`'s gradient; False where this kernel does not apply. out [E, I, O], the last stride 1."""
    if not _takes(tile, rows.device) or (add and out.dtype != grad.dtype):
        return False
    experts, inner, columns = out.shape
    a = laid_out(described_rows(rows, (tile.inner, tile.rows)))
    b = laid_out(described_rows(grad, (tile.inner, tile.columns)))
    o = laid_out(described(out, (1, tile.rows // 2, tile.columns // 4)))
    old = laid_out(described(out.unsqueeze(0), (1, 1, tile.rows // 2, tile.columns))) if add else o
    if a is None or b is None or o is None or old is None:
        return False
    tiles_i, tiles_o = cdiv(inner, tile.rows), cdiv(columns, tile.columns)
    with on_device(rows):
        return launch_block(
            STAGES, ("wgrad", rows.device, add, tile), tile.stages, kernels().wgrad_kernel, (multiprocessors(rows.device),),
            a, b, offsets, o, old, tiles_i, tiles_o, experts * tiles_i * tiles_o, ADD=add, GROUP=tile.group,
            BI=tile.rows, BO=tile.columns, BR=tile.inner, num_warps=WARPS,
        )  # fmt: skip
