"""lower_parallel: tasks of a layer whose experts are spread over ranks become launches.

Each rank does this, for its own T tokens and the E_local experts it holds; names of chunk c end in `_c`:

    counts                         how many rows go to and come from every rank, for all chunks of both phases: one exchange
    encode: order offsets position of the tokens' slots, rows = the tokens in the order of experts, so also of ranks
    A1: a1, then arrive: rx        the rows that came for the experts here, ordered by source rank and expert
    E:  rorder roffsets rposition  order of rx by expert; v{i} as in `lower`, for a region of E_local experts and K = 1;
        ry                         their results, in the order of rx
    A2: a2, then arrive: h         the results for the own tokens, in the order of `rows`
    decode: y                      weighted sum over the slots

Backward is the same way for gradients: gr (of h) goes to the experts and arrives as rgy, rgx comes back as gxr; W adds to the
gradients of the weights whenever it has time. C and D encode and decode what is exchanged, where there is a codec. An
exchange begins in its task on the lane of its link, and `arrive` waits for it where its rows are needed, so links need no
events. Before the first of these the plan yields: there the block's own code runs that needs no result of the region, such
as a shared expert (`passes/beside.py`).

Backward may have another degree. Its chunks then pick their rows out of what all chunks of forward saved: `*_all`.

With a capacity (`padded`) every expert has places for C rows from each rank, and a chunk is a part of those places instead of
the tokens: x, ids, w are whole, `queue` says which place a slot has, `pad` puts rows into places before they leave and `unpad`
takes them out when they are back, and the results of the chunks are added.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moefx.passes._launches import (
    EPILOGUE,
    HOME,
    PROLOGUE,
    Chunk,
    Gradients,
    check,
    consumers,
    experts_backward,
    experts_forward,
    guarded,
    needs_h,
    result_of,
    saved_of_chunk,
    with_events,
    with_frees,
    with_uses,
)

from moefx.errors import PlanError
from moefx.ir import Launch, Plan, Region, Schedule, TaskGraph, issue_order
from moefx.segments import x_value

# Values of the rows that arrive, beside those of the tokens.
ARRIVED = {"x": "rx", "order": "rorder", "offsets": "roffsets", "position": "rposition"}
BESIDE = "beside"  # the task of the caller's own code
COUNTS = "counts"  # made, and where they are on a GPU read, by the lane HOME alone
WHOLE = frozenset(("x", "ids", "w", "gy"))
ROW_SIZED = r"[vgs]\d|rows|wire\d|got\d|rx|ry|h(_|$)|gr|rgy|rgx|gxr|a\d|p(rows|gr|h|gxr)(_|$)"


class _Pair:
    """The launches of one chunk: `tokens` are those of the rank's own tokens, `rows` of what arrives for its experts."""

    def __init__(self, region: Region, local: Region, chunk: int, degree: int, codec: bool, padded: bool) -> None:
        launches: dict[str, list[Launch]] = {}
        self.region, self.codec, self.padded = region, codec, padded
        kinds = dict.fromkeys(("dispatch", "experts", "d_combine", "d_experts", "d_dispatch"), "E") | {"w_experts": "W"}
        self.tokens = Chunk(region, chunk, degree, launches=launches, whole=WHOLE if padded else frozenset())
        self.rows = Chunk(local, chunk, degree, one_lane=True, launches=launches, renamed=ARRIVED, tasks=kinds)

    @property
    def launches(self) -> dict[str, list[Launch]]:
        return self.tokens.launches

    def route(self) -> None:
        """The slots of the chunk by expert."""
        op, of_chunk = ("route_places", ("queue", self.tokens.chunk)) if self.padded else ("route", (self.region.experts,))
        self.tokens.launch("encode", op, ("order", "offsets", "position"), (self.tokens.name("ids"), *of_chunk))

    def exchange(self, number: int, value: str, result: str, width: int) -> None:
        """`value` goes to the experts (exchange 1) or back to the tokens (2), and arrives as `result`."""
        chunk, arrived = self.tokens, result
        if self.padded and number == 1:
            chunk.launch("encode", "pad", (f"p{value}",), (*chunk.names((value, "offsets")), chunk.chunk))
            value = f"p{value}"
        elif self.padded:
            arrived = f"p{result}"
        wire = value
        if self.codec:
            wire = f"wire{number}"
            chunk.launch(f"C{number}", "encode", (wire,), (chunk.name(value),))
        op = "to_experts" if number == 1 else "to_tokens"
        chunk.launch(f"A{number}", op, (f"a{number}",), (chunk.name(wire), COUNTS, chunk.chunk))
        if self.codec:
            chunk.launch(f"D{number}", "arrive", (f"got{number}",), (chunk.name(f"a{number}"),))
            args = (chunk.name(f"got{number}"), width, f"{chunk.name(value)}.dtype")
            chunk.launch(f"D{number}", "decode", (arrived,), args)
        else:
            chunk.launch("E" if number == 1 else "decode", "arrive", (arrived,), (chunk.name(f"a{number}"),))
        if arrived != result:
            chunk.launch("decode", "unpad", (result,), (*chunk.names((arrived, "order", "offsets")), chunk.chunk))


def _saved_of_pair(pair: _Pair) -> tuple[str, ...]:
    own = ["order", "offsets", "position", *(["h"] if needs_h(pair.region) else [])]
    return (*pair.tokens.names(own), *pair.rows.names(["x", *saved_of_chunk(pair.rows.region)]))


def _forward(pair: _Pair) -> None:
    region, tokens = pair.region, pair.tokens
    tokens.slices("encode", ("x", "ids", "w"))
    pair.route()
    w = tokens.name("w") if region.weight_position == "input" else None
    args = (tokens.name("x"), tokens.name("order"), region.top_k, tokens.name("offsets"), w)
    tokens.launch("encode", "gather_rows", ("rows",), args)
    pair.exchange(1, "rows", "rx", region.d_model)
    tokens.launch("E", "regroup", ("rorder", "roffsets", "rposition"), (COUNTS, tokens.chunk))
    experts_forward(pair.rows)
    made = tokens.name(f"v{result_of(region)}")
    tokens.launch("E", "combine", ("ry",), (made, tokens.name("rposition"), None, f"{made}.dtype"))
    pair.exchange(2, "ry", "h", region.d_out)
    w = tokens.name("w") if needs_h(region) else None
    out = "routed" if region.identity else "y"
    tokens.launch("decode", "combine", (out,), (*tokens.names(("h", "position")), w, "x.dtype"))
    if region.identity and not pair.padded:
        tokens.launch("decode", "identity_add", ("y",), tokens.names(("routed", "x", "position", "w")))


def _backward(pair: _Pair, picks: bool) -> None:
    """picks: the chunk's rows are picked out of all that forward saved."""
    region, tokens, rows = pair.region, pair.tokens, pair.rows
    x_rows, result = x_value(region.template), result_of(region)
    gradients = Gradients(rows, consumers(rows.region))
    tokens.slices("encode", ("gy", "x", "w", *(["ids"] if picks else [])))
    if picks:
        pair.route()
    args: tuple[Any, ...]
    if needs_h(region):
        if picks:
            args = ("h_all", "position_all", tokens.name("order"), COUNTS, tokens.chunk)
            tokens.launch("encode", "pick_own", ("h",), args)
        gw = "gw_h" if region.identity else "gw"
        args = tokens.names(("gy", "h", "order", "position", "offsets", "w"))
        tokens.launch("encode", "combine_backward", ("gr", gw), args)
    else:
        args = (tokens.name("gy"), tokens.name("order"), region.top_k, tokens.name("offsets"), None)
        tokens.launch("encode", "gather_rows", ("gr",), args)
    pair.exchange(1, "gr", "rgy", region.d_out)

    order, position = ("gorder", "gposition") if picks else ("rorder", "rposition")
    if picks:
        outs = ("gorder", "roffsets", "gposition", "rorder", "rindex")
        tokens.launch("E", "regroup_picked", outs, (COUNTS, "arrived_all", tokens.chunk))
        for name in saved_of_chunk(rows.region):
            if name.startswith("v"):
                tokens.launch("E", "pick", (name,), (f"{name}_all", tokens.name("rindex")))
        args = ("rx_all", *tokens.names(("rorder",)), 1, tokens.name("roffsets"), None)
        tokens.launch("E", "gather_rows", (f"v{x_rows}",), args)
    else:
        rows.gather("d_combine")
    args = (tokens.name("rgy"), tokens.name(order), 1, tokens.name("roffsets"), None)
    tokens.launch("E", "gather_rows", (gradients.part(result),), args)
    experts_backward(rows, gradients)
    g = tokens.name(f"g{x_rows}")
    tokens.launch("E", "combine", ("rgx",), (g, tokens.name(position), None, f"{g}.dtype"))
    pair.exchange(2, "rgx", "gxr", region.d_model)

    gx, gw = ("gx_rows", "gw_h") if region.identity else ("gx", "gw")
    w = tokens.name("w") if region.weight_position == "input" else None
    args = (*tokens.names(("gxr", "x", "position", "order", "offsets")), w)
    tokens.launch("decode", "rows_backward", (gx, "_" if w is None else gw), args)
    if region.identity and not pair.padded:
        args = tokens.names(("gy", "x", "position", "w"))
        tokens.launch("decode", "identity_backward", ("gx_id", "gw_id"), args)
        tokens.launch("decode", "add", ("gx",), tokens.names(("gx_rows", "gx_id")))
        tokens.launch("decode", "add", ("gw",), tokens.names(("gw_h", "gw_id")))


def _prologue(region: Region, local: Region, forward_degree: int, padded: bool) -> list[Launch]:
    """What all chunks of forward saved, each kind in one piece."""
    chunks = [_Pair(region, local, c, forward_degree, False, padded) for c in range(forward_degree)]
    bases = [*(["h"] if needs_h(region) else []), "rx", *(n for n in saved_of_chunk(local) if n.startswith("v"))]
    launches = [
        Launch(PROLOGUE, HOME, "cat", (f"{base}_all",), tuple(f"f_{pair.tokens.name(base)}" for pair in chunks))
        for base in bases
    ]
    arrived = "rposition" if padded else "rorder"
    parts = [tuple(f"f_{pair.tokens.name(base)}" for pair in chunks) for base in ("position", arrived)]
    launches.append(Launch(PROLOGUE, HOME, "rows_of_all", ("position_all",), (COUNTS, parts[0])))
    launches.append(Launch(PROLOGUE, HOME, "arrived_of_all", ("arrived_all",), (COUNTS, parts[1])))
    return [Launch(PROLOGUE, HOME, "queue", ("queue",), ("ids",)), *launches] if padded else launches


def _epilogue(region: Region, phase: str, degree: int, padded: bool) -> list[Launch]:
    """The results of all chunks put together: those of their tokens, or, where they share the tokens, sums."""

    def launch(op: str, outs: tuple[str, ...], args: tuple[Any, ...]) -> Launch:
        return Launch(EPILOGUE, HOME, op, outs, args)

    apart = region.identity and padded
    whole, rest = (("y",), ("routed",)) if phase == "forward" else (("gx", "gw"), ("gx_rows", "gw_h"))
    outputs: tuple[str, ...] = rest if apart else whole
    launches = [launch("join", (), ())]
    if degree > 1:
        parts = [tuple(f"{out}_{c}" for c in range(degree)) for out in outputs]
        launches += [launch("add" if padded else "cat", (out,), args) for out, args in zip(outputs, parts)]
    if apart:
        launches.append(launch("outside", ("outside",), ("ids", region.experts)))
        if phase == "forward":
            launches.append(launch("identity_add", ("y",), ("routed", "x", "outside", "w")))
        else:
            launches.append(launch("identity_backward", ("gx_id", "gw_id"), ("gy", "x", "outside", "w")))
            launches += [launch("add", (g,), parts) for g, parts in (("gx", ("gx_rows", "gx_id")), ("gw", ("gw_h", "gw_id")))]
    return launches


def lower_parallel(
    region: Region,
    local: Region,
    graph: TaskGraph,
    schedule: Schedule,
    forward_degree: int,
    codec: bool = False,
    padded: bool = False,
) -> Plan:
    """The plan of one phase of `region`, whose experts are spread over ranks; graph: of `partition.expert_parallel`.

    local: the region of this rank's experts, with K = 1 and without weights. forward_degree: that of the forward plan, which
    saves what a backward plan reads. codec: what is exchanged is encoded, and the graph has tasks for it. padded: with a capacity.
    """
    known = {"encode", "C1", "A1", "D1", "E", "W", "C2", "A2", "D2", "decode"}
    if strange := [t.name for t in graph.tasks if t.name.rpartition("_")[0] not in known]:
        raise PlanError(f"a plan for ranks has no meaning for the tasks {', '.join(strange)}")
    forward = graph.phase == "forward"
    picks = not forward and graph.degree != forward_degree
    by_task: dict[str, list[Launch]] = {}
    for c in range(graph.degree):
        pair = _Pair(region, local, c, graph.degree, codec, padded)
        if forward:
            _forward(pair)
        else:
            _backward(pair, picks)
        by_task.update(pair.launches)
    if missing := [t for t in by_task if t not in graph.by_name]:
        raise PlanError(f"the task graph lacks {', '.join(missing)}")

    links = {t.name for t in graph.tasks if t.resource != HOME}
    # Exchanges begin as soon as they can; a lane that waits for one comes to that in its own order.
    early = replace(schedule, lanes=tuple(sorted(schedule.lanes, key=lambda lane: lane[0] == HOME)))
    launches = [replace(x, lane=lane) for lane, task in issue_order(early, graph) for x in by_task.get(task, [])]
    launches = [
        replace(x, waits=tuple(e for e in x.waits if e not in links), records="" if x.task in links else x.records)
        for x in with_events(launches, graph, schedule)
    ]
    first = next(n for n, x in enumerate(launches) if x.op == "arrive")
    launches.insert(first, Launch(BESIDE, HOME, "yield", (), ()))
    if forward:
        queue = [Launch(PROLOGUE, HOME, "queue", ("queue",), ("ids",))] if padded else []
        launches = [*queue, Launch(PROLOGUE, HOME, "counts", (COUNTS,), ("ids",)), *launches]
    elif picks:
        launches = _prologue(region, local, forward_degree, padded) + launches
    outputs = ("y",) if forward else ("gx", "gw")
    launches += _epilogue(region, graph.phase, graph.degree, padded)
    if not forward:
        launches = guarded(launches)
    kept = saved_values(region, local, forward_degree, padded)
    saved = kept if forward else ()
    keep = {*outputs, *saved}
    launches = [
        replace(x, uses=tuple(v for v in x.uses if not _is_pending(v) and v != COUNTS)) for x in with_uses(launches, keep)
    ]
    launches = with_frees(launches, keep, ROW_SIZED)
    leaves = tuple(f"leaf{i}" for i in range(len(region.leaves)))
    inputs = ("x", "ids", "w", *leaves)
    if not forward:
        common = ("x", "ids", "w", COUNTS)
        kept = (*common, *(f"f_{v}" for v in kept[len(common) :])) if picks else kept
        inputs = (*kept, "gy", *leaves, *(f"d{leaf}" for leaf in leaves))
    lanes = tuple(lane for lane, _ in schedule.lanes)
    plan = Plan(graph.phase, graph.degree, lanes, inputs, outputs, saved, tuple(launches))
    check(plan)
    return plan


def saved_values(region: Region, local: Region, forward_degree: int, padded: bool = False) -> tuple[str, ...]:
    """What the forward plan leaves for the backward plan, in order."""
    pairs = [_Pair(region, local, c, forward_degree, False, padded) for c in range(forward_degree)]
    return ("x", "ids", "w", COUNTS, *(name for pair in pairs for name in _saved_of_pair(pair)))


def _is_pending(value: str) -> bool:
    return value[0] == "a" and value[1:2].isdigit()
