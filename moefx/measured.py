"""What the plans of one block take on the ranks of a group: measured, where the cost model only promises.

The model ranks degrees by lines that were fitted one kind of work at a time. What a layer computes besides products, what a
chunk more costs it, and what runs slower beside an exchange, is seen only in plans that run. They run here on the real
parameters, and tokens choose experts at random, anew in each round: rows that are spread evenly fill the tiles of kernels in
1, 2, 4 chunks and not in 3, and what one routing takes in so many chunks differs from another by up to a tenth.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.build import PHASES, compile_parallel
from moefx.codegen.all_to_all import AllToAll, Pending
from moefx.costs import BlockTimes, Sizes
from moefx.exchange import Wire, experts_of
from moefx.ir import Region
from moefx.options import Options
from moefx.parallel_region import ParallelRegion

Name = TypeVar("Name", bound=Hashable)

# Rounds that are measured, after one that is not: more where they are short, and noise is larger.
ROUNDS, MOST_ROUNDS, MEASURED_S = 5, 30, 8.0
CLOSE = 0.02  # what is slower by less than this has more rounds, however certain it seems
CHUNKS = (1, 4, 16)  # of the plans that show what is computed in so many
STEP = "step"  # forward, and backward right behind it


@dataclass(frozen=True)
class Runs:
    """The median of some runs, each on the slowest rank, and the standard error that their scatter leaves it, in seconds."""

    median_s: float
    error_s: float = 0.0

    @staticmethod
    def of(seconds: Sequence[float]) -> Runs:
        """The scatter by the median of absolute deviations, which a few slow runs do not change."""
        median = statistics.median(seconds)
        scatter = 1.4826 * statistics.median(abs(s - median) for s in seconds)
        return Runs(median, 1.2533 * scatter / len(seconds) ** 0.5)

    def no_slower(self, other: Runs, errors: float = 1.0) -> bool:
        """Whether it is not slower than `other`, or by no more than so many standard errors of the difference."""
        return self.median_s - other.median_s <= errors * (self.error_s**2 + other.error_s**2) ** 0.5

    def close_to(self, other: Runs) -> bool:
        """Whether more runs may show it to be the faster one."""
        return self.median_s <= (1 + CLOSE) * other.median_s or self.no_slower(other, errors=2.0)


class AtOnce:
    """An all-to-all that takes no time, to measure what a plan takes beside it: the rows that leave stand for those that come,
    in the same memory; where there are too few, those of an earlier call and zeros.

    messages: an all-to-all by which one row really goes from each of the `ranks` to each, for what it costs to start messages
    and to await them; None: nothing travels.
    """

    def __init__(self, messages: AllToAll | None = None, ranks: int = 0) -> None:
        self.messages, self.ones = messages, [1] * ranks
        self.small: dict[Any, Tensor] = {}  # rows that travel, by what they are
        self.kept: dict[Any, Tensor] = {}  # rows for calls in which more come than leave

    def start(self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: Any = None) -> Arrived:
        pending, what = None, (send.shape[1], send.dtype, send.device)
        if self.messages is not None:
            if what not in self.small:
                self.small[what] = send.new_zeros(len(self.ones), send.shape[1])
            pending = self.messages.start(self.small[what], self.ones, self.ones, [self.ones] * len(self.ones))
        coming = sum(received_rows)
        if coming <= len(send):
            return Arrived(send[:coming], pending)
        if what not in self.kept or len(self.kept[what]) < coming:  # kept, since making them takes time, too
            self.kept[what] = torch.cat([send, send.new_zeros(coming - len(send), send.shape[1])])
        return Arrived(self.kept[what][:coming], pending)


@dataclass(frozen=True)
class Arrived:
    """Rows that are there already, and messages that are to be awaited."""

    rows: Tensor
    pending: Pending | None = None

    def wait(self) -> Tensor:
        if self.pending is not None:
            self.pending.wait()
        return self.rows


def block_times(
    region: Region, local: Region, params: Mapping[str, Tensor], tokens: int, wire: Wire, kernels: str
) -> dict[str, BlockTimes]:
    """By phase, what a block takes in CHUNKS whose exchanges carry next to nothing; codecs are part of it.

    local: this rank's experts, with their parameters by name. All ranks call it, each with its tokens.
    """
    wire = replace(wire, capacity=None)
    sizes = Sizes(tokens, region.top_k, region.d_model, region.d_expert, wire.most * wire.ranks, wire.ranks)
    regions = {}
    for degree in CHUNKS:
        plans = compile_parallel(region, local, Options(degree=degree, policy="fifo"), sizes, None, dict.fromkeys(wire.codecs, 1.0))
        at_once = AtOnce(wire.all_to_all, wire.ranks)
        regions[degree] = ParallelRegion(region, local, plans, kernels, replace(wire, all_to_all=at_once))
    device = next(iter(params.values())).device
    rows, counts = torch.zeros(wire.ranks, region.d_model, device=device), [1] * wire.ranks
    exchange = lambda _: wire.all_to_all.start(rows, counts, counts).wait()  # noqa: E731
    exchanges = [_timed([exchange], device, wire.group)[0] for _ in range(ROUNDS + 1)]
    least = _slowest(statistics.median(exchanges[1:]), device, wire.group)
    seconds = measure(regions, params, set(params), tokens, wire.group, ())
    return {
        phase: BlockTimes({r: max(0.0, runs.median_s - 2 * least) for r, runs in seconds[phase].items()}, least)
        for phase in PHASES
    }


def measure(
    regions: Mapping[Name, ParallelRegion],
    params: Mapping[str, Tensor],
    trained: Collection[str],
    tokens: int,
    group: dist.ProcessGroup,
    compared: Collection[str],
) -> dict[str, dict[Name, Runs]]:
    """By phase and for the STEP of both, what each region took, by its name, all of them in turns. All ranks call it.

    params: this rank's, by name. trained: those whose gradients are wanted. tokens: of this rank. No capacity: the rows that
    are chosen travel, all of them. compared: the phases of which the fastest region is wanted, or STEP; a region that is clearly
    slower in all of them has ROUNDS rounds, and those that are left have more. Empty: all regions have as many. Where it is the
    forward alone, nothing else runs.
    """
    region, parameter = next(iter(regions.values())).region, next(iter(params.values()))
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator(device).manual_seed(group.rank())
    widths = region.d_model, region.d_out
    x, gy = (torch.randn(tokens, width, generator=generator, device=device, dtype=dtype) for width in widths)
    w = torch.full((tokens, region.top_k), 1 / region.top_k, dtype=dtype, device=device)
    draw = partial(_random_experts, tokens, region.experts, region.top_k, generator)
    if experts_of(region.experts, group.size(), group.size() - 1):  # else a rank has nothing to compile, and others wait for it
        for compiled in regions.values():
            names = compiled.binder.names
            compiled.precompile(x, draw(), w, {n: params[n].detach() for n in names}, [[n for n in names if n in trained]])
    phases = PHASES[:1] if set(compared) == {"forward"} else PHASES
    found: dict[Name, list[list[float]]] = {name: [] for name in regions}  # by round: each phase, and the sum

    def turn(names: Sequence[Name]) -> list[list[float]]:
        ids = draw()
        steps = [_step(regions[name], x, ids, w, gy, params, trained)[: len(phases)] for name in names]
        seconds = [_timed(step, device, group) for step in steps]
        slowest = torch.tensor([[*times, sum(times)] for times in seconds], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)  # so that all ranks go on with the same
        return slowest.tolist()  # type: ignore[no-any-return]

    left, rounds, spent_s = list(regions), 0, 0.0
    turn(left)  # which also prepares
    while rounds < ROUNDS or (rounds < MOST_ROUNDS and spent_s < MEASURED_S and (len(left) > 1 or not compared)):
        rounds += 1
        left.reverse()  # what runs behind another may find it in its way
        for name, times in zip(left, turn(left)):
            found[name].append(times)
            spent_s += times[-1]
        if compared and rounds >= ROUNDS:
            left = _left({name: _runs(phases, found[name]) for name in left}, compared)
    by_name = {name: _runs(phases, times) for name, times in found.items()}
    return {what: {name: runs[what] for name, runs in by_name.items()} for what in (*phases, STEP)}


def _random_experts(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 [tokens, top_k]: each token's experts, different ones as far as there are so many."""
    scores = torch.rand(tokens, max(experts, top_k), generator=generator, device=generator.device)
    return scores.topk(top_k).indices % experts


def _runs(phases: Sequence[str], rounds: Sequence[Sequence[float]]) -> dict[str, Runs]:
    return {what: Runs.of(seconds) for what, seconds in zip((*phases, STEP), zip(*rounds))}


def _left(runs: Mapping[Name, Mapping[str, Runs]], compared: Collection[str]) -> list[Name]:
    """Those that may be the fastest in one of what is compared."""
    best = {what: min((of[what] for of in runs.values()), key=lambda r: r.median_s) for what in compared}
    return [name for name, of in runs.items() if any(of[what].close_to(best[what]) for what in compared)]


def _step(
    compiled: ParallelRegion, x: Tensor, ids: Tensor, w: Tensor, gy: Tensor, params: Mapping[str, Tensor], trained: Collection[str]
) -> Sequence[Callable[[Any], Any]]:
    """Forward, and backward of what that saved."""
    names = compiled.binder.names
    tensors, wanted = [params[n].detach() for n in names], [n in trained for n in names]
    return (
        lambda _: compiled.run_forward(x, ids, w, tensors, None)[1],
        lambda saved: compiled.run_backward(saved, gy, tensors, wanted, True, None),
    )


def _timed(calls: Sequence[Callable[[Any], Any]], device: torch.device, group: dist.ProcessGroup) -> list[float]:
    """Seconds of calls right behind one another, as in a step, each of which is given what the one before it gave. On a GPU
    they are those of its stream, since the host is ahead of it."""
    dist.barrier(group)
    result, marks = None, [_now(device)]
    for call in calls:
        result = call(result)
        marks.append(_now(device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [1e-3 * a.elapsed_time(b) for a, b in pairwise(marks)]
    return [b - a for a, b in pairwise(marks)]


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def _slowest(seconds: float, device: torch.device, group: dist.ProcessGroup) -> float:
    value = torch.tensor(seconds, device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return float(value)
