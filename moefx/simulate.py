"""What a schedule costs: the one truth. A task graph with times and an order on each lane --> a timeline.

Semantics: a lane runs its tasks one after another in the given order, each as early as it can: as soon as the task before
it on the lane and all its dependencies have ended. Nothing is preempted. All times are in seconds from the start.
Closed forms, policies and what-ifs are all checked against this file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from moefx.errors import PlanError
from moefx.ir import Schedule, Task, TaskGraph, deadlock_text

COMPUTE = "compute"  # the resource that communication can hide behind


@dataclass(frozen=True)
class Span:
    """One task in time: it keeps `lane` busy from start_s to end_s. `waits_for`: the task whose end let it start."""

    task: Task
    lane: str
    start_s: float
    end_s: float
    waits_for: str = ""

    def __str__(self) -> str:
        return f"{self.task.name} on {self.lane}: {1e3 * self.start_s:.6g} ms to {1e3 * self.end_s:.6g} ms"


@dataclass(frozen=True)
class Timeline:
    """When every task of a graph runs; spans in order of their start."""

    graph: TaskGraph
    schedule: Schedule
    spans: tuple[Span, ...]

    @cached_property
    def by_name(self) -> dict[str, Span]:
        return {span.task.name: span for span in self.spans}

    def __getitem__(self, task: str) -> Span:
        return self.by_name[task]

    @cached_property
    def makespan_s(self) -> float:
        """The end of the last task; 0 for no tasks."""
        return max((span.end_s for span in self.spans), default=0.0)

    @cached_property
    def busy_s(self) -> dict[str, float]:
        """Seconds of work of each resource."""
        busy: dict[str, float] = defaultdict(float)
        for span in self.spans:
            busy[span.task.resource] += span.end_s - span.start_s
        return dict(busy)

    @cached_property
    def exposed_s(self) -> dict[str, float]:
        """Of each kind of task off the compute resource: how long some task of it runs while nothing computes.

        On one lane (`serial`) all communication is exposed. Two links exposed at once count for both kinds.
        """
        computing = _union((s.start_s, s.end_s) for s in self.spans if s.task.resource == COMPUTE)
        by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for span in self.spans:
            if span.task.resource != COMPUTE:
                by_kind[span.task.kind].append((span.start_s, span.end_s))
        return {kind: _outside(_union(spans), computing) for kind, spans in by_kind.items()}

    @cached_property
    def critical_path(self) -> tuple[str, ...]:
        """Tasks, first to last, each starting when the one before it ends, the first at zero."""
        if not self.spans:
            return ()
        path = [max(self.spans, key=lambda span: span.end_s)]
        while path[-1].waits_for:
            path.append(self[path[-1].waits_for])
        return tuple(span.task.name for span in reversed(path))

    def check(self) -> None:
        """No task before its dependencies, no two tasks of one lane or resource at once; else PlanError says where.

        What `simulate` returns always passes; a timeline that was measured or edited may not.
        """
        missing = [t.name for t in self.graph.tasks if t.name not in self.by_name]
        if missing or len(self.spans) != len(self.graph.tasks):
            raise PlanError(f"a timeline holds every task once; missing: {', '.join(missing) or 'none'}")
        slack = 1e-9 * self.makespan_s
        for span in self.spans:
            for dep in span.task.deps:
                if self[dep].end_s > span.start_s + slack:
                    raise PlanError(f"{span} starts before {dep}, which it depends on, ends: {self[dep]}")
        for what in ("lane", "resource"):
            last: dict[str, Span] = {}
            for span in sorted(self.spans, key=lambda s: (s.start_s, s.end_s)):
                place = span.lane if what == "lane" else span.task.resource
                before = last.get(place)
                if before is not None and before.end_s > span.start_s + slack:
                    raise PlanError(f"{what} {place} runs two tasks at once: {before}; {span}")
                last[place] = span


def simulate(graph: TaskGraph, schedule: Schedule) -> Timeline:
    """Run `schedule` on paper, in time linear in the number of tasks.

    Every task needs a time (`TaskGraph.timed`). PlanError names the lane and the task for a deadlock, a task that is
    missing, doubled or unknown, and a resource that two lanes share (which of them comes first would be a guess).
    """
    seconds = graph.seconds
    _one_lane_a_resource(graph, schedule)
    todo = {lane: list(reversed(tasks)) for lane, tasks in schedule.lanes}
    spans: dict[str, Span] = {}
    last: dict[str, Span] = {}
    waiting: dict[str, list[str]] = defaultdict(list)  # lanes whose next task waits for this task
    active = [lane for lane, _ in schedule.lanes]
    while active:
        lane = active.pop()
        while todo[lane]:
            task = graph[todo[lane][-1]]
            missing = next((dep for dep in task.deps if dep not in spans), None)
            if missing is not None:
                waiting[missing].append(lane)
                break
            todo[lane].pop()
            before = [spans[dep] for dep in task.deps]
            if lane in last:
                before.append(last[lane])
            latest = max(before, key=lambda span: span.end_s, default=None)
            start, name = (latest.end_s, latest.task.name) if latest else (0.0, "")
            last[lane] = spans[task.name] = Span(task, lane, start, start + seconds[task.name], name)
            active += waiting.pop(task.name, ())
    if any(todo.values()):
        raise PlanError(deadlock_text(graph, {lane: list(reversed(t)) for lane, t in todo.items()}, set(spans)))
    return Timeline(graph, schedule, tuple(sorted(spans.values(), key=lambda span: (span.start_s, span.end_s))))


def _one_lane_a_resource(graph: TaskGraph, schedule: Schedule) -> None:
    lane_of: dict[str, str] = {}
    seen: set[str] = set()
    for lane, tasks in schedule.lanes:
        for name in tasks:
            if name in seen:
                raise PlanError(f"task {name} stands twice in\n{schedule}")
            seen.add(name)
            resource = graph[name].resource
            if lane_of.setdefault(resource, lane) != lane:
                raise PlanError(f"resource {resource} is on two lanes, {lane_of[resource]} and {lane} (task {name})")
    if len({name for name, _ in schedule.lanes}) < len(schedule.lanes):
        raise PlanError(f"two lanes have one name in\n{schedule}")
    if len(seen) < len(graph.tasks):
        lost = [t.name for t in graph.tasks if t.name not in seen]
        raise PlanError(f"no lane holds {', '.join(lost[:5])}{' ...' if len(lost) > 5 else ''} in\n{schedule}")


def lower_bound_s(graph: TaskGraph) -> float:
    """No schedule is faster: on each resource, what must come before its first task, all its work, what must follow.

    At least each resource's work and the longest chain of dependencies.
    """
    head, tail = heads_s(graph), tails_s(graph)
    seconds = graph.seconds
    bound = max((head[t.name] + seconds[t.name] + tail[t.name] for t in graph.tasks), default=0.0)
    by_resource: dict[str, list[str]] = defaultdict(list)
    for task in graph.tasks:
        by_resource[task.resource].append(task.name)
    for names in by_resource.values():
        work = sum(seconds[n] for n in names)
        bound = max(bound, min(head[n] for n in names) + work + min(tail[n] for n in names))
    return bound


def heads_s(graph: TaskGraph) -> dict[str, float]:
    """Of each task the longest chain of dependencies before it."""
    head: dict[str, float] = {}
    for task in graph.tasks:  # dependencies are listed first
        head[task.name] = max((head[d] + graph.seconds[d] for d in task.deps), default=0.0)
    return head


def tails_s(graph: TaskGraph) -> dict[str, float]:
    """Of each task the longest chain of tasks after it."""
    tail = dict.fromkeys(graph.by_name, 0.0)
    for task in reversed(graph.tasks):
        for dep in task.deps:
            tail[dep] = max(tail[dep], tail[task.name] + graph.seconds[task.name])
    return tail


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint intervals, in order, that cover the same times."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _outside(spans: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """The length of `spans` that `others` do not cover; both disjoint and in order."""
    total = sum(end - start for start, end in spans)
    i = j = 0
    while i < len(spans) and j < len(others):
        total -= max(0.0, min(spans[i][1], others[j][1]) - max(spans[i][0], others[j][0]))
        if spans[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return max(0.0, total)
