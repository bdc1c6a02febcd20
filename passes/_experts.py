"""Step 1 of `find`: which template values have several bindings, so that each binding is an expert's parameters.

And those templates, evaluated on any rows with any expert's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from moefx.passes._lift import Child, Lifter, Node, Piece
from torch import Tensor

MAX_GROUPS = 4  # expert groups tried in one block


@dataclass(frozen=True)
class Bank:
    """E experts of one template value: bindings[e] fills the holes of `tv` for expert e."""

    tv: int
    bindings: tuple[tuple[Piece, ...], ...]
    stacked: bool  # labels follow from offsets inside stacked parameters

    @property
    def experts(self) -> int:
        return len(self.bindings)


def expert_groups(lifter: Lifter) -> list[frozenset[str]]:
    """Sets of parameters that take each other's place in some template value: possible experts, deepest first."""
    groups: dict[frozenset[str], tuple[int, int]] = {}
    for tv, uses in lifter.uses.items():
        linears = depth_of(lifter, tv)
        token_uses = [b for b, rows in uses.items() if lifter.rows[rows[0]].token is not None]
        if linears == 0 or lifter.nodes[tv].width < 2 or len(token_uses) < 2:
            continue
        varying = [i for i in range(len(token_uses[0])) if len({b[i] for b in token_uses}) > 1]
        names = frozenset(lifter.names[b[i][0]] for b in token_uses for i in varying)
        rank = (linears, tv)
        groups[names] = max(groups.get(names, rank), rank)
    ordered = sorted(groups, key=lambda names: groups[names], reverse=True)
    kept: list[frozenset[str]] = []
    for names in ordered:  # a group that is part of a deeper one is a step on the way to it
        if not any(names < other and groups[names][0] < groups[other][0] for other in kept):
            kept.append(names)
    return kept[:MAX_GROUPS]


def depth_of(lifter: Lifter, tv: int) -> int:
    """Number of parameter products on the longest path of a template value."""
    node = lifter.nodes[tv]
    below = max((depth_of(lifter, child) for child, _ in node.children), default=0)
    return below + (node.kind == "linear")


def banks(lifter: Lifter) -> list[Bank]:
    """Every template value of at least two experts, the last ones of the computation first."""
    found = []
    for tv, uses in lifter.uses.items():
        if depth_of(lifter, tv) == 0 or lifter.nodes[tv].width < 2 or lifter.nodes[tv].kind == "gate":
            continue
        bindings = [b for b, rows in uses.items() if lifter.rows[rows[0]].token is not None]
        for members in _families(bindings):
            bank = _complete(lifter, tv, members)
            if bank is not None:
                found.append(bank)
    return sorted(found, key=lambda b: (depth_of(lifter, b.tv), b.tv), reverse=True)


def _families(bindings: list[tuple[Piece, ...]]) -> list[list[tuple[Piece, ...]]]:
    """Bindings into the same parameters belong together: a stack, apart from a shared expert of the same shape."""
    by_params: dict[tuple[int, ...], list[tuple[Piece, ...]]] = {}
    for b in bindings:
        by_params.setdefault(tuple(param for param, _ in b), []).append(b)
    stacks = [members for members in by_params.values() if len(members) >= 2]
    return stacks or ([bindings] if len(bindings) >= 2 else [])


def _complete(lifter: Lifter, tv: int, seen: list[tuple[Piece, ...]]) -> Bank | None:
    """All experts of a template value, the ones no token reached in this run included where stacks show them."""
    positions = range(len(seen[0]))
    varying = [i for i in positions if len({b[i] for b in seen}) > 1]
    stacks = {i: _stack(lifter, [b[i] for b in seen]) for i in varying}
    if any(s is not None for s in stacks.values()):
        index = {}
        for b in seen:
            labels = {(b[i][1] - s[0]) // s[1] for i, s in stacks.items() if s is not None}
            if len(labels) != 1:
                return None
            index[labels.pop()] = b
        experts = min(s[2] for s in stacks.values() if s is not None)
        if max(index) >= experts or not all(
            s is None or _fits(lifter, tv, i, seen[0][i][0], s, experts) for i, s in stacks.items()
        ):
            return None
        if any(s is None for s in stacks.values()) and len(index) < experts:
            return None  # some leaves are listed, and some experts were not reached
        example = seen[0]
        full = []
        for e in range(experts):
            pieces = list(index.get(e, example))
            for i, s in stacks.items():
                if s is not None:
                    pieces[i] = (example[i][0], s[0] + e * s[1])
            full.append(tuple(pieces))
        return Bank(tv, tuple(full), True)
    return Bank(tv, tuple(sorted(seen, key=lambda b: [b[i][0] for i in varying])), False)


def _fits(lifter: Lifter, tv: int, position: int, param: int, stack: tuple[int, int, int], experts: int) -> bool:
    """Whether the last expert's slices still lie inside of the parameter."""
    reach = 0
    for shape, strides in _holes(lifter, tv, position):
        reach = max(reach, sum((n - 1) * s for n, s in zip(shape, strides)))
    return stack[0] + (experts - 1) * stack[1] + reach < lifter.tensors[param].numel()


def _holes(lifter: Lifter, tv: int, position: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes and strides of the parameter slices that stand at `position` of a template value's binding."""
    node = lifter.nodes[tv]
    if node.kind == "vector" and position == 0:
        yield (node.width,), (node.args[0],)
    if node.kind == "linear" and position == len(node.children[0][1]):
        yield (node.args[0], node.width), (node.args[1], node.args[2])
    for child, holes in node.children:
        for inner, outer in enumerate(holes):
            if outer == position:
                yield from _holes(lifter, child, inner)


def _stack(lifter: Lifter, pieces: list[Piece]) -> tuple[int, int, int] | None:
    """(first offset, expert stride, number of experts) of pieces stacked in one parameter; None when they are listed."""
    params = {p for p, _ in pieces}
    offsets = sorted({o for _, o in pieces})
    if len(params) != 1 or len(offsets) < 2:
        return None
    stride = math.gcd(*(b - a for a, b in zip(offsets, offsets[1:])))
    shape = lifter.tensors[params.pop()].shape
    extents = [(math.prod(shape[a + 1 :]), math.prod(shape[a:])) for a in range(len(shape))]
    for inner, outer in extents:  # the axis inside of which the experts are stacked
        if (
            inner <= stride
            and stride % inner == 0
            and outer % stride == 0
            and offsets[-1] // outer == offsets[0] // outer
        ):
            return offsets[0] % stride + offsets[0] // outer * outer, stride, outer // stride
    return None


# ------------------------------------------------------------------------------------------------ their template, evaluated


class Evaluator:
    """Computes template values on token rows with the probe's parameters."""

    def __init__(self, lifter: Lifter) -> None:
        self.lifter = lifter
        self.flat = [t.reshape(-1) for t in lifter.tensors]

    def hole(self, piece: Piece, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        return self.flat[piece[0]].as_strided(shape, strides, piece[1])

    def __call__(self, tv: int, binding: tuple[Piece, ...], x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """f(x; binding) [T, width]; `weight` [T, 1] stands at the template's gate, if it has one."""
        made: Tensor = self._value(tv, binding, x, weight, {})
        return made

    def _value(self, tv: int, binding: tuple[Piece, ...], x: Tensor, weight: Tensor | float, memo: dict[Any, Any]) -> Any:
        key = (tv, binding)
        if key not in memo:
            node = self.lifter.nodes[tv]
            below = [(child, tuple(binding[i] for i in holes)) for child, holes in node.children]
            children = [self._value(child, pieces, x, weight, memo) for child, pieces in below]
            memo[key] = self._compute(node, binding, children, x, weight)
        return memo[key]

    def _compute(self, node: Node, binding: tuple[Piece, ...], children: list[Any], x: Tensor, weight: Tensor | float) -> Any:
        if node.kind == "x":
            return x
        if node.kind == "linear":
            contracted, stride, step, _ = node.args
            hole = self.hole(binding[-1], (contracted, node.width), (stride, step))
            return children[0] @ hole.to(children[0].dtype)
        if node.kind == "vector":
            return self.hole(binding[0], (node.width,), (node.args[0],)).unsqueeze(0)
        if node.kind == "columns":
            start, step = node.args
            return children[0][:, start : start + step * node.width : step]
        if node.kind == "item":
            return children[0][node.args[0]]
        if node.kind == "gate":
            return children[0] * weight
        op: Any = torch.ops.aten
        for part in node.name.split(".")[1:]:
            op = getattr(op, part)
        return op(*_fill(node.args, children), **{k: _fill(v, children) for k, v in node.kwargs})


def _fill(args: Any, children: list[Any]) -> Any:
    if isinstance(args, Child):
        return children[args.index]
    return [_fill(a, children) for a in args] if isinstance(args, tuple) else args


def gate_nodes(lifter: Lifter, tv: int) -> list[Node]:
    node = lifter.nodes[tv]
    below = [g for child, _ in node.children for g in gate_nodes(lifter, child)]
    return [node, *below] if node.kind == "gate" else below
