"""Every non-preemptive order of a small task graph: the yardstick of the policies. Independent of passes/.

Why this is complete. The makespan never falls when a task starts later, so some optimal schedule is semi-active: every
task starts as soon as the one before it on its resource and its dependencies have ended. `optimum` names the tasks one
by one, in every order in which dependencies come first, and starts each at

    the latest of: its resource's last end, its dependencies' ends, the start of the task named before it.

The tasks of a semi-active schedule, named by their starts, are given just these starts; so every semi-active schedule is
among those tried, and all that are tried are valid. Partial schedules of the same tasks are merged when one is nowhere
later in anything that the rest can feel (last start, ends of resources with work left, ends that a task still waits
for): naming the same rest then gives starts that are nowhere later, task by task, because each is a maximum of such
times. No bound, no heuristic, no assumption that chunks are equal unless asked for.

`literal_optimum` merges nothing: it simulates every order of every lane. It checks `optimum`, for two chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import le

from moefx.errors import PlanError
from moefx.ir import Schedule, TaskGraph
from moefx.simulate import simulate

Ends = tuple[float, ...]


def optimum(graph: TaskGraph, equal_chunks: bool = False) -> float:
    """The shortest makespan of all orders, in seconds.

    equal_chunks: of each kind, chunk c comes before chunk c+1. For chunks of equal times this loses nothing: give the
    i-th start of a kind to chunk i; "each start after its own partner's end" still holds when both lists are sorted.
    """
    names = [t.name for t in graph.tasks]
    number = {name: i for i, name in enumerate(names)}
    resources = sorted({t.resource for t in graph.tasks})
    lane = [resources.index(t.resource) for t in graph.tasks]
    seconds = [graph.seconds[name] for name in names]
    deps = [[number[d] for d in t.deps] for t in graph.tasks]
    if equal_chunks:
        place = {(t.kind, t.chunk): i for i, t in enumerate(graph.tasks)}
        for i, task in enumerate(graph.tasks):
            if task.chunk > 0:
                deps[i] = sorted({*deps[i], place[task.kind, task.chunk - 1]})
    users: list[list[int]] = [[] for _ in names]
    for i, before in enumerate(deps):
        for d in before:
            users[d].append(i)
    needs = [sum(1 << d for d in before) for before in deps]
    on_lane = [sum(1 << i for i, at in enumerate(lane) if at == k) for k in range(len(resources))]
    used_by = [sum(1 << u for u in after) for after in users]
    # a partial schedule: (last start, makespan, each resource's end ..., each task's end ...), 0 where it is not felt
    layer: dict[int, list[Ends]] = {0: [(0.0,) * (2 + len(resources) + len(names))]}
    first_lane, first_task = 2, 2 + len(resources)
    for _ in names:
        following: dict[int, list[Ends]] = {}
        for mask, partials in layer.items():
            for i in range(len(names)):
                if mask >> i & 1 or needs[i] & ~mask:
                    continue
                done = mask | 1 << i
                felt = [k for k in range(len(resources)) if on_lane[k] & ~done]
                waited = [t for t in range(len(names)) if done >> t & 1 and used_by[t] & ~done]
                for old in partials:
                    start = max([old[0], old[first_lane + lane[i]], *(old[first_task + d] for d in deps[i])])
                    end = start + seconds[i]
                    new = [0.0] * len(old)
                    new[0], new[1] = start, max(old[1], end)
                    for k in felt:
                        new[first_lane + k] = max(start, end if k == lane[i] else old[first_lane + k])
                    for t in waited:
                        new[first_task + t] = max(start, end if t == i else old[first_task + t])
                    _keep(following.setdefault(done, []), tuple(new))
        layer = following
    (partials,) = layer.values()
    return min(partial[1] for partial in partials)


def _keep(partials: list[Ends], new: Ends) -> None:
    """Add `new` unless one is nowhere later; drop those that are nowhere earlier."""
    for old in partials:
        if all(map(le, old, new)):
            return
    partials[:] = [old for old in partials if not all(map(le, new, old))]
    partials.append(new)


def literal_optimum(graph: TaskGraph) -> float:
    """The same by simulating every combination of every lane's orders, those that deadlock left out."""
    resources = list(dict.fromkeys(t.resource for t in graph.tasks))

    def orders(left: frozenset[str]) -> Iterator[tuple[str, ...]]:
        if not left:
            yield ()
        for name in sorted(left):
            if not any(_reaches(graph, other, name) for other in left - {name}):
                yield from ((name, *rest) for rest in orders(left - {name}))

    def combinations(todo: list[str]) -> Iterator[tuple[tuple[str, tuple[str, ...]], ...]]:
        if not todo:
            yield ()
            return
        first, *rest = todo
        for order in orders(frozenset(t.name for t in graph.tasks if t.resource == first)):
            for others in combinations(rest):
                yield ((first, order), *others)

    best = float("inf")
    for lanes in combinations(resources):
        try:
            best = min(best, simulate(graph, Schedule(graph.phase, graph.degree, lanes)).makespan_s)
        except PlanError:
            continue  # a deadlock between lanes
    return best


def _reaches(graph: TaskGraph, start: str, end: str) -> bool:
    """Whether `end` depends on `start`, at any distance."""
    return any(dep == start or _reaches(graph, start, dep) for dep in graph[end].deps)
