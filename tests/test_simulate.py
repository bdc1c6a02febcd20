"""simulate: a hand-made timeline, the laws that every timeline keeps, and refusals that say where."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import layers, pipeline
from moefx.passes.schedule import POLICIES, fifo, schedule, serial

from moefx.errors import PlanError
from moefx.ir import Schedule, Task, TaskGraph
from moefx.simulate import Timeline, heads_s, lower_bound_s, simulate, tails_s

QUICK = [name for name in sorted(POLICIES) if name not in ("schemoe", "exact")]


def two_chunks() -> TaskGraph:
    return pipeline(2, ("send", "link", 2.0), ("experts", "compute", 3.0), ("back", "link", 2.0))


def times(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {span.task.name: (span.start_s, span.end_s) for span in timeline.spans}


def test_a_timeline_by_hand():
    timeline = simulate(two_chunks(), fifo(two_chunks()))
    assert times(timeline) == {
        "send_0": (0, 2),
        "send_1": (2, 4),
        "experts_0": (2, 5),
        "experts_1": (5, 8),
        "back_0": (5, 7),
        "back_1": (8, 10),
    }
    assert timeline.makespan_s == 10
    assert timeline.busy_s == {"link": 8, "compute": 6}
    assert timeline.exposed_s == {"send": 2, "back": 2}  # nothing computes before 2 and after 8
    assert timeline.critical_path == ("send_0", "experts_0", "experts_1", "back_1")


def test_on_one_lane_all_communication_is_exposed():
    timeline = simulate(two_chunks(), serial(two_chunks()))
    assert timeline.makespan_s == 14
    assert timeline.exposed_s == {"send": 4, "back": 4}


@given(layers(), st.sampled_from(QUICK))
def test_laws_of_a_timeline(graph, policy):
    order = schedule(graph, policy)
    timeline = simulate(graph, order)
    timeline.check()
    seconds = graph.seconds
    slack = 1e-9 * (1 + timeline.makespan_s)
    for span in timeline.spans:
        assert all(timeline[dep].end_s <= span.start_s for dep in span.task.deps)
        assert span.end_s - span.start_s == pytest.approx(seconds[span.task.name], abs=slack)
    for lane, tasks in order.lanes:
        ends = [timeline[task].end_s for task in tasks]
        assert all(end <= timeline[task].start_s for end, task in zip(ends, tasks[1:])), lane
    assert sum(timeline.busy_s.values()) == pytest.approx(sum(seconds.values()), abs=slack)
    assert timeline.makespan_s >= max(timeline.busy_s.values()) - slack
    longest = max(heads_s(graph)[t.name] + seconds[t.name] + tails_s(graph)[t.name] for t in graph.tasks)
    assert timeline.makespan_s >= longest - slack
    assert lower_bound_s(graph) >= max(longest, *timeline.busy_s.values()) - slack
    assert timeline.makespan_s >= lower_bound_s(graph) - slack
    assert sum(seconds[name] for name in timeline.critical_path) == pytest.approx(timeline.makespan_s, abs=slack)
    assert all(-slack <= exposed <= timeline.makespan_s + slack for exposed in timeline.exposed_s.values())


@given(layers(), st.sampled_from(QUICK), st.data())
def test_a_longer_task_never_shortens_a_fixed_order(graph, policy, data):
    order = schedule(graph, policy)
    before = simulate(graph, order).makespan_s
    name = data.draw(st.sampled_from(sorted(graph.by_name)))
    longer = graph.seconds | {name: graph.seconds[name] + data.draw(st.floats(0, 5))}
    assert simulate(graph.timed(longer), order).makespan_s >= before


def test_a_deadlock_is_printed_with_its_place():
    stuck = Schedule(
        "forward", 2, (("link", ("back_0", "send_0", "send_1", "back_1")), ("compute", ("experts_0", "experts_1")))
    )
    with pytest.raises(PlanError) as error:
        simulate(two_chunks(), stuck)
    assert str(error.value).splitlines() == [
        "the schedule deadlocks",
        "  link: back_0 waits for experts_0",
        "  compute: experts_0 waits for send_0",
    ]


def test_a_task_that_depends_on_one_behind_it():
    graph = TaskGraph("forward", 1, (Task("a", "x", 0, "compute", (), 1.0), Task("b", "x", 0, "compute", ("a",), 1.0)))
    with pytest.raises(PlanError, match="compute: b waits for a"):
        simulate(graph, Schedule("forward", 1, (("compute", ("b", "a")),)))


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ((("l", ("send_0",)),), "no lane holds experts_0, back_0"),
        ((("l", ("send_0", "send_0")),), "send_0 stands twice"),
        ((("l", ("send_9",)),), "no task 'send_9'"),
        ((("l", ("send_0",)), ("m", ("back_0",))), "resource link is on two lanes, l and m"),
    ],
)
def test_schedules_that_do_not_fit(lanes, message):
    graph = pipeline(1, ("send", "link", 2.0), ("experts", "compute", 3.0), ("back", "link", 2.0))
    with pytest.raises(PlanError, match=message):
        simulate(graph, Schedule("forward", 1, lanes))


def test_a_task_without_a_time():
    graph = TaskGraph("forward", 1, (Task("a", "route", 0, "memory"),))
    with pytest.raises(PlanError, match=r"task a \(route\) has no time"):
        simulate(graph, serial(graph))


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_times_that_are_none(seconds):
    with pytest.raises(PlanError, match="finite and not negative"):
        TaskGraph("forward", 1, (Task("a", "route", 0, "memory", (), seconds),))


def test_a_measured_timeline_is_checked():
    timeline = simulate(two_chunks(), fifo(two_chunks()))
    early = [replace(s, start_s=0.0, end_s=3.0) if s.task.name == "experts_0" else s for s in timeline.spans]
    with pytest.raises(PlanError, match="experts_0 on compute: 0 ms to 3000 ms starts before send_0"):
        replace(timeline, spans=tuple(early)).check()
    both = [replace(s, start_s=1.0, end_s=3.0) if s.task.name == "send_1" else s for s in timeline.spans]
    with pytest.raises(PlanError, match="lane link runs two tasks at once"):
        replace(timeline, spans=tuple(both)).check()
    with pytest.raises(PlanError, match="missing: send_0"):
        replace(timeline, spans=timeline.spans[1:]).check()


def test_nothing_to_do():
    graph = TaskGraph("forward", 1, ())
    timeline = simulate(graph, Schedule("forward", 1, ()))
    assert (timeline.makespan_s, timeline.critical_path, lower_bound_s(graph)) == (0.0, (), 0.0)
