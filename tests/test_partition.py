"""partition: tasks per chunk, their dependencies, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import regions
from hypothesis import given
from hypothesis import strategies as st
from moefx.passes.partition import partition

from moefx.errors import PlanError
from moefx.ir import Task, TaskGraph, chunk_bounds


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
