"""schedule: tasks get an order and a lane. A policy is a function TaskGraph -> Schedule in `POLICIES`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from moefx.errors import PlanError
from moefx.ir import Schedule, Task, TaskGraph, issue_order

# Lane "compute" is the caller's own stream; a lane is named after the resource that its tasks keep busy.
COMPUTE, MEMORY = "compute", "memory"


def serial(graph: TaskGraph) -> Schedule:
    """All tasks on one lane in program order."""
    return Schedule(graph.phase, graph.degree, ((COMPUTE, tuple(t.name for t in graph.tasks)),))


def fifo(graph: TaskGraph) -> Schedule:
    """One lane per resource; each serves the chunks in order, first everything that feeds the experts, then the rest.

    While the experts of chunk c compute, the memory lane gathers chunk c+1. One chunk has nothing to overlap: `serial`.
    """
    if graph.degree == 1:
        return serial(graph)
    feeding = ("route", "dispatch", "d_combine")

    def lane(resource: str) -> tuple[str, ...]:
        tasks: list[Task] = [t for t in graph.tasks if t.resource == resource]
        tasks.sort(key=lambda t: t.kind not in feeding)
        return tuple(t.name for t in tasks)

    return Schedule(graph.phase, graph.degree, tuple((name, lane(name)) for name in (COMPUTE, MEMORY)))


POLICIES: dict[str, Callable[[TaskGraph], Schedule]] = {"serial": serial, "fifo": fifo}


def schedule(graph: TaskGraph, policy: str = "fifo") -> Schedule:
    """Orders the tasks of `graph` by the named policy and checks the result."""
    if policy not in POLICIES:
        raise PlanError(f"no schedule policy {policy!r}; known: {', '.join(POLICIES)}")
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
