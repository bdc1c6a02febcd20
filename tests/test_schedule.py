"""schedule: policies, the text form, and the refusal of schedules that would not run."""

from __future__ import annotations

import pytest
import regions
from hypothesis import given
from hypothesis import strategies as st
from moefx.passes.partition import partition
from moefx.passes.schedule import POLICIES, check, schedule

from moefx.errors import PlanError
from moefx.ir import Schedule, TaskGraph, issue_order

PHASES = ["forward", "backward"]


def graph(degree: int = 2, phase: str = "forward") -> TaskGraph:
    return partition(regions.region("swiglu_fused"), degree, phase)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("degree", [1, 3])
def test_golden(golden, phase, degree):
    golden(f"schedule_{phase}_r{degree}", str(schedule(graph(degree, phase))))


@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 9), st.sampled_from(PHASES))
def test_issue_order_keeps_dependencies_and_lanes(policy, degree, phase):
    tasks = graph(degree, phase)
    planned = schedule(tasks, policy)
    order = [task for _, task in issue_order(planned, tasks)]
    assert sorted(order) == sorted(t.name for t in tasks.tasks)
    for task in tasks.tasks:
        assert all(order.index(d) < order.index(task.name) for d in task.deps)
    for lane, in_lane in planned.lanes:
        assert [t for t in order if planned.lane_of(t) == lane] == list(in_lane)


@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 9), st.sampled_from(PHASES))
def test_text_parses_back(policy, degree, phase):
    planned = schedule(graph(degree, phase), policy)
    assert Schedule.parse(str(planned)) == planned


@pytest.mark.parametrize("text", ["", "forward", "sideways r=1\n  a: b", "forward r=1\n  lane without colon"])
def test_text_that_is_no_schedule(text):
    with pytest.raises(PlanError, match="not a schedule"):
        Schedule.parse(text)


def test_fifo_feeds_the_experts_first():
    lanes = dict(schedule(graph(2)).lanes)
    assert lanes["memory"] == ("route_0", "dispatch_0", "route_1", "dispatch_1", "combine_0", "combine_1")


def test_one_chunk_has_one_lane():
    assert [lane for lane, _ in schedule(graph(1)).lanes] == ["compute"]


def test_unknown_policy():
    with pytest.raises(PlanError, match="no schedule policy 'best'; known: serial, fifo"):
        schedule(graph(), "best")


def edited(planned: Schedule, **lanes: tuple[str, ...]) -> Schedule:
    return Schedule(
        planned.phase, planned.degree, tuple((lane, lanes.get(lane, tasks)) for lane, tasks in planned.lanes)
    )


def test_deadlock_is_printed_with_its_place():
    planned = schedule(graph(2))
    stuck = edited(planned, memory=("combine_0", "route_0", "dispatch_0", "route_1", "dispatch_1", "combine_1"))
    with pytest.raises(PlanError) as error:
        check(stuck, graph(2))
    assert str(error.value).splitlines() == [
        "the schedule deadlocks",
        "  compute: experts_0 waits for dispatch_0",
        "  memory: combine_0 waits for experts_0",
    ]


def test_tasks_lost_doubled_or_unknown():
    planned = schedule(graph(2))
    with pytest.raises(PlanError, match="task experts_1 stands 0 times"):
        check(edited(planned, compute=("experts_0",)), graph(2))
    with pytest.raises(PlanError, match="task experts_1 stands 2 times"):
        check(edited(planned, compute=("experts_0", "experts_1", "experts_1")), graph(2))
    with pytest.raises(PlanError, match="unknown tasks experts_9"):
        check(edited(planned, compute=("experts_0", "experts_1", "experts_9")), graph(2))


def test_schedule_of_another_graph():
    with pytest.raises(PlanError, match="schedule of forward r=2 for tasks of backward r=2"):
        check(schedule(graph(2)), graph(2, "backward"))
