"""Launches of one chunk on one lane, without rows as wide as the model.

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

from dataclasses import replace

from moefx.passes._launches import values_of

from moefx.ir import Launch, Region


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
