"""Outputs and gradients on several ranks against float64 on one, and bit for bit under random delays."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from moefx.codegen.all_to_all import (
    ALL_TO_ALLS,
    Topology,
)
from moefx.codegen.codecs import CODECS, codec_for
from torch import Tensor

import moefx
from moefx.build import compile_region
from moefx.exchange import experts_of
from multi_gpu_parts.plans import Batch, Layer, Spread, compile_kernels, random_batch
from multi_gpu_parts.worker import Bench

Values = dict[str, Tensor]  # y, x, w and the parameters' names: an output and gradients


@dataclass(frozen=True)
class Case:
    """One comparison: how tokens are routed, and the options of the plan."""

    data: str
    degrees: tuple[int, int]
    codec: str = "none"
    all_to_all: str = "direct"
    capacity: bool = False

    def __str__(self) -> str:
        more = [text for text in (self.codec, self.all_to_all) if text not in ("none", "direct")]
        more += ["capacity"] if self.capacity else []
        return ", ".join([self.data, f"r={self.degrees[0]}/{self.degrees[1]}", *more])


EDGES = ("few tokens", "last rank idle")
ROUTINGS = ("random", "all to rank 0", "to own rank", "dropped", *EDGES)
LEAST_ERROR = {"float32": 3e-6, "bfloat16": 8e-3}  # each chunk's share of a gradient is rounded to its dtype


def cases() -> Iterator[Case]:
    """Degrees on random routing; other routings, codecs and all-to-alls at some degrees."""
    for degrees in ((1, 1), (2, 2), (4, 4), (8, 8), (1, 4), (4, 2), (8, 1)):
        yield Case("random", degrees)
    for data in ROUTINGS[1:]:
        yield from (Case(data, degrees) for degrees in ((1, 1), (4, 4), (4, 2)))
    for codec in (name for name in CODECS if name != "none"):
        yield from (Case("random", degrees, codec) for degrees in ((2, 2), (4, 2)))
    for name in (name for name in ALL_TO_ALLS if name in ("hierarchical", "pipe")):
        yield from (Case(data, (4, 2), all_to_all=name) for data in ROUTINGS)
        yield Case("random", (4, 4), "int8", name)
        yield Case("random", (4, 2), all_to_all=name, capacity=True)
    for data in ROUTINGS:
        yield from (Case(data, degrees, capacity=True) for degrees in ((1, 1), (4, 4), (4, 2)))
    yield Case("random", (4, 4), "int8", capacity=True)


def routed(bench: Bench, layer: Layer, data: str, dtype: Any) -> Batch:
    tokens = (37 if bench.toy else 1021) + 8 * bench.rank  # chunks are uneven, and ranks differ
    tokens = {"few tokens": 3, "last rank idle": 0 if bench.rank == bench.world - 1 else tokens}.get(data, tokens)
    batch = random_batch(bench, layer, tokens, dtype)
    if data in ("all to rank 0", "to own rank"):
        some = experts_of(layer.experts, bench.world, 0 if data == "all to rank 0" else bench.rank)
        ids = torch.rand(tokens, len(some), device=bench.device).topk(layer.top_k).indices
        batch = replace(batch, ids=ids + some.start)
    if data == "dropped":
        dropped = torch.rand(batch.ids.shape, device=bench.device) < 0.4
        batch = replace(batch, ids=batch.ids.masked_fill(dropped, -1))
    return batch


def in_float64(layer: Layer, params: Values, batch: Batch) -> Values:
    """The layer as it is defined, expert by expert, in float64 on the same numbers."""
    x, w, gy = (t.detach().double() for t in (batch.x, batch.w, batch.gy))
    weights = {n: p.detach().double().requires_grad_() for n, p in params.items()}
    x.requires_grad_(), w.requires_grad_()
    y = torch.zeros_like(gy)
    for expert in range(layer.experts):
        token, slot = (batch.ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ weights["gate_up"][expert].t()).chunk(2, 1)
        rows = (torch.nn.functional.silu(gate) * up) @ weights["down"][expert].t()
        y = y.index_add(0, token, rows * w[token, slot].unsqueeze(1))
    y.backward(gy)
    return {"y": y.detach(), "x": x.grad, "w": w.grad, **{n: p.grad for n, p in weights.items()}}


def outcome(region: Any, params: Values, batch: Batch) -> Values:
    """Output and all gradients of one step."""
    x, w = batch.x.detach().requires_grad_(), batch.w.detach().requires_grad_()
    own = {n: p.detach().requires_grad_() for n, p in params.items()}
    y = region(x, batch.ids, w, own)
    grads = torch.autograd.grad(y, [x, w, *own.values()], batch.gy)
    return dict(zip(("y", "x", "w", *own), (y.detach(), *grads)))


class Reference:
    """What all ranks should compute together, in float64, and how far a plan on one rank is from it."""

    def __init__(self, bench: Bench, layer: Layer, params: Values, batch: Batch, one_rank: Any) -> None:
        held = experts_of(layer.experts, bench.world, bench.rank)
        self.own = slice(held.start, held.stop)
        self.values = in_float64(layer, params, batch)
        alone = {n: v.double() for n, v in outcome(one_rank, params, batch).items()}
        for name in params:  # an expert's gradient is that of all ranks' tokens
            for values in (self.values, alone):
                dist.all_reduce(values[name])
                values[name] = values[name][self.own]
        self.one_rank = self.errors(alone)

    def errors(self, got: Values) -> dict[str, float]:
        """Relative Frobenius norms."""
        scale = {n: float(v.norm()) for n, v in self.values.items()}
        apart = {n: float((got[n].double() - v).norm()) for n, v in self.values.items()}
        return {n: apart[n] / scale[n] if scale[n] else apart[n] for n in apart}


def codec_error(bench: Bench, name: str, dtype: Any) -> float:
    """Relative error of Gaussian rows that go through the codec once."""
    if name == "none":
        return 0.0
    codec, rows = codec_for(name, bench.device.type), torch.randn(256, 256, device=bench.device).to(dtype)
    back = codec.decode(codec.encode(rows), 256, dtype)
    return float((back.double() - rows.double()).norm() / rows.double().norm())


class Checks:
    """The comparisons of one dtype; what they need is made when it is first needed."""

    def __init__(self, bench: Bench, layer: Layer, dtype: torch.dtype) -> None:
        self.bench, self.layer, self.dtype = bench, layer, dtype
        self.short = str(dtype).removeprefix("torch.")
        self.one_rank = compile_region(layer.region(), 1)
        self.references: dict[str, tuple[Batch, Reference]] = {}

    @cached_property
    def whole(self) -> Values:
        """All experts' weights, the same on every rank."""
        torch.manual_seed(0)
        made = {n: torch.randn(shape) * shape[-1] ** -0.5 for n, shape in self.layer.shapes(self.layer.experts).items()}
        return {n: t.to(self.bench.device, self.dtype).requires_grad_() for n, t in made.items()}

    @cached_property
    def spread(self) -> Spread:
        """This rank's part; at 4 ranks and more, two of them are a node."""
        bench = self.bench
        held = experts_of(self.layer.experts, bench.world, bench.rank)
        own = {n: t[held.start : held.stop].detach().clone().requires_grad_() for n, t in self.whole.items()}
        per_node = 2 if bench.world >= 4 else 1
        return Spread(bench, self.layer, own, topology=Topology(tuple(r // per_node for r in range(bench.world))))

    def reference(self, data: str) -> tuple[Batch, Reference]:
        if data not in self.references:
            batch = routed(self.bench, self.layer, data, self.dtype)
            self.one_rank.precompile(batch.x, batch.ids, batch.w, self.whole, [list(self.whole)])
            self.references[data] = batch, Reference(self.bench, self.layer, self.whole, batch, self.one_rank)
        return self.references[data]

    def check(self, case: Case, name: str) -> dict[str, Any]:
        """The cells of one case."""
        bench, spread, params = self.bench, self.spread, self.spread.params
        batch, reference = self.reference(case.data)
        options = options_of(case)
        if case.capacity:
            options = replace(options, capacity=most_rows(bench, self.layer, batch))
        region, _ = spread.plan(options, len(batch.x))
        compile_kernels([region], params, batch)
        got = outcome(region, params, batch)
        errors, lossy = reference.errors(got), 4 * codec_error(bench, case.codec, self.dtype)
        bars = {n: max(1.5 * e, LEAST_ERROR[self.short]) + lossy for n, e in reference.one_rank.items()}
        passed = all(errors[n] <= bars[n] for n in errors)
        if case.all_to_all != "direct":  # the same bits
            direct, _ = spread.plan(replace(options, all_to_all="direct"), len(batch.x))
            passed &= equal(got, outcome(direct, params, batch))
        different, delayed = delays(bench, region, params, batch, got, 3)
        worst = max(errors, key=lambda n: errors[n] / bars[n] if errors[n] == errors[n] else math.inf)
        cells = {
            "y": f"{errors['y']:.1e}", "worst": f"{worst} {errors[worst]:.1e}", "bar": f"{bars[worst]:.1e}",
            "one rank": f"{reference.one_rank[worst]:.1e}", "differ under delays": f"{different} of {delayed}",
        }  # fmt: skip
        return bench.judged(self.short, name, cells, passed and not different)


def correctness(bench: Bench, edges: bool = False) -> None:
    """edges: the routings in which ranks differ in what they have to do, and these alone."""
    experts = 4 * bench.world - 1  # the last rank has one less
    layer = Layer(32, 16, experts, 2) if bench.toy else Layer(512, 384, experts, 3)
    for dtype in (torch.float32, torch.bfloat16):
        checks = Checks(bench, layer, dtype)
        for case in cases():
            if (case.data in EDGES) != edges or (bench.toy and dtype == torch.bfloat16 and case.degrees != (4, 4)):
                continue
            name = f"{checks.short}, {case}"
            bench.row("edges" if edges else "correctness", name, partial(checks.check, case, name))


def most_rows(bench: Bench, layer: Layer, batch: Batch) -> int:
    """The most rows that an expert gets from one rank: a capacity that no rank exceeds."""
    of_expert = [int((batch.ids == expert).sum()) for expert in range(layer.experts)]
    return max(1, *bench.gathered(max(of_expert)))


def options_of(case: Case) -> Any:
    return moefx.Options(
        degree=case.degrees[0], backward_degree=case.degrees[1], policy="fifo", codec=case.codec,
        backward_codec=case.codec, all_to_all=case.all_to_all,
    )  # fmt: skip


def equal(a: Values, b: Values) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


def delays(bench: Bench, region: Any, params: Values, batch: Batch, calm: Values, runs: int) -> tuple[int, int]:
    """How many runs with lanes slowed down at random differ from a calm one, and how many there were."""
    rng = random.Random(bench.rank)

    def delay(lane: str) -> None:
        if bench.cuda:
            torch.cuda._sleep(rng.randrange(1_000_000))  # up to about half a millisecond
        else:
            time.sleep(rng.random() * 1e-3)

    different = 0
    region.delays = delay
    try:
        for _ in range(runs):
            late = outcome(region, params, batch)
            different += not equal(calm, late)
            for value in late.values():
                value.fill_(math.nan)  # memory that was given back too early shows in the next run
    finally:
        region.delays = None
    return different, runs
