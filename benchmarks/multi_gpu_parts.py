"""The parts of benchmarks/multi_gpu.py: what a worker does, in a process group, for its rank."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import random
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from moefx.codegen.all_to_all import (  # noqa: E402
    ALL_TO_ALLS,
    Messages,
    Pipe,
    Topology,
    check_rows,
    in_place,
    make_all_to_all,
    next_tag,
)
from moefx.codegen.codecs import CODECS, codec_for  # noqa: E402
from moefx.passes.simplify import simplify  # noqa: E402
from multi_gpu import GRACE_S, GROUP_TIMEOUT_S, PARTS, Result, begun_rows  # noqa: E402

import moefx  # noqa: E402
from moefx import calibrate  # noqa: E402
from moefx.block import Variant  # noqa: E402
from moefx.build import compile_region  # noqa: E402
from moefx.costs import BlockTimes  # noqa: E402
from moefx.degrees import plans_for  # noqa: E402
from moefx.errors import InputError  # noqa: E402
from moefx.exchange import Wire, experts_of  # noqa: E402
from moefx.holding import holding  # noqa: E402
from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template  # noqa: E402
from moefx.measured import AtOnce, block_times  # noqa: E402
from moefx.parallel import expert_parameters  # noqa: E402
from moefx.parallel_region import ParallelRegion  # noqa: E402
from moefx.profile import Line, Profile, device_name, rate  # noqa: E402


class Bench:
    """A worker: this rank's device and group, what has been done, and what came out (on rank 0)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.toy = options, options.toy
        self.folder, attempt = Path(os.environ["MOEFX_FOLDER"]), int(os.environ["MOEFX_ATTEMPT"])
        self.deadline, self.began = float(os.environ["MOEFX_DEADLINE"]), time.time()
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.skip = {row for rank in range(self.world) for row in begun_rows(self.folder, rank)}
        self.cuda = options.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if self.cuda else "gloo", init_method=f"file://{self.folder}/store_{attempt}", rank=self.rank,
            world_size=self.world, timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )  # fmt: skip
        self.group = dist.distributed_c10d._get_default_group()
        dist.barrier()
        self.outcomes = dist.FileStore(f"{self.folder}/outcomes_{attempt}", self.world)
        self.result = Result.load(options.out / "multi_gpu.json") if attempt else Result(options.out / "multi_gpu.json")
        device = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.result.head = f"{self.world} x {device}, torch {torch.__version__}{', toy sizes' if self.toy else ''}"
        settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("NCCL_", "TORCH_NCCL_"))]
        settings += [f"reserve={options.reserve}"] if options.reserve else []
        self.result.head += f"; {' '.join(settings)}" if self.cuda else ""
        self.log(f"{self.result.head}; attempt {attempt}, {self.deadline - time.time():.0f} s left")

    def log(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        shared = [value]
        dist.broadcast_object_list(shared)
        return shared[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def row(self, table: str, name: str, make: Callable[[], dict[str, Any]], reserve_s: float = 0.0) -> dict[str, Any]:
        """One row of a table, unless an earlier worker began it; make: gives its cells, on rank 0 those that are kept.

        What raises on all ranks costs this row; what raises on one alone ends the workers.
        """
        key = f"{table}: {name}"
        if key in self.skip or not re.search(self.options.rows, name):
            return {}
        if self.share(time.time() + reserve_s > self.deadline):
            self.keep(table, {"": name, "result": "left out: no time"})
            return {}
        with (self.folder / f"begun_{self.rank}").open("a", encoding="utf-8") as file:
            file.write(key + "\n")
        began, cells, problem = time.time(), dict[str, Any](), ""
        try:
            cells = make()
        except torch.OutOfMemoryError as error:
            problem = f"out of memory: {str(error)[:80]}"
        except Exception as error:  # noqa: BLE001 - the other rows still tell something
            traceback.print_exc()
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        problems = self.problems(key, problem)
        if problems or time.time() - began > 2:  # not after each of a hundred small rows
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        if problems:
            cells = {"result": problems[0]}
            if not problems[0].startswith("out of memory"):
                self.result.failed.append(f"{key}: {problems[0]}")
        self.log(f"{key}: {', '.join(f'{k} {v}' for k, v in cells.items() if k[:1] != '_')} ({time.time() - began:.1f} s)")
        self.keep(table, {"": name, **cells})
        return cells

    def problems(self, row: str, own: str) -> list[str]:
        """What went wrong in a row, by the ranks where something did. Ends the worker if the others do not finish the row."""
        self.outcomes.set(f"{row} {self.rank}", own)
        try:
            patience = GRACE_S if own else 2 * GROUP_TIMEOUT_S
            self.outcomes.wait([f"{row} {rank}" for rank in range(self.world)], timedelta(seconds=patience))
        except RuntimeError:
            print(f"rank {self.rank}: {row}: {own or 'the other ranks do not finish'}", flush=True)
            os._exit(1)
        texts = [self.outcomes.get(f"{row} {rank}").decode() for rank in range(self.world)]
        return [text for text in texts if text]

    def keep(self, table: str, cells: dict[str, Any]) -> None:
        self.result.rows.setdefault(table, []).append(cells)
        if self.rank == 0:
            self.result.save()

    def judged(self, table: str, name: str, cells: dict[str, Any], passed: bool) -> dict[str, Any]:
        """Cells with a verdict: all ranks have to pass."""
        passed = all(self.gathered(passed))
        if not passed:
            self.result.failed.append(f"{table}: {name}: {cells}")
        return {**cells, "result": "OK" if passed else "FAIL"}

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def in_turns(self, works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Median seconds of each on the slowest rank. One sample: the mean of calls in a row, about 30 ms of them."""
        repeats: dict[str, int] = {}
        for name, work in works.items():
            work()  # compiles
            once = torch.tensor(self.seconds(work, 1), dtype=torch.float64, device=self.device)
            dist.all_reduce(once, dist.ReduceOp.MAX)
            repeats[name] = 1 if self.toy else max(1, min(10, math.ceil(0.03 / float(once))))
        samples = [[self.seconds(work, repeats[n]) for n, work in works.items()] for _ in range(rounds)]
        slowest = torch.tensor(samples, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return dict(zip(works, slowest.median(0).values.tolist()))

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        dist.barrier()
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - began) / repeats
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeats


# ------------------------------------------------------------------------------------------------ layers


@dataclass(frozen=True)
class Layer:
    """D model width, F expert width, E experts, K experts a token; SwiGLU experts as Transformers stacks them."""

    d_model: int
    d_expert: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"D={self.d_model} F={self.d_expert} E={self.experts} K={self.top_k}"

    def region(self) -> Any:
        """What moefx finds in such a block."""
        d, f, e = self.d_model, self.d_expert, self.experts

        def leaf(name: str, inputs: int, outputs: int) -> Leaf:
            starts = tuple(i * inputs * outputs for i in range(e))
            return Leaf((inputs, outputs), (1, inputs), (name,) * e, starts)

        instrs = (
            Instr("x", width=d),
            Instr("linear", args=(Ref(0), LeafRef(1)), width=2 * f),
            Instr("columns", args=(Ref(1), 0, f, 1), width=f),
            Instr("op", "aten.silu.default", (Ref(2),), (), f),
            Instr("columns", args=(Ref(1), f, 2 * f, 1), width=f),
            Instr("op", "aten.mul.Tensor", (Ref(3), Ref(4)), (), f),
            Instr("linear", args=(Ref(5), LeafRef(0)), width=d),
        )
        leaves = (leaf("down", f, d), leaf("gate_up", d, 2 * f))
        return simplify(Region(e, self.top_k, d, d, f, Template(instrs), leaves))

    def shapes(self, experts: int) -> dict[str, tuple[int, int, int]]:
        return {"gate_up": (experts, 2 * self.d_expert, self.d_model), "down": (experts, self.d_model, self.d_expert)}


_exchanges: dict[tuple[str, Any], Any] = {}


def exchange_of(name: str, group: Any, topology: Any = None) -> Any:
    """One all-to-all of each kind for the life of the process group: making one is collective."""
    topology = topology or Topology((0,) * group.size())
    if (name, topology) not in _exchanges:
        _exchanges[name, topology] = make_all_to_all(name, group, topology)
    return _exchanges[name, topology]


class Spread:
    """This rank's part of a layer: its experts' weights, and plans of any degree, codec and all-to-all for them."""

    def __init__(
        self, bench: Bench, layer: Layer, params: dict[str, Tensor], profile: Any = None, topology: Any = None
    ) -> None:
        self.bench, self.layer, self.params, self.profile, self.topology = bench, layer, params, profile, topology
        whole = {n: torch.empty(shape, device="meta") for n, shape in layer.shapes(layer.experts).items()}
        self.region = layer.region()
        self.held = holding(self.region, whole, bench.world, bench.rank)
        self.dtype = next(iter(params.values())).dtype
        self.times: dict[int, dict[str, BlockTimes]] = {}  # by tokens

    def wire(self, options: Any) -> Any:
        named = {"forward": options.codec, "backward": options.backward_codec}
        codecs = {phase: codec_for(name, self.bench.device.type) for phase, name in named.items() if name != "none"}
        rows, counts = (exchange_of(n, self.bench.group, self.topology) for n in (options.all_to_all, "direct"))
        return Wire(self.bench.group, self.layer.experts, rows, counts, codecs, capacity=options.capacity)

    def plan(self, options: Any, tokens: int) -> tuple[Any, tuple[Any, Any]]:
        """The region as these options have it, and the timelines that the cost model promises (None without a profile)."""
        wire, here = self.wire(options), (self.region, self.held.region, self.params, max(1, tokens))
        if self.profile is not None and tokens not in self.times:
            self.times[tokens] = block_times(*here, replace(wire, codecs={}), "auto")
        plans = plans_for(*here, wire, options, self.profile, self.times.get(tokens, {}))
        return ParallelRegion(self.region, self.held.region, plans, "auto", wire), plans.timelines


@dataclass
class Batch:
    """Tokens of this rank, their routing, and the gradient of the output."""

    x: Tensor
    ids: Tensor
    w: Tensor
    gy: Tensor


def own_weights(bench: Bench, layer: Layer, dtype: Any) -> dict[str, Tensor]:
    """Random weights of this rank's experts, that ask for gradients."""
    torch.manual_seed(bench.rank)
    own = len(experts_of(layer.experts, bench.world, bench.rank))
    made = {n: torch.randn(shape, device=bench.device, dtype=dtype) for n, shape in layer.shapes(own).items()}
    return {n: t.mul_(t.shape[-1] ** -0.5).requires_grad_() for n, t in made.items()}


def random_batch(bench: Bench, layer: Layer, tokens: int, dtype: Any) -> Batch:
    """Every token has K different experts, any of them with the same chance."""
    torch.manual_seed(1000 + bench.rank)
    x, gy = (torch.randn(tokens, layer.d_model, device=bench.device, dtype=dtype) for _ in range(2))
    w, ids = torch.rand(tokens, layer.experts, device=bench.device).topk(layer.top_k)
    return Batch(x.requires_grad_(), ids, (w / w.sum(1, keepdim=True)).to(dtype), gy)


@contextmanager
def beside(region: Any, reserve: int) -> Iterator[None]:
    """Inside, persistent kernels of a plan with several chunks leave so many multiprocessors to the exchanges beside them."""
    if not reserve or max(region.degrees) == 1:
        yield
        return
    users = [importlib.import_module(f"moefx.codegen.{name}") for name in ("triton_grouped", "triton_pointwise")]
    all_of_them = users[0].multiprocessors
    try:
        for module in users:
            module.multiprocessors = lambda device: all_of_them(device) - reserve
        yield
    finally:
        for module in users:
            module.multiprocessors = all_of_them


def compile_kernels(regions: Iterable[Any], params: dict[str, Tensor], batch: Batch, reserve: int = 0) -> None:
    """All kernels of these plans at once, instead of one after the other when they first run."""
    for region in regions:
        # Nothing runs meanwhile, so orders of rows are arbitrary: no plan may pick rows by them.
        if region.degrees[0] == region.degrees[1] and region.wire.capacity is None:
            with beside(region, reserve):
                region.precompile(batch.x, batch.ids, batch.w, params, [list(params)])


def step(region: Any, params: dict[str, Tensor], batch: Batch, reserve: int = 0) -> Callable[[], None]:
    """Forward and backward, with gradients of tokens and weights."""

    def run() -> None:
        for tensor in (batch.x, *params.values()):
            tensor.grad = None
        with beside(region, reserve):
            region(batch.x, batch.ids, batch.w, params).backward(batch.gy)

    return run


# ------------------------------------------------------------------------------------------------ correctness

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


# ------------------------------------------------------------------------------------------------ calibration


def profile_of(bench: Bench) -> Any:
    """The costs of this group: measured once, then from the user's cache, where `moefx.optimize` finds them too."""
    text = ""
    if bench.rank == 0 and not (bench.options.recalibrate and "calibrate" in bench.options.only):
        try:
            text = Profile.load(device=device_name(bench.device), ranks=bench.world).dumps()
        except InputError:
            pass
    text = bench.share(text)
    if not text:
        profile = calibrate.calibrate(bench.device.type, bench.world, 0.05 if bench.toy else 1.0)
        if bench.rank == 0:
            profile.save()
        text = bench.share(profile.dumps())
        bench.options.recalibrate = False
    if bench.cuda:
        torch.cuda.empty_cache()
    return Profile.loads(text)


def calibration(bench: Bench) -> None:
    def make() -> dict[str, Any]:
        profile = profile_of(bench)
        bench.log(f"\n{profile}")
        if bench.rank == 0:
            bench.options.out.mkdir(parents=True, exist_ok=True)
            (bench.options.out / "profile.json").write_text(profile.dumps(), encoding="utf-8")
        return {kind: f"{1e6 * line.alpha_s:.0f} us + {rate(line)}" for kind, line in profile.lines.items()}

    bench.row("calibrate", "alpha + beta", make, reserve_s=20)


# ------------------------------------------------------------------------------------------------ layers

LAYERS = {
    "mixtral": Layer(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Layer(2048, 768, 128, 8),
    "deepseek-v3, 64 experts": Layer(7168, 2048, 64, 8),
}
TOKENS = (4096, 8192, 16384, 32768)
TOY_LAYERS, TOY_TOKENS = {"toy": Layer(64, 48, 8, 2)}, (128, 256)


class Shape:
    """A layer of real width, made when it is first needed."""

    def __init__(self, bench: Bench, layer: Layer, lines: Mapping[str, Line] = MappingProxyType({}), topology: Any = None) -> None:
        self.bench, self.layer, self.lines, self.topology = bench, layer, lines, topology

    @cached_property
    def spread(self) -> Spread:
        dtype, profile = torch.float32 if self.bench.toy else torch.bfloat16, profile_of(self.bench)
        profile = replace(profile, lines={**profile.lines, **self.lines})
        return Spread(self.bench, self.layer, own_weights(self.bench, self.layer, dtype), profile, self.topology)


def layer_row(bench: Bench, shape: Shape, tokens: int, all_to_all: str = "direct") -> dict[str, Any]:
    """Times of one layer at one size: every degree, `auto` as `optimize` has it, what the costs alone choose, and no wire."""
    spread, reserve = shape.spread, bench.options.reserve
    degrees, rounds = ((1, 2), 2) if bench.toy else (bench.options.degrees, bench.options.rounds)
    batch = random_batch(bench, spread.layer, tokens, spread.dtype)
    variants = {f"r={r}": moefx.Options(degree=r, all_to_all=all_to_all) for r in degrees}
    variants |= {"auto": moefx.Options(all_to_all=all_to_all), "costs": moefx.Options(all_to_all=all_to_all, measured=False)}
    plans = {name: spread.plan(options, tokens) for name, options in variants.items()}
    alone, _ = spread.plan(variants["r=1"], tokens)
    alone.wire = replace(alone.wire, all_to_all=AtOnce())
    same = {n: next(m for m, (other, _) in plans.items() if other.schedules == mine.schedules) for n, (mine, _) in plans.items()}
    distinct = {name: plans[name][0] for name in same.values()}  # in one order on all ranks: they exchange rows
    compile_kernels(distinct.values(), spread.params, batch, reserve)
    works = {name: step(region, spread.params, batch, reserve) for name, region in distinct.items()}
    timed = bench.in_turns({**works, "no wire": step(alone, spread.params, batch)}, rounds)
    compute, seconds = timed["no wire"], {name: timed[as_name] for name, as_name in same.items()}
    predicted = {n: sum(t.makespan_s for t in timelines) for n, (_, timelines) in plans.items() if all(timelines)}
    best = min(seconds, key=lambda n: seconds[n])
    regret = {name: seconds[name] / seconds[best] - 1 for name in ("auto", "costs")}
    gain, could = seconds["r=1"] - seconds["auto"], min(seconds["r=1"] - compute, compute)
    chunk = sum(t.chunk_s for t in spread.times[tokens].values())
    return {
        "no wire ms": f"{1e3 * compute:.2f}", "a chunk more ms": f"{1e3 * chunk:.2f}",
        **{f"{n} ms": f"{1e3 * s:.2f}" for n, s in seconds.items() if n != "costs"},
        "chosen": "/".join(map(str, plans["auto"][0].degrees)), "best": best, "regret": f"{100 * regret['auto']:.1f} %",
        "r=1 / auto": f"{seconds['r=1'] / seconds['auto']:.2f}", "hidden": f"{100 * gain / could:.0f} %" if could > 0 else "-",
        "predicted": f"{1e3 * predicted['auto']:.2f} ({100 * (predicted['auto'] / seconds['auto'] - 1):+.0f} %)",
        "costs alone": f"{'/'.join(map(str, plans['costs'][0].degrees))}, regret {100 * regret['costs']:.1f} %",
        "_seconds": seconds, "_compute": compute, "_predicted": predicted, "_regret": regret["auto"],
        "_times": {phase: asdict(t) for phase, t in spread.times[tokens].items()},
    }  # fmt: skip


def layers(bench: Bench) -> None:
    shapes, sizes = (TOY_LAYERS, TOY_TOKENS) if bench.toy else (LAYERS, TOKENS)
    for name, layer in shapes.items():
        shape = Shape(bench, layer)
        for tokens in sizes:
            bench.row("layers", f"{name} ({layer}) T={tokens}", partial(layer_row, bench, shape, tokens), reserve_s=10)


# ------------------------------------------------------------------------------------------------ trace

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


# ------------------------------------------------------------------------------------------------ a whole model


def plain_experts() -> Any:
    """The class of plain expert parallelism, as torchtitan has it: no overlap, grouped_mm, the same stacked weights."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    class Exchange(torch.autograd.Function):
        """Rows to other ranks and their gradients back."""

        @staticmethod
        def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
            ctx.splits, ctx.group = (sent, received), group
            out = rows.new_empty(sum(received), rows.shape[1])
            dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            sent, received = ctx.splits
            out = gradient.new_empty(sum(sent), gradient.shape[1])
            dist.all_to_all_single(out, gradient.contiguous(), sent, received, group=ctx.group)
            return out, None, None, None

    class PlainExperts(nn.Module):
        """Dispatch, experts and combine of a block of Transformers, with E / P of its experts here."""

        def __init__(self, experts: nn.Module, group: Any) -> None:
            super().__init__()
            self.group, self.experts = group, experts.gate_up_proj.shape[0]
            own = self.experts // group.size()
            first = own * group.rank()
            self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[first : first + own].clone())
            self.down_proj = nn.Parameter(experts.down_proj.detach()[first : first + own].clone())

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ranks, top_k = self.group.size(), ids.shape[1]
            slots = ids.reshape(-1).argsort(stable=True)
            counts = torch.zeros(self.experts, dtype=torch.int64, device=x.device)
            counts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids.reshape(-1)))
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=self.group)
            both = torch.stack([counts, arriving]).view(2, ranks, -1).sum(2).tolist()  # the host waits
            sent, received = both
            rows = Exchange.apply(x[slots // top_k], sent, received, self.group)
            by_rank = arriving.view(ranks, -1)
            expert = torch.arange(by_rank.shape[1], device=x.device).repeat(ranks)
            expert = expert.repeat_interleave(arriving, output_size=rows.shape[0])
            order = expert.argsort(stable=True)  # by source rank and expert -> by expert
            ends = by_rank.sum(0).cumsum(0).int()
            hidden = self._product(rows[order], self.gate_up_proj, ends)
            gate, up = hidden.chunk(2, 1)
            made = self._product(torch.nn.functional.silu(gate) * up, self.down_proj, ends)
            back = Exchange.apply(torch.empty_like(made).index_copy(0, order, made), received, sent, self.group)
            y = torch.empty_like(back).index_copy(0, slots, back).view(*ids.shape, -1)
            return (y * weights.unsqueeze(2)).sum(1).to(x.dtype)

        @staticmethod
        def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
            if rows.is_cuda:
                return grouped_mm(rows, weights.transpose(1, 2), offs=ends)
            edges = [0, *ends.tolist()]
            return torch.cat([rows[a:b] @ weight.t() for a, b, weight in zip(edges, edges[1:], weights)])

    return PlainExperts


def make_model(bench: Bench) -> Any:
    """A few layers of Qwen3-30B-A3B with random weights, the same on all ranks, and a small vocabulary."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    }  # fmt: skip
    if bench.toy:
        sizes = {
            "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
    config = transformers.Qwen3MoeConfig(
        **sizes, num_hidden_layers=2 if bench.toy else bench.options.model_layers, norm_topk_prob=True, vocab_size=1024,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(bench.device):
        return transformers.Qwen3MoeForCausalLM(config).to(torch.float32 if bench.toy else torch.bfloat16)


def ready(bench: Bench, layer: Layer) -> None:
    """The kernels that `optimize` checks a layer with: one number of rows an expert for each tile."""
    began, spread = time.time(), Spread(bench, layer, own_weights(bench, layer, torch.bfloat16))
    for tokens in (rows * layer.experts // (layer.top_k * bench.world) for rows in (16, 32, 64, 256)):
        region, _ = spread.plan(moefx.Options(degree=1, policy="fifo"), tokens)
        compile_kernels([region], spread.params, random_batch(bench, layer, tokens, torch.bfloat16))
    bench.log(f"{layer}: kernels ready in {time.time() - began:.1f} s")


class Trainee:
    """A model and its training step: forward, backward, gradients of the mean loss on all ranks, AdamW."""

    def __init__(self, bench: Bench, model: Any, experts: set[int], ids: Tensor) -> None:
        self.bench, self.model, self.ids, self.experts = bench, model, ids, experts
        groups = [[p for p in model.parameters() if (id(p) in experts) == mine] for mine in (True, False)]
        self.optimizers = [torch.optim.AdamW(g, lr=1e-4, fused=bench.cuda) for g in groups]
        self.loss = 0.0 * ids.sum()

    def step(self) -> None:
        self.loss = self.model(input_ids=self.ids, labels=self.ids).loss
        self.loss.backward()
        rest = [p for p in self.model.parameters() if id(p) not in self.experts and p.grad is not None]
        flat = torch.cat([p.grad.reshape(-1) for p in rest])
        dist.all_reduce(flat)
        flat /= self.bench.world
        for p, piece in zip(rest, flat.split([p.numel() for p in rest])):
            p.grad = piece.view_as(p)
        for p in self.model.parameters():
            if id(p) in self.experts and p.grad is not None:
                p.grad /= self.bench.world
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def model(bench: Bench) -> None:
    sizes = [(2, 64)] if bench.toy else [(1, 4096), (4, 4096)]
    names = ("plain, grouped_mm", "moefx r=1", "moefx auto")

    def run(batch: int, length: int) -> dict[str, Any]:
        profile_of(bench)  # so that optimize finds it
        if bench.cuda:
            ready(bench, Layer(2048, 768, 128, 8))
        torch.manual_seed(1 + bench.rank)
        ids = torch.randint(0, 1024, (batch, length), device=bench.device)
        trainees: dict[str, Trainee] = {}
        chosen = ""
        for name in names:
            made, began = make_model(bench), time.time()
            if name.startswith("plain"):
                plain = plain_experts()
                for layer in made.model.layers:
                    layer.mlp.experts = plain(layer.mlp.experts, bench.group)
                experts = {id(p) for m in made.modules() if isinstance(m, plain) for p in m.parameters()}
            else:
                options = moefx.Options(degree=1, policy="fifo") if name.endswith("r=1") else moefx.Options()
                moefx.optimize(made, {"input_ids": ids}, options, mesh=bench.group)
                report = moefx.explain(made)
                if len(report.found) != len(made.model.layers):
                    raise RuntimeError(f"blocks were not found: {report}")
                experts = {id(p) for _, p in expert_parameters(made)}
                regions = [m.forward for m in made.modules() if "forward" in m.__dict__]
                compiled = [v.compiled for f in regions for v in f.variants.values() if isinstance(v, Variant)]
                assert all(isinstance(c, ParallelRegion) for c in compiled)
                chosen = "/".join(map(str, compiled[0].degrees))
                bench.log(f"{name}: optimised in {time.time() - began:.1f} s, r {chosen}")
            trainees[name] = Trainee(bench, made, experts, ids)
        losses: dict[str, list[float]] = {n: [] for n in names}
        for _ in range(3):  # from the same weights on the same batch: the same losses
            for n, t in trainees.items():
                t.step()
                losses[n].append(float(t.loss.detach()))
        apart = max(abs(a / b - 1) for n in names[1:] for a, b in zip(losses[n], losses[names[0]]))
        seconds = bench.in_turns({n: t.step for n, t in trainees.items()}, 2 if bench.toy else bench.options.rounds)
        cells = {f"{n} ms": f"{1e3 * s:.1f}" for n, s in seconds.items()} | {
            "r": chosen, "plain / auto": f"{seconds[names[0]] / seconds[names[2]]:.2f}",
            "r=1 / auto": f"{seconds[names[1]] / seconds[names[2]]:.2f}",
            "tokens/s": f"{ids.numel() * bench.world / seconds[names[2]]:,.0f}",
            "losses apart": f"{apart:.1e}", "_seconds": seconds, "_losses": losses,
        }  # fmt: skip
        return bench.judged("model", f"{batch} x {length}", cells, apart < (1e-3 if bench.toy else 2e-2))

    for batch, length in sizes:
        layers_of = "2 toy layers" if bench.toy else f"{bench.options.model_layers} layers of Qwen3-30B-A3B"
        bench.row("model", f"{layers_of}, {batch} x {length} tokens a rank", lambda b=batch, n=length: run(b, n), reserve_s=40)


# ------------------------------------------------------------------------------------------------ symmetric memory


MOST_SYMMETRIC = 15  # experts of a rank that `all_to_all_vdev_2d` can handle, in torch 2.11


def why_not_symmetric(bench: Bench) -> str:
    """What an all-to-all on symmetric memory lacks here; "" if nothing."""
    if not bench.cuda:
        return "needs CUDA"
    if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d"):
        return f"torch {torch.__version__} has no symm_mem.all_to_all_vdev_2d"
    if not memory.is_nvshmem_available():
        return "NVSHMEM is not in this build of torch, or its library is not found"
    return ""


def symmetric_row(bench: Bench, layer: Layer, tokens: int) -> dict[str, Any]:
    """The dispatch of a layer by `all_to_all_vdev_2d`, whose counts stay on the device, against counts that the host reads.

    Both end with rows in the order of the experts here; rows start in the order of all experts.
    """
    if hasattr(memory, "set_backend"):
        memory.set_backend("NVSHMEM")
    group, ranks, held = bench.group.group_name, bench.world, layer.experts // bench.world
    if hasattr(memory, "enable_symm_mem_for_group"):
        memory.enable_symm_mem_for_group(group)
    most = 2 * tokens * layer.top_k  # that may arrive here

    def shared(*shape: int, dtype: torch.dtype) -> Tensor:
        tensor = memory.empty(*shape, dtype=dtype, device=bench.device)
        memory.rendezvous(tensor, group)
        return tensor

    send, out = (shared(n, layer.d_model, dtype=torch.bfloat16) for n in (tokens * layer.top_k, most))
    splits, received = shared(layer.experts, dtype=torch.int64), shared(2, layer.experts, dtype=torch.int64)
    ids = random_batch(bench, layer, tokens, torch.bfloat16).ids.reshape(-1)
    splits.copy_(torch.bincount(ids, minlength=layer.experts))
    send.copy_(torch.randn(send.shape, device=bench.device))
    torch.cuda.synchronize()
    dist.barrier()

    def on_device() -> None:
        torch.ops.symm_mem.all_to_all_vdev_2d(send, out, splits, received, group)

    def by_host() -> Tensor:
        arriving = torch.empty_like(splits)
        dist.all_to_all_single(arriving, splits)
        both = torch.stack([splits, arriving]).view(2, ranks, held)
        leaving, coming = both.sum(2).tolist()
        rows = send.new_empty(sum(coming), layer.d_model)
        dist.all_to_all_single(rows, send, coming, leaving)
        expert = torch.arange(held, device=bench.device).repeat(ranks).repeat_interleave(arriving, output_size=len(rows))
        return rows[expert.argsort(stable=True)]

    on_device()
    expected, (sizes, starts) = by_host(), received.tolist()
    pieces = torch.cat([out[start : start + size] for size, start in zip(sizes, starts)])
    seconds = bench.in_turns({"on the device": on_device, "counts by the host": by_host}, bench.options.rounds)
    moved = send.nbytes * (ranks - 1) / ranks
    cells = {
        **{f"{n} ms": f"{1e3 * t:.3f}" for n, t in seconds.items()},
        "GB/s out of a rank": f"{moved / seconds['on the device'] / 1e9:.0f}", "_seconds": seconds,
    }  # fmt: skip
    return bench.judged("symmetric", f"T={tokens}", cells, torch.equal(pieces, expected))


def symmetric(bench: Bench) -> None:
    if reason := why_not_symmetric(bench):
        bench.row("symmetric", "all_to_all_vdev_2d", lambda: {"result": f"not available: {reason}"})
        return
    layer = NODE_LAYERS["phi-3.5-moe"]
    if layer.experts % bench.world or layer.experts // bench.world > MOST_SYMMETRIC:
        why = {"result": f"skipped: {layer.experts} experts on {bench.world} ranks; it takes up to {MOST_SYMMETRIC} a rank, evenly"}
        bench.row("symmetric", "all_to_all_vdev_2d", lambda: why)
        return
    for tokens in (4096, 16384):
        name = f"all_to_all_vdev_2d, dispatch of {layer}, T={tokens}"
        bench.row("symmetric", name, partial(symmetric_row, bench, layer, tokens))


# ------------------------------------------------------------------------------------------------ two nodes


class Throttled(Pipe):
    """Pipe-A2A with links between nodes that are EMULATED: rows for another node pass through the sender's host memory.

    one_by_one: the messages between nodes leave when those within the node have passed, as on one channel.
    """

    one_by_one = False

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        super().__init__(group, topology)
        self.link = torch.cuda.Stream() if dist.get_backend(group) == "nccl" else None

    def start(
        self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: Any = None
    ) -> ThroughHosts:
        check_rows(self.group, send, sent_rows, received_rows)
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        tag = next_tag(self.group)
        within = Messages(self._near, self._inside(sends), self._inside(receives), tag)
        leaving, arriving = self._outside(sends), self._outside(receives)
        if self.link is None:
            if self.one_by_one:
                within.wait()  # gloo's messages can be awaited once
            between = Messages(self.group, leaving, arriving, tag)
            return ThroughHosts(rows, [between] if self.one_by_one else [within, between])
        self.link.wait_stream(torch.cuda.current_stream(send.device))
        send.record_stream(self.link)
        rows.record_stream(self.link)
        with torch.cuda.stream(self.link):
            if self.one_by_one:
                within.wait()
            hosts = {p: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for p, t in leaving.items()}
            for peer, host in hosts.items():
                host.copy_(leaving[peer], non_blocking=True)
            staged = {peer: host.to(send.device, non_blocking=True) for peer, host in hosts.items()}
            between = Messages(self.group, staged, arriving, tag)
            done = self.link.record_event()
        return ThroughHosts(rows, [within, between], done, [*hosts.values(), *staged.values()])


class OneByOne(Throttled):
    one_by_one = True


@dataclass
class ThroughHosts:
    rows: Tensor
    messages: Sequence[Messages]
    done: torch.cuda.Event | None = None
    held: Sequence[Tensor] = ()  # until then

    def wait(self) -> Tensor:
        for messages in self.messages:
            messages.wait()
        if self.done is not None:
            here = torch.cuda.current_stream(self.rows.device)
            here.wait_event(self.done)
            for tensor in self.held:
                if tensor.is_cuda:
                    tensor.record_stream(here)
        return self.rows


def exchange_row(bench: Bench, topology: Topology, mebibytes: float) -> dict[str, Any]:
    """Times of one exchange in which every rank has as many bytes for each other."""
    count = max(1, int(mebibytes * 2**20 / 4096))
    send = torch.randn(count * bench.world, 1024, device=bench.device)
    counts = [count] * bench.world
    names = ("throttled_one_by_one", "throttled_pipe")
    made = {name: exchange_of(name, bench.group, topology) for name in names}
    works: dict[str, Callable[[], Any]] = {n: lambda e=e: e.start(send, counts, counts).wait() for n, e in made.items()}
    one, both = (work() for work in works.values())
    expected = exchange_of("direct", bench.group, topology).start(send, counts, counts).wait()
    passed = torch.equal(one, expected) and torch.equal(both, expected)
    # The two channels apart: messages within the node alone, and between nodes alone.
    mates = topology.members(topology.nodes[bench.rank])
    inside = [count if rank in mates else 0 for rank in range(bench.world)]
    outside = [count - n for n in inside]
    rows = {"within": send[: sum(inside)].contiguous(), "between": send[: sum(outside)].contiguous()}
    pipe = made["throttled_pipe"]
    works["within alone"] = lambda: pipe.start(rows["within"], inside, inside).wait()
    works["between alone"] = lambda: pipe.start(rows["between"], outside, outside).wait()
    seconds = bench.in_turns(works, 2 if bench.toy else bench.options.rounds)
    slow, fast = (seconds[name] for name in names)
    apart = seconds["within alone"], seconds["between alone"]
    cells = {f"{n} ms": f"{1e3 * s:.3f}" for n, s in seconds.items()} | {
        "one by one / pipe": f"{slow / fast:.2f}", "sum / max": f"{sum(apart) / max(apart):.2f}", "_seconds": seconds,
    }  # fmt: skip
    return bench.judged("nodes", f"{mebibytes} MiB", cells, passed)


NODE_LAYERS = {
    "phi-3.5-moe": Layer(4096, 6400, 16, 2), "mixtral": LAYERS["mixtral"],
    "deepseek-v3, 64 experts": LAYERS["deepseek-v3, 64 experts"],
}  # fmt: skip
NODE_TOKENS = (4096, 16384, 32768)


def nodes(bench: Bench) -> None:
    if bench.world < 4 or bench.world % 2:
        skipped = {"result": f"skipped: needs 4, 6 or 8 ranks, there are {bench.world}"}
        bench.row("nodes", "pairs of ranks as nodes", lambda: skipped)
        return
    for name, make in (("throttled_pipe", Throttled), ("throttled_one_by_one", OneByOne)):
        moefx.register_all_to_all(name, make)
    topology = Topology(tuple(rank // 2 for rank in range(bench.world)))
    samples: list[calibrate.Sample] = []
    for mebibytes in (0.01, 0.1, 1) if bench.toy else (1, 4, 16, 64):
        row = partial(exchange_row, bench, topology, mebibytes)
        cells = bench.row("nodes", f"EMULATED links, {bench.world // 2} nodes of 2, {mebibytes} MiB a pair", row, reserve_s=5)
        if "_seconds" in cells:
            samples.append(calibrate.Sample(mebibytes * 2**20 * (bench.world - 1), (cells["_seconds"]["throttled_pipe"],)))
    if len(samples) < 3:
        return  # no line without them
    line = {"all_to_all:throttled_pipe": calibrate.line_of(samples, "wire_bytes")}
    shapes, sizes = (TOY_LAYERS, TOY_TOKENS) if bench.toy else (NODE_LAYERS, NODE_TOKENS)
    for name, layer in shapes.items():
        shape = Shape(bench, layer, line, topology)
        for tokens in sizes:
            row = partial(layer_row, bench, shape, tokens, "throttled_pipe")
            bench.row("layers between nodes", f"EMULATED links, {name} ({layer}) T={tokens}", row, reserve_s=15)


def work(options: argparse.Namespace) -> int:
    sys.path.insert(0, str(ROOT))

    if options.device == "cuda" and torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        print(f"{os.environ['WORLD_SIZE']} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
        return 2

    bench = Bench(options)
    parts: dict[str, Callable[[Bench], None]] = {
        "correctness": correctness, "calibrate": calibration, "layers": layers, "trace": trace, "model": model,
        "edges": partial(correctness, edges=True), "symmetric": symmetric, "nodes": nodes,
    }  # fmt: skip
    for name in PARTS:
        if name in options.only:
            began = time.time()
            parts[name](bench)
            bench.log(f"part {name}: {time.time() - began:.1f} s")
    bench.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all results are written; threads of groups that plug-ins made may abort an ordinary end
