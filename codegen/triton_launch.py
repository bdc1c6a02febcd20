"""What all Triton kernels of moefx share: the dtypes they take, how they are launched, which expert owns a row tile.

Letters as everywhere: T tokens, K slots per token, R = T*K routed rows, E experts; I and O are the input and output
features of a product. Rows behind offsets[E] belong to no expert: no kernel reads them and no kernel writes them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from moefx.codegen import triton_relaunch as relaunch
from triton.runtime.errors import OutOfResources
from triton.tools.ragged_tma import to_ragged_indices
from triton.tools.tensor_descriptor import TensorDescriptor

from moefx.errors import InputError


@triton.jit
def expert_tile(offsets, tile, experts, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """The expert that owns row tile `tile`, the tile's first row, and the end of the expert's rows.

    Expert e owns the tiles first(e) .. first(e + 1) - 1 with first(e) = offsets[e] // BM + e: a closed form, so no scan
    over the experts is needed, and at least ceil(rows of e / BM) of them. A tile whose first row is not before the end
    has nothing to do. All experts together own `row_tiles(R, E, BM)` tiles at most, whatever the routing.
    """
    e = tl.arange(0, BLOCK_E)
    first = tl.load(offsets + e, mask=e < experts, other=0) // BM + e
    owner = tl.sum(((first <= tile) & (e < experts)).to(tl.int32), axis=0) - 1
    start = tl.load(offsets + owner)
    end = tl.load(offsets + owner + 1)
    return owner, start + (tile - start // BM - owner) * BM, end


@triton.jit
def first_tiles(offsets, experts, BLOCK_E: tl.constexpr, BM: tl.constexpr):
    """(the first tile of each expert [BLOCK_E], how many there are): tiles of BM rows, none without rows."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    tiles = (end - start + BM - 1) // BM
    return tl.where(e < experts, tl.cumsum(tiles, axis=0) - tiles, 1 << 30), tl.sum(tiles, axis=0)


@triton.jit
def find_tile(first, offsets, tile, BM: tl.constexpr):
    """As `expert_tile`, by the table of `first_tiles`: for persistent programs, which make it once."""
    before = first <= tile
    expert = tl.sum(before.to(tl.int32), axis=0) - 1
    row0 = tl.load(offsets + expert) + (tile - tl.max(tl.where(before, first, 0), axis=0)) * BM
    return expert, row0, tl.load(offsets + expert + 1)


@triton.jit
def halves(block, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half [BM, BN] of a block [BM, 2 * BN]."""
    return tl.split(tl.permute(tl.reshape(block, (BM, 2, BN)), (0, 2, 1)))


@triton.jit
def load_rows(rows, start, count, row, column, BM: tl.constexpr, BN: tl.constexpr):
    """The block [BM, BN] from `row` and `column` on of the `count` rows from `start` on: zeros past their end.

    rows: a descriptor of `described_rows`. The indices are those of triton.tools.ragged_tma, whose own functions the
    interpreter does not take.
    """
    a, b, c = to_ragged_indices(start, count, row)
    return rows.load([a, b, c, column]).reshape(BM, BN)


@triton.jit
def store_rows(out, start, count, column, block, BM: tl.constexpr, BN: tl.constexpr):
    """Writes a block [BM, BN] over the first of the `count` rows from `start` on, and nothing past their end."""
    a, b, c = to_ragged_indices(start, count, 0)
    out.store([a, b, c, column], block.to(out.dtype).reshape(1, 1, BM, BN))


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up. Triton's own, called on the host, takes longer than all else that computes a grid."""
    return -(-n // by)


def row_tiles(rows: int, experts: int, block: int) -> int:
    """How many tiles of `block` rows cover `rows` rows of `experts` experts, at worst: no tile spans two experts."""
    return rows // block + experts


def tiles_with_rows(rows: int, experts: int, block: int) -> int:
    """How many tiles `first_tiles` counts, at worst: with few rows there are no more than rows."""
    return min(rows, row_tiles(rows, experts, block))


def interpreted() -> bool:
    """True when the kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(expert_tile, triton.runtime.JITFunction)


def supports(dtype: torch.dtype) -> str | None:
    """None when the kernels take this dtype; otherwise the reason why not."""
    if dtype is torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 wrongly; use float16 or float32 there"
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return None
    if dtype is torch.float64:
        return "the Triton kernels accumulate in float32; float64 needs the torch ops"
    return f"the Triton kernels take bfloat16, float16 and float32, not {dtype}"


def check_dtypes(op: str, tensors: Mapping[str, torch.Tensor | None], same: bool = False) -> None:
    """Raises InputError unless the kernels support the dtype of every tensor (and, with `same`, there is only one)."""
    dtypes = {name: t.dtype for name, t in tensors.items() if t is not None}
    for name, dtype in dtypes.items():
        if reason := supports(dtype):
            raise InputError(f"{op}: {name} is {dtype}: {reason}")
    if same and len(set(dtypes.values())) > 1:
        raise InputError(f"{op}: one dtype expected, got {dtypes}; cast the operands first")


def float32_precision() -> str:
    """How tl.dot multiplies float32: "tf32" only where torch's own matmul may use it."""
    try:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    except RuntimeError:  # torch refuses the old flag once the new one was used
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


_builder: _Builder | None = None  # while there is one, `launch` gives kernels to it and runs nothing
_every_size = True  # whether that is for all numbers of rows


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, shrinks: bool = False, **options: Any) -> None:
    """Runs a kernel on the current stream; inside `only_compiling` makes it ready to run instead.

    shrinks: the caller takes a smaller one where this needs more of the chip than there is.
    """
    if _builder is not None:
        _builder.shrinks = shrinks
        made = kernel.warmup(*args, grid=grid, **options)
        if not hasattr(made, "result"):  # compiled before, and not side by side
            _builder.load(made, shrinks)
    elif interpreted():
        kernel[grid](*args, **options)
    else:
        relaunch.launch(kernel, grid, args, options)


def prepare_compiler() -> None:
    """What Triton does once in a process, before its first kernel: it builds its driver with a C compiler, and hashes its own
    files for the keys of its cache. About a second, of which little holds Python's lock."""
    if not interpreted():
        from torch.utils._triton import triton_hash_with_backend  # as Inductor asks for them

        triton_hash_with_backend()


@contextlib.contextmanager
def only_compiling(every_size: bool = True) -> Iterator[None]:
    """Inside, kernels are compiled for the arguments they are launched with, side by side, and none runs: what they would
    have written stays arbitrary. Returns when all are ready and loaded. Not for several threads at once.

    every_size: also those that another number of rows would take.
    """
    global _builder, _every_size
    if interpreted():
        yield  # nothing to compile
        return
    with _Builder() as builder, triton.AsyncCompileMode(builder):
        _builder, _every_size = builder, every_size
        try:
            yield
        finally:
            _builder = None


class _Builder(ThreadPoolExecutor):
    """Threads that Triton compiles kernels in, and each brings its own onto the device and builds its launcher, as Triton does at
    the first launch. shrinks: of the kernel that is given now, whether it takes another form where it needs more of the chip
    than there is; any other raises OutOfResources then."""

    def __init__(self) -> None:
        super().__init__(os.cpu_count())
        self.shrinks = False
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def submit(self, fn: Callable[[], Any], /) -> Future[Any]:  # type: ignore[override]  # Triton gives nothing else
        return super().submit(self._build, fn, self.shrinks)

    def _build(self, compile_kernel: Callable[[], Any], shrinks: bool) -> Any:
        kernel = compile_kernel()
        self.load(kernel, shrinks)
        return kernel

    def load(self, kernel: Any, shrinks: bool) -> None:
        with torch.cuda.device(self.device) if self.device is not None else contextlib.nullcontext():
            with contextlib.suppress(OutOfResources) if shrinks else contextlib.nullcontext():
                kernel.run  # noqa: B018 - a property that does both


def compiling() -> bool:
    """Whether kernels are only made ready now."""
    return _builder is not None


def compiling_every_size() -> bool:
    """Whether kernels are only made ready, and those for all numbers of rows: then all of them are launched."""
    return _builder is not None and _every_size


def launch_block(
    stages: dict[Hashable, int], key: Hashable, most: int, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any
) -> bool:
    """`launch` with as many stages as the chip has room for, at most `most`; False where even two do not fit. How much
    shared memory a kernel takes is known when it is compiled: what was found out is kept in `stages` under `key`."""
    while (n := stages.setdefault(key, most)) >= 2:
        try:
            launch(kernel, grid, *args, num_stages=n, shrinks=True, **options)
            return True
        except OutOfResources:
            stages[key] = n - 1
    return False


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def described(tensor: torch.Tensor, block: Sequence[int]) -> TensorDescriptor | None:
    """A descriptor of the tensor for the copy engine of Hopper and later chips (TMA), which moves blocks of this shape.

    None where the chip, the dtype or the layout has none: 16-bit elements, the last stride 1, the address and the other
    strides in multiples of 16 bytes, nothing empty. Blocks that reach over an edge are filled with zeros, and are not
    written there.
    """
    return descriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)) if _fits(tensor) else None


def described_rows(rows: torch.Tensor, block: Sequence[int]) -> TensorDescriptor | None:
    """A descriptor of rows [R, n] for `load_rows` and `store_rows`, which never touch the rows of another expert.

    The same as `triton.tools.ragged_tma.create_ragged_descriptor(rows, block)`, which says how it works.
    """
    if not _fits(rows) or rows.shape[0] > 1 << 30:
        return None
    stride = rows.stride(0)
    shape, strides = [0x7FFF0000, 0x7FFF0000, 1 << 30, rows.shape[1]], [(1 << 34) - stride, stride, stride, 1]
    return descriptor(rows, shape, strides, [1, 1, *block])


def descriptor(
    base: Any,
    shape: list[int],
    strides: list[int],
    block: list[int],
    padding: str = "zero",
    kind: Any = TensorDescriptor,
    layout: Any = None,
) -> Any:
    """Without the constructor, which checks anew what `_fits` has checked and takes most of a launch's time. base: a tensor, or
    what has a `data_ptr` as one. kind, layout: Gluon's class of descriptors, which also have a layout."""
    made = object.__new__(kind)
    made.base, made.shape, made.strides, made.block_shape, made.padding = base, shape, strides, block, padding
    if layout is not None:
        made.layout = layout
    return made


def _fits(tensor: torch.Tensor) -> bool:
    if tensor.element_size() != 2 or tensor.data_ptr() & 15 or not tensor.numel() or not has_copy_engine(tensor.device):
        return False
    *lead, last = tensor.stride()
    for stride in lead:
        if stride <= 0 or stride & 7:
            return False
    return last == 1


@cache
def has_copy_engine(device: torch.device) -> bool:
    """Whether the chip moves blocks by itself (TMA)."""
    if device.type != "cuda":
        return interpreted()  # which knows descriptors
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can have."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a whole multiprocessor run at once: the grid of a persistent kernel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def unit_columns(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with adjacent features: kernels take any row stride, but a feature stride of 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def power_of_2(n: int, least: int = 1, most: int = 1 << 30) -> int:
    """The power of two not below n, kept within [least, most]."""
    return max(least, min(most, 1 << (max(n, 1) - 1).bit_length()))
