"""The tiles of grouped products: the block of results that a program makes, and in which order programs take blocks.

What `moefx calibrate` measured on this GPU decides, for products of about the sizes that it measured; otherwise a rule, with
defaults measured on H200s (docs/kernels.md). Nothing is tuned while a model runs, and the number of tokens, rounded up to a
power of two, chooses among kernels that `moefx.optimize` has made ready.

    tiles_for(device, kind, rows, inner, columns)   the tile; while those of every size are made ready all that any rows would take
    rule(kind, rows, inner, columns)                the default
    candidates(kind, rows, inner, columns)          what `moefx calibrate` compares
    Measured                                        what it found, a file a GPU
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from moefx.codegen.gluon_grouped import why_not
from moefx.codegen.triton_launch import compiling_every_size

from moefx.errors import InputError
from moefx.profile import cache_folder, device_name, file_name

VERSION = 3  # of the file: it holds the rule's tiles too, so a new rule makes old files wrong
# The kinds of products, and the kernels that make them.
KINDS = {
    "linear": "rows times weights by the copy engine",
    "act": "rows times weights with their activation, by the copy engine",
    "wgrad": "gradients of weights by the copy engine",
    "pointer": "rows times weights by pointers: few rows, and chips without a copy engine",
}
FEW_ROWS, SOME_ROWS, MANY_ROWS = 16, 32, 128  # of a pointer kernel's tile; see `pointer_rows`
LARGE = 1 << 22  # elements of an expert's matrix that no longer fit the L2 cache beside the rows: row tiles go in groups
BLOCK_ROWS = 1024  # rows of an expert from which a gate and an up share larger groups
NARROW_BELOW = 512  # rows of an expert: fewer make weights' gradients in small steps, where much of the time goes into writing
SPECIALISED_FROM = 256  # rows of an expert from which products of rows are warp-specialised
DEEP = 8192  # summands beyond which they are not: there the end of a tile is a small part of it
GATHERED_FROM = 2048  # columns of a segment that is in the epilogue of products of gathered rows
NEAR = 2.0  # powers of two by which rows, inner and columns together may differ from what was measured
MOST_ROWS = 24  # as a power of two


@dataclass(frozen=True)
class Tile:
    """A program makes rows x columns results in steps of `inner` summands, by `warps` warps with `stages` buffers.

    group: row tiles that walk over the columns together. programs: of a multiprocessor, each of which makes many tiles; 0:
    there are as many programs as tiles. gathers: rows are gathered before the product, not on the way (kind "act").
    specialised: some warps bring operands and `warps` others multiply (`gluon_grouped`; kinds "linear" and "wgrad").
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 8
    programs: int = 0
    gathers: bool = False
    specialised: bool = False

    def shared_bytes(self, itemsize: int, products: int = 1) -> int:
        """Shared memory of the operands' buffers for `products` products that share the left operand."""
        return self.stages * self.inner * (self.rows + products * self.columns) * itemsize


_LINEAR = Tile(128, 256, 64, 8, 4, group=1, programs=1)
_ACT = Tile(128, 128, 64, 8, 4, group=4, programs=1)
_WGRAD = Tile(128, 256, 64, 8, 3, group=8, programs=1)
_NARROW_WGRAD = Tile(128, 128, 32, 4, 6, group=16)  # two of a multiprocessor: one writes while the other multiplies
_SPECIALISED = {
    "linear": Tile(128, 256, 64, 8, 4, group=4, programs=1, specialised=True),
    "wgrad": Tile(128, 256, 64, 8, 4, group=16, programs=1, specialised=True),
}


def rule(kind: str, rows: int, inner: int, columns: int, specialised: bool = True) -> Tile:
    """The default of 16-bit operands. rows: of an expert, at the mean; inner: summands; columns: of the result (of "act": the
    activation's). The operands of "wgrad" have `rows` rows each, its result is inner x columns. specialised: there are
    warp-specialised kernels here (`why_not`)."""
    if specialised and columns >= 256:
        if kind == "linear" and rows >= SPECIALISED_FROM and inner <= DEEP or kind == "wgrad":
            return _SPECIALISED[kind]
    if kind == "linear":
        return replace(_LINEAR, columns=256 if columns >= 256 else 128, group=1 if inner * columns <= LARGE else 4)
    if kind == "act":
        return replace(_ACT, group=8 if rows >= BLOCK_ROWS else 4, gathers=columns >= GATHERED_FROM)
    if kind == "wgrad":
        return _WGRAD if columns >= 256 and rows >= NARROW_BELOW else _NARROW_WGRAD
    if rows <= SOME_ROWS:
        return Tile(pointer_rows(rows), 128, 128, 4, 4 if rows <= FEW_ROWS // 2 else 3)
    return Tile(MANY_ROWS, 256 if columns >= 256 else 128, 64, 8, 4)


def pointer_rows(rows: int) -> int:
    """Rows of a pointer kernel's tile, by the rows of an expert at the mean: enough that most experts have one tile, and so
    their matrices are read once. Few sizes, so that few kernels serve all numbers of rows."""
    return FEW_ROWS if rows <= FEW_ROWS // 2 else SOME_ROWS if rows <= SOME_ROWS else MANY_ROWS


def candidates(kind: str, rows: int, inner: int, columns: int, specialised: bool = True) -> list[Tile]:
    """Tiles that are worth a comparison, the rule's first. specialised: as `rule`'s."""
    first, plain = (rule(kind, rows, inner, columns, warps) for warps in (specialised, False))
    if kind == "linear":
        others = [plain, *(replace(plain, group=group) for group in (1, 4, 16, 32))]
        others.append(Tile(128, 128, 64, 8, 3, group=1, programs=2))
    elif kind == "act":
        others = [replace(first, group=group, gathers=gathers) for gathers in (False, True) for group in (1, 4, 8)]
    elif kind == "wgrad":
        others = [plain, _NARROW_WGRAD]
        others += [replace(_WGRAD, group=group) for group in (8, 32, 64)] if columns >= 256 else []
    elif rows <= SOME_ROWS:
        others = [Tile(first.rows, *rest) for rest in ((64, 128, 4, 5), (64, 256, 4, 3), (128, 128, 4, 3), (128, 64, 4, 4))]
    else:
        others = [Tile(128, 128, 64, 8, 4), Tile(128, 128, 32, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 256, 32, 4, 4)]
    if specialised and kind in _SPECIALISED and columns >= 256:
        others.append(_SPECIALISED[kind])
    return list(dict.fromkeys([first, *others]))


def tiles_for(device: torch.device, kind: str, rows: int, inner: int, columns: int) -> list[Tile]:
    """The tile of a product (see `rule`); while those of every size are made ready those of any number of rows."""
    if kind in _forced:
        return [_forced[kind]]
    if not compiling_every_size():
        return [_choose(device, kind, _rounded(rows), inner, columns)]
    return list(dict.fromkeys(_choose(device, kind, 1 << n, inner, columns) for n in range(MOST_ROWS + 1)))


def pointer_tile(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    rows: int,
    inner: int,
    columns: int,
    shared: int,
    products: int = 1,
) -> Tile:
    """The tile of a kernel by pointers, as large as fits into `shared` bytes of shared memory.

    products: grouped products that share the left operand, each with `columns` columns.
    """
    if dtype.itemsize == 2:
        tile = _forced.get("pointer") or _choose(device, "pointer", _rounded(rows), inner, columns)
    elif precision == "tf32":
        tile = Tile(pointer_rows(rows), 128, 32, 4 if rows <= SOME_ROWS else 8, 3)
    else:
        tile = Tile(min(pointer_rows(rows), 64), 64, 32, 4, 2)
    if products > 1:
        tile = replace(tile, columns=tile.columns // 2)
    while tile.stages > 2 and tile.shared_bytes(dtype.itemsize, products) > shared:
        tile = replace(tile, stages=tile.stages - 1)
    if tile.shared_bytes(dtype.itemsize, products) > shared:
        tile = replace(tile, inner=tile.inner // 2)
    return tile


def _rounded(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()


@cache
def _choose(device: torch.device, kind: str, rows: int, inner: int, columns: int) -> Tile:
    measured = measured_on(device) if device.type == "cuda" else None
    tile = measured and measured.nearest(kind, rows, inner, columns)
    if not tile or tile.specialised and why_not(device):  # a file may come from another release of Triton
        tile = rule(kind, rows, inner, columns, specialised=kind in _SPECIALISED and not why_not(device))
    return tile


# ------------------------------------------------------------------------------------------------ what was measured


@dataclass(frozen=True)
class Choice:
    """The fastest tile of one product, and how many times as fast as the rule's it was."""

    kind: str
    rows: int
    inner: int
    columns: int
    tile: Tile
    gain: float


@dataclass(frozen=True)
class Measured:
    """The tiles that `moefx calibrate` found on one GPU."""

    device: str
    choices: tuple[Choice, ...]
    source: str = ""

    def nearest(self, kind: str, rows: int, inner: int, columns: int) -> Tile | None:
        """That of the product of this kind whose sizes are nearest, None where none is `NEAR`."""

        def apart(c: Choice) -> float:
            pairs = ((rows, c.rows), (inner, c.inner), (columns, c.columns))
            return sum(abs(math.log2(max(a, 1) / b)) for a, b in pairs)

        among = [c for c in self.choices if c.kind == kind]
        best = min(among, key=apart, default=None)
        return best.tile if best and apart(best) <= NEAR else None

    def save(self, path: Path | None = None) -> Path:
        """Writes JSON to `path`, or to where `measured_on` looks; returns where."""
        path = path or file_of(self.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        forget()
        return path

    @staticmethod
    def loads(text: str, where: str) -> Measured:
        """Reads what `save` writes; InputError says what is wrong with it."""
        hint = "; calibrate again (python -m moefx calibrate) or remove it"
        try:
            data = json.loads(text)
            if (version := data["version"]) != VERSION:
                raise KeyError(f"version {VERSION} is needed; got {version!r}")
            choices = [Choice(**{**c, "tile": Tile(**c["tile"])}) for c in data["choices"]]
            device, source = data["device"], data["source"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{where} holds no tiles ({type(error).__name__}: {error}){hint}") from None
        for c in choices:
            sizes = (c.rows, c.inner, c.columns, c.tile.rows, c.tile.columns, c.tile.inner, c.tile.warps, c.tile.stages)
            if c.kind not in KINDS or any(type(n) is not int or n < 1 for n in sizes):
                raise InputError(f"{where}: {c} is no choice of a tile{hint}")
        return Measured(device, tuple(choices), source)

    def __str__(self) -> str:
        rows = [("product", "rows", "inner", "columns", "tile", "against the rule")]
        for c in self.choices:
            t = c.tile
            name = f"{t.rows}x{t.columns}x{t.inner}, {t.warps} warps, {t.stages} stages, groups of {t.group}"
            name += (f", {t.programs} a multiprocessor" if t.programs else "") + (", gathers first" if t.gathers else "")
            name += ", warp-specialised" if t.specialised else ""
            rows.append((c.kind, str(c.rows), str(c.inner), str(c.columns), name, f"{c.gain:.2f}x"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([f"tiles of {self.device}" + (f", {self.source}" if self.source else ""), *lines])


def file_of(device: str) -> Path:
    """In the cache folder, one file for a GPU."""
    return cache_folder() / f"tiles-{file_name(device)}.json"


@cache
def measured_on(device: torch.device) -> Measured | None:
    """What was measured on a GPU of this name, read once in a process; None where nothing was."""
    name = device_name(device)
    path = file_of(name)
    if not path.is_file():
        return None
    measured = Measured.loads(path.read_text(encoding="utf-8"), str(path))
    if measured.device != name:
        raise InputError(f"{path} holds tiles of {measured.device!r}, not of {name!r}: calibrate again")
    return measured


def forget() -> None:
    """What was read and chosen so far, so that a new file counts. Kernels that are ready stay."""
    measured_on.cache_clear()
    _choose.cache_clear()


_forced: dict[str, Tile] = {}


@contextlib.contextmanager
def only(kind: str, tile: Tile) -> Iterator[None]:
    """Inside, products of this kind take this tile: for measuring and for tests. Not for several threads at once."""
    before: Any = dict(_forced)
    _forced[kind] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
