"""emit: two plans become one readable Python file: activation functions, `forward`, `backward`.

The file is plain torch plus a runtime `rt` (moefx.runtime.Runtime) that holds the ops, the lanes and the events.
An activation function is what the segment means; the runtime may have a kernel that does the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch

from moefx.errors import PlanError
from moefx.ir import Instr, Launch, LeafRef, Plan, Ref, Region, Template
from moefx.segments import Segment
from moefx.segments import steps as steps_of

OUTSIDE = ("prologue", "join", "beside")  # tasks of no lane
_LITERALS = (int, bool, type(None), torch.dtype, torch.memory_format, torch.layout)


def emit(region: Region, forward: Plan, backward: Plan, name: str) -> str:
    """The source of `forward(rt, x, ids, w, leaves)` and `backward(rt, saved, gy, leaves, leaf_grads, need_x)`."""
    if len(forward.saved) != backward.inputs.index("gy"):
        raise PlanError(f"{name}: forward saves {len(forward.saved)} values, backward reads {backward.inputs.index('gy')}")
    used = {x.op.partition(".")[0] for plan in (forward, backward) for x in plan.launches}
    segments = [step for step in steps_of(region.template) if isinstance(step, Segment) and step.name in used]
    parts = [
        _header(region, forward, backward, name),
        *(_segment(region.template, s) for s in segments),
        _forward(region, forward),
        _backward(region, backward),
    ]
    return "\n\n\n".join("\n".join(part) for part in parts) + "\n"


# ------------------------------------------------------------------------------------------------ header


def _header(region: Region, forward: Plan, backward: Plan, name: str) -> list[str]:
    # The head says what is computed, not whose parameters: equal layers have equal files.
    about = [f"{name}: written by moefx from a plan; reading and running it is encouraged.", "", *_about(region)]
    about += ["", *_lanes(forward), *_lanes(backward)]
    return [*(f"# {line}".rstrip() for line in about), "", "import torch", "", "aten = torch.ops.aten"]


def _about(region: Region) -> list[str]:
    weight = "w[t,k] * f(x[t])" if region.weight_position == "output" else "f(w[t,k] * x[t])"
    outside = "w[t,k] * x[t]" if region.identity else "nothing"
    lines = [
        f"y[t] = sum over k of {weight} with the parameters of expert ids[t,k]; ids outside [0, E) add {outside}",
        f"E={region.experts} K={region.top_k} D={region.d_model} F={region.d_expert} out={region.d_out}",
    ]
    for i, leaf in enumerate(region.leaves):
        shape = ", ".join(map(str, (1 if leaf.shared else leaf.experts, *(leaf.shape or (1,)))))
        lines.append(f"leaf{i} [{shape}]")
    return lines + str(region.template).splitlines()


def _lanes(plan: Plan) -> Iterator[str]:
    """The schedule, read back from the plan."""
    yield f"{plan.phase} r={plan.degree}"
    for lane in plan.lanes:
        tasks = dict.fromkeys(x.task for x in plan.launches if x.lane == lane and x.task not in OUTSIDE)
        yield f"  {lane}: {' '.join(tasks)}"


# ------------------------------------------------------------------------------------------------ activations


def _segment(template: Template, segment: Segment) -> list[str]:
    params = [f"v{i}" for i in segment.inputs] + [f"rows{i}" for i in segment.leaves]
    results = ", ".join(f"v{i}" for i in segment.outputs)
    lines = [f"def {segment.name}({', '.join(params)}):"]
    together = [members for members in _divisions(template, segment) if len(members) > 1]
    for i in segment.body:
        instr = template.instrs[i]
        division = next((members for members in together if i in members), [i])
        if i == min(division):
            value = _division(template, division) if len(division) > 1 else _expression(instr, _model_dtype(segment))
            lines.append(f"    {', '.join(f'v{j}' for j in division)} = {value}  # [R, {instr.width}]")
    return [*lines, f"    return {results}"]


def _divisions(template: Template, segment: Segment) -> list[list[int]]:
    """Column instructions which together make up all columns of one value, grouped and in order of their columns.

    Taken one by one, each would pull its gradient back into a whole tensor of zeros; together they need one copy.
    """
    by_source: dict[Ref, list[int]] = {}
    for i in segment.body:
        if template.instrs[i].kind == "columns":
            by_source.setdefault(template.instrs[i].args[0], []).append(i)
    result = []
    for source, members in by_source.items():
        members.sort(key=lambda i: template.instrs[i].args[1])
        taken = [c for i in members for c in range(*template.instrs[i].args[1:])]
        width = template.instrs[source.index].width
        steps = {template.instrs[i].args[3] for i in members}
        side_by_side = steps == {1} and taken == list(range(width))
        in_turn = steps == {len(members)} and sorted(taken) == list(range(width))
        if side_by_side or in_turn:
            result.append(members)
    return result


def _division(template: Template, members: list[int]) -> str:
    """All columns of a value at once: side by side, or in turn."""
    first = template.instrs[members[0]]
    source, _, _, step = first.args
    if step == 1:
        return f"{source}.split([{', '.join(str(template.instrs[i].width) for i in members)}], 1)"
    return f"{source}.unflatten(1, ({first.width}, {step})).unbind(2)"


def _model_dtype(segment: Segment) -> str:
    """The expression for the dtype that the template calls "model": that of the rows which come in."""
    return f"v{segment.inputs[0]}.dtype" if segment.inputs else f"rows{segment.leaves[0]}.dtype"


def _expression(instr: Instr, model_dtype: str) -> str:
    if instr.kind == "columns":
        rows, start, stop, step = instr.args
        return f"{rows}[:, {start}:{stop}]" if step == 1 else f"{rows}[:, {start}:{stop}:{step}]"
    if instr.kind == "item":
        rows, k = instr.args
        return f"{rows}[{k}]"
    args = [_argument(a, model_dtype) for a in instr.args]
    args += [f"{key}={_argument(a, model_dtype)}" for key, a in instr.kwargs]
    target = instr.target if instr.target.startswith("aten.") else f"torch.ops.{instr.target}"
    return f"{target}({', '.join(args)})"


def _argument(value: Any, model_dtype: str) -> str:
    """An instruction argument as Python source; PlanError for what has no meaning on rows."""
    if isinstance(value, Ref):
        return f"v{value.index}"
    if isinstance(value, LeafRef):
        return f"rows{value.index}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_argument(v, model_dtype) for v in value) + "]"
    if isinstance(value, str):
        return model_dtype if value == "model" else repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, _LITERALS):
        return str(value)
    raise PlanError(f"cannot write {value!r} of type {type(value).__name__} in an activation function")


# ------------------------------------------------------------------------------------------------ forward, backward


def _forward(region: Region, plan: Plan) -> list[str]:
    return [
        "def forward(rt, x, ids, w, leaves):",
        f"    {_unpack('leaf', region)} = leaves",
        *_body(plan),
        f"    saved = ({', '.join(plan.saved)})",
        "    return y, saved",
    ]


def _backward(region: Region, plan: Plan) -> list[str]:
    saved = plan.inputs[: plan.inputs.index("gy")]
    return [
        "def backward(rt, saved, gy, leaves, leaf_grads, need_x=True):",
        f"    {', '.join(saved)} = saved",
        f"    {_unpack('leaf', region)} = leaves",
        f"    {_unpack('dleaf', region)} = leaf_grads",
        *_body(plan),
        "    return gx, gw",
    ]


def _unpack(name: str, region: Region) -> str:
    names = ", ".join(f"{name}{i}" for i in range(len(region.leaves)))
    return f"({names},)" if len(region.leaves) == 1 else names or "()"


def _body(plan: Plan) -> Iterator[str]:
    if any(x.op == "slice" for x in plan.launches):
        tokens = "x" if plan.phase == "forward" else "gy"
        chunks = ", ".join(f"tokens_{c}" for c in range(plan.degree))
        yield f"    {chunks} = rt.chunks({tokens}.shape[0], {plan.degree})"
    for task, launches in groupby(plan.launches, key=lambda x: x.task):
        yield ""
        if len(plan.lanes) == 1 or task in OUTSIDE:
            yield f"    # {task}"
            yield from (f"    {line}" for line in _task(launches))
        else:
            group = list(launches)
            yield f'    with rt.lane("{group[0].lane}"):  # {task}'
            yield from (f"        {line}" for line in _task(group))
    yield ""


def _task(launches: Iterable[Launch]) -> Iterator[str]:
    for x in launches:
        if x.op == "join":
            yield f"rt.join({', '.join(x.uses)})"
            continue
        if x.op == "yield":
            yield "yield  # here runs what the block computes beside its experts"
            continue
        yield from (f'rt.wait("{event}")' for event in x.waits)
        if x.uses:
            yield f"rt.hold({', '.join(x.uses)})"
        yield _call(x)
        if x.frees:
            yield f"del {', '.join(x.frees)}"
        if x.records:
            yield f'rt.record("{x.records}")'


def _call(x: Launch) -> str:
    args = [_value(a) for a in x.args]
    function, _, form = x.op.partition(".")
    if x.op == "slice":
        tensor, chunk = x.args
        call = f"{tensor}[tokens_{chunk}]"
    elif x.op == "cat":
        call = f"torch.cat([{', '.join(args)}])"
    elif x.op == "add":
        call = " + ".join(args)
    elif function.startswith("act_"):
        call = f"rt.{_ACT_FORMS[form]}({', '.join([function, *args])})"
    else:
        call = f"rt.{x.op}({', '.join(args)})"
    if x.guard:
        absent = ", ".join(["None"] * len(x.outs))
        call += f" if {x.guard} else " + (absent if len(x.outs) == 1 else f"({absent})")
    return f"{', '.join(x.outs)} = {call}" if x.outs else call


# What the runtime calls the forms of a segment: its value, after linears, its gradient.
_ACT_FORMS = {"": "act", "linear": "linear_act", "vjp": "act_vjp", "weighted_vjp": "act_weighted_vjp"}


def _value(arg: Any) -> str:
    return f"[{', '.join(map(_value, arg))}]" if isinstance(arg, tuple) else str(arg)
