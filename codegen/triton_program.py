"""A pointwise segment of an expert template as lines of arithmetic: its outputs, and their gradients in reverse mode.

Program element (r, j) makes outputs[r, j]. A template value is needed there at column start + step*j, where
(start, step) follows from the `columns` instructions between it and the output: (0, 1) without any. So a fused or
interleaved gate/up is read in place. The gradient is reverse mode over the same lines, with the derivatives of the
table `RULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from moefx.codegen.triton_rules import MASK_ARGUMENTS, RULES, STORAGE_KEYWORDS, Formula, literal

from moefx.ir import Instr, Leaf, LeafRef, Ref, Template
from moefx.segments import Segment


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


class NoKernel(Exception):
    """Carries the reason out of the recursion of `Program`."""


@dataclass
class Program:
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
        """The name of each output; fills reads and lines. Raises NoKernel."""
        widths = {self.template.instrs[i].width for i in self.segment.outputs}
        if len(widths) != 1:
            raise NoKernel(f"its outputs have different widths: {sorted(widths)}")
        outputs = {i: self.value(i, 0, 1) for i in self.segment.outputs}
        if bad := [f"v{i}" for i, name in outputs.items() if name in self.masks]:
            raise NoKernel(f"{bad[0]} is a truth value")
        for source in {read.source for read in self.reads.values() if read.step}:
            self._check_columns(source)
        return outputs

    def _check_columns(self, source: str) -> None:
        """A gradient is written read by read: no element may be read in two of them."""
        seen: set[int] = set()
        for read in self.of(source):
            columns = set(range(read.start, read.start + read.step * self.width, read.step))
            if columns & seen:
                raise NoKernel(f"{source} is read twice at column {min(columns & seen)} for different results")
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
            raise NoKernel(f"v{i} = {instr} is not pointwise")
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
            raise NoKernel(f"v{i} = {instr}: no rule for {instr.target}")
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
            raise NoKernel(f"v{i} = {instr}: no rule for these arguments") from None
        if places and places[-1] >= len(formula.partials):
            raise NoKernel(f"v{i} = {instr}: no gradient for argument {places[-1]}")
        partials = tuple(formula.partials[n] for n in places)
        return Formula(formula.value, partials, formula.mask), tuple(uses), str(instr)

    def _operand(self, i: int, instr: Instr, arg: Ref | LeafRef, start: int, step: int) -> str:
        if isinstance(arg, Ref):
            width = self.template.instrs[arg.index].width
            if width != instr.width:
                raise NoKernel(f"v{i} = {instr} broadcasts v{arg.index} from {width} to {instr.width} features")
            return self.value(arg.index, start, step)
        shape = self.leaves[arg.index].shape
        if shape in ((), (1,)):
            return self._read(f"leaf{arg.index}", 0, 0, leaf=True)
        if shape != (instr.width,):
            raise NoKernel(f"v{i} = {instr} broadcasts leaf{arg.index} {shape} to {instr.width} features")
        return self._read(f"leaf{arg.index}", start, step, leaf=True)

    @staticmethod
    def _constant(i: int, instr: Instr, value: Any) -> str | None:
        """A constant operand as source; None stays None, text (gelu's approximate) stays text."""
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, (bool, int, float)):
            return literal(value)
        raise NoKernel(f"v{i} = {instr}: {value!r} is not a number")

    @staticmethod
    def _check_cast(i: int, instr: Instr) -> None:
        dtype = dict(instr.kwargs).get("dtype")
        if isinstance(dtype, torch.dtype) and (not dtype.is_floating_point or dtype is torch.float64):
            raise NoKernel(f"v{i} = {instr} casts to {dtype}")

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
