"""_narrow: launches of narrow experts hold no rows of the model's width; and the order in which least is held."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import permutations

import pytest
import regions
from moefx.passes._launches import values_of
from moefx.passes._narrow import late
from moefx.passes.lower import lower
from moefx.passes.partition import partition
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify

from moefx.ir import Launch, Region


def launches(region: Region, phase: str, degree: int = 1) -> tuple[Launch, ...]:
    graph = partition(region, degree, phase)
    return lower(region, graph, schedule(graph, "fifo")).launches


def widths(region: Region, values: Iterable[str]) -> list[int]:
    found = [re.match(r"[vg](\d+)", value) for value in values]
    return [region.template.instrs[int(f.group(1))].width for f in found if f]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_narrow_experts_hold_no_rows_of_the_models_width(phase):
    region = simplify(regions.region("narrow"))
    made = launches(region, phase)
    assert regions.D not in widths(region, (out for x in made for out in x.outs))
    ops = {x.op for x in made if not x.op.startswith("act_")}
    want = {"gather_linear", "gather_wgrad", "wgrad_gather", "linear_combine"}
    assert ops == (want if phase == "backward" else {"route", "linear_combine"})


def test_wide_experts_hold_them():
    ops = {x.op for x in launches(simplify(regions.region("swiglu_fused")), "backward")}
    assert {"gather_rows", "grouped_linear", "grouped_wgrad", "rows_backward"} <= ops


def test_rows_that_two_gradients_of_weights_read_are_gathered_once():
    made = launches(simplify(regions.region("narrow_listed")), "backward")
    assert [x.op for x in made].count("gather_rows") == 1
    assert [x.op for x in made].count("grouped_wgrad") == 2, "of gate and up, from the same rows"


def test_rows_that_are_weighted_before_the_experts_stay():
    made = launches(simplify(regions.region("narrow", weight_position="input")), "backward")
    assert {"gather_rows", "rows_backward"} <= {x.op for x in made}


def test_a_result_that_backward_reads_stays():
    made = launches(simplify(regions.region("narrow_low_rank")), "forward")
    assert "linear_combine" not in {x.op for x in made}, "its product with gy is the gradient of w"


def test_gradients_that_are_added_up_stay():
    made = launches(simplify(regions.region("narrow")), "backward", 3)
    assert {"grouped_wgrad", "grouped_wgrad_add"} <= {x.op for x in made}


@pytest.mark.parametrize("style", sorted(regions.STYLES))
def test_no_order_holds_less_at_its_worst_moment(style):
    """Against all orders that dependencies allow, of the launches of a backward (of the first seven, where there are more)."""
    region = simplify(regions.region(style))
    given = list(launches(region, "backward"))[-7:]
    inside = {out for x in given for out in x.outs}

    def allowed(order: tuple[Launch, ...]) -> bool:
        made: set[str] = set()
        for x in order:
            if not (set(values_of(x)) & inside) <= made:
                return False
            made.update(x.outs)
        return True

    def most(order: tuple[Launch, ...]) -> float:
        worst, live = 0.0, {"gx"} & inside
        for x in reversed(order):
            read = set(values_of(x)) & inside
            own, before = (sum(widths(region, values)) for values in (read, set(x.outs)))
            tokens = regions.D / region.top_k
            gx = tokens * len({"gx"} & (live | set(x.outs)))
            held = max(own, before) if x.op.endswith("vjp") else own + before
            wide = regions.D if x.op in ("gather_wgrad", "wgrad_gather", "linear_combine") else 0
            worst = max(worst, gx + held + wide + sum(widths(region, live - read - set(x.outs))))
            live = (live - set(x.outs)) | read
        return worst

    orders = [order for order in permutations(given) if allowed(order)]
    assert most(tuple(late(given, region, {"gx", "gw"}))) == min(map(most, orders))
