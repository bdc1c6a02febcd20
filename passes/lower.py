"""lower: tasks in lanes become launches with events and value lifetimes.

Names in a plan: v{i} is template value i (v of the `x` instruction: the gathered rows), g{i} its gradient,
leaf{i} / dleaf{i} a leaf of all experts [E, ...] and its gradient, s{i} a chunk's share of a vector leaf's gradient.
With several chunks every name of chunk c ends in `_c`.

Ops beside those of moefx.ops: slice, cat, add, join; write and add_into for a leaf's gradient; wgrad_gather, a gather_wgrad
whose other operand is gathered (see `moefx.passes._narrow`); and of a segment act_i

    act_i(inputs, leaves, offsets)            its outputs
    act_i.linear(rows, weights, leaves, offsets)   its inputs, linears of the same rows, then its outputs; with two more
                                              arguments, order and top_k, of tokens whose rows are gathered on the way
    act_i.vjp(inputs, leaves, offsets, gradients)  its outputs again, the gradients of its inputs and of its leaves
    act_i.weighted_vjp(inputs, leaves, offsets, gradients, order, w)  the same for a result that w multiplies row by row:
                                              w times its output, and after all others the gradient of w; one more
                                              argument, [T, K] or None, is added to that; a last one, False: others
                                              read the inputs too

Saved for backward are x, w, the routing and the values which segments read (pre-activations), and the result h where
the routing weights need it (not where `weighted_segment` moves them). Gathered rows and segment results are made again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

from moefx.passes._launches import (
    EPILOGUE,
    HOME,
    Chunk,
    Gradients,
    bias_apart,
    check,
    consumers,
    experts_backward,
    experts_forward,
    guarded,
    gw_of,
    needs_h,
    result_of,
    saved_of_chunk,
    values_of,
    weighted_segment,
    with_events,
    with_frees,
    with_uses,
)
from moefx.passes._narrow import late, without_wide_rows

from moefx.ir import Launch, Plan, Region, Schedule, TaskGraph, issue_order
from moefx.segments import Segment, steps, x_value


def _saved(region: Region, degree: int) -> tuple[str, ...]:
    chunks = [Chunk(region, c, degree) for c in range(degree)]
    return ("x", "w", *(name for chunk in chunks for name in chunk.names(saved_of_chunk(region))))


def _forward(chunk: Chunk) -> None:
    region = chunk.region
    routing = ("order", "offsets", "position")
    chunk.slices("route", ("x", "ids", "w"))
    chunk.launch("route", "route", routing, (chunk.name("ids"), region.experts))
    experts_forward(chunk)
    w = chunk.name("w") if needs_h(region) else None
    made = "routed" if region.identity else "y"
    bias = () if chunk.bias is None else (f"leaf{chunk.bias}", chunk.name("ids"))
    args_h = (chunk.name(f"v{result_of(region)}"), chunk.name("position"), w, "x.dtype", *bias)
    chunk.launch("combine", "combine", (made,), args_h)
    if region.identity:
        chunk.launch("combine", "identity_add", ("y",), chunk.names(("routed", "x", "position", "w")))


def _backward(chunk: Chunk) -> None:
    region, program = chunk.region, steps(chunk.region.template)
    x_rows, result = x_value(region.template), result_of(region)
    gradients = Gradients(chunk, consumers(region))
    chunk.slices("d_combine", ("gy", "x", "w"))
    chunk.gather("d_combine")
    if needs_h(region) and weighted_segment(region) is None:
        if program and isinstance(program[-1], Segment):
            chunk.segment("d_combine", program[-1])
        args_h = chunk.names(("gy", f"v{result}", "order", "position", "offsets", "w"))
        chunk.launch("d_combine", "combine_backward", (gradients.part(result), gw_of(region)), args_h)
    else:
        args_g = (chunk.name("gy"), chunk.name("order"), region.top_k, chunk.name("offsets"), None)
        chunk.launch("d_combine", "gather_rows", (gradients.part(result),), args_g)
    if chunk.bias is not None:
        args_b = (*chunk.names(("gy", "position", "offsets")), f"leaf{chunk.bias}")
        chunk.launch("d_combine", "bias_products", ("gw_bias",), args_b)
        args_s = chunk.names((f"g{result}", "offsets", "order", "w"))
        chunk.launch("w_experts", "expert_sum", (f"s{chunk.bias}",), args_s)
        gradients.into_vector(chunk.bias)

    experts_backward(chunk, gradients)
    gx, gw = "gx_rows" if region.identity else "gx", gw_of(region)
    w = None if needs_h(region) else chunk.name("w")
    args_x = (*chunk.names((f"g{x_rows}", "x", "position", "order", "offsets")), w)
    chunk.launch("d_dispatch", "rows_backward", (gx, "_" if needs_h(region) else gw), args_x)
    if region.identity:
        chunk.launch("d_dispatch", "identity_backward", ("gx_id", "gw_id"), chunk.names(("gy", "x", "position", "w")))
        chunk.launch("d_dispatch", "add", ("gx",), chunk.names(("gx_rows", "gx_id")))
        chunk.launch("d_dispatch", "add", ("gw",), chunk.names(("gw_h", "gw_id")))


# ------------------------------------------------------------------------------------------------ the plan


def lower(region: Region, graph: TaskGraph, schedule: Schedule) -> Plan:
    """The launches of a scheduled task graph, with events between lanes and the lifetime of every value."""
    forward = graph.phase == "forward"
    region, bias = bias_apart(region)
    by_task: dict[str, list[Launch]] = {}
    one_lane = len(schedule.lanes) == 1
    chunks = [Chunk(region, c, graph.degree, one_lane=one_lane, bias=bias) for c in range(graph.degree)]
    for chunk in chunks:
        (_forward if forward else _backward)(chunk)
        by_task.update(chunk.launches)

    lanes = tuple(lane for lane, _ in schedule.lanes)
    launches = [replace(x, lane=lane) for lane, task in issue_order(schedule, graph) for x in by_task.get(task, [])]
    outputs = ("y",) if forward else ("gx", "gw")
    saved = _saved(region, graph.degree) if forward else ()
    if one_lane:  # chunk by chunk
        keep = {*saved, *(chunk.name(out) for chunk in chunks for out in outputs)}
        groups = [list(group) for _, group in groupby(launches, key=lambda x: graph[x.task].chunk)]
        launches = [x for group in groups for x in late(without_wide_rows(group, region, keep), region, keep)]
    launches = with_events(launches, graph, schedule)
    leaves = tuple(f"leaf{i}" for i in range(len(region.leaves)))
    if len(lanes) > 1:
        launches.append(Launch(EPILOGUE, HOME, "join", (), ()))
    if graph.degree > 1:
        parts = [tuple(f"{out}_{c}" for c in range(graph.degree)) for out in outputs]
        launches += [Launch(EPILOGUE, HOME, "cat", (out,), args) for out, args in zip(outputs, parts)]
    if not forward:
        launches = guarded(launches)
    launches = with_uses(launches, keep={*outputs, *saved})
    launches = with_frees(launches, keep={*outputs, *saved})
    inputs = ("x", "ids", "w", *leaves)
    if not forward:
        inputs = (*_saved(region, graph.degree), "gy", *leaves, *(f"d{leaf}" for leaf in leaves))
    plan = Plan(graph.phase, graph.degree, lanes, inputs, outputs, saved, tuple(launches))
    check(plan)
    return plan


__all__ = ["check", "lower", "values_of"]
