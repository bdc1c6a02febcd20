"""Measure which tiles make grouped products fastest on this GPU: a part of `python -m moefx calibrate`.

Products of a few layers, with few and many rows an expert, by every candidate (`moefx.codegen.triton_tiles.candidates`), in turns.
A tile other than the rule's is chosen where it is faster by more than such times move by themselves.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.calibrate import progress, seconds_of
from moefx.errors import InputError
from moefx.ir import Instr, Leaf, LeafRef, Ref, Template
from moefx.profile import device_name
from moefx.runtime import ops_for
from moefx.segments import Segment, steps

EXPERTS = 16
LAYERS = ((2048, 768), (2048, 2048), (4096, 4096), (4096, 14336))  # (D, F): few, so that some are near most layers
ROWS = (64, 256, 1024, 4096)  # of an expert
FEW = (1, 8, 24)  # the same for kernels by pointers; with blocks for all others, where the chip has them
TURNS = 5
RUN_S = 3e-3  # of one candidate in a turn, at least
CLEARLY = 1.04  # times as fast as the rule's tile: a product alone and the same one in a layer agree to about 3 %


@dataclass(frozen=True)
class Problem:
    """A product of `rows` rows an expert, and a function that makes it by the tile that is in force."""

    kind: str
    rows: int
    inner: int
    columns: int
    work: Callable[[], Any]


def calibrate_tiles(
    layers: Sequence[tuple[int, int]] = LAYERS, rows: Sequence[int] = ROWS, few: Sequence[int] = FEW, experts: int = EXPERTS
) -> Any:
    """`moefx.codegen.triton_tiles.Measured` of this GPU, for products in bfloat16. layers: (D, F); rows, few: of an expert."""
    if not torch.cuda.is_available():
        raise InputError("tiles are measured on a GPU, and there is none")
    from moefx.codegen import triton_tiles as tiles
    from moefx.codegen.gluon_grouped import why_not
    from moefx.codegen.triton_launch import has_copy_engine, only_compiling

    choices: list[Any] = []
    specialised = not why_not(torch.device("cuda"))
    sizes = [(d, f, n) for d, f in layers for n in (*few, *rows)]
    ready: set[Any] = set()
    for d, f, n in progress(sizes, "measuring tiles", "product"):
        for problem in problems(d, f, n, experts, pointers=n in few or not has_copy_engine(torch.device("cuda"))):
            compared = tiles.candidates(problem.kind, problem.rows, problem.inner, problem.columns, specialised)
            key = (problem.kind, tiles.pointer_rows(problem.rows), d, f)  # kernels are specialised on these
            if key not in ready:
                ready.add(key)
                with only_compiling():
                    for tile in compared:
                        with tiles.only(problem.kind, tile):
                            problem.work()
            times = compare(problem, compared)
            best = min(compared, key=times.__getitem__)
            gain = times[compared[0]] / times[best]
            if gain < CLEARLY:
                best, gain = compared[0], 1.0
            choices.append(tiles.Choice(problem.kind, problem.rows, problem.inner, problem.columns, best, gain))
    return tiles.Measured(device_name("cuda"), tuple(choices), f"measured with torch {torch.__version__}")


def compare(problem: Problem, tiles: Sequence[Any]) -> dict[Any, float]:
    """Seconds of the product by each tile: the median of turns."""
    from moefx.codegen.triton_tiles import only

    repeat, times = 1, {tile: list[float]() for tile in tiles}
    for turn in range(1 + TURNS):
        for tile in tiles:
            with only(problem.kind, tile):
                problem.work()
                seconds = seconds_of(problem.work, "cuda", repeat)
            if turn:
                times[tile].append(seconds)
            else:
                repeat = max(repeat, min(40, round(RUN_S / max(seconds, 1e-6))))
    return {tile: statistics.median(of_tile) for tile, of_tile in times.items()}


def problems(d: int, f: int, rows: int, experts: int, pointers: bool) -> Iterator[Problem]:
    """The products of one SwiGLU layer with even routing, or one of them by pointers."""
    ops, total = ops_for("cuda", "auto"), rows * experts

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    offsets = torch.arange(experts + 1, device="cuda", dtype=torch.int32) * rows
    x, a = values(total, d), values(total, f)
    down = values(experts, d, f).transpose(1, 2)
    if pointers:
        yield Problem("pointer", rows, f, d, lambda: ops["grouped_linear"](a, down, offsets))
        return
    yield Problem("linear", rows, f, d, lambda: ops["grouped_linear"](a, down, offsets))
    turned = down.transpose(1, 2)
    yield Problem("linear", rows, d, f, lambda: ops["grouped_linear"](x, turned, offsets))
    out = torch.empty_like(turned).transpose(1, 2)
    yield Problem("wgrad", rows, f, d, lambda: ops["grouped_wgrad"](a, x, offsets, out))
    act, up = swiglu(d, f, experts), values(experts, 2 * f, d).transpose(1, 2)
    order = torch.randperm(total, device="cuda", dtype=offsets.dtype)
    yield Problem("act", rows, d, f, lambda: act.linear(x, [up], [], offsets, order, 1, True))


def swiglu(d: int, f: int, experts: int) -> Any:
    """The kernels of silu(gate) * up, with gate and up side by side in one [E, 2F, D] weight."""
    from moefx.codegen.triton_pointwise import compile_pointwise

    instrs = (
        Instr("x", width=d),
        Instr("linear", args=(Ref(0), LeafRef(0)), width=2 * f),
        Instr("columns", args=(Ref(1), 0, f, 1), width=f),
        Instr("columns", args=(Ref(1), f, 2 * f, 1), width=f),
        Instr("op", "aten.silu.default", (Ref(2),), width=f),
        Instr("op", "aten.mul.Tensor", (Ref(4), Ref(3)), width=f),
    )
    leaf = Leaf((d, 2 * f), (1, d), ("up",) * experts, tuple(2 * f * d * e for e in range(experts)))
    template = Template(instrs)
    segment = next(step for step in steps(template) if isinstance(step, Segment))
    return compile_pointwise(template, segment, (leaf,))
