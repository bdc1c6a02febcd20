"""A pointwise segment of an expert template becomes Triton source: its value, its gradient, and its value in the
epilogue of the grouped product that feeds it.

Program element (r, j) makes outputs[r, j]. A template value is needed there at column start + step*j, where
(start, step) follows from the `columns` instructions between it and the output: (0, 1) without any. So a fused or
interleaved gate/up is read in place. The gradient is reverse mode over the same lines, with the derivatives of the
table `RULES`. All arithmetic is in fp32, whatever the storage dtype; casts between floating dtypes inside a segment
therefore change nothing but the dtype of the result.

    compile_pointwise(template, segment, leaves) -> Pointwise | Unsupported
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from textwrap import indent
from typing import Any

import torch
from moefx.codegen import triton_grouped
from moefx.codegen.triton_launch import (
    cdiv,
    check_dtypes,
    described,
    described_rows,
    float32_precision,
    launch,
    launch_block,
    multiprocessors,
    on_device,
    power_of_2,
    row_tiles,
    unit_columns,
)
from moefx.codegen.triton_permute import expert_sum
from moefx.codegen.triton_rules import FUNCTIONS, MASK_ARGUMENTS, RULES, STORAGE_KEYWORDS, Formula, literal
from torch import Tensor

from moefx.errors import InputError
from moefx.ir import Instr, Leaf, LeafRef, Ref, Template
from moefx.segments import Segment, leaf_refs

# Generated kernels handle about this many elements a program.
ELEMENTS = 2048
# The epilogue of a grouped product holds at most this many accumulators (gate and up).
MAX_PRODUCTS = 2


@dataclass(frozen=True)
class Unsupported:
    """Why a segment has no Triton form: the caller runs it with torch."""

    reason: str

    def __bool__(self) -> bool:
        return False


# ------------------------------------------------------------------------------------------------ the program


@dataclass(frozen=True)
class Line:
    """name = text, from the names `uses`; partials[n] is the gradient with respect to uses[n]."""

    name: str
    text: str
    uses: tuple[str, ...]
    partials: tuple[str | None, ...]
    note: str


@dataclass(frozen=True)
class Read:
    """name = elements start + step*j of an input or of a leaf. A leaf of one element (width 1) has step 0."""

    name: str
    source: str
    start: int
    step: int
    leaf: bool

    @property
    def columns(self) -> str:
        """The columns read, as an expression of `column`."""
        if (self.start, self.step) == (0, 1):
            return "column"
        scaled = "column" if self.step == 1 else f"{self.step} * column"
        return f"({scaled})" if self.start == 0 else f"({self.start} + {scaled})"

    @property
    def place(self) -> tuple[int, int]:
        return self.start, self.step

    def slice(self, width: int) -> slice:
        """The columns read by `width` program columns."""
        return slice(self.start, self.start + self.step * width, self.step)


@dataclass(frozen=True)
class Block:
    """One access to memory: a single read of an input, or an even and an odd read whose columns alternate (interleaved
    gate and up), accessed as one run of 2 * BN columns and split in registers."""

    reads: tuple[Read, ...]

    @property
    def source(self) -> str:
        return self.reads[0].source

    @property
    def name(self) -> str:
        return self.reads[0].name if len(self.reads) == 1 else f"{self.source}_pair"

    @property
    def columns(self) -> str:
        return self.reads[0].columns if len(self.reads) == 1 else "pair_column"

    @property
    def mask(self) -> str:
        return "mask" if len(self.reads) == 1 else "pair_mask"

    def split(self) -> list[str]:
        """The lines that give each read its name."""
        if len(self.reads) == 1:
            return []
        names = ", ".join(read.name for read in self.reads)
        return [f"{names} = tl.split(tl.reshape({self.name}, (BM, BN, 2)))"]

    def join(self, values: dict[str, str]) -> str:
        """What to store, given the value for each read by name; a missing one is zero."""
        found = [values.get(read.name, "tl.zeros((BM, BN), dtype=tl.float32)") for read in self.reads]
        return found[0] if len(found) == 1 else f"tl.interleave({', '.join(found)})"


class _Decline(Exception):
    """Carries the reason out of the recursion of `_Program`."""


@dataclass
class _Program:
    """The reads and lines that make a segment's outputs at column j."""

    template: Template
    segment: Segment
    leaves: Sequence[Leaf]
    reads: dict[tuple[str, int, int], Read] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    masks: set[str] = field(default_factory=set)
    made: dict[tuple[int, int, int], str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    @property
    def width(self) -> int:
        """The features of every output."""
        return self.template.instrs[self.segment.outputs[0]].width

    def build(self) -> dict[int, str]:
        """The name of each output; fills reads and lines. Raises _Decline."""
        widths = {self.template.instrs[i].width for i in self.segment.outputs}
        if len(widths) != 1:
            raise _Decline(f"its outputs have different widths: {sorted(widths)}")
        outputs = {i: self.value(i, 0, 1) for i in self.segment.outputs}
        if bad := [f"v{i}" for i, name in outputs.items() if name in self.masks]:
            raise _Decline(f"{bad[0]} is a truth value")
        for source in {read.source for read in self.reads.values() if read.step}:
            self._check_columns(source)
        return outputs

    def _check_columns(self, source: str) -> None:
        """A gradient is written read by read: no element may be read in two of them."""
        seen: set[int] = set()
        for read in self.of(source):
            columns = set(range(read.start, read.start + read.step * self.width, read.step))
            if columns & seen:
                raise _Decline(f"{source} is read twice at column {min(columns & seen)} for different results")
            seen |= columns

    def of(self, source: str) -> list[Read]:
        """The reads of an input or leaf."""
        return [read for read in self.reads.values() if read.source == source]

    def blocks(self) -> list[Block]:
        """The accesses that make all reads of inputs."""
        result: list[Block] = []
        for source in dict.fromkeys(read.source for read in self.reads.values() if not read.leaf):
            reads = sorted(self.of(source), key=lambda read: read.start)
            alternate = [read.place for read in reads] == [(0, 2), (1, 2)]
            result += [Block(tuple(reads))] if alternate else [Block((read,)) for read in reads]
        return result

    def _fresh(self, name: str) -> str:
        free = next(n for n in (name, *(f"{name}_{i}" for i in range(1, 1000))) if n not in self.names)
        self.names.add(free)
        return free

    def _read(self, source: str, start: int, step: int, leaf: bool) -> str:
        key = (source, start, step)
        if key not in self.reads:
            self.reads[key] = Read(self._fresh(source), source, start, step, leaf)
        return self.reads[key].name

    def value(self, i: int, start: int, step: int) -> str:
        """The name of template value i at columns start + step*j."""
        if i in self.segment.inputs:
            return self._read(f"v{i}", start, step, leaf=False)
        if (i, start, step) not in self.made:
            self.made[i, start, step] = self._make(i, self.template.instrs[i], start, step)
        return self.made[i, start, step]

    def _make(self, i: int, instr: Instr, start: int, step: int) -> str:
        if instr.kind == "columns":
            rows, *bounds = instr.args
            first, stop, by = slice(*bounds).indices(self.template.instrs[rows.index].width)
            return self.value(rows.index, first + by * start, by * step)
        if instr.kind != "op":
            raise _Decline(f"v{i} = {instr} is not pointwise")
        formula, uses, about = self._formula(i, instr, start, step)
        name = self._fresh(f"v{i}")
        self.lines.append(Line(name, formula.value, uses, formula.partials, about))
        if formula.mask:
            self.masks.add(name)
        return name

    def _formula(self, i: int, instr: Instr, start: int, step: int) -> tuple[Formula, tuple[str, ...], str]:
        """The rule of an instruction applied to its operands: the formula, its value operands, and a note."""
        namespace, op = instr.target.split(".")[:2]
        rule = RULES.get(op) if namespace == "aten" else None
        if rule is None:
            raise _Decline(f"v{i} = {instr}: no rule for {instr.target}")
        uses: list[str] = []
        places: list[int] = []
        operands: list[str | None] = []
        for n, arg in enumerate(instr.args):
            if isinstance(arg, (Ref, LeafRef)):
                name = self._operand(i, instr, arg, start, step)
                if name in self.masks and n not in MASK_ARGUMENTS.get(op, ()):
                    name = f"{name}.to(tl.float32)"
                elif name not in self.masks and n in MASK_ARGUMENTS.get(op, ()):
                    name = f"({name} != 0)"
                uses.append(name)
                places.append(n)
                operands.append(name)
            else:
                operands.append(self._constant(i, instr, arg))
        keywords = {
            {"min": "low", "max": "high"}.get(key, key): self._constant(i, instr, value)
            for key, value in instr.kwargs
            if key not in STORAGE_KEYWORDS
        }
        self._check_cast(i, instr)
        try:
            formula = rule(*operands, **keywords)
        except (TypeError, ValueError):
            raise _Decline(f"v{i} = {instr}: no rule for these arguments") from None
        if places and places[-1] >= len(formula.partials):
            raise _Decline(f"v{i} = {instr}: no gradient for argument {places[-1]}")
        partials = tuple(formula.partials[n] for n in places)
        return Formula(formula.value, partials, formula.mask), tuple(uses), str(instr)

    def _operand(self, i: int, instr: Instr, arg: Ref | LeafRef, start: int, step: int) -> str:
        if isinstance(arg, Ref):
            width = self.template.instrs[arg.index].width
            if width != instr.width:
                raise _Decline(f"v{i} = {instr} broadcasts v{arg.index} from {width} to {instr.width} features")
            return self.value(arg.index, start, step)
        shape = self.leaves[arg.index].shape
        if shape in ((), (1,)):
            return self._read(f"leaf{arg.index}", 0, 0, leaf=True)
        if shape != (instr.width,):
            raise _Decline(f"v{i} = {instr} broadcasts leaf{arg.index} {shape} to {instr.width} features")
        return self._read(f"leaf{arg.index}", start, step, leaf=True)

    @staticmethod
    def _constant(i: int, instr: Instr, value: Any) -> str | None:
        """A constant operand as source; None stays None, text (gelu's approximate) stays text."""
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (bool, int, float)):
            return literal(value)
        raise _Decline(f"v{i} = {instr}: {value!r} is not a number")

    @staticmethod
    def _check_cast(i: int, instr: Instr) -> None:
        dtype = dict(instr.kwargs).get("dtype")
        if isinstance(dtype, torch.dtype) and (not dtype.is_floating_point or dtype is torch.float64):
            raise _Decline(f"v{i} = {instr} casts to {dtype}")

    def gradients(self, outputs: dict[int, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
        """Reverse mode: the gradient name of every read that has one, and the lines (name, text) that make them.

        The gradient of output v{i} is g{i}; that of any other value `name` is g_`name`.
        """
        parts: dict[str, list[str]] = {}
        for i, name in outputs.items():
            parts.setdefault(name, []).append(f"g{i}")
        lines: list[tuple[str, str]] = []

        def total(name: str) -> str | None:
            terms = parts.get(name)
            if not terms:
                return None
            if len(terms) == 1 and terms[0].isidentifier():
                return terms[0]
            lines.append(
                (f"g_{name}", " + ".join(t if t.isidentifier() or len(terms) == 1 else f"({t})" for t in terms))
            )
            return f"g_{name}"

        for line in reversed(self.lines):
            if line.name in self.masks or (g := total(line.name)) is None:
                continue
            for used, partial in zip(line.uses, line.partials):
                if partial is not None and used.isidentifier():  # otherwise a mask as a number: no gradient
                    parts.setdefault(used, []).append(partial.replace("{g}", g).replace("{y}", line.name))
        reads = {read.name: g for read in self.reads.values() if (g := total(read.name)) is not None}
        return reads, lines


# ------------------------------------------------------------------------------------------------ source

_HEAD = '''"""{name} of an expert template as Triton kernels; generated by moefx.codegen.triton_pointwise.

{about}
"""

import triton
import triton.language as tl

from moefx.codegen.triton_grouped import accumulate, left_rows, swizzle
from moefx.codegen.triton_launch import expert_tile, find_tile, first_tiles, halves, store_rows
from moefx.codegen.triton_rules import {functions}
'''

_POINTWISE = '''
@triton.jit
def {kernel}(
{params}
{more}    offsets, experts, {constants}BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    """{doc} Grid (row tiles, {width} / BN): a block of rows x columns each.{note}"""
{rows}
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    in_width = (column < {width})[None, :]
    mask = held[:, None] & in_width
    at = row.to(tl.int64)[:, None]
{body}'''

_ROWS = """\
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    held = row < tl.load(offsets + experts)"""

_ROWS_OF_EXPERT = """\
    expert, row0, end = expert_tile(offsets, tl.program_id(0), experts, BLOCK_E, BM)
    row = row0 + tl.arange(0, BM)
    held = row < end"""

# What the kernel `..._vjp` has beside that: parameters, constants, and a note.
_VJP_PARAMS = """\
    order, w, products,
"""
_VJP_CONSTANTS = """\
WEIGHTED: tl.constexpr, IN_PLACE: tl.constexpr,
    """
_VJP_NOTE = """

    With IN_PLACE results lie where inputs lay: all threads have read theirs before one writes. With WEIGHTED the one output
    is multiplied row by row by w [slots], and its gradient is that of the product: products [slots, {width} / BN] is the
    gradient of w, column block by column block.
    """

_LINEAR = '''
@triton.jit(do_not_specialize=["tiles_m"])
def {kernel}_linear(
    rows, order,
{params}
    offsets, n_in, stride_r, experts, tiles_m, tiles_n, top_k,
    SAVE: tl.constexpr, GATHER: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """{doc} Grid (tiles_m * tiles_n,): a tile of one expert's rows x columns each.

    With SAVE the products are stored as well; with GATHER the rows are tokens order[r] // top_k.
    """
    tile, tile_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP)
    expert, row0, end = expert_tile(offsets, tile, experts, BLOCK_E, BM)
    if row0 < end:
        row = row0 + tl.arange(0, BM)
        column = tile_n * BN + tl.arange(0, BN)
        in_width = (column < {width})[None, :]
        inner = tl.arange(0, BK)
        a = left_rows(rows, order, row, row0, end, top_k, stride_r, GATHER) + inner[None, :]
{pointers}
        for i0 in range(0, n_in, BK):
            left = tl.load(a) if EVEN else tl.load(a, mask=inner[None, :] < n_in - i0, other=0.0)
{products}
            a += BK
        mask = (row < end)[:, None] & in_width
        at = row.to(tl.int64)[:, None]
        if SAVE:
{saves}
{body}'''


_BLOCK_LINEAR = '''
@triton.jit
def {kernel}_block(
    rows, order,
{params}
    offsets, n_in, stride_r, experts, tiles_n, top_k,
    SAVE: tl.constexpr, GATHER: tl.constexpr, INNER_LAST: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):
    """`{kernel}_linear` for 16-bit operands that the copy engine moves: descriptors of the weights, of all results and,
    without GATHER, of the rows. Grid (PROGRAMS,): each makes every PROGRAMS-th tile, in one flattened loop, so that the
    operands of a tile are on their way while the one before is finished.
    """
    first, tiles = first_tiles(offsets, experts, BLOCK_E, BM)
    for t in tl.range(tl.program_id(0), tiles * tiles_n, PROGRAMS, flatten=True):
        tile, tile_n = swizzle(t, tiles, tiles_n, GROUP)
        expert, row0, end = find_tile(first, offsets, tile, BM)
        if GATHER:
            row = row0 + tl.arange(0, BM)
            a = left_rows(rows, order, row, row0, end, top_k, stride_r, True) + tl.arange(0, BK)[None, :]
{zeros}
        for i0 in range(0, n_in, BK):
            if GATHER:
                left = tl.load(a + i0)
            else:
                left = rows.load([row0, i0])
{products}
{splits}
        if SAVE:
{saves}
        column = tile_n * BN + tl.arange(0, BN)
        in_width = (column < {width})[None, :]
{body}'''


@dataclass(frozen=True)
class _Sources:
    """The text of a segment's module and what its kernels take, in order."""

    text: str
    width: int
    inputs: tuple[str, ...]
    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    grads: tuple[str, ...]  # inputs and leaves whose gradient rows the kernel writes
    same_grad: dict[str, tuple[tuple[Read, Read], ...]]  # leaves without; see _same_gradients
    covered: tuple[str, ...]  # inputs whose every element is read
    products: int  # accumulators of BN columns in the kernel `..._linear`; 0: there is none
    why_not_linear: str
    forms: tuple[str, ...]  # of each input in the kernel `..._block`: how its columns follow each other; (): there is none


def _params(params: list[str]) -> str:
    return "\n".join(f"    {p}," for p in params)


def _load_block(block: Block) -> list[str]:
    pointer = f"{block.source}_ptr + at * {block.source}_stride + {block.columns}[None, :]"
    return [f"{block.name} = tl.load({pointer}, mask={block.mask}, other=0.0).to(tl.float32)", *block.split()]


def _load_leaf(read: Read) -> str:
    pointer = f"{read.source}_ptr + expert.to(tl.int64) * {read.source}_stride_e"
    if read.step == 0:
        return f"{read.name} = tl.load({pointer}).to(tl.float32)"
    pointer += f" + {read.columns}[None, :] * {read.source}_stride_n"
    return f"{read.name} = tl.load({pointer}, mask=in_width, other=0.0).to(tl.float32)"


def _line(line: Line) -> str:
    return f"{line.name} = {line.text}  # {line.note}"


def _store(target: str, width: int, columns: str, value: str, mask: str = "mask") -> str:
    return f"tl.store({target} + at * {width} + {columns}[None, :], {value}.to({target}.dtype.element_ty), mask={mask})"


def _pair_columns(blocks: Sequence[Block], program_id: str, width: int) -> list[str]:
    """What accesses to alternating columns need."""
    if all(len(block.reads) == 1 for block in blocks):
        return []
    return [
        f"pair_column = {program_id} * (2 * BN) + tl.arange(0, 2 * BN)",
        f"in_pair = (pair_column < {2 * width})[None, :]",
    ]


def _store_sum(target: str, value: str) -> str:
    """The sum over the program's columns: one number per row and column block."""
    place = f"{target} + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)"
    return f"tl.store({place}, tl.sum(tl.where(mask, {value}, 0.0), axis=1), mask=held)"


def _write(program: _Program, outputs: dict[int, str], name: str) -> _Sources:
    """The module of a built program: kernels `{name}`, `{name}_vjp` and, where it can be, `{name}_linear`."""
    template, segment, width = program.template, program.segment, program.width
    reads = list(program.reads.values())
    leaves = tuple(f"leaf{i}" for i in segment.leaves)
    inputs = tuple(f"v{i}" for i in segment.inputs)
    widths = {f"v{i}": template.instrs[i].width for i in segment.inputs}
    widths |= {f"leaf{i}": (*program.leaves[i].shape, 1)[0] for i in segment.leaves}

    gradients, gradient_lines = program.gradients(outputs)

    same_grad = _same_gradients(reads, leaves, gradients)
    with_gradient = {read.source for read in reads if read.name in gradients}
    grads = tuple(s for s in (*inputs, *leaves) if s in with_gradient and s not in same_grad)
    covered = tuple(s for s in widths if len(program.of(s)) * width == widths[s])

    params = [f"{s}_ptr, {s}_stride" for s in inputs] + [f"{s}_ptr, {s}_stride_e, {s}_stride_n" for s in leaves]
    out_params = [f"v{i}_out" for i in outputs]
    grad_params = [f"g{i}_ptr, g{i}_stride" for i in outputs] + [f"g_{s}_out" for s in grads]
    blocks = program.blocks()
    loads = _pair_columns(blocks, "tl.program_id(1)", width)
    loads += ["pair_mask = held[:, None] & in_pair"] if loads else []
    loads += [line for block in blocks for line in _load_block(block)]
    loads += [_load_leaf(read) for read in reads if read.leaf]
    values = [_line(line) for line in program.lines]
    stores = [_store(f"v{i}_out", width, "column", value) for i, value in outputs.items()]
    g_loads = [
        f"g{i} = tl.load(g{i}_ptr + at * g{i}_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)"
        for i in outputs
    ]
    g_lines = [f"{n} = {text}" for n, text in gradient_lines]
    g_stores = [
        _store(f"g_{block.source}_out", widths[block.source], block.columns, block.join(gradients), block.mask)
        for block in blocks
        if any(read.name in gradients for read in block.reads)
    ]
    for read in reads:
        if read.leaf and read.source in grads:
            target, value = f"g_{read.source}_out", gradients[read.name]
            whole = _store(target, widths[read.source], read.columns, value)
            g_stores.append(whole if read.step else _store_sum(target, value))
    about = [f"{read.name} = {read.source}[:, {read.columns}]" for read in reads]
    about += [f"v{i} = {template.instrs[i]}" for i in segment.body]
    made = ", ".join(f"v{i} [R, {width}]" for i in outputs)
    rows = _ROWS_OF_EXPERT if leaves else _ROWS
    text = _HEAD.format(name=name, about="\n".join(about), functions=", ".join(sorted(FUNCTIONS)))
    text += "\n" + _POINTWISE.format(
        more="", constants="", note="", kernel=name, params=_params(params + out_params), width=width, rows=rows,
        doc=f"{made} from {', '.join(inputs + leaves)}.", body=indent("\n".join(loads + values + stores), " " * 4),
    )  # fmt: skip
    again, weigh = stores, []
    if len(outputs) == 1:
        ((i, value),) = outputs.items()
        weigh = [*_WEIGH.format(i=i, value=value).splitlines()]
        again = [_store(f"v{i}_out", width, "column", f"v{i}_again")]
    text += "\n\n" + _POINTWISE.format(
        kernel=f"{name}_vjp", params=_params(params + out_params + grad_params), width=width, rows=rows,
        more=_VJP_PARAMS, constants=_VJP_CONSTANTS, note=_VJP_NOTE.format(width=width),
        doc=f"{made} and the gradients of {', '.join(grads) or 'nothing'}.",
        body=indent("\n".join([*loads, *g_loads, *_BARRIER, *values, *weigh, *again, *g_lines, *g_stores]), " " * 4),
    )  # fmt: skip

    why_not = _why_not_linear(program, covered)
    forms: tuple[str, ...] = ()
    if not why_not:
        text += "\n\n" + _linear(program, outputs, blocks, made, params[len(inputs) :] + out_params, widths)
        forms = tuple(_form(program, s) for s in inputs)
        text += "\n\n" + _block_linear(program, outputs, dict(zip(inputs, forms)), made, params[len(inputs) :] + out_params)
    products_count = 0 if why_not else sum(not read.leaf for read in reads)
    return _Sources(
        text + "\n",
        width,
        inputs,
        leaves,
        tuple(f"v{i}" for i in outputs),
        grads,
        same_grad,
        covered,
        products_count,
        why_not,
        forms,
    )


_BARRIER = ("if IN_PLACE:", "    tl.debug_barrier()")

_WEIGH = """\
v{i}_again = {value}
if WEIGHTED:
    slot = tl.load(order + row, mask=held, other=0)
    part = tl.sum(tl.where(mask, g{i} * {value}, 0.0), axis=1)
    tl.store(products + slot * tl.num_programs(1) + tl.program_id(1), part, mask=held)
    scale = tl.load(w + slot, mask=held, other=0.0).to(tl.float32)[:, None]
    v{i}_again = {value} * scale
    g{i} = g{i} * scale"""


def _same_gradients(
    reads: Sequence[Read], leaves: Sequence[str], gradients: dict[str, str]
) -> dict[str, tuple[tuple[Read, Read], ...]]:
    """The leaves whose gradient rows are those of inputs, as of a bias: (read of the leaf, read of the input)."""
    of_input = {gradients[r.name]: r for r in reads if not r.leaf and r.name in gradients}
    result = {}
    for leaf in leaves:
        own = [r for r in reads if r.source == leaf and r.name in gradients]
        if own and all(r.step and gradients[r.name] in of_input for r in own):
            result[leaf] = tuple((r, of_input[gradients[r.name]]) for r in own)
    return result


def _why_not_linear(program: _Program, covered: Sequence[str]) -> str:
    """Why the segment cannot run in the epilogue of the linears that feed it; empty when it can."""
    feeds = [program.template.instrs[i] for i in program.segment.inputs]
    if not feeds or any(feed.kind != "linear" for feed in feeds):
        return "not every input is the result of a linear"
    if len({feed.args[0] for feed in feeds}) != 1:
        return "its linears read different rows"
    if missing := [f"v{i}" for i in program.segment.inputs if f"v{i}" not in covered]:
        return f"it does not read all of {missing[0]}"
    products = sum(not read.leaf for read in program.reads.values())
    return f"it needs {products} accumulators, more than {MAX_PRODUCTS}" if products > MAX_PRODUCTS else ""


def _linear(
    program: _Program,
    outputs: dict[int, str],
    blocks: list[Block],
    made: str,
    params: list[str],
    widths: dict[str, int],
) -> str:
    """The text of the kernel `..._linear`: one accumulator for each block of an input, then the segment on them."""
    sources = list(dict.fromkeys(block.source for block in blocks))
    weights = [f"{s}_weight, {s}_stride_e, {s}_stride_i, {s}_stride_o, {s}_out" for s in sources]
    pointers, sums = _pair_columns(blocks, "tile_n", program.width), []
    for block in blocks:
        name, source, pair = block.name, block.source, len(block.reads) == 2
        at = f"expert.to(tl.int64) * {source}_stride_e + inner[:, None] * {source}_stride_i"
        pointers.append(
            f"b_{name} = {source}_weight + {at} + {block.columns}.to(tl.int64)[None, :] * {source}_stride_o"
        )
        pointers += [
            f"{n} = tl.zeros((BM, {'2 * BN' if pair else 'BN'}), dtype=tl.float32)" for n in (name, f"{name}_lost")
        ]
        inside = "in_pair" if pair else "in_width"
        sums.append(f"b_mask = {inside} if EVEN else (inner[:, None] < n_in - i0) & {inside}")
        sums.append(f"right = tl.load(b_{name}, mask=b_mask, other=0.0)")
        sums.append(f"{name}, {name}_lost = accumulate(left, right, {name}, {name}_lost, PRECISION)")
        sums.append(f"b_{name} += BK * {source}_stride_i")
    saves = ["pair_mask = (row < end)[:, None] & in_pair"] if any(len(b.reads) == 2 for b in blocks) else []
    saves += [_store(f"{b.source}_out", widths[b.source], b.columns, b.name, b.mask) for b in blocks]
    body = [line for block in blocks for line in block.split()]
    body += [_load_leaf(read) for read in program.reads.values() if read.leaf]
    body += [_line(line) for line in program.lines]
    body += [_store(f"v{i}_out", program.width, "column", value) for i, value in outputs.items()]
    return _LINEAR.format(
        kernel=program.segment.name,
        params=_params(weights + params),
        doc=f"{made} from rows [R, n_in].",
        width=program.width,
        pointers=indent("\n".join(pointers), " " * 8),
        products=indent("\n".join(sums), " " * 12),
        saves=indent("\n".join(saves), " " * 12),
        body=indent("\n".join(body), " " * 8),
    )


def _form(program: _Program, source: str) -> str:
    """How the reads of an input divide its columns: "whole", or two of them "halves" or "pairs" (interleaved)."""
    places = sorted(read.place for read in program.of(source))
    return {((0, 1),): "whole", ((0, 2), (1, 2)): "pairs"}.get(tuple(places), "halves")


# Of each form: the shape of a weight's block if the inner dimension is last and if it is not, with the place of its first
# element; the columns of its product; how the product divides.
_SHAPES = {
    "whole": ("[expert, tile_n * BN, i0]", "[expert, i0, tile_n * BN]", "BN", ""),
    "halves": ("[expert, 0, tile_n * BN, i0]", "[expert, i0, 0, tile_n * BN]", "2 * BN", "halves({name}, BM, BN)"),
    "pairs": (
        "[expert, tile_n * (2 * BN), i0]",
        "[expert, i0, tile_n * (2 * BN)]",
        "2 * BN",
        "tl.split(tl.reshape({name}, (BM, BN, 2)))",
    ),
}


def _block_linear(
    program: _Program, outputs: dict[int, str], forms: dict[str, str], made: str, params: list[str]
) -> str:
    """The text of the kernel `..._block`: one product for each input, then the segment on its columns."""
    zeros, products, splits, saves = [], [], [], []
    for source, form in forms.items():
        reads = sorted(program.of(source), key=lambda read: read.start)
        last, first, columns, split = _SHAPES[form]
        name = reads[0].name if form == "whole" else f"{source}_product"
        zeros.append(f"{name} = tl.zeros((BM, {columns}), dtype=tl.float32)")
        products += [
            "if INNER_LAST:",
            f"    right = {source}_weight.load({last}).reshape({columns}, BK).T",
            "else:",
            f"    right = {source}_weight.load({first}).reshape(BK, {columns})",
            f"{name} = tl.dot(left, right, {name})",
        ]
        if split:
            splits.append(f"{', '.join(read.name for read in reads)} = {split.format(name=name)}")
        # Stores of one size share the shared memory that they go through.
        if form == "halves":
            saves += [
                f"store_rows({source}_out_{n}, row0, end - row0, tile_n * BN, {read.name}, BM, BN)"
                for n, read in enumerate(reads)
            ]
        elif form == "pairs":
            saves.append(f"{source}_left, {source}_right = halves({name}, BM, BN)")
            saves += [
                f"store_rows({source}_out, row0, end - row0, tile_n * (2 * BN){plus}, {source}_{side}, BM, BN)"
                for plus, side in (("", "left"), (" + BN", "right"))
            ]
        else:
            saves.append(f"store_rows({source}_out, row0, end - row0, tile_n * BN, {name}, BM, BN)")
    body = [_load_leaf(read) for read in program.reads.values() if read.leaf]
    body += [_line(line) for line in program.lines]
    body += [f"store_rows(v{i}_out, row0, end - row0, tile_n * BN, {value}, BM, BN)" for i, value in outputs.items()]
    return _BLOCK_LINEAR.format(
        kernel=program.segment.name,
        params=_params(
            [
                f"{s}_weight, {s}_out_0, {s}_out_1" if form == "halves" else f"{s}_weight, {s}_out"
                for s, form in forms.items()
            ]
            + params
        ),
        doc="",
        width=program.width,
        zeros=indent("\n".join(zeros), " " * 8),
        products=indent("\n".join(products), " " * 12),
        splits=indent("\n".join(splits), " " * 8),
        saves=indent("\n".join(saves), " " * 12),
        body=indent("\n".join(body), " " * 8),
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether a can take the place of b as a result."""
    return a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()


@cache
def _module(text: str) -> dict[str, Any]:
    """The kernels of a generated module. Triton reads their source through linecache, by a name of its own."""
    filename = f"<moefx triton {hashlib.sha256(text.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    namespace: dict[str, Any] = {"__name__": "moefx.codegen.generated"}
    exec(compile(text, filename, "exec"), namespace)
    return namespace


# ------------------------------------------------------------------------------------------------ callables


class Pointwise:
    """A compiled segment: `forward`, `vjp` and, unless `why_not_linear` tells why not, `linear`. Holds no tensors.

    inputs: the values [R, width] of `segment.inputs`. leaves: the vectors [E, n] of `segment.leaves`; [1, n] for one
    that all experts share. offsets [E+1]: the rows of each expert.
    """

    def __init__(self, template: Template, segment: Segment, leaves: Sequence[Leaf], sources: _Sources) -> None:
        self.template, self.segment, self._sources = template, segment, sources
        self._leaf_widths = [(*leaves[i].shape, 1)[0] for i in segment.leaves]
        self._dtypes: dict[tuple[torch.dtype, ...], list[torch.dtype]] = {}
        self._stages: dict[Hashable, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pointwise:
        return self

    @property
    def source(self) -> str:
        """The generated module."""
        return self._sources.text

    @property
    def why_not_linear(self) -> str:
        """Why there is no `linear`; empty when there is."""
        return self._sources.why_not_linear

    @cached_property
    def _kernels(self) -> dict[str, Any]:
        return _module(self._sources.text)

    def forward(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], offsets: Tensor) -> tuple[Tensor, ...]:
        """The segment's outputs [R, width]."""
        inputs = self._checked(inputs, leaves)
        outputs = self._new_outputs([t.dtype for t in inputs], leaves, inputs[0], inputs[0].shape[0])
        self._launch(self.segment.name, inputs, leaves, offsets, outputs)
        return tuple(outputs)

    def vjp(
        self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], offsets: Tensor, grads: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the outputs again, the gradient of each input, the gradient of each leaf) for the outputs' gradients."""
        return self._vjp(inputs, leaves, offsets, grads, None)[:3]

    def weighted_vjp(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        grads: Sequence[Tensor],
        order: Tensor,
        w: Tensor,
        in_place: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """`vjp` of w times the segment's one output, row by row: (w times the output, the gradients of the inputs and of
        the leaves, the gradient of w [T, K]). order [T*K]: the slot of each row.

        in_place: nobody else reads inputs and grads any more, and the results may take their memory.
        """
        outputs, inner, leaf, products = self._vjp(inputs, leaves, offsets, grads, (order, w), in_place)
        assert products is not None
        return outputs, inner, leaf, products.sum(1).view(w.shape).to(w.dtype)

    def _vjp(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        grads: Sequence[Tensor],
        weights: tuple[Tensor, Tensor] | None,
        in_place: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """(outputs, gradients of inputs and of leaves, products with the outputs of each slot and column block)."""
        inputs, sources = self._checked(inputs, leaves), self._sources
        check_dtypes(f"{self.segment.name}.vjp", {f"grad{n}": g for n, g in enumerate(grads)})
        rows = inputs[0].shape[0]
        outputs = self._new_outputs([t.dtype for t in inputs], leaves, inputs[0], rows)
        if in_place:  # a program reads its elements of all of them before it writes them, and no other program does
            outputs = [g if _alike(g, y) else y for g, y in zip(grads, outputs)]
        made = {
            s: t if in_place and t.is_contiguous() and self._writes_all(s) else self._new_gradient(s, t.shape, t)
            for s, t in zip(sources.inputs, inputs)
        }
        for s, n in zip(sources.leaves, self._leaf_widths):
            if s not in sources.same_grad:  # fp32, since a sum over all rows follows
                columns = cdiv(sources.width, self._block(sources.width)[1]) if n == 1 else n
                made[s] = self._new_gradient(s, (rows, columns), inputs[0], torch.float32, whole=n == 1)
        given: list[Any] = []
        for g in grads:
            g = unit_columns(g)
            given += [g, g.stride(0)]
        products, extra = None, [offsets, offsets, offsets]
        if weights is not None:
            order, w = weights
            columns = cdiv(sources.width, self._block(sources.width)[1])
            products = w.new_zeros(order.numel(), columns, dtype=torch.float32)
            extra = [order, w.contiguous(), products]
        self._launch(
            f"{self.segment.name}_vjp", inputs, leaves, offsets,
            [*outputs, *given, *(made[s] for s in sources.grads), *extra],
            WEIGHTED=weights is not None, IN_PLACE=in_place,
        )  # fmt: skip
        leaf_grads = [
            self._leaf_gradient(s, leaf, n, made, offsets)
            for s, leaf, n in zip(sources.leaves, leaves, self._leaf_widths)
        ]
        return tuple(outputs), tuple(made[s] for s in sources.inputs), tuple(leaf_grads), products

    def _new_gradient(
        self, source: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None, whole: bool = False
    ) -> Tensor:
        """Room for gradient rows: zeros unless the kernel writes all of it."""
        written = self._writes_all(source) or (whole and source in self._sources.grads)
        return (like.new_empty if written else like.new_zeros)(shape, dtype=dtype or like.dtype)

    def _writes_all(self, source: str) -> bool:
        """Whether the gradient rows of an input are written whole."""
        return source in self._sources.grads and source in self._sources.covered

    def linear(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        order: Tensor | None = None,
        top_k: int = 1,
        save: bool = True,
    ) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
        """(the linears' results if `save`, the outputs) of the segment in the epilogue of the linears that feed it.

        rows [R, I]; or, with order [T*K], the tokens [T, I] whose rows are gathered on the way. weights: one [E, I, O]
        (any strides; [1, I, O] when shared) for each of the segment's inputs.
        """
        name, sources = self.segment.name, self._sources
        if sources.why_not_linear:
            raise InputError(f"{name} has no fused linear: {sources.why_not_linear}")
        check_dtypes(f"{name}.linear", {"rows": rows, **{f"weight{n}": w for n, w in enumerate(weights)}}, same=True)
        widths = [self.template.instrs[i].width for i in self.segment.inputs]
        experts, inner = offsets.numel() - 1, rows.shape[1]
        weights = [w.expand(experts, -1, -1) if w.shape[0] == 1 else w for w in weights]
        if [tuple(w.shape) for w in weights] != [(experts, inner, n) for n in widths]:
            raise InputError(
                f"{name}.linear: weights {[tuple(w.shape) for w in weights]} do not fit "
                f"E={experts}, I={inner}, O={widths}"
            )
        rows = unit_columns(rows)
        total = rows.shape[0] if order is None else order.numel()
        # Not saved products are not written: any tensor of the right dtype stands for them.
        products = [rows.new_empty(total, n) if save else rows for n in widths]
        outputs = self._new_outputs([rows.dtype] * len(widths), leaves, rows, total)
        done = not total or self._launch_block(rows, weights, products, leaves, outputs, offsets, order, top_k, save)
        for tile in triton_grouped.tiles_for(rows, total, experts, sources.width, sources.products, done):
            tiles_m, tiles_n = row_tiles(total, experts, tile.rows), cdiv(sources.width, tile.columns)
            args: list[Any] = []
            for weight, product in zip(weights, products):
                args += [weight, *weight.stride(), product]
            with on_device(rows):
                launch(
                    self._kernels[f"{name}_linear"], (tiles_m * tiles_n,),
                    rows, offsets if order is None else order, *args, *self._leaf_args(leaves), *outputs, offsets,
                    inner, rows.stride(0), experts, tiles_m, tiles_n, top_k, SAVE=save, GATHER=order is not None,
                    EVEN=inner % tile.inner == 0, PRECISION=float32_precision(), GROUP=triton_grouped.GROUP,
                    BLOCK_E=power_of_2(experts), BM=tile.rows, BN=tile.columns, BK=tile.inner,
                    num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        return tuple(products) if save else None, tuple(outputs)

    def _launch_block(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        products: Sequence[Tensor],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
        offsets: Tensor,
        order: Tensor | None,
        top_k: int,
        save: bool,
    ) -> bool:
        """`linear` by the kernel `..._block`; False where it does not apply."""
        experts, inner, width = offsets.numel() - 1, rows.shape[1], self._sources.width
        per_expert = cdiv(outputs[0].shape[0], experts)
        wide = self._sources.products == 1 and width >= 256
        tile = triton_grouped.Tile(128, 256 if wide else 128, 64, 8, 4 if self._sources.products == 2 else 3)
        inner_last = weights[0].stride(1) == 1
        apply = width >= 128 and triton_grouped.many_rows(outputs[0].shape[0], experts)
        if not apply or any((w.stride(1) == 1) != inner_last for w in weights):
            return False
        if order is not None and (inner % tile.inner or rows.element_size() != 2):
            return False
        left = rows if order is not None else described(rows, (tile.rows, tile.inner))
        args: list[Any] = []
        for form, weight, product in zip(self._sources.forms, weights, products):
            base, block = weight.transpose(1, 2) if inner_last else weight, [tile.columns]
            outs = [product if save else outputs[0]]  # not saved: any descriptor stands for it
            if form == "halves":
                base, block = base.unflatten(1 if inner_last else 2, (2, width)), [2, tile.columns]
                outs = [product[:, :width], product[:, width:]] if save else outs * 2
            elif form == "pairs":
                block = [2 * tile.columns]
            whole = [1, *block, tile.inner] if inner_last else [1, tile.inner, *block]
            args += [described(base, whole), *(described_rows(out, (tile.rows, tile.columns)) for out in outs)]
        results = [described_rows(out, (tile.rows, tile.columns)) for out in outputs]
        if left is None or None in args or None in results:
            return False
        programs, group = multiprocessors(rows.device), triton_grouped.group_for(weights[0])
        key = (rows.device, inner_last, order is not None, save, tile)
        with on_device(rows):
            return launch_block(
                self._stages, key, tile.stages, self._kernels[f"{self.segment.name}_block"], (programs,),
                left, offsets if order is None else order, *args, *self._leaf_args(leaves), *results, offsets,
                inner, rows.stride(0), experts, cdiv(width, tile.columns), top_k, SAVE=save,
                GATHER=order is not None, INNER_LAST=inner_last, GROUP=max(group, 8 if per_expert >= 1024 else 1),
                PROGRAMS=programs, BLOCK_E=power_of_2(experts), BM=tile.rows, BN=tile.columns, BK=tile.inner,
                num_warps=tile.warps,
            )  # fmt: skip

    def _checked(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        name = self.segment.name
        check_dtypes(name, dict(zip((*self._sources.inputs, *self._sources.leaves), (*inputs, *leaves))))
        widths = [self.template.instrs[i].width for i in self.segment.inputs]
        if [t.shape[1] for t in inputs] != widths or len(leaves) != len(self._leaf_widths):
            raise InputError(
                f"{name} takes inputs of widths {widths} and {len(self._leaf_widths)} leaves; "
                f"got {[tuple(t.shape) for t in inputs]} and {len(leaves)} leaves"
            )
        return [unit_columns(t) for t in inputs]

    def _leaf_args(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Each leaf with its strides: a leaf that all experts share has expert stride 0."""
        args: list[Any] = []
        for leaf, n in zip(leaves, self._leaf_widths):
            leaf = leaf.reshape(leaf.shape[0], n)
            args += [leaf, 0 if leaf.shape[0] == 1 else leaf.stride(0), leaf.stride(1)]
        return args

    def _launch(
        self,
        kernel: str,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        more: Sequence[Any],
        **constants: Any,
    ) -> None:
        rows, width, experts = inputs[0].shape[0], self._sources.width, offsets.numel() - 1
        if not rows:
            return
        bm, bn = self._block(width)
        tiles = row_tiles(rows, experts, bm) if leaves else cdiv(rows, bm)
        args: list[Any] = []
        for t in inputs:
            args += [t, t.stride(0)]
        with on_device(inputs[0]):
            launch(
                self._kernels[kernel], (tiles, cdiv(width, bn)),
                *args, *self._leaf_args(leaves), *more, offsets, experts, **constants, BLOCK_E=power_of_2(experts),
                BM=bm, BN=bn,
            )  # fmt: skip

    @staticmethod
    def _block(width: int) -> tuple[int, int]:
        """(rows, columns) of a program's block."""
        columns = power_of_2(width, least=16, most=512)
        return ELEMENTS // columns, columns

    def _leaf_gradient(self, source: str, leaf: Tensor, n: int, made: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """The gradient of a leaf, shaped and typed like it, from gradient rows."""
        if leaf.shape[0] == 1 and offsets.numel() > 2:
            offsets = torch.stack((offsets[0], offsets[-1]))
        if source not in self._sources.same_grad:
            summed = expert_sum(made[source], offsets)
            return (summed.sum(1) if n == 1 else summed).reshape(leaf.shape).to(leaf.dtype)
        sums: dict[str, Tensor] = {}
        gradient = leaf.new_zeros(leaf.shape[0], n)
        for own, other in self._sources.same_grad[source]:
            if other.source not in sums:
                sums[other.source] = expert_sum(made[other.source], offsets)
            columns = other.slice(self._sources.width)
            gradient[:, own.slice(self._sources.width)] = sums[other.source][:, columns]
        return gradient.reshape(leaf.shape)

    def _new_outputs(
        self, dtypes: list[torch.dtype], leaves: Sequence[Tensor], like: Tensor, rows: int
    ) -> list[Tensor]:
        key = (*dtypes, *(leaf.dtype for leaf in leaves))
        if key not in self._dtypes:
            self._dtypes[key] = self._output_dtypes(key)
        return [like.new_empty(rows, self._sources.width, dtype=dtype) for dtype in self._dtypes[key]]

    def _output_dtypes(self, dtypes: tuple[torch.dtype, ...]) -> list[torch.dtype]:
        """What torch gives for inputs and leaves of these dtypes: the segment run on one meta row."""
        values: dict[int, Any] = {}
        leaf_rows: dict[int, Tensor] = {}
        for i, dtype in zip(self.segment.inputs, dtypes):
            values[i] = torch.empty(1, self.template.instrs[i].width, dtype=dtype, device="meta")
        for i, n, dtype in zip(self.segment.leaves, self._leaf_widths, dtypes[len(values) :]):
            leaf_rows[i] = torch.empty(1, n, dtype=dtype, device="meta")

        def argument(value: Any) -> Any:
            if isinstance(value, Ref):
                return values[value.index]
            if isinstance(value, LeafRef):
                return leaf_rows[value.index]
            return dtypes[0] if value == "model" else value

        for i in self.segment.body:
            instr = self.template.instrs[i]
            if instr.kind == "columns":
                rows, start, stop, step = instr.args
                values[i] = values[rows.index][:, start:stop:step]
            else:
                _, op, overload = instr.target.split(".")
                kwargs = {key: argument(value) for key, value in instr.kwargs if key != "device"}
                values[i] = getattr(getattr(torch.ops.aten, op), overload)(*map(argument, instr.args), **kwargs)
        return [values[i].dtype for i in self.segment.outputs]


def compile_pointwise(template: Template, segment: Segment, leaves: Sequence[Leaf]) -> Pointwise | Unsupported:
    """The segment as Triton kernels, or why it has none. `leaves` are the region's."""
    program = _Program(template, segment, leaves)
    if not segment.inputs:
        return Unsupported(f"{segment.name} reads no rows")
    if any(
        isinstance(value, LeafRef)
        for i in segment.body
        for value in leaf_refs([v for _, v in template.instrs[i].kwargs])
    ):
        return Unsupported(f"{segment.name} passes a leaf by keyword")
    try:
        outputs = program.build()
    except _Decline as decline:
        return Unsupported(f"{segment.name}: {decline}")
    return Pointwise(template, segment, leaves, _write(program, outputs, segment.name))
