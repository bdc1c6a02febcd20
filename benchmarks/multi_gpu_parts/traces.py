"""One step's kernels, and how much of its communication runs beside compute."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import moefx
from multi_gpu_parts.layers import LAYERS, TOY_LAYERS, Shape
from multi_gpu_parts.plans import compile_kernels, random_batch, step
from multi_gpu_parts.worker import Bench

Interval = tuple[float, float]


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The same points as intervals that do not touch, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(result[-1][1], end)
        else:
            result.append((start, end))
    return result


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """The points that two unions share."""
    return [(max(s, t), min(e, u)) for s, e in a for t, u in b if max(s, t) < min(e, u)]


@dataclass(frozen=True)
class Overlap:
    """Microseconds of communication, of that beside compute, of compute, and from the first to the last of either."""

    communication: float
    hidden: float
    compute: float
    span: float

    @property
    def share(self) -> float:
        return self.hidden / self.communication if self.communication else math.nan

    def __str__(self) -> str:
        exposed = self.communication - self.hidden
        return f"{100 * self.share:.0f} % of {self.communication:.0f} us hidden, {exposed:.0f} us exposed"


def overlap_of(events: Sequence[Mapping[str, Any]], is_communication: Callable[[Mapping[str, Any]], bool]) -> Overlap:
    """From the events of a Chrome trace; kernels that are no communication are compute."""
    on_gpu = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans: dict[bool, list[Interval]] = {True: [], False: []}
    for e in on_gpu:
        talk = is_communication(e)
        if talk or e["cat"] == "kernel":
            spans[talk].append((float(e["ts"]), float(e["ts"]) + float(e["dur"])))
    talks, works = union(spans[True]), union(spans[False])
    both = [*talks, *works]
    span = max(e for _, e in both) - min(s for s, _ in both) if both else 0.0
    return Overlap(length(talks), length(common(talks, works)), length(works), span)


def is_nccl(event: Mapping[str, Any]) -> bool:
    return "nccl" in str(event.get("name", "")).lower()


@contextmanager
def traced(file: Path, cuda: bool) -> Iterator[None]:
    """A profile of what runs inside, written for Perfetto."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as prof:
        yield
        if cuda:
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(file))


def events_of(file: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return events


def trace_row(bench: Bench, shape: Shape, name: str, tokens: int, variant: str) -> dict[str, Any]:
    """One step, traced on every rank; rank 0's trace is kept."""
    spread, batch = shape.spread, random_batch(bench, shape.layer, tokens, shape.spread.dtype)
    options = moefx.Options() if variant == "auto" else moefx.Options(degree=int(variant[2:]))
    region, _ = spread.plan(options, tokens)
    compile_kernels([region], spread.params, batch, bench.options.reserve)
    run = step(region, spread.params, batch, bench.options.reserve)
    for _ in range(3):
        run()
    bench.synchronize()
    dist.barrier()
    file = f"trace_{name.split(',')[0]}_T{tokens}_{variant.replace('=', '')}.json"
    file = (bench.options.out if bench.rank == 0 else bench.folder / f"{bench.rank}") / file
    with traced(file, bench.cuda):
        run()
    everyone = bench.gathered(overlap_of(events_of(file), is_nccl))
    cells = {"r": "/".join(map(str, region.degrees)), "file": file.name}
    if not bench.cuda:
        return {**cells, "NCCL": "n/a on the CPU"}
    mine = everyone[0]
    return {
        **cells, "NCCL of rank 0": str(mine), "compute ms": f"{mine.compute / 1e3:.2f}", "span ms": f"{mine.span / 1e3:.2f}",
        "hidden share by rank": ", ".join(f"{100 * o.share:.0f} %" for o in everyone), "_overlap": [asdict(o) for o in everyone],
    }  # fmt: skip


def trace(bench: Bench) -> None:
    chosen = {"toy": 128} if bench.toy else {"qwen3-30b-a3b": 16384, "deepseek-v3, 64 experts": 8192}
    for name, tokens in chosen.items():
        shape = Shape(bench, (TOY_LAYERS if bench.toy else LAYERS)[name])
        for variant in ("r=1", "auto", "r=2", "r=4"):
            row = partial(trace_row, bench, shape, name, tokens, variant)
            bench.row("trace", f"{name} T={tokens} {variant}", row, reserve_s=10)
