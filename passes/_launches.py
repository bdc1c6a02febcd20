"""Launches from which `lower` and `lower_parallel` build their plans: what experts do to the rows of one chunk, then events,
lifetimes and guards of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moefx.errors import PlanError
from moefx.ir import Launch, LeafRef, Plan, Ref, Region, Schedule, TaskGraph, Template
from moefx.segments import Linear, Segment, leaf_refs, operands, steps, x_value

# The lane of the caller's own stream: here a plan begins and ends.
HOME = "compute"
# Tasks of a plan that no schedule has: what comes before all others, and after.
PROLOGUE, EPILOGUE = "prologue", "join"
# Launches that leave an exchange under way.
EXCHANGES = ("to_experts", "to_tokens")

# ------------------------------------------------------------------------------------------------ the experts of a chunk


@dataclass
class Chunk:
    """Builds the launches of one chunk, task by task. `_` as an out is a value that nobody needs.

    renamed: other names for some values, and `tasks` for some kinds of launches, where one plan holds two regions. whole: values
    that all chunks share. bias: see `bias_apart`.
    """

    region: Region
    chunk: int
    degree: int
    one_lane: bool = False
    launches: dict[str, list[Launch]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    bias: int | None = None

    def name(self, base: str) -> str:
        base = self.renamed.get(base, base)
        return base if self.degree == 1 or base in self.whole else f"{base}_{self.chunk}"

    def names(self, bases: Iterable[str]) -> tuple[str, ...]:
        return tuple(self.name(b) for b in bases)

    def launch(self, kind: str, op: str, outs: Iterable[str], args: Iterable[Any]) -> None:
        task = f"{self.tasks.get(kind, kind)}_{self.chunk}"
        outs = tuple("_" if out == "_" else self.name(out) for out in outs)
        self.launches.setdefault(task, []).append(Launch(task, "", op, outs, tuple(args)))

    def slices(self, kind: str, tensors: Iterable[str]) -> None:
        """This chunk's tokens of whole tensors."""
        if self.degree > 1:
            for tensor in (t for t in tensors if t not in self.whole):
                self.launch(kind, "slice", (tensor,), (tensor, self.chunk))

    def gather(self, kind: str) -> None:
        w = self.name("w") if self.region.weight_position == "input" else None
        rows = f"v{x_value(self.region.template)}"
        args = (self.name("x"), self.name("order"), self.region.top_k, self.name("offsets"), w)
        self.launch(kind, "gather_rows", (rows,), args)

    def offsets_of(self, leaf: int) -> str:
        """Where the rows of each member of a leaf end; a shared leaf has one member with all rows."""
        offsets = self.name("offsets")
        return f"{offsets}[::{self.region.experts}].contiguous()" if self.region.leaves[leaf].shared else offsets

    def segment(self, kind: str, step: Segment) -> None:
        args = (*self.reads(step), self.name("offsets"))
        self.launch(kind, step.name, (f"v{i}" for i in step.outputs), args)

    def reads(self, step: Segment) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A segment's inputs and its vector leaves."""
        return self.names(f"v{i}" for i in step.inputs), tuple(f"leaf{i}" for i in step.leaves)


def result_of(region: Region) -> int:
    return len(region.template.instrs) - 1


def needs_h(region: Region) -> bool:
    """The gradient of routing weights on the output is <gy, h>."""
    return region.weight_position == "output"


def gw_of(region: Region) -> str:
    """The base name of the routing weights' gradient, as far as it comes from rows of experts."""
    return "gw_h" if region.identity else "gw"


def consumers(region: Region) -> dict[int, int]:
    """How many steps read each value; the result is read by combine as well."""
    count = dict.fromkeys(range(len(region.template.instrs)), 0)
    count[result_of(region)] = 1
    for step in steps(region.template):
        for value in step.inputs if isinstance(step, Segment) else (step.rows,):
            count[value] += 1
    return count


def feeding_of(region: Region) -> dict[Segment, list[Linear]]:
    """Segments that read linears of the same rows and nothing else, which nothing else reads: one launch runs both."""
    program, readers = steps(region.template), consumers(region)
    linears = {step.value: step for step in program if isinstance(step, Linear)}
    result = {}
    for step in program:
        if isinstance(step, Segment) and step.inputs and all(i in linears and readers[i] == 1 for i in step.inputs):
            feeding = [linears[i] for i in step.inputs]
            if len({linear.rows for linear in feeding}) == 1 and not any(region.leaves[f.leaf].shared for f in feeding):
                result[step] = feeding
    return result


def gathering(region: Region, feeding: dict[Segment, list[Linear]]) -> Segment | None:
    """The segment whose linears alone read the tokens' rows: they gather them on the way, and no permuted copy is made."""
    x, readers = x_value(region.template), consumers(region)
    if region.weight_position == "input":
        return None
    return next((s for s, linears in feeding.items() if linears[0].rows == x and readers[x] == len(linears)), None)


def weighted_segment(region: Region) -> Segment | None:
    """The segment whose one result the last linear reads, and nothing else, where routing weights follow: y = w (a @ W).

    Then w moves before the linear in backward: with g = gy @ W^T per row, the gradient of a is w g, that of w is <a, g>,
    and that of W is (w a)^T @ gy. So the result of the linear is neither saved nor made again, and no weighted copy of
    gy is made.
    """
    program = steps(region.template)
    if not needs_h(region) or len(program) < 2 or not isinstance(program[-1], Linear):
        return None
    a, readers = program[-1].rows, consumers(region)
    if region.leaves[program[-1].leaf].shared or readers[a] != 1 or readers[result_of(region)] != 1:
        return None
    return next((s for s in program if isinstance(s, Segment) and s.outputs == (a,)), None)


def bias_apart(region: Region) -> tuple[Region, int | None]:
    """The region without a vector of each expert that is added to its result, and that vector's leaf; None where there is
    none, or `weighted_segment` does not follow.

    Since y = sum of w (f(x) + b), b may be added where rows are summed: the product writes what combine reads. In backward
    <gy, b> is a part of the gradient of w, and the sum of w gy that of b.
    """
    *before, last = region.template.instrs
    rows, leaf = last.args[:2] if len(last.args) == 2 else (None, None)
    if isinstance(rows, LeafRef):
        rows, leaf = leaf, rows
    if last.target != "aten.add.Tensor" or last.kwargs or not isinstance(rows, Ref) or not isinstance(leaf, LeafRef):
        return region, None
    vector, uses = region.leaves[leaf.index], [r for instr in region.template.instrs for r in leaf_refs(operands(instr))]
    product = rows.index == len(before) - 1 and before[-1].kind == "linear"
    if not product or region.identity or vector.shared or vector.shape != (region.d_out,) or uses.count(leaf) > 1:
        return region, None
    without = replace(region, template=Template(tuple(before)))
    return (without, leaf.index) if weighted_segment(without) else (region, None)


def saved_of_chunk(region: Region) -> list[str]:
    """Base names of what one chunk's forward saves."""
    program = steps(region.template)
    values = {i for step in program if isinstance(step, Segment) for i in step.inputs}
    products = {step.value for step in program if isinstance(step, Linear)}
    values |= {
        step.rows for step in program if isinstance(step, Linear)
    } & products  # a product of a product: no segment remakes it
    needs_result = needs_h(region) and weighted_segment(region) is None
    if needs_result and region.template.instrs[result_of(region)].kind == "linear":
        values.add(result_of(region))
    values.discard(x_value(region.template))
    return ["order", "offsets", "position", *(f"v{i}" for i in sorted(values))]


def experts_forward(chunk: Chunk) -> None:
    """From the tokens' rows to the result of the template."""
    region = chunk.region
    feeding = feeding_of(region)
    on_the_way = gathering(region, feeding) if chunk.one_lane else None  # else dispatch runs beside other experts
    if on_the_way is None:
        chunk.gather("dispatch")
    fused = {linear for linears in feeding.values() for linear in linears}
    for step in steps(region.template):
        if isinstance(step, Segment) and step in feeding:
            linears = feeding[step]
            weights = tuple(f"leaf{linear.leaf}" for linear in linears)
            args: tuple[Any, ...] = (chunk.name(f"v{linears[0].rows}"), weights, chunk.reads(step)[1], chunk.name("offsets"))
            if step == on_the_way:
                args = (chunk.name("x"), *args[1:], chunk.name("order"), region.top_k)
            chunk.launch("experts", f"{step.name}.linear", (f"v{i}" for i in (*step.inputs, *step.outputs)), args)
        elif isinstance(step, Segment):
            chunk.segment("experts", step)
        elif step not in fused:
            args_l = (chunk.name(f"v{step.rows}"), f"leaf{step.leaf}", chunk.offsets_of(step.leaf))
            chunk.launch("experts", "grouped_linear", (f"v{step.value}",), args_l)


@dataclass
class Gradients:
    """Collects what flows back into each value and each leaf of a chunk."""

    chunk: Chunk
    consumers: dict[int, int]
    parts: dict[int, list[str]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)

    def part(self, value: int) -> str:
        """Base name for the next contribution to the gradient of `value`."""
        have = self.parts.setdefault(value, [])
        have.append(f"g{value}" if self.consumers[value] == 1 else f"g{value}{'abcdefghijklmnopqrstuvwxyz'[len(have)]}")
        return have[-1]

    def total(self, value: int) -> str:
        """The name of the summed gradient of `value`."""
        parts = self.parts[value]
        if len(parts) > 1:
            self.chunk.launch("d_experts", "add", (f"g{value}",), self.chunk.names(parts))
        return self.chunk.name(f"g{value}")

    def is_first(self, leaf: int) -> bool:
        """Whether nothing has been put into the leaf's gradient: the first share is written, later ones are added."""
        first = self.chunk.chunk == 0 and leaf not in self.written
        self.written.add(leaf)
        return first

    def into_matrix(self, step: Linear, g: str) -> None:
        op = "grouped_wgrad" if self.is_first(step.leaf) else "grouped_wgrad_add"
        args = (self.chunk.name(f"v{step.rows}"), g, self.chunk.offsets_of(step.leaf), f"dleaf{step.leaf}")
        self.chunk.launch("w_experts", op, (), args)

    def into_vector(self, leaf: int) -> None:
        op = "write" if self.is_first(leaf) else "add_into"
        self.chunk.launch("w_experts", op, (), (f"dleaf{leaf}", self.chunk.name(f"s{leaf}")))


def experts_backward(chunk: Chunk, gradients: Gradients) -> None:
    """From the gradient of the result to those of the tokens' rows and of the leaves; and to that of the routing weights
    where `weighted_segment` moves them to a segment."""
    region, program, weighted = chunk.region, steps(chunk.region.template), weighted_segment(chunk.region)
    remade = {f"v{step.rows}" for step in program if isinstance(step, Linear)}.difference(saved_of_chunk(region))
    for step in reversed(program):
        if isinstance(step, Linear):
            g = gradients.total(step.value)
            args_l = (g, f"leaf{step.leaf}.transpose(1, 2)", chunk.offsets_of(step.leaf))
            chunk.launch("d_experts", "grouped_linear", (gradients.part(step.rows),), args_l)
            gradients.into_matrix(step, g)
            continue
        gs = tuple(gradients.total(value) for value in step.outputs)
        again = [f"v{i}" if f"v{i}" in remade else "_" for i in step.outputs]
        outs = [*again, *(gradients.part(i) for i in step.inputs), *(f"s{i}" for i in step.leaves)]
        args = (*chunk.reads(step), chunk.name("offsets"), gs)
        if step == weighted:
            outs.append(gw_of(region))
            beside = None if chunk.bias is None else chunk.name("gw_bias")
            alone = all(gradients.consumers[i] == 1 for i in step.inputs)  # nobody else reads what it may write over
            more = (beside, False) if not alone else () if beside is None else (beside,)
            chunk.launch("d_experts", f"{step.name}.weighted_vjp", outs, (*args, *chunk.names(("order", "w")), *more))
        else:
            chunk.launch("d_experts", f"{step.name}.vjp", outs, args)
        for leaf in step.leaves:
            gradients.into_vector(leaf)
    x_rows = x_value(region.template)
    parts = gradients.parts[x_rows]
    if len(parts) > 1:
        chunk.launch("d_dispatch", "add", (f"g{x_rows}",), chunk.names(parts))


# ------------------------------------------------------------------------------------------------ the whole plan


def values_of(launch: Launch) -> list[str]:
    """Names of the values that a launch reads."""

    def expressions(arg: Any) -> list[str]:
        if isinstance(arg, tuple):
            return [e for a in arg for e in expressions(a)]
        return [arg] if isinstance(arg, str) else []

    return [re.match(r"\w+", e).group() for e in expressions(launch.args)]  # type: ignore[union-attr]


def with_events(launches: list[Launch], graph: TaskGraph, schedule: Schedule) -> list[Launch]:
    """A task waits for its dependencies on other lanes before its first launch; those are recorded after their last."""
    lane = {task: name for name, tasks in schedule.lanes for task in tasks}
    waits = {t.name: tuple(d for d in t.deps if lane[d] != lane[t.name]) for t in graph.tasks}
    awaited = {d for deps in waits.values() for d in deps}
    first = {x.task: n for n, x in reversed(list(enumerate(launches)))}
    last = {x.task: n for n, x in enumerate(launches)}
    return [
        replace(
            x,
            waits=waits[x.task] if n == first[x.task] else (),
            records=x.task if n == last[x.task] and x.task in awaited else "",
        )
        for n, x in enumerate(launches)
    ]


def with_uses(launches: list[Launch], keep: set[str]) -> list[Launch]:
    """Names, at each task's first launch, the values of other lanes that its lane holds from there on.

    An allocator that reuses memory stream by stream has to know. What outlives the plan is held by the lane HOME.
    """
    made = {out: x.lane for x in launches if x.op != "slice" for out in x.outs}
    held: set[tuple[str, str]] = set()
    result = list(launches)
    for n, first in enumerate(launches):
        if n and launches[n - 1].task == first.task:
            continue
        task = [x for x in launches if x.task == first.task]
        needs = [v for x in task for v in values_of(x)] + (sorted(keep) if first.task == "join" else [])
        foreign = [v for v in dict.fromkeys(needs) if made.get(v, first.lane) != first.lane]
        other = [v for v in foreign if (v, first.lane) not in held]
        held.update((v, first.lane) for v in other)
        result[n] = replace(first, uses=tuple(other))
    return result


def with_frees(launches: list[Launch], keep: set[str], row_sized: str = r"[vgs]\d") -> list[Launch]:
    """Frees every row-sized value, one whose name matches the pattern, after its last use."""
    made = {out for x in launches for out in x.outs if re.match(row_sized, out)}
    last = {value: n for n, x in enumerate(launches) for value in values_of(x) if value in made - keep}
    ends: dict[int, list[str]] = {}
    for value, n in last.items():
        ends.setdefault(n, []).append(value)
    return [replace(x, frees=tuple(ends.get(n, ()))) for n, x in enumerate(launches)]


def guarded(launches: list[Launch]) -> list[Launch]:
    """Marks the launches that only the gradient of x needs with the guard `need_x`."""
    needed = {"gw"}
    result = []
    for x in reversed(launches):
        if x.outs and needed.isdisjoint(x.outs):
            result.append(replace(x, guard="need_x"))
        else:
            needed.update(values_of(x))
            result.append(x)
    return result[::-1]


def check(plan: Plan) -> None:
    """Every value is made before it is read, every event recorded before it is awaited, also where lanes run at once (see
    `check_lanes`); else PlanError."""
    made, recorded = set(plan.inputs), set[str]()
    for x in plan.launches:
        if missing := [v for v in values_of(x) if v not in made]:
            raise PlanError(f"launch {x} reads {', '.join(missing)} before it is made")
        if early := [e for e in x.waits if e not in recorded]:
            raise PlanError(f"launch {x} waits for {', '.join(early)} before it is recorded")
        made.update(x.outs)
        recorded.add(x.records)
    if missing := [v for v in (*plan.outputs, *plan.saved) if v not in made]:
        raise PlanError(f"plan {plan.phase} ends without {', '.join(missing)}")
    check_lanes(plan)


def check_lanes(plan: Plan) -> None:
    """What a run on one lane cannot show: PlanError unless every value that a lane reads was made by the same lane, or lies
    behind an event that it has waited for, directly or not, and is among its `uses`; and the same for what is written in
    place. A lane begins behind all that HOME has done by then, an exchange ends before `arrive` goes on, `join` awaits all.
    """
    seen: dict[str, dict[str, int]] = {HOME: {}}  # lane -> of each lane, up to which launch it has ended for this one
    marks: dict[str, dict[str, int]] = {}  # event, or exchange under way -> the same, where it was recorded or begun
    made: dict[str, tuple[str, int]] = {}
    held: set[tuple[str, str]] = set()

    def reach(lane: str, other: dict[str, int]) -> None:
        for name, n in other.items():
            seen[lane][name] = max(n, seen[lane].get(name, -1))

    for n, x in enumerate(plan.launches):
        if x.lane not in seen:
            seen[x.lane] = dict(seen[HOME])
        awaited = [*x.waits, *(values_of(x) if x.op == "arrive" else ())]
        for mark in (marks[name] for name in awaited):
            reach(x.lane, mark)
        if x.op == "join":
            for other in list(seen.values()):
                reach(HOME, other)
        held.update((value, x.lane) for value in x.uses)
        # of an exchange the device reads the rows alone, and what is under way is no memory of a lane
        reads = values_of(x)[:1] if x.op in EXCHANGES else [] if x.op == "arrive" else values_of(x)
        for value in reads:
            lane, at = made.get(value, (x.lane, n))
            if lane == x.lane:
                continue
            if seen[x.lane].get(lane, -1) < at:
                raise PlanError(f"launch {x} may run before {value}, which lane {lane} makes")
            if (value, x.lane) not in held and value not in plan.inputs:
                raise PlanError(f"launch {x}: nothing holds the memory of {value}, which is lane {lane}'s")
        seen[x.lane][x.lane] = n
        written = [v for v in reads if v.startswith("dleaf")]
        made |= {out: (x.lane, n) for out in (*x.outs, *written) if x.op != "slice"}
        if x.records:
            marks[x.records] = dict(seen[x.lane])
        if x.op in EXCHANGES:
            marks[x.outs[0]] = dict(seen[x.lane])
    for value in (*plan.outputs, *plan.saved):
        if made.get(value, (HOME, 0))[0] != HOME and (value, HOME) not in held:
            raise PlanError(f"plan {plan.phase}: nothing holds the memory of {value}, which outlives the plan")
