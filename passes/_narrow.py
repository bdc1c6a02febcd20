"""Launches of one chunk on one lane that hold little memory: without rows as wide as the model, and in the order for it.

The R = T K rows of width D are the largest values of a step where experts are narrow (F < D). Nobody but the next launch wants
them, so that launch takes what they are made from:

    g = gather_rows(gy, order, K, offsets, None)
    ga = grouped_linear(g, W, offsets)           -->   ga = gather_linear(gy, order, K, W, offsets)
    grouped_wgrad(a, g, offsets, dW)                   wgrad_gather(a, gy, order, K, offsets, dW)

    h = grouped_linear(a, W, offsets)            -->   y = linear_combine(a, W, offsets, position, w, dtype)
    y = combine(h, position, w, dtype)

and may make them some columns at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from moefx.passes._launches import values_of

from moefx.ir import Launch, Region

# Launches that hold rows of the model's width while they run.
WIDE_INSIDE = ("gather_wgrad", "wgrad_gather", "linear_combine")
BEAM = 256


def without_wide_rows(launches: list[Launch], region: Region, keep: set[str]) -> list[Launch]:
    """The launches with rows of the model's width inside of them, where experts are narrower. keep: values that are read later."""
    if min(region.d_model, region.d_out) <= region.d_expert:
        return launches
    return _combined(_gathered(launches), keep)


def _gathered(launches: list[Launch]) -> list[Launch]:
    for gather in launches:
        if gather.op != "gather_rows" or gather.args[-1] is not None:
            continue
        readers = {n: _reads_tokens(x, gather) for n, x in enumerate(launches) if gather.outs[0] in values_of(x)}
        made = [x for x in readers.values() if x is not None]
        if len(made) == len(readers) and sum("wgrad" in x.op for x in made) <= 1:  # each of these gathers for itself
            launches = [readers.get(n) or x for n, x in enumerate(launches) if x is not gather]
            return _gathered(launches)
    return launches


def _reads_tokens(x: Launch, gather: Launch) -> Launch | None:
    """A reader of gathered rows as a reader of the tokens; None where there is no such op."""
    (rows,), (tokens, order, top_k, offsets, _) = gather.outs, gather.args
    if x.op == "grouped_linear" and x.args[0] == rows and x.args[2] == offsets:
        return replace(x, op="gather_linear", args=(tokens, order, top_k, x.args[1], offsets))
    if x.op == "grouped_wgrad" and x.args[2] == offsets and x.args[0] != x.args[1]:
        left, right, _, out = x.args
        if left == rows:
            return replace(x, op="gather_wgrad", args=(tokens, order, top_k, right, offsets, out))
        return replace(x, op="wgrad_gather", args=(left, tokens, order, top_k, offsets, out))
    return None


def _combined(launches: list[Launch], keep: set[str]) -> list[Launch]:
    for linear in launches:
        readers = [x for x in launches if not set(linear.outs).isdisjoint(values_of(x))]
        if linear.op != "grouped_linear" or len(readers) != 1 or not keep.isdisjoint(linear.outs):
            continue
        (last,) = readers
        if last.op == "combine":
            args = last.args[1:]
        elif last.op == "rows_backward" and last.args[-1] is None:
            _, x, position, *_ = last.args
            args = (position, None, f"{x}.dtype")
        else:
            continue
        both = replace(last, op="linear_combine", outs=last.outs[:1], args=(*linear.args, *args))
        return _combined([both if x is last else x for x in launches if x is not linear], keep)
    return launches


def late(launches: list[Launch], region: Region, keep: set[str]) -> list[Launch]:
    """The launches of one chunk on one lane in the order in which the least memory of rows is held at the worst moment, then
    the least in all. Dependencies stay: values, and shares added to one gradient. keep: values that are read later.

    From the end backwards, of each set of launches the best order; of many sets the best BEAM.
    """
    made = {out: n for n, x in enumerate(launches) for out in x.outs if out != "_"}
    reads = [{v for v in values_of(x) if v in made} for x in launches]
    outs = [{out for out in x.outs if out != "_"} for x in launches]
    after: list[set[int]] = [set() for _ in launches]  # what must come later
    sums: dict[str, int] = {}
    for n, x in enumerate(launches):
        for value in reads[n]:
            if made[value] != n:
                after[made[value]].add(n)
        for leaf in (v for v in values_of(x) if v.startswith("dleaf")):
            if leaf in sums:
                after[sums[leaf]].add(n)
            sums[leaf] = n

    def features(value: str) -> int:
        """Of one token, K rows where it has rows; what is small counts for nothing."""
        if re.fullmatch(r"(y|routed|gx)(_\d+)?", value):
            return region.d_model
        rows = re.fullmatch(r"[vg](\d+)[a-z]?(_\d+)?", value)
        return region.top_k * region.template.instrs[int(rows.group(1))].width if rows else 0

    size = {value: features(value) for value in made}

    def all_of(values: Iterable[str]) -> int:
        return sum(size[value] for value in values)

    def held(n: int, live: frozenset[str]) -> int:
        """While launch n runs; live: what later ones read. A segment's gradient may lie where its inputs lay."""
        read, made_here = all_of(reads[n]), all_of(outs[n])
        own = max(read, made_here) if launches[n].op.endswith("vjp") else read + made_here
        inside = region.top_k * region.d_model if launches[n].op in WIDE_INSIDE else 0
        return all_of(live - reads[n] - outs[n]) + own + inside

    # the launches placed so far -> (most held, sum of what was held, their negative numbers from the last one on, live)
    State = tuple[int, int, tuple[int, ...], frozenset[str]]
    states: dict[frozenset[int], State] = {frozenset(): (0, 0, (), frozenset(keep & made.keys()))}
    for _ in launches:
        grown: dict[frozenset[int], State] = {}
        for placed, (most, total, order, live) in states.items():
            for n in (n for n in range(len(launches)) if n not in placed and after[n] <= placed):
                now = held(n, live)
                state = (max(most, now), total + now, (*order, -n), (live - outs[n]) | reads[n])
                if (known := grown.get(placed | {n})) is None or state[:3] < known[:3]:
                    grown[placed | {n}] = state
        states = dict(sorted(grown.items(), key=lambda item: item[1][:3])[:BEAM])
    ((_, _, order, _),) = states.values()
    return [launches[-n] for n in reversed(order)]
