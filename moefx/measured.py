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

# Rounds that are measured, after those that prepare: more until there are as many runs, and yet more, of what is compared, while
# the medians are uncertain by more than a share of CERTAIN. No new one after MEASURED_S of runs.
ROUNDS, MANY_RUNS, MOST_ROUNDS, MEASURED_S, CERTAIN = 5, 30, 300, 8.0, 0.01
# What takes less on a CPU runs several times in a round, as layers in a model do: ranks that are level at the start of each run
# wait for each other longer than ranks which need not be, and most in one chunk. On a GPU the streams of a run are timed.
RUN_S = 0.04
CLOSE = 0.02  # what is slower by less than this has more rounds, however certain it seems
CHUNKS = (1, 4, 16)  # of the plans that show what is computed in so many
STEP = "step"  # forward, and backward right behind it


@dataclass(frozen=True)
class Runs:
    """The median of some runs, each on the slowest rank, and the standard error that their scatter leaves it, in seconds."""

    median_s: float
    error_s: float = 0.0

    @staticmethod
    def of(seconds: Sequence[float], beside: int = 0) -> Runs:
        """The scatter by the median of absolute deviations, which a few slow runs do not change. beside: how many others ran in
        the rounds of whose pace `seconds` are free; it is the mean of all, and so took its share of the scatter."""
        median = statistics.median(seconds)
        scatter = 1.4826 * statistics.median(abs(s - median) for s in seconds)
        taken = (1 + 1 / beside) ** 0.5 if beside else 1.0
        return Runs(median, 1.2533 * taken * scatter / len(seconds) ** 0.5)

    def no_slower(self, other: Runs, errors: float = 1.0) -> bool:
        """Whether it is not slower than `other`, or by no more than so many standard errors of the difference."""
        return self.median_s - other.median_s <= errors * (self.error_s**2 + other.error_s**2) ** 0.5

    def certain(self) -> bool:
        """Whether more runs would hardly move the median."""
        return self.error_s <= CERTAIN * self.median_s

    def close_to(self, other: Runs) -> bool:
        """Whether more runs may show it to be the faster one."""
        return self.median_s <= (1 + CLOSE) * other.median_s or self.no_slower(other, errors=2.0)


def at_one_pace(rounds: Sequence[Mapping[Name, float]]) -> dict[Name, list[float]]:
    """By name, its seconds in the rounds in which it ran, as if all rounds had been equally fast. Who runs in the last round ran in
    all of them.

    A time is that of its name times the pace of its round and some scatter; the pace is the mean of those that ran in all
    rounds, each against its median. Machines and routings differ from round to round, and hit all that run in one: on shared
    cores that is half of the scatter of runs, and more.
    """
    lasting = list(rounds[-1])
    paces = [1.0] * len(rounds)
    if len(lasting) > 1:
        medians = {name: statistics.median(times[name] for times in rounds) for name in lasting}
        paces = [statistics.fmean(times[name] / medians[name] for name in lasting) for times in rounds]
        usual = statistics.median(paces)
        paces = [pace / usual for pace in paces]
    return {name: [times[name] / pace for times, pace in zip(rounds, paces) if name in times] for name in rounds[0]}


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
    """By phase, what a block takes in CHUNKS whose exchanges carry next to nothing, and an exchange of all its rows; codecs are
    part of both. With a capacity, where places travel, exchanges are not measured.

    local: this rank's experts, with their parameters by name. All ranks call it, each with its tokens.
    """
    dropless, wire = wire.capacity is None, replace(wire, capacity=None)
    sizes = Sizes(tokens, region.top_k, region.d_model, region.d_expert, wire.most * wire.ranks, wire.ranks)
    regions = {}
    for degree in CHUNKS:
        plans = compile_parallel(region, local, Options(degree=degree, policy="fifo"), sizes, None, dict.fromkeys(wire.codecs, 1.0))
        at_once = AtOnce(wire.all_to_all, wire.ranks)
        regions[degree] = ParallelRegion(region, local, plans, kernels, replace(wire, all_to_all=at_once))
    parameter = next(iter(params.values()))
    least = _exchange_s(wire, parameter.new_zeros(wire.ranks, region.d_model))
    seconds = measure(regions, params, set(params), tokens, wire.group, ())
    whole = _whole_exchange_s(wire, parameter, tokens * region.top_k, region.d_model) if dropless else {}
    computed = {p: {r: max(0.0, runs.median_s - 2 * least) for r, runs in seconds[p].items()} for p in PHASES}
    return {phase: BlockTimes(computed[phase], least, whole.get(phase, 0.0)) for phase in PHASES}


def _whole_exchange_s(wire: Wire, parameter: Tensor, rows: int, width: int) -> dict[str, float]:
    """By phase, an exchange of all rows, encoded where the phase has a codec; phases without one have the same."""
    most_rows = torch.tensor(rows, device=parameter.device)
    dist.all_reduce(most_rows, dist.ReduceOp.MAX, wire.group)  # each sends as many to each
    plain = parameter.new_zeros(-(-int(most_rows) // wire.ranks) * wire.ranks, width)
    found = {phase: _exchange_s(wire, codec.encode(plain), behind=1) for phase, codec in wire.codecs.items()}
    if without := [phase for phase in PHASES if phase not in found]:
        found |= dict.fromkeys(without, _exchange_s(wire, plain, behind=1))
    return found


def _exchange_s(wire: Wire, rows: Tensor, behind: int = 0) -> float:
    """Seconds of an exchange in which as many of these rows go to each rank, right behind so many others."""
    counts = [len(rows) // wire.ranks] * wire.ranks
    exchange = lambda _: wire.all_to_all.start(rows, counts, counts, [counts] * wire.ranks).wait()  # noqa: E731
    runs = [_timed([exchange] * (behind + 1), rows.device, wire.group)[-1] for _ in range(ROUNDS + 1)]
    return _slowest(statistics.median(runs[1:]), rows.device, wire.group)


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
    slower in all of them has ROUNDS rounds, and those that are left have more, until their medians are certain. Empty: all
    regions have as many. Where it is the forward alone, nothing else runs.
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
    found: list[dict[Name, list[float]]] = []  # by round and name: each phase, and the sum
    repeats = dict.fromkeys(regions, 1)

    def turn(names: Sequence[Name]) -> dict[Name, list[float]]:
        ids, seconds = draw(), []
        for name in names:
            step, n = _step(regions[name], x, ids, w, gy, params, trained)[: len(phases)], repeats[name]
            times = _timed(step * n, device, group)
            of_phases = [sum(times[i :: len(phases)]) / n for i in range(len(phases))]
            seconds.append([*of_phases, sum(of_phases)])
        slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)  # so that all ranks go on with the same
        return dict(zip(names, slowest.tolist()))

    left, certain, spent_s = list(regions), not compared, 0.0
    turn(left)  # which prepares, and may be slow
    if device.type == "cpu":
        repeats = {name: max(1, round(RUN_S / times[-1])) for name, times in turn(left).items()}
    many = MANY_RUNS / min(repeats.values())
    while len(found) < ROUNDS or (
        len(found) < (many if certain else MOST_ROUNDS) and spent_s < MEASURED_S and (len(left) > 1 or not compared)
    ):
        left.reverse()  # what runs behind another may find it in its way
        found.append(turn(left))
        spent_s += sum(times[-1] * repeats[name] for name, times in found[-1].items())
        if compared and len(found) % ROUNDS == 0:
            runs = _runs(phases, found)
            left = _left(runs, left, compared)
            certain = all(runs[what][name].certain() for name in left for what in compared)
    runs = _runs(phases, found)
    return {what: {name: of[name] for name in regions} for what, of in runs.items()}


def _random_experts(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 [tokens, top_k]: each token's experts, different ones as far as there are so many."""
    scores = torch.rand(tokens, max(experts, top_k), generator=generator, device=generator.device)
    return scores.topk(top_k).indices % experts


def _runs(phases: Sequence[str], rounds: Sequence[Mapping[Name, Sequence[float]]]) -> dict[str, dict[Name, Runs]]:
    beside = len(rounds[-1]) - 1
    found = {}
    for i, what in enumerate((*phases, STEP)):
        seconds = at_one_pace([{name: times[i] for name, times in of_round.items()} for of_round in rounds])
        found[what] = {name: Runs.of(of_name, beside) for name, of_name in seconds.items()}
    return found


def _left(runs: Mapping[str, Mapping[Name, Runs]], names: Sequence[Name], compared: Collection[str]) -> list[Name]:
    """Those of `names` that may be the fastest in one of what is compared."""
    best = {what: min((runs[what][name] for name in names), key=lambda r: r.median_s) for what in compared}
    return [name for name in names if any(runs[what][name].close_to(best[what]) for what in compared)]


def _step(
    compiled: ParallelRegion, x: Tensor, ids: Tensor, w: Tensor, gy: Tensor, params: Mapping[str, Tensor], trained: Collection[str]
) -> tuple[Callable[[Any], Any], ...]:
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
