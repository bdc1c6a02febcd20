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
    instrs: list[Instr] = []
    leaves: list[Leaf] = []
    written: dict[Any, Ref] = {}
    leaf_of: dict[Any, int] = {}

    def leaf(
        position: int, shape: tuple[int, ...], strides: tuple[int, ...], cast: torch.dtype | None = None
    ) -> LeafRef:
        key = (position, shape, strides, cast)
        if key not in leaf_of:
            leaf_of[key] = len(leaves)
            pieces = [b[position] for b in bank.bindings]
            names, offsets = tuple(lifter.names[p] for p, _ in pieces), tuple(o for _, o in pieces)
            leaves.append(Leaf(shape, strides, names, offsets, cast))
        return LeafRef(leaf_of[key])

    def emit(instr: Instr) -> Ref:
        instrs.append(instr)
        return Ref(len(instrs) - 1)

    def visit(tv: int, holes: tuple[int, ...]) -> Ref | LeafRef:
        key = (tv, holes)
        if key in written:
            return written[key]
        node = lifter.nodes[tv]
        if node.kind == "vector":
            return leaf(holes[0], (node.width,), (node.args[0],))
        children = [visit(child, tuple(holes[i] for i in inner)) for child, inner in node.children]
        if node.kind == "gate":
            ref = children[0]
        elif node.kind == "x":
            ref = emit(Instr("x", width=node.width))
            if read_as is not None:
                ref = emit(Instr("op", "aten._to_copy.default", (ref,), (("dtype", read_as),), node.width))
        elif node.kind == "linear":
            contracted, stride, step, cast = node.args
            hole = leaf(holes[-1], (contracted, node.width), (stride, step), cast)
            ref = emit(Instr("linear", args=(children[0], hole), width=node.width))
        elif node.kind == "columns":
            start, step = node.args
            ref = emit(
                Instr("columns", args=(children[0], start, start + step * (node.width - 1) + 1, step), width=node.width)
            )
        elif node.kind == "item":
            ref = emit(Instr("item", args=(children[0], node.args[0]), width=node.width))
        else:
            kwargs = tuple((k, "model" if v is torch.float64 else _written(v, children)) for k, v in node.kwargs)
            ref = emit(Instr("op", node.name, _written(node.args, children), kwargs, node.width))
        written[key] = ref  # type: ignore[assignment]
        return ref

    visit(bank.tv, tuple(range(len(bank.bindings[0]))))
    return Template(tuple(instrs)), tuple(leaves)


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
