"""From a region to something that runs: the stages after `find`, named once each."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType, MappingProxyType
from typing import Any, Literal

from moefx.codegen.emit import emit
from moefx.compiled import CompiledRegion, Emitted
from moefx.costs import BlockTimes, Sizes, price, price_block
from moefx.ir import Plan, Region, Schedule, TaskGraph
from moefx.options import Options
from moefx.passes.lower import lower
from moefx.passes.lower_parallel import lower_parallel
from moefx.passes.partition import Layout, expert_parallel, partition
from moefx.passes.schedule import check as check_schedule
from moefx.passes.schedule import choose, schedule
from moefx.passes.simplify import simplify
from moefx.profile import Profile
from moefx.region_op import register
from moefx.simulate import Timeline, simulate

PHASES: tuple[Literal["forward"], Literal["backward"]] = ("forward", "backward")
MOST_CHUNKS = 64  # "auto" looks at degrees up to here
# A degree that promises less than this over a smaller one is not taken: no cost model is that good.
NOT_WORTH_A_CHUNK = 0.01


def compile_region(region: Region, degree: int = 1, kernels: str = "auto", policy: str = "fifo") -> CompiledRegion:
    """simplify -> partition -> schedule -> lower -> emit -> load, for both phases of a region in `degree` chunks."""
    region = simplify(region)
    graphs = (partition(region, degree, "forward"), partition(region, degree, "backward"))
    schedules = (schedule(graphs[0], policy), schedule(graphs[1], policy))
    plans = (lower(region, graphs[0], schedules[0]), lower(region, graphs[1], schedules[1]))
    emitted = load(emit(region, *plans, name="region"))
    return register(CompiledRegion(region, graphs, schedules, plans, emitted, kernels))


@dataclass(frozen=True)
class ParallelPlans:
    """Both phases of a region whose experts are spread over ranks, and the timelines that decided, where there are times.

    measured: what the degrees took that ran in turns, as text; empty where none did.
    """

    graphs: tuple[TaskGraph, TaskGraph]
    schedules: tuple[Schedule, Schedule]
    plans: tuple[Plan, Plan]
    emitted: Emitted
    timelines: tuple[Timeline | None, Timeline | None]
    measured: tuple[str, ...] = ()


def compile_parallel(
    region: Region,
    local: Region,
    options: Options,
    sizes: Sizes,
    profile: Profile | None,
    wire_shares: Mapping[str, float],
    decided: Sequence[str] = (),
    times: Mapping[str, BlockTimes] = MappingProxyType({}),
) -> ParallelPlans:
    """partition -> schedule -> lower -> emit -> load for a simplified region on ranks, of which this one holds `local`.

    sizes, profile: what a degree or an order that `options` leave open is chosen by. wire_shares: by phase, the bytes of an
    encoded row per byte of a row; no entry, no codec. decided: the texts of the schedules, where another rank has chosen.
    times: by phase, what was measured of this block.
    """
    chosen = []
    for i in (0, 1):
        phase = PHASES[i]
        layout = Layout(codec=phase in wire_shares)
        codec = options.codec if phase == "forward" else options.backward_codec
        priced = replace(sizes, wire_share=wire_shares.get(phase, 1.0), codec=codec if phase in wire_shares else "")
        priced = replace(priced, all_to_all=options.all_to_all)
        given = Schedule.parse(decided[i]) if decided else None
        chosen.append(_choose(phase, layout, options, options.degrees[i], priced, profile, given, times.get(phase)))
    graphs, schedules, timelines = (tuple(column) for column in zip(*chosen))
    degree = schedules[0].degree
    forward, backward = (
        lower_parallel(region, local, g, s, degree, phase in wire_shares, options.capacity is not None)
        for g, s, phase in zip(graphs, schedules, PHASES)
    )
    emitted = load(emit(local, forward, backward, name="region"))
    return ParallelPlans(graphs, schedules, (forward, backward), emitted, timelines)  # type: ignore[arg-type]


def _choose(
    phase: Literal["forward", "backward"],
    layout: Layout,
    options: Options,
    degree: int | Literal["auto"],
    sizes: Sizes,
    profile: Profile | None,
    given: Schedule | None,
    times: BlockTimes | None,
) -> tuple[TaskGraph, Schedule, Timeline | None]:
    """The graph, its order, and what it costs."""

    def build(r: int) -> TaskGraph:
        graph = expert_parallel(r, phase, layout)
        if profile is None or r > sizes.capacity:
            return graph
        graph = price(graph, sizes, profile)
        return graph if times is None else price_block(graph, price(expert_parallel(1, phase, layout), sizes, profile), times)

    if given is None and degree == "auto":
        choice = choose(build, min(sizes.capacity, MOST_CHUNKS), options.policy)
        degree = min(r for r, s in choice.tried_s.items() if s <= (1 + NOT_WORTH_A_CHUNK) * choice.makespan_s)
        if degree == choice.degree:
            return choice.timeline.graph, choice.schedule, choice.timeline
    graph = build(given.degree if given is not None else degree)  # type: ignore[arg-type]  # a number by now
    timed = profile is not None and graph.degree <= sizes.capacity
    if given is not None:
        check_schedule(given, graph)
    order = given or schedule(graph, options.policy if timed or not options.timed else "fifo")
    return graph, order, simulate(graph, order) if timed else None


def load(source: str) -> Emitted:
    """Runs an emitted file. Equal sources share one entry in `linecache`, so tracebacks show its lines."""
    filename = f"<moefx {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    code: CodeType = compile(source, filename, "exec")
    namespace: dict[str, Any] = {"__name__": filename}
    exec(code, namespace)
    return Emitted(source, namespace["forward"], namespace["backward"])
