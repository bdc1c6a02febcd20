"""schedule: tasks get an order and a lane. A policy is a function TaskGraph -> Schedule in `POLICIES`.

    serial   everything on one lane in the order of the program
    fifo     PipeMoE: each lane first all that feeds the experts, chunk by chunk, then the rest
    schemoe  the order of ScheMoE's Theorem 1, for the seven-task chain on two resources alone
    greedy   a free resource takes the ready task with the longest way to the end
    exact    the shortest of all orders, proved
    auto     the theorem's order where it is optimal, else a search that cuts; what users get

`serial`, `fifo` and `schemoe` look at the graph alone; the others need its times. A policy of your own:
`register_policy("mine", function)`, or POLICIES["mine"] = function. Which r is best: `choose`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from moefx.passes._orders import TIE, by_key, layered_search, list_schedule, reverse, reverse_schedule

from moefx.errors import InputError, PlanError
from moefx.ir import NO_CHUNK, Schedule, Task, TaskGraph, issue_order
from moefx.registry import Registry
from moefx.simulate import COMPUTE, Timeline, lower_bound_s, simulate, tails_s

Policy = Callable[[TaskGraph], Schedule]

# What `auto` tries until an order is GOOD_ENOUGH: how many partial schedules it keeps, from the end backwards or not, and
# with the dear lower bounds or not. Wide and dear is for graphs of few tasks.
AUTO_SEARCHES = ((12, False, False), (12, True, False), (12, False, True), (12, True, True))
AUTO_SEARCHES_SMALL = (*AUTO_SEARCHES, (48, False, True), (48, True, True))
AUTO_SEARCHES_LARGE = (*AUTO_SEARCHES, (24, False, False), (24, True, False))
SMALL_TASKS = 160
# So many degrees are looked at with these searches, those that are best by the quick orders.
AUTO_DEGREES = 10
# `auto` is content with an order this close to a lower bound, and stops raising r when twice r gains less.
GOOD_ENOUGH = 1e-3
# `exact` widens its search in these steps: each finds a better schedule, which cuts more of the next.
EXACT_WIDTHS = (8, 128, None)
EXACT_STATES = 2_000_000


def serial(graph: TaskGraph) -> Schedule:
    """All tasks on one lane in program order."""
    return Schedule(graph.phase, graph.degree, ((COMPUTE, tuple(t.name for t in graph.tasks)),))


def fifo(graph: TaskGraph) -> Schedule:
    """One lane per resource; each serves the chunks in order, first everything that feeds the experts, then the rest.

    While the experts of chunk c compute, the other lane already moves chunk c+1. How far a task is from the start is
    counted in changes of the resource on the way to it. Tasks of no chunk come last. On one device a single chunk has
    nothing to overlap: `serial`.
    """
    if graph.degree == 1 and {t.resource for t in graph.tasks} <= {COMPUTE, "memory"}:
        return serial(graph)
    return by_key(graph, _fifo_key(graph))


def _fifo_key(graph: TaskGraph) -> Callable[[Task], tuple[bool, int, int]]:
    changes: dict[str, int] = {}
    for task in graph.tasks:
        before = (graph[d] for d in task.deps)
        changes[task.name] = max((changes[d.name] + (d.resource != task.resource) for d in before), default=0)
    return lambda task: (task.chunk == NO_CHUNK, changes[task.name], task.chunk)


def schemoe(graph: TaskGraph) -> Schedule:
    """The order of Theorem 1 (ScheMoE, EuroSys 2024). PlanError where the graph is not of its form.

    compute: C1_0 .. C1_{r-1}, (D1 E C2)_0 .. (D1 E C2)_{r-1}, D2_0 .. D2_{r-1};  link: all A1, then all A2.
    It is optimal where `theorem_gaps` finds nothing.
    """
    if gaps := _form_gaps(graph):
        raise PlanError(f"the theorem's order is for the chain C1 A1 D1 E C2 A2 D2 on two resources; here {gaps[0]}")
    return by_key(graph, _fifo_key(graph))


def theorem_gaps(graph: TaskGraph) -> list[str]:
    """Which assumptions of ScheMoE's Theorem 1 do not hold; none: its order is optimal. r = 1 has only one order.

    Equal chunks, one link, compute and link alternate as C1 A1 (D1 E C2) A2 D2 (any codec may be absent), and equal
    times of the first and second instance: t(C1) = t(C2), t(A1) = t(A2), t(D1) = t(D2).
    """
    if gaps := _form_gaps(graph):
        return gaps
    chunks = _chunks(graph)
    times = [[t.seconds for t in tasks] for tasks in chunks]
    if any(t is None for row in times for t in row):
        return ["the tasks have no times"]
    if graph.degree == 1:
        return []
    gaps = ["the chunks take different times"] if any(row != times[0] for row in times) else []
    first = {_link_of_chain(t): t.seconds or 0.0 for t in chunks[0]}
    for codec in ("compress", "all_to_all", "decompress"):
        a, b = first.get(f"dispatch_{codec}", 0.0), first.get(f"combine_{codec}", 0.0)
        if abs(a - b) > 1e-9 * max(a, b):
            gaps.append(f"t(dispatch_{codec}) = {1e3 * a:.6g} ms is not t(combine_{codec}) = {1e3 * b:.6g} ms")
    return gaps


# The theorem's seven kinds, in the order of the chain: C1 A1 D1 E C2 A2 D2.
CHAIN = (
    *("dispatch_compress", "dispatch_all_to_all", "dispatch_decompress", "experts"),
    *("combine_compress", "combine_all_to_all", "combine_decompress"),
)


def _chunks(graph: TaskGraph) -> list[list[Task]]:
    chunks: dict[int, list[Task]] = {}
    for task in graph.tasks:
        chunks.setdefault(task.chunk, []).append(task)
    return list(chunks.values())


def _form_gaps(graph: TaskGraph) -> list[str]:
    """Why the graph is not the theorem's chain, on one compute resource and one link."""
    chunks = _chunks(graph)
    links = {t.resource for t in graph.tasks if t.kind.endswith("all_to_all")}
    for tasks in chunks:
        for before, task in zip([None, *tasks], tasks):
            place = f"task {task.name} ({task.kind} on {task.resource})"
            if _link_of_chain(task) not in CHAIN:
                return [f"{place} has no place in it"]
            if task.deps != ((before.name,) if before else ()):
                return [f"{place} depends on {', '.join(task.deps) or 'nothing'}, not on the task before it alone"]
            if (task.resource != COMPUTE) != task.kind.endswith("all_to_all") or len(links) != 1:
                return [f"{place}: the codecs and the experts take {COMPUTE}, both all-to-alls one link"]
        kinds = [_link_of_chain(t) for t in tasks]
        if kinds != [kind for kind in CHAIN if kind in kinds] or not {CHAIN[1], CHAIN[3], CHAIN[5]} <= set(kinds):
            return [f"a chunk is {' '.join(kinds)}"]
        if kinds != [_link_of_chain(t) for t in chunks[0]]:
            return ["the chunks have different tasks"]
    return []


def _link_of_chain(task: Task) -> str:
    """The task's place in the chain: the experts' whole backward stands for the experts, either link for the link."""
    return "experts" if task.kind == "experts_backward" else task.kind.replace("_intra_all_to_all", "_all_to_all")


def greedy(graph: TaskGraph) -> Schedule:
    """List scheduling: a free resource takes, of the tasks that are ready, the one with the longest way to the end."""
    tails = tails_s(graph)
    return list_schedule(graph, lambda task: -tails[task.name] - (task.seconds or 0.0))


def exact(graph: TaskGraph) -> Schedule:
    """The shortest of all non-preemptive orders, proved, for any times, dependencies and number of resources.

    The work grows fast with r; PlanError when EXACT_STATES partial schedules do not suffice for the proof.
    """
    best, seconds = _best(graph, _quick(graph))
    if seconds <= lower_bound_s(graph) * (1 + TIE):
        return best
    for width in EXACT_WIDTHS:
        found = layered_search(graph, seconds, width, strong=True, max_states=EXACT_STATES)
        if found.schedule is not None:
            best, seconds = found.schedule, found.makespan_s
        if found.proved:
            return best
    raise PlanError(
        f"no proof of the optimum for {len(graph.tasks)} tasks (r={graph.degree}) within {EXACT_STATES:,} partial "
        "schedules; use policy 'auto', or a smaller r"
    )


def auto(graph: TaskGraph) -> Schedule:
    """The theorem's order where it is optimal; else the best of the quick orders, improved by searches of bounded width.

    Linear in the number of tasks. It stops early at an order that a lower bound shows to be within GOOD_ENOUGH.
    """
    if not theorem_gaps(graph):
        return schemoe(graph)
    best, seconds = _best(graph, _quick(graph))
    good = lower_bound_s(graph) * (1 + GOOD_ENOUGH)
    for width, backwards, strong in AUTO_SEARCHES_SMALL if len(graph.tasks) <= SMALL_TASKS else AUTO_SEARCHES_LARGE:
        if seconds <= good:
            break
        found = layered_search(reverse(graph) if backwards else graph, seconds, width, strong)
        if found.schedule is not None:
            best = reverse_schedule(found.schedule) if backwards else found.schedule
            seconds = found.makespan_s
        if found.proved:
            break
    return best


def _quick(graph: TaskGraph) -> list[Schedule]:
    """Orders found in one pass. The list schedules serve by fifo's order, with tasks of no chunk where a lane is idle."""
    return [fifo(graph), greedy(graph), list_schedule(graph, _fifo_key(graph))]


def _best(graph: TaskGraph, schedules: Iterable[Schedule]) -> tuple[Schedule, float]:
    timed = [(s, simulate(graph, s).makespan_s) for s in schedules]
    return min(timed, key=lambda pair: pair[1])


POLICIES: Registry[Policy] = Registry("schedule policy", requires=("__call__",), error=PlanError)
for _policy in (serial, fifo, schemoe, greedy, exact, auto):
    POLICIES.register(_policy.__name__, _policy)


def register_policy(name: str, policy: Policy) -> None:
    """Make `policy`, a function TaskGraph -> Schedule, known by `name`. A name that is taken is an InputError.

    The result is checked each time: every task once, no deadlock. `simulate` tells what it costs.
    """
    POLICIES.register(name, policy)


def schedule(graph: TaskGraph, policy: str = "fifo") -> Schedule:
    """Orders the tasks of `graph` by the named policy and checks the result."""
    result = POLICIES[policy](graph)
    check(result, graph)
    return result


def check(schedule: Schedule, graph: TaskGraph) -> None:
    """Every task of the graph exactly once, and no deadlock between lane orders and dependencies; else PlanError."""
    if (schedule.phase, schedule.degree) != (graph.phase, graph.degree):
        raise PlanError(f"schedule of {schedule.phase} r={schedule.degree} for tasks of {graph.phase} r={graph.degree}")
    planned = Counter(task for _, tasks in schedule.lanes for task in tasks)
    for task in graph.tasks:
        if planned[task.name] != 1:
            raise PlanError(f"task {task.name} stands {planned[task.name]} times in\n{schedule}")
    known = {task.name for task in graph.tasks}
    if extra := [name for name in planned if name not in known]:
        raise PlanError(f"unknown tasks {', '.join(extra)} in\n{schedule}")
    issue_order(schedule, graph)


# ------------------------------------------------------------------------------------------------ the degree


@dataclass(frozen=True)
class Choice:
    """The degree and the order that were chosen together, and the makespans of the degrees that were tried."""

    degree: int
    schedule: Schedule
    timeline: Timeline
    tried_s: Mapping[int, float]

    @property
    def makespan_s(self) -> float:
        return self.timeline.makespan_s


def choose(
    build: Callable[[int], TaskGraph], capacity: int, policy: str = "auto", degrees: Iterable[int] | None = None
) -> Choice:
    """The best degree 1 <= r <= capacity together with its order; ties go to the smaller r.

    build(r): the graph in r chunks, with times. Forward and backward have graphs, and so choices, of their own.
    degrees: only these are tried; one above the capacity (rows of a chunk would be zero) is an InputError.

    Without `degrees`, "exact" proves its choice over all r; it relies on a resource's work not shrinking as r grows
    (start-up costs are not negative), so degrees whose work alone is too long end the search. Other policies use that for
    a fixed order and times alpha + beta*n/r every path through the timeline takes c0 + c1*r + c2/r seconds, all c >= 0:
    the makespan is convex in r, and doubling r, then bisection, finds the minimum of `fifo`'s. "auto" looks around it
    with all orders, and does not raise r for less than GOOD_ENOUGH.
    """
    if capacity < 1:
        raise InputError(f"the capacity is the largest degree, at least 1; got {capacity}")
    POLICIES[policy]  # PlanError for one that is not known
    graph_of = cache(build)
    if degrees is not None:
        asked = sorted(set(degrees))
        if not asked or asked[0] < 1 or asked[-1] > capacity:
            raise InputError(f"degrees lie between 1 and the capacity {capacity}; got {asked}")
        return _choose_among(graph_of, asked, policy)
    if policy == "exact":
        return _choose_exact(graph_of, capacity)
    if policy == "auto":
        return _choose_auto(graph_of, capacity)
    if policy in ("serial", "fifo", "schemoe"):
        return _choose_among(graph_of, _bisect(_makespan_of(graph_of, policy), capacity, 0.0), policy)
    return _choose_among(graph_of, range(1, capacity + 1), policy)


def _makespan_of(graph_of: Callable[[int], TaskGraph], policy: str) -> Callable[[int], float]:
    return cache(lambda r: simulate(graph_of(r), schedule(graph_of(r), policy)).makespan_s)


def _choose_among(graph_of: Callable[[int], TaskGraph], degrees: Iterable[int], policy: str) -> Choice:
    best: tuple[Schedule, Timeline] | None = None
    tried: dict[int, float] = {}
    for r in sorted(degrees):
        order = schedule(graph_of(r), policy)
        timeline = simulate(graph_of(r), order)
        tried[r] = timeline.makespan_s
        if best is None or timeline.makespan_s < best[1].makespan_s * (1 - TIE):
            best = order, timeline
    assert best is not None, "callers give at least one degree"
    return Choice(best[0].degree, *best, tried)


def _choose_exact(graph_of: Callable[[int], TaskGraph], capacity: int) -> Choice:
    guess = _choose_auto(graph_of, capacity)
    limit, degrees = guess.makespan_s * (1 + TIE), [guess.degree]
    for r in range(1, capacity + 1):
        graph = graph_of(r)
        work = Counter[str]()
        for task in graph.tasks:
            work[task.resource] += graph.seconds[task.name]  # type: ignore[assignment]  # a Counter of seconds
        if max(work.values()) > limit:
            break
        if lower_bound_s(graph) <= limit:
            degrees.append(r)
    return _choose_among(graph_of, set(degrees), "exact")


def _choose_auto(graph_of: Callable[[int], TaskGraph], capacity: int) -> Choice:
    quick = cache(lambda r: _best(graph_of(r), _quick(graph_of(r)))[1])
    near = _bisect(_makespan_of(graph_of, "fifo"), capacity, GOOD_ENOUGH)
    start = min(near, key=lambda r: (quick(r), r))
    steps = {1, 2, 3, 4, start, *(start + d for d in (-2, -1, 1, 2)), *(int(start * x) for x in (0.5, 0.75, 1.5))}
    around = [r for r in steps if 1 <= r <= min(capacity, max(4, 2 * start))]
    shortlist = sorted(around, key=lambda r: (quick(r), r))
    best = simulate(graph_of(shortlist[0]), auto(graph_of(shortlist[0])))
    tried = {r: quick(r) for r in around} | {best.graph.degree: best.makespan_s}
    for r in shortlist[1:AUTO_DEGREES]:
        if lower_bound_s(graph_of(r)) < best.makespan_s * (1 - GOOD_ENOUGH):
            other = simulate(graph_of(r), auto(graph_of(r)))
            tried[r] = other.makespan_s
            if (other.makespan_s, r) < (best.makespan_s, best.graph.degree):
                best = other
    return Choice(best.graph.degree, best.schedule, best, dict(sorted(tried.items())))


def _bisect(cost: Callable[[int], float], capacity: int, least_gain: float) -> list[int]:
    """Degrees around the minimum of a cost that is convex in r: doubling until it no longer falls, then bisection.

    least_gain: doubling stops already when it gains less than this share.
    """
    r = 1
    while 2 * r <= capacity and cost(2 * r) < cost(r) * (1 - least_gain):
        r *= 2
    low, high = max(1, r // 2), min(capacity, 2 * r)
    while low < high:
        middle = (low + high) // 2
        if cost(middle + 1) < cost(middle) * (1 - TIE):
            low = middle + 1
        else:
            high = middle
    return sorted({low, r} if low != r else {low})
