"""lower: launches, events, lifetimes, guards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import regions
from moefx.passes.lower import check, lower, values_of
from moefx.passes.partition import partition
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify
from regions import D, E

from moefx.errors import PlanError
from moefx.ir import Launch, Plan, Ref, Region, Template


def plan(style: str = "swiglu_fused", degree: int = 1, phase: str = "forward", policy: str = "fifo", **changes) -> Plan:
    region = simplify(regions.region(style, **changes))
    graph = partition(region, degree, phase)
    return lower(region, graph, schedule(graph, policy))


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("degree", [1, 3])
def test_golden(golden, phase, degree):
    golden(f"lower_{phase}_r{degree}", str(plan(degree=degree, phase=phase)))


# ------------------------------------------------------------------------------------------------ lower


def test_one_chunk_has_no_events():
    assert all(not x.waits and not x.records and not x.uses for x in plan().launches)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("style", sorted(regions.STYLES))
def test_every_dependency_across_lanes_has_an_event(style, phase):
    graph = partition(regions.region(style), 3, phase)
    planned = schedule(graph)
    launches = lower(simplify(regions.region(style)), graph, planned).launches
    for task in graph.tasks:
        crossing = {d for d in task.deps if planned.lane_of(d) != planned.lane_of(task.name)}
        assert {e for x in launches if x.task == task.name for e in x.waits} == crossing


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("style", sorted(regions.STYLES))
def test_values_of_other_lanes_are_held_before_they_are_read(style, phase):
    made: dict[str, str] = {}
    held: set[tuple[str, str]] = set()
    for x in plan(style, 3, phase).launches:
        held.update((value, x.lane) for value in x.uses)
        for value in values_of(x):
            assert made.get(value, x.lane) == x.lane or (value, x.lane) in held
        made.update((out, x.lane) for out in x.outs if x.op != "slice")


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("policy", ["serial", "fifo"])
def test_nothing_is_read_after_it_is_freed(phase, policy):
    freed: set[str] = set()
    result = plan("residual_norm", 3, phase, policy)
    for x in result.launches:
        assert freed.isdisjoint(values_of(x))
        freed.update(x.frees)
    assert freed and freed.isdisjoint((*result.outputs, *result.saved))


def test_saved_are_preactivations_and_nothing_permuted():
    assert plan().saved == ("x", "w", "order", "offsets", "position", "v1")
    assert plan("interleaved_bias").saved[-1] == "v1"  # the last bias is added where rows are summed
    assert plan(weight_position="input").saved[-1] == "v1"


def test_what_only_x_needs_is_guarded():
    guarded = [x.op for x in plan(phase="backward").launches if x.guard]
    assert guarded == ["grouped_linear", "rows_backward"]
    assert not [x for x in plan(phase="backward", weight_position="input").launches if x.guard]


def test_first_chunk_writes_and_later_chunks_add():
    ops = [x.op for x in plan(degree=3, phase="backward").launches if x.task.startswith("w_experts")]
    assert ops == ["grouped_wgrad"] * 2 + ["grouped_wgrad_add"] * 4


def test_a_leaf_that_two_linears_use_is_summed():
    instrs = (regions.X, regions.linear(0, 0, D), regions.op("relu.default", Ref(1), width=D), regions.linear(2, 0, D))
    region = Region(E, 2, D, D, D, Template(instrs), (regions.stacked("w", D, D),))
    graph = partition(region, 1, "backward")
    ops = [x.op for x in lower(region, graph, schedule(graph)).launches if x.task == "w_experts_0"]
    assert ops == ["grouped_wgrad", "grouped_wgrad_add"]


def test_check_names_the_place():
    good = plan(degree=2)
    late = replace(good, launches=good.launches[1:])
    with pytest.raises(PlanError, match="reads x_0 before it is made"):
        check(late)
    silent = replace(good, launches=tuple(replace(x, records="") for x in good.launches))
    with pytest.raises(PlanError, match="waits for dispatch_0 before it is recorded"):
        check(silent)
    with pytest.raises(PlanError, match="ends without z"):
        check(replace(good, outputs=("z",)))


def test_values_of_reads_expressions():
    launch = Launch("t", "compute", "op", ("a",), ("leaf0.transpose(1, 2)", 3, None, "offsets_0[::5].contiguous()"))
    assert values_of(launch) == ["leaf0", "offsets_0"]
