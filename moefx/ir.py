"""The shared vocabulary: what the stages hand to each other. All frozen, all printable.

Letters: T tokens, D model width, F expert hidden width, E experts, K expert slots per token, R = number of routed rows,
r pipeline degree (chunks).

    find      -> Region      what a block computes: y[t] = sum_k w[t,k] * f(x[t]; theta[ids[t,k]])
    partition -> TaskGraph   the region cut into r chunks of tokens
    schedule  -> Schedule    the tasks in order, each on a lane
    lower     -> Plan        launches, events and buffers
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from moefx.errors import PlanError

# ------------------------------------------------------------------------------------------------ the expert template


@dataclass(frozen=True)
class Ref:
    """An earlier value of the template: the result of instruction `index`."""

    index: int

    def __str__(self) -> str:
        return f"v{self.index}"


@dataclass(frozen=True)
class LeafRef:
    """The expert's own vector or scalar leaf number `index`, broadcast over the expert's rows."""

    index: int

    def __str__(self) -> str:
        return f"leaf{self.index}"


@dataclass(frozen=True)
class Instr:
    """One instruction of a template; its value has shape [R, width] (rows of tokens, features).

    kind "x":       the token rows, [R, D].
    kind "linear":  args = (Ref, LeafRef): rows @ leaf with leaf [I, O] of the row's expert.
    kind "op":      an aten operator on rows: target = its qualified name ("aten.mul.Tensor"); args may hold Ref,
                    LeafRef, numbers, dtypes. Feature dimensions are dim 1 of the [R, width] value.
    kind "columns": args = (Ref, start, stop, step): a strided slice of the features.
    kind "item":    args = (Ref, k): member k of an "op" which returns a tuple.
    """

    kind: Literal["x", "linear", "op", "columns", "item"]
    target: str = ""
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    width: int = 0

    def __str__(self) -> str:
        args = [_show(a) for a in self.args] + [f"{k}={_show(v)}" for k, v in self.kwargs]
        return f"{self.target or self.kind}({', '.join(args)})"


def _show(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_show(v) for v in value) + "]"
    return str(value)


def refs(value: Any) -> list[Ref]:
    """All `Ref`s inside (nested) instruction arguments, in order."""
    if isinstance(value, Ref):
        return [value]
    if isinstance(value, (tuple, list)):
        return [r for v in value for r in refs(v)]
    return []


@dataclass(frozen=True)
class Template:
    """A straight-line program y = f(x; theta_e) on rows; the last instruction is the result."""

    instrs: tuple[Instr, ...]

    def __post_init__(self) -> None:
        for i, instr in enumerate(self.instrs):
            if any(r.index >= i for r in refs((instr.args, tuple(v for _, v in instr.kwargs)))):
                raise PlanError(f"template instruction v{i} = {instr} uses a later value")

    def __str__(self) -> str:
        return "\n".join(f"v{i} = {instr}  # [R, {instr.width}]" for i, instr in enumerate(self.instrs))


@dataclass(frozen=True)
class Leaf:
    """theta[e] of one role, for all experts: expert e's values are the strided view

        parameter(params[e]).flatten()[offsets[e] + i*strides[0] + j*strides[1] ...]   of shape `shape`.

    `params` holds E qualified names (all equal when the experts are stacked in one parameter); `shape` is (I, O) for
    a matrix used as rows @ leaf, (n,) for a vector, () for a scalar. read_as: the dtype that the block casts a matrix to
    before it multiplies (None: the parameter's own).
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    params: tuple[str, ...]
    offsets: tuple[int, ...]
    read_as: torch.dtype | None = None

    @property
    def experts(self) -> int:
        return len(self.params)

    @cached_property
    def stacked(self) -> bool:
        """All experts live in one parameter."""
        return len(set(self.params)) == 1

    @cached_property
    def shared(self) -> bool:
        """Every expert uses the very same values (for example one norm weight for all)."""
        return len(set(zip(self.params, self.offsets))) == 1 and self.experts > 1

    @cached_property
    def expert_stride(self) -> int | None:
        """Distance between experts in a stacked parameter, or None when it is not constant."""
        steps = {b - a for a, b in zip(self.offsets, self.offsets[1:])}
        return steps.pop() if self.stacked and len(steps) == 1 else None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        if self.stacked:
            where = f"{self.params[0]} + {self.offsets[0]} + e*{self.expert_stride}"
        else:
            where = f"{self.params[0]} ... {self.params[-1]}"
        cast = f" as {self.read_as}" if self.read_as is not None else ""
        return f"[{shape}] strides {self.strides} of {where}{cast}"


# ------------------------------------------------------------------------------------------------ the region


@dataclass(frozen=True)
class Region:
    """The routed part of a block:  y[t] = sum_k w[t,k] * f(x[t]; theta[ids[t,k]])   for 0 <= ids[t,k] < E.

    Other ids contribute nothing, or w[t,k] * x[t] when `identity` is set (zero-computation experts).
    weight_position "output": the routing weight multiplies f's result; "input": it multiplies x before f; "none": no weights
    (what the experts of one rank do to the rows that arrive there).
    x [T, D], ids [T, K] integer, w [T, K], y [T, d_out].
    """

    experts: int
    top_k: int
    d_model: int
    d_out: int
    d_expert: int
    template: Template
    leaves: tuple[Leaf, ...]
    weight_position: Literal["output", "input", "none"] = "output"
    identity: bool = False
    routing: str = ""
    layout: str = ""

    def __str__(self) -> str:
        lines = [
            f"region E={self.experts} K={self.top_k} D={self.d_model} F={self.d_expert} d_out={self.d_out} "
            f"weights={self.weight_position}{' identity' if self.identity else ''}",
            f"  routing: {self.routing}",
            f"  layout: {self.layout}",
        ]
        lines += [f"  leaf{i}: {leaf}" for i, leaf in enumerate(self.leaves)]
        lines += ["  " + line for line in str(self.template).splitlines()]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ tasks and schedules


@dataclass(frozen=True)
class Task:
    """One unit of work. `deps` name the tasks that must end before it starts.

    chunk: the chunk of tokens it works on, or `NO_CHUNK` (shared expert, slices of the gradients).
    resource: what it keeps busy, one task at a time: "compute", "memory", a link.
    seconds: how long it takes; None while it has no price (`moefx.costs.price`, `TaskGraph.timed`).
    """

    name: str
    kind: str
    chunk: int
    resource: str
    deps: tuple[str, ...] = ()
    seconds: float | None = None

    def __str__(self) -> str:
        after = f" after {', '.join(self.deps)}" if self.deps else ""
        takes = f" takes {1e3 * self.seconds:.6g} ms" if self.seconds is not None else ""
        return f"{self.name} on {self.resource}{takes}{after}"


NO_CHUNK = -1


@dataclass(frozen=True)
class TaskGraph:
    """The tasks of one phase of a region, cut into `degree` chunks of tokens."""

    phase: Literal["forward", "backward"]
    degree: int
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise PlanError(f"task {task.name} appears twice")
            missing = [d for d in task.deps if d not in seen]
            if missing:
                raise PlanError(f"task {task.name} depends on {missing}, not listed before it")
            if task.seconds is not None and not 0 <= task.seconds < math.inf:
                raise PlanError(f"task {task.name} takes {task.seconds} s; a time is finite and not negative")
            seen.add(task.name)

    @cached_property
    def by_name(self) -> dict[str, Task]:
        return {t.name: t for t in self.tasks}

    def __getitem__(self, name: str) -> Task:
        try:
            return self.by_name[name]
        except KeyError:
            raise PlanError(f"no task {name!r} in this graph of {len(self.tasks)} tasks") from None

    def timed(self, seconds: Callable[[Task], float] | Mapping[str, float]) -> TaskGraph:
        """The same tasks with new times, from a function of the task or a mapping from its name."""
        price = (lambda t: seconds[t.name]) if isinstance(seconds, Mapping) else seconds
        return TaskGraph(self.phase, self.degree, tuple(replace(t, seconds=price(t)) for t in self.tasks))

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Each task's time; PlanError names a task without one."""
        result = {t.name: t.seconds for t in self.tasks if t.seconds is not None}
        if len(result) < len(self.tasks):
            task = next(t for t in self.tasks if t.seconds is None)
            raise PlanError(f"task {task.name} ({task.kind}) has no time: price the graph before asking what it costs")
        return result

    def __str__(self) -> str:
        return f"{self.phase} r={self.degree}\n" + "\n".join(f"  {t}" for t in self.tasks)


@dataclass(frozen=True)
class Schedule:
    """The order of tasks on each lane. Prints as text and parses back: `Schedule.parse(str(s)) == s`."""

    phase: Literal["forward", "backward"]
    degree: int
    lanes: tuple[tuple[str, tuple[str, ...]], ...]

    def lane_of(self, task: str) -> str:
        try:
            return self._lanes_by_task[task]
        except KeyError:
            raise PlanError(f"no lane holds task {task!r} in\n{self}") from None

    @cached_property
    def _lanes_by_task(self) -> dict[str, str]:
        return {task: lane for lane, tasks in self.lanes for task in tasks}

    def __str__(self) -> str:
        lanes = [f"  {lane}: {' '.join(tasks)}" for lane, tasks in self.lanes]
        return "\n".join([f"{self.phase} r={self.degree}", *lanes])

    @staticmethod
    def parse(text: str) -> Schedule:
        """Reads what `str` prints. Raises PlanError that names the line."""
        try:
            head, *rest = text.strip().splitlines()
            phase, degree = head.split(" r=")
            lanes = tuple((line.split(":")[0].strip(), tuple(line.split(":")[1].split())) for line in rest)
            if phase not in ("forward", "backward"):
                raise ValueError(phase)
            return Schedule(phase, int(degree), lanes)  # type: ignore[arg-type]
        except (ValueError, IndexError) as error:
            want = "expected 'forward r=2' and lines 'lane: task ...'"
            raise PlanError(f"not a schedule: {text!r} ({error}); {want}") from None


def issue_order(schedule: Schedule, graph: TaskGraph) -> list[tuple[str, str]]:
    """(lane, task) in an order that keeps every lane's order and every dependency; PlanError prints a deadlock."""
    todo = {lane: deque(tasks) for lane, tasks in schedule.lanes}
    done: set[str] = set()
    order: list[tuple[str, str]] = []
    while any(todo.values()):
        heads = ((lane, tasks[0]) for lane, tasks in todo.items() if tasks)
        ready = next((head for head in heads if done.issuperset(graph[head[1]].deps)), None)
        if ready is None:
            raise PlanError(deadlock_text(graph, todo, done))
        todo[ready[0]].popleft()
        done.add(ready[1])
        order.append(ready)
    return order


def deadlock_text(graph: TaskGraph, todo: Mapping[str, Iterable[str]], done: set[str]) -> str:
    """What each lane's next task waits for, when none of them can start."""
    heads = [(lane, next(iter(tasks))) for lane, tasks in todo.items() if tasks]
    missing = {task: ", ".join(d for d in graph[task].deps if d not in done) for _, task in heads}
    return "\n".join(["the schedule deadlocks", *(f"  {lane}: {t} waits for {missing[t]}" for lane, t in heads)])


# ------------------------------------------------------------------------------------------------ plans


@dataclass(frozen=True)
class Launch:
    """One call of an op on a lane: `outs = op(*args)`. String arguments are expressions on value names.

    waits: events awaited before it; uses: values of other lanes which its lane holds from here on; records: the event
    recorded after it; frees: values that nothing needs after it; guard: a flag, without which the launch is left out
    and its outs are None.
    """

    task: str
    lane: str
    op: str
    outs: tuple[str, ...]
    args: tuple[Any, ...]
    waits: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    records: str = ""
    frees: tuple[str, ...] = ()
    guard: str = ""

    def __str__(self) -> str:
        records = (self.records,) if self.records else ()
        lists = {"wait": self.waits, "use": self.uses, "record": records, "free": self.frees}
        notes = [f"{what}[{', '.join(names)}]" for what, names in lists.items() if names]
        notes += [f"if {self.guard}"] if self.guard else []
        outs = f"{', '.join(self.outs)} = " if self.outs else ""
        return " ".join([f"{self.lane}: {outs}{self.op}({', '.join(map(_show, self.args))})", *notes])


@dataclass(frozen=True)
class Plan:
    """What runs: launches in issue order, each on a lane, with the events between lanes."""

    phase: Literal["forward", "backward"]
    degree: int
    lanes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    saved: tuple[str, ...]
    launches: tuple[Launch, ...]
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = f"plan {self.phase} r={self.degree} lanes={','.join(self.lanes)}"
        launches = [f"  {x}" for x in self.launches]
        return "\n".join([head, f"  in: {', '.join(self.inputs)}", *launches, f"  out: {', '.join(self.outputs)}"])


def chunk_bounds(tokens: int, degree: int) -> list[tuple[int, int]]:
    """Splits `tokens` rows into `degree` contiguous chunks whose sizes differ by at most one (the first are larger).

    >>> chunk_bounds(7, 3)
    [(0, 3), (3, 5), (5, 7)]
    """
    edges = [0]
    for c in range(degree):  # no comparison: a symbolic number of tokens has no branches
        edges.append(edges[-1] + (tokens + degree - 1 - c) // degree)
    return list(zip(edges, edges[1:]))


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
