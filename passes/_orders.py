"""Search over the orders of tasks: list scheduling, and a layered search that is exact when nothing is cut.

All schedules here are non-preemptive, one task at a time on each resource. The times of a graph are in seconds.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import le
from typing import Any

from moefx.ir import NO_CHUNK, Schedule, Task, TaskGraph
from moefx.simulate import COMPUTE, tails_s

# Two times closer than this, relative to the makespan, are one: sums of floats depend on their order.
TIE = 1e-12
# Lower bounds look at so many of the tasks that are left.
WINDOW = 72


def resources(graph: TaskGraph) -> list[str]:
    """The lanes' names: compute first, then as they appear."""
    names = list(dict.fromkeys(t.resource for t in graph.tasks))
    return sorted(names, key=lambda name: name != COMPUTE)


def by_key(graph: TaskGraph, key: Callable[[Task], Any]) -> Schedule:
    """One lane per resource, each ordered by `key` (ties: as listed)."""
    lanes = {name: [t for t in graph.tasks if t.resource == name] for name in resources(graph)}
    ordered = tuple((name, tuple(t.name for t in sorted(tasks, key=key))) for name, tasks in lanes.items())
    return Schedule(graph.phase, graph.degree, ordered)


def list_schedule(graph: TaskGraph, key: Callable[[Task], Any]) -> Schedule:
    """Whenever a resource is free it takes, of the tasks that are ready, the one with the smallest `key`."""
    seconds, place = graph.seconds, {t.name: i for i, t in enumerate(graph.tasks)}
    missing = {t.name: len(t.deps) for t in graph.tasks}
    successors: dict[str, list[str]] = defaultdict(list)
    for task in graph.tasks:
        for dep in task.deps:
            successors[dep].append(task.name)
    ready: dict[str, list[tuple[Any, int, str]]] = {name: [] for name in resources(graph)}
    lanes: dict[str, list[str]] = {name: [] for name in ready}
    running: list[tuple[float, int, str]] = []
    idle = set(ready)

    def release(name: str) -> None:
        task = graph[name]
        heapq.heappush(ready[task.resource], (key(task), place[name], name))

    for name, count in missing.items():
        if count == 0:
            release(name)
    now = 0.0
    while True:
        for resource in [name for name in ready if name in idle and ready[name]]:
            _, _, name = heapq.heappop(ready[resource])
            lanes[resource].append(name)
            idle.remove(resource)
            heapq.heappush(running, (now + seconds[name], place[name], name))
        if not running:
            break
        now = running[0][0]
        while running and running[0][0] <= now:
            _, _, name = heapq.heappop(running)
            idle.add(graph[name].resource)
            for successor in successors[name]:
                missing[successor] -= 1
                if missing[successor] == 0:
                    release(successor)
    return Schedule(graph.phase, graph.degree, tuple((lane, tuple(tasks)) for lane, tasks in lanes.items()))


def reverse(graph: TaskGraph) -> TaskGraph:
    """Time runs backwards: every dependency turned round. It has the same shortest makespan."""
    after: dict[str, list[str]] = {t.name: [] for t in graph.tasks}
    for task in graph.tasks:
        for dep in task.deps:
            after[dep].append(task.name)

    def turned(task: Task) -> Task:
        chunk = task.chunk if task.chunk == NO_CHUNK else graph.degree - 1 - task.chunk
        return replace(task, chunk=chunk, deps=tuple(after[task.name]))

    return TaskGraph(graph.phase, graph.degree, tuple(turned(t) for t in reversed(graph.tasks)))


def reverse_schedule(schedule: Schedule) -> Schedule:
    """A schedule of the reversed graph --> the schedule of the graph; it is no longer."""
    lanes = tuple((lane, tuple(reversed(tasks))) for lane, tasks in schedule.lanes)
    return Schedule(schedule.phase, schedule.degree, lanes)


# ------------------------------------------------------------------------------------------------ equal tasks


def order_of_equals(graph: TaskGraph) -> list[tuple[str, str]]:
    """Pairs (first, second) of interchangeable tasks: some optimal schedule runs each first before its second.

    Equal chunks have the same kinds of tasks with the same times and dependencies. In any schedule, let the i-th start of
    a kind among equal chunks belong to the i-th of these chunks: the i-th start of a kind still comes after the i-th end
    of a kind before it, because sorting two lists of equal length keeps "each after its partner". So the renamed schedule
    is valid and equally long. A dependency from a kind in chunk c-1 to the same kind in chunk c (sums of gradients) is
    kept for the same reason if all chunks have it.
    """
    chained = _chained_kinds(graph)
    needed_by: dict[str, list[str]] = defaultdict(list)
    for task in graph.tasks:
        if task.chunk == NO_CHUNK:
            for dep in task.deps:
                needed_by[dep].append(task.name)
    chunks: dict[int, list[Task]] = defaultdict(list)
    alone: dict[Any, list[Task]] = defaultdict(list)
    successors: dict[str, list[str]] = defaultdict(list)
    for task in graph.tasks:
        for dep in task.deps:
            successors[dep].append(task.name)
    for task in graph.tasks:
        if task.chunk == NO_CHUNK:
            alone[task.kind, task.resource, task.seconds, task.deps, tuple(successors[task.name])].append(task)
        else:
            chunks[task.chunk].append(task)

    equal: dict[Any, list[list[Task]]] = defaultdict(list)
    for tasks in chunks.values():
        tasks.sort(key=lambda t: t.kind)
        signature = [_signature(graph, t, chained, tuple(needed_by[t.name])) for t in tasks]
        if None not in signature and len({t.kind for t in tasks}) == len(tasks):
            equal[tuple(signature)].append(tasks)
    pairs = [
        (a, b) for group in equal.values() for first, second in zip(group, group[1:]) for a, b in zip(first, second)
    ]
    pairs += [pair for group in alone.values() for pair in zip(group, group[1:])]
    return [(a.name, b.name) for a, b in pairs]


def _chained_kinds(graph: TaskGraph) -> set[str]:
    """Kinds whose task of every chunk depends on that of the chunk before."""
    links = Counter(
        t.kind
        for t in graph.tasks
        if t.chunk > 0 and any(graph[d].kind == t.kind and graph[d].chunk == t.chunk - 1 for d in t.deps)
    )
    return {kind for kind, count in links.items() if count == graph.degree - 1}


def _signature(graph: TaskGraph, task: Task, chained: set[str], needed_by: tuple[str, ...]) -> Any:
    """What makes two tasks of a kind interchangeable; None where a dependency reaches into another chunk."""
    inside = []
    for dep in (graph[d] for d in task.deps):
        if dep.chunk == task.chunk:
            inside.append(dep.kind)
        elif dep.chunk == NO_CHUNK:
            inside.append("=" + dep.name)
        elif not (dep.kind == task.kind and dep.chunk == task.chunk - 1 and task.kind in chained):
            return None
    return task.kind, task.resource, task.seconds, tuple(sorted(inside)), needed_by


# ------------------------------------------------------------------------------------------------ layered search


@dataclass(frozen=True)
class Found:
    """schedule: the best found below the limit, or None; proved: nothing was cut, so it is the optimum (None: no better)."""

    schedule: Schedule | None
    makespan_s: float
    proved: bool
    states: int


@dataclass(slots=True)
class _State:
    """A partial schedule: the tasks of `mask`; each lane is free from `free` and has left_s seconds of work left.

    ready: the tasks whose predecessors are all done. release: the latest end of a task's predecessors that are done, where
    the task could feel it: not when the equal tasks before it keep its lane busy for longer anyway.
    """

    mask: int
    ready: tuple[int, ...]
    free: tuple[float, ...]
    left_s: tuple[float, ...]
    release: dict[int, float]
    end_s: float
    bound_s: float
    task: int
    before: _State | None


class _Problem:
    """A graph in arrays: task i is number i of the graph."""

    def __init__(self, graph: TaskGraph) -> None:
        self.graph = graph
        self.names = [t.name for t in graph.tasks]
        number = {name: i for i, name in enumerate(self.names)}
        self.lanes = resources(graph)
        self.lane = [self.lanes.index(t.resource) for t in graph.tasks]
        self.seconds = [graph.seconds[name] for name in self.names]
        tails = tails_s(graph)
        self.tail = [tails[name] for name in self.names]
        edges = [(number[d], number[t.name]) for t in graph.tasks for d in t.deps]
        extra = [(number[a], number[b]) for a, b in order_of_equals(graph)]
        self.equals_before = [0] * len(self.names)  # as a mask: tasks of the same lane and time that come first
        for a, b in extra:
            self.equals_before[b] = self.equals_before[a] | 1 << a
        self.before: list[list[int]] = [[] for _ in self.names]
        self.after: list[list[int]] = [[] for _ in self.names]
        for a, b in dict.fromkeys([*edges, *extra]):
            self.before[b].append(a)
            self.after[a].append(b)
        self.needs = [sum(1 << a for a in before) for before in self.before]
        self.on_lane = [0] * len(self.lanes)
        for i, lane in enumerate(self.lane):
            self.on_lane[lane] |= 1 << i
        self.least_tail = [
            min((self.tail[i] for i in range(len(self.names)) if self.lane[i] == lane), default=0.0)
            for lane in range(len(self.lanes))
        ]
        self.all = (1 << len(self.names)) - 1

    def root(self) -> _State:
        lanes = range(len(self.lanes))
        left = tuple(sum(s for s, at in zip(self.seconds, self.lane) if at == lane) for lane in lanes)
        release = {i: 0.0 for i, needs in enumerate(self.needs) if needs == 0}
        return _State(0, tuple(release), (0.0,) * len(self.lanes), left, release, 0.0, 0.0, -1, None)

    def branches(self, state: _State) -> list[int]:
        """Giffler and Thompson: of the resource whose earliest possible end is first, the tasks that can start before it.

        Every active schedule (no task can start earlier without delaying another) is reached by such choices, and
        some optimal schedule is active.
        """
        first_end, chosen = float("inf"), -1
        starts: dict[int, float] = {}
        for i in state.ready:
            starts[i] = start = max(state.release.get(i, 0.0), state.free[self.lane[i]])
            if start + self.seconds[i] < first_end:
                first_end, chosen = start + self.seconds[i], i
        lane = self.lane[chosen]
        return [i for i, start in starts.items() if self.lane[i] == lane and (start < first_end or i == chosen)]

    def append(self, state: _State, i: int) -> _State:
        lane, seconds = self.lane[i], self.seconds[i]
        end = max(state.release.get(i, 0.0), state.free[lane]) + seconds
        free = (*state.free[:lane], end, *state.free[lane + 1 :])
        left = (*state.left_s[:lane], state.left_s[lane] - seconds, *state.left_s[lane + 1 :])
        release = state.release.copy()
        release.pop(i, None)
        mask = state.mask | 1 << i
        ready = [j for j in state.ready if j != i]
        for j in self.after[i]:
            first = (self.equals_before[j] & ~mask).bit_count()
            if end > free[self.lane[j]] + first * self.seconds[j] and end > release.get(j, 0.0):
                release[j] = end
            if not self.needs[j] & ~mask:
                ready.append(j)
        bound = end + self.tail[i]
        for at, start in enumerate(free):
            if self.on_lane[at] & ~mask:
                bound = max(bound, start + left[at] + self.least_tail[at])
        for j in ready:
            bound = max(bound, max(release.get(j, 0.0), free[self.lane[j]]) + self.seconds[j] + self.tail[j])
        latest, bound = max(end, state.end_s), max(bound, state.bound_s)
        return _State(mask, tuple(ready), free, left, release, latest, bound, i, state)

    def strong_bound(self, state: _State) -> float:
        """On each resource alone: earliest starts and tails of what is left, preemption allowed (Jackson).

        Only the next WINDOW tasks are looked at one by one (a graph lists dependencies first); what a lane has left
        beyond them counts as one task that could start at once and has the lane's shortest tail.
        """
        starts: dict[int, float] = {}
        jobs: list[list[tuple[float, float, float]]] = [[] for _ in self.lanes]  # (start, -tail, seconds)
        left = list(state.left_s)
        rest = self.all & ~state.mask
        for _ in range(WINDOW):
            if not rest:
                break
            low = rest & -rest
            rest ^= low
            i = low.bit_length() - 1
            lane, seconds = self.lane[i], self.seconds[i]
            start = max(state.release.get(i, 0.0), state.free[lane])
            for j in self.before[i]:
                if j in starts and starts[j] + self.seconds[j] > start:
                    start = starts[j] + self.seconds[j]
            starts[i] = start
            left[lane] -= seconds
            jobs[lane].append((start, -self.tail[i], seconds))
        for lane, seconds in enumerate(left):
            if rest & self.on_lane[lane]:
                jobs[lane].append((state.free[lane], -self.least_tail[lane], max(0.0, seconds)))
        return max((_preemptive_s(sorted(lane)) for lane in jobs), default=0.0)

    def times(self, state: _State) -> tuple[float, ...]:
        """What the future depends on besides the mask and the releases: no entry later, no later end."""
        free = (start if on_lane & ~state.mask else 0.0 for start, on_lane in zip(state.free, self.on_lane))
        return (state.end_s, *free)

    def nowhere_later(self, a: _State, b: _State) -> bool:
        """Whether each release of `a` comes no later than that of `b`, or than the end of what its lane does in `b`."""
        free, others = b.free, b.release
        return all(t <= free[self.lane[i]] or t <= others.get(i, 0.0) for i, t in a.release.items())

    def schedule(self, state: _State) -> Schedule:
        lanes: dict[str, list[str]] = {name: [] for name in self.lanes}
        step: _State | None = state
        while step is not None and step.task >= 0:
            lanes[self.lanes[self.lane[step.task]]].append(self.names[step.task])
            step = step.before
        ordered = tuple((name, tuple(reversed(tasks))) for name, tasks in lanes.items())
        return Schedule(self.graph.phase, self.graph.degree, ordered)


def _preemptive_s(jobs: list[tuple[float, float, float]]) -> float:
    """The longest end plus tail on one resource that always runs the started job (start, -tail, seconds) of longest tail."""
    bound, now, k = 0.0, 0.0, 0
    running: list[list[float]] = []  # heap of [-tail, seconds left]
    while k < len(jobs) or running:
        if not running:
            now = max(now, jobs[k][0])
        while k < len(jobs) and jobs[k][0] <= now:
            heapq.heappush(running, [jobs[k][1], jobs[k][2]])
            k += 1
        first = running[0]
        until = jobs[k][0] if k < len(jobs) else float("inf")
        if now + first[1] <= until:
            now += first[1]
            heapq.heappop(running)
            bound = max(bound, now - first[0])
        else:
            first[1] -= until - now
            now = until
    return bound


def layered_search(
    graph: TaskGraph, below_s: float, width: int | None, strong: bool, max_states: int = 1 << 62
) -> Found:
    """The best schedule shorter than below_s. Layer k holds the partial schedules of k tasks.

    A partial schedule is dropped when its lower bound is not below the limit, or when another one of the same tasks is
    nowhere later (dominance). Neither loses an optimum. `width` keeps only that many, most promising first; if it ever
    cuts, nothing is proved. width None is exact; it gives up unproved after max_states. strong: tighter, dearer bounds.
    """
    problem = _Problem(graph)
    limit = below_s * (1 - TIE)
    layer, proved, states = [problem.root()], True, 0
    for _ in graph.tasks:
        groups: dict[int, list[_State]] = defaultdict(list)
        for state in layer:
            for i in problem.branches(state):
                child = problem.append(state, i)
                states += 1
                if child.bound_s < limit:
                    groups[child.mask].append(child)
        layer = [state for group in groups.values() for state in _not_dominated(problem, group)]
        if strong:
            for state in layer:
                state.bound_s = max(state.bound_s, problem.strong_bound(state))
            layer = [state for state in layer if state.bound_s < limit]
        if width is not None and len(layer) > width:
            layer = heapq.nsmallest(width, layer, key=lambda s: (s.bound_s, sum(s.free) + sum(s.left_s)))
            proved = False
        if states > max_states:
            return Found(None, below_s, False, states)
    best = min(layer, key=lambda state: state.end_s, default=None)
    if best is None:
        return Found(None, below_s, proved, states)
    return Found(problem.schedule(best), best.end_s, proved, states)


def _not_dominated(problem: _Problem, states: list[_State]) -> list[_State]:
    """Of partial schedules of the same tasks, those that none of the others is at least as good as."""
    if len(states) == 1:
        return states
    kept: list[tuple[tuple[float, ...], _State]] = []
    for times, state in sorted(((problem.times(s), s) for s in states), key=lambda pair: sum(pair[0])):
        if not any(all(map(le, a, times)) and problem.nowhere_later(other, state) for a, other in kept):
            kept.append((times, state))
    return [state for _, state in kept]
