"""The normal form of an expert template: grouped linears with pointwise segments between them.

A value's level is the number of linears on its longest path from x. All other instructions of one level form one
segment, emitted as one function `act_i`; a linear leads from its level to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefx.ir import Instr, LeafRef, Template, refs


@dataclass(frozen=True)
class Linear:
    """v[value] = v[rows] @ leaf of the row's expert."""

    value: int
    rows: int
    leaf: int

    def __str__(self) -> str:
        return f"v{self.value} = grouped_linear(v{self.rows}, leaf{self.leaf})"


@dataclass(frozen=True)
class Segment:
    """Instructions `body` of one level: reads values `inputs` and vector leaves `leaves`, makes values `outputs`."""

    name: str
    body: tuple[int, ...]
    inputs: tuple[int, ...]
    leaves: tuple[int, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        args = [f"v{i}" for i in self.inputs] + [f"leaf{i}" for i in self.leaves]
        return f"{', '.join(f'v{i}' for i in self.outputs)} = {self.name}({', '.join(args)})"


def operands(instr: Instr) -> tuple[Any, ...]:
    """All arguments of an instruction, keyword arguments last."""
    return (*instr.args, *(value for _, value in instr.kwargs))


def leaf_refs(value: Any) -> list[LeafRef]:
    """All `LeafRef`s inside (nested) instruction arguments, in order."""
    if isinstance(value, LeafRef):
        return [value]
    if isinstance(value, (tuple, list)):
        return [r for v in value for r in leaf_refs(v)]
    return []


def live(template: Template) -> list[int]:
    """The token rows and the instructions that the result needs, in order."""
    needed = {len(template.instrs) - 1, x_value(template)}
    for i in reversed(range(len(template.instrs))):
        if i in needed:
            needed.update(r.index for r in refs(operands(template.instrs[i])))
    return sorted(needed)


def x_value(template: Template) -> int:
    """The value that is the token rows."""
    return next(i for i, instr in enumerate(template.instrs) if instr.kind == "x")


def steps(template: Template) -> tuple[Linear | Segment, ...]:
    """The template as linears and segments, in an order that runs."""
    alive = live(template)
    uses = {i: [r.index for r in refs(operands(template.instrs[i]))] for i in alive}
    level: dict[int, int] = {}
    for i in alive:
        level[i] = max((level[j] for j in uses[i]), default=0) + (template.instrs[i].kind == "linear")

    def of_level(n: int, linear: bool) -> list[int]:
        kinds = {"linear"} if linear else {"op", "columns", "item"}
        return [i for i in alive if level[i] == n and template.instrs[i].kind in kinds]

    result: list[Linear | Segment] = []
    segments = 0
    for n in range(max(level.values()) + 1):
        if body := of_level(n, linear=False):
            inside = set(body)
            outside_uses = {j for i in alive if i not in inside for j in uses[i]} | {len(template.instrs) - 1}
            inputs = {j for i in body for j in uses[i]} - inside
            result.append(
                Segment(
                    name=f"act_{segments}",
                    body=tuple(body),
                    # One that reads leaves alone takes the token rows, to know how many rows there are.
                    inputs=tuple(sorted(inputs or {x_value(template)})),
                    leaves=tuple(sorted({r.index for i in body for r in leaf_refs(operands(template.instrs[i]))})),
                    outputs=tuple(sorted(inside & outside_uses)),
                )
            )
            segments += 1
        for i in of_level(n + 1, linear=True):
            rows, leaf = template.instrs[i].args
            result.append(Linear(value=i, rows=rows.index, leaf=leaf.index))
    return tuple(result)
