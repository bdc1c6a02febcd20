"""partition: tasks per chunk, their dependencies, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import regions
from hypothesis import given
from hypothesis import strategies as st
from moefx.passes.partition import Layout, expert_parallel, partition

from moefx.errors import PlanError
from moefx.ir import NO_CHUNK, Task, TaskGraph, chunk_bounds


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("degree", [1, 3])
def test_golden(golden, phase, degree):
    golden(f"partition_{phase}_r{degree}", str(partition(regions.region("swiglu_fused"), degree, phase)))


def test_parameter_gradients_are_summed_in_chunk_order():
    graph = partition(regions.region("swiglu_fused"), 3, "backward")
    assert "w_experts_0" in graph["w_experts_1"].deps
    assert "w_experts_1" in graph["w_experts_2"].deps


@pytest.mark.parametrize("degree", [0, -1])
def test_degree_must_be_positive(degree):
    with pytest.raises(PlanError, match="at least one chunk"):
        partition(regions.region("swiglu_fused"), degree, "forward")


def test_identity_experts_need_equal_widths():
    region = replace(regions.region("swiglu_fused", identity=True), d_out=3)
    with pytest.raises(PlanError, match="d_out must be d_model"):
        partition(region, 1, "forward")


def test_task_graph_refuses_what_is_not_listed_before():
    with pytest.raises(PlanError, match="depends on"):
        TaskGraph("forward", 1, (Task("a", "route", 0, "memory", ("b",)),))
    with pytest.raises(PlanError, match="twice"):
        TaskGraph("forward", 1, (Task("a", "route", 0, "memory"), Task("a", "route", 0, "memory")))


@given(st.integers(0, 200), st.integers(1, 20))
def test_chunks_partition_the_tokens(tokens, degree):
    bounds = chunk_bounds(tokens, degree)
    sizes = [b - a for a, b in bounds]
    assert len(bounds) == degree
    assert [t for a, b in bounds for t in range(a, b)] == list(range(tokens))
    assert max(sizes) - min(sizes) <= 1


# ------------------------------------------------------------------------------------------------ several ranks


def test_a_chunk_over_several_ranks():
    layout = Layout(codec=True, shards=True, shared=True, gradient_slices=2)
    forward = expert_parallel(2, "forward", layout)
    names = [t.name for t in forward.tasks if t.chunk == 1]
    assert names == "encode_1 C1_1 A1_1 D1_1 AG_1 E_1 RS_1 C2_1 A2_1 D2_1 decode_1".split()
    assert all(forward[b].deps == (a,) for a, b in zip(names, names[1:]))
    assert [t.name for t in forward.tasks if t.chunk == NO_CHUNK] == ["shared"]
    resources = {t.kind: t.resource for t in forward.tasks}
    assert (resources["dispatch_all_to_all"], resources["all_gather"], resources["encode"]) == (
        "inter",
        "intra",
        "compute",
    )


def test_backward_over_several_ranks():
    graph = expert_parallel(2, "backward", Layout(permute=False, gradient_slices=2))
    assert [t.name for t in graph.tasks] == "A1_0 E_0 W_0 A2_0 A1_1 E_1 W_1 A2_1 slice_0 slice_1".split()
    assert graph["A2_0"].deps == ("E_0",), "gradients of rows leave before those of weights"
    assert graph["W_1"].deps == ("E_1", "W_0")
    whole = expert_parallel(1, "backward", Layout(permute=False, split_backward=False))
    assert [t.kind for t in whole.tasks] == ["dispatch_all_to_all", "experts_backward", "combine_all_to_all"]


def test_both_links_at_once():
    graph = expert_parallel(1, "forward", Layout(permute=False, split_links=True))
    assert graph["E_0"].deps == ("A1_0", "I1_0")
    assert (graph["A1_0"].resource, graph["I1_0"].resource) == ("inter", "intra")


def test_layouts_that_cannot_be():
    with pytest.raises(PlanError, match="at least one chunk; got degree 0"):
        expert_parallel(0, "forward")
    with pytest.raises(PlanError, match="'forward' or 'backward'; got 'sideways'"):
        expert_parallel(1, "sideways")
    with pytest.raises(PlanError, match="0 or more slices; got -1"):
        expert_parallel(1, "backward", Layout(gradient_slices=-1))
