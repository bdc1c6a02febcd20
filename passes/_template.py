"""The template of some experts, written down as instructions on x and leaves (`moefx.ir.Template`)."""

from __future__ import annotations

from typing import Any

import torch
from moefx.passes._experts import Bank
from moefx.passes._lift import Child, Lifter

from moefx.ir import Instr, Leaf, LeafRef, Ref, Template


def write_template(
    lifter: Lifter, bank: Bank, read_as: torch.dtype | None = None
) -> tuple[Template, tuple[Leaf, ...]]:
    """The template value as a program, and its holes as leaves for all experts. read_as: the dtype that tokens are cast to."""
    writer = _Writer(lifter, bank, read_as)
    writer.visit(bank.tv, tuple(range(len(bank.bindings[0]))))
    return Template(tuple(writer.instrs)), tuple(writer.leaves)


class _Writer:
    def __init__(self, lifter: Lifter, bank: Bank, read_as: torch.dtype | None) -> None:
        self.lifter, self.bank, self.read_as = lifter, bank, read_as
        self.instrs: list[Instr] = []
        self.leaves: list[Leaf] = []
        self._written: dict[Any, Ref | LeafRef] = {}
        self._leaf_of: dict[Any, int] = {}

    def _leaf(
        self, position: int, shape: tuple[int, ...], strides: tuple[int, ...], cast: torch.dtype | None = None
    ) -> LeafRef:
        key = (position, shape, strides, cast)
        if key not in self._leaf_of:
            self._leaf_of[key] = len(self.leaves)
            pieces = [b[position] for b in self.bank.bindings]
            names, offsets = tuple(self.lifter.names[p] for p, _ in pieces), tuple(o for _, o in pieces)
            self.leaves.append(Leaf(shape, strides, names, offsets, cast))
        return LeafRef(self._leaf_of[key])

    def _emit(self, instr: Instr) -> Ref:
        self.instrs.append(instr)
        return Ref(len(self.instrs) - 1)

    def visit(self, tv: int, holes: tuple[int, ...]) -> Ref | LeafRef:
        """Writes what a template value is made from, and then itself. holes: which of the bank's pieces fill it."""
        key = (tv, holes)
        if key in self._written:
            return self._written[key]
        node = self.lifter.nodes[tv]
        if node.kind == "vector":
            return self._leaf(holes[0], (node.width,), (node.args[0],))
        children = [self.visit(child, tuple(holes[i] for i in inner)) for child, inner in node.children]
        ref: Ref | LeafRef
        if node.kind == "gate":
            ref = children[0]
        elif node.kind == "x":
            ref = self._emit(Instr("x", width=node.width))
            if self.read_as is not None:
                ref = self._emit(Instr("op", "aten._to_copy.default", (ref,), (("dtype", self.read_as),), node.width))
        elif node.kind == "linear":
            contracted, stride, step, cast = node.args
            hole = self._leaf(holes[-1], (contracted, node.width), (stride, step), cast)
            ref = self._emit(Instr("linear", args=(children[0], hole), width=node.width))
        elif node.kind == "columns":
            start, step = node.args
            stop = start + step * (node.width - 1) + 1
            ref = self._emit(Instr("columns", args=(children[0], start, stop, step), width=node.width))
        elif node.kind == "item":
            ref = self._emit(Instr("item", args=(children[0], node.args[0]), width=node.width))
        else:
            kwargs = tuple((k, "model" if v is torch.float64 else _written(v, children)) for k, v in node.kwargs)
            ref = self._emit(Instr("op", node.name, _written(node.args, children), kwargs, node.width))
        self._written[key] = ref
        return ref


def _written(args: Any, children: list[Any]) -> Any:
    if isinstance(args, Child):
        return children[args.index]
    return tuple(_written(a, children) for a in args) if isinstance(args, tuple) else args


def layout_of(leaves: tuple[Leaf, ...]) -> str:
    """One line about where the experts' matrices live."""
    matrices = [leaf for leaf in leaves if len(leaf.shape) == 2]
    vectors = [leaf for leaf in leaves if len(leaf.shape) == 1 and not leaf.shared]
    stacked = all(leaf.stacked for leaf in matrices)
    names = {leaf.params[0] for leaf in matrices}
    orientation = {"[E, in, out]" if leaf.strides[0] > leaf.strides[1] else "[E, out, in]" for leaf in matrices}
    words = [
        "stacked" if stacked else "one module each",
        f"{len(matrices)} matrices in {len(names)} parameters",
        *sorted(orientation),
    ]
    if any(leaf.strides[-1] == 2 or 2 in leaf.strides for leaf in matrices):
        words.append("interleaved")
    return ", ".join([*words, "with biases" if vectors else "no biases"])
