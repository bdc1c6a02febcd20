"""schedule: policies, the text form, and the refusal of schedules that would not run."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import brute_orders
import pytest
import regions
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import LAYOUTS, layers, pipeline, random_layer, timed_layer
from moefx.passes import _orders
from moefx.passes import schedule as scheduling
from moefx.passes.partition import Layout, expert_parallel, partition
from moefx.passes.schedule import (
    POLICIES,
    auto,
    check,
    choose,
    exact,
    fifo,
    register_policy,
    schedule,
    schemoe,
    theorem_gaps,
)

from moefx.errors import InputError, PlanError
from moefx.ir import NO_CHUNK, Schedule, Task, TaskGraph, issue_order
from moefx.simulate import lower_bound_s, simulate

PHASES = ["forward", "backward"]
UNTIMED = ["serial", "fifo"]  # the policies that need no times; schemoe wants a chain of all-to-alls


def graph(degree: int = 2, phase: str = "forward") -> TaskGraph:
    return partition(regions.region("swiglu_fused"), degree, phase)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("degree", [1, 3])
def test_golden(golden, phase, degree):
    golden(f"schedule_{phase}_r{degree}", str(schedule(graph(degree, phase))))


@given(st.sampled_from(UNTIMED), st.integers(1, 9), st.sampled_from(PHASES))
def test_issue_order_keeps_dependencies_and_lanes(policy, degree, phase):
    tasks = graph(degree, phase)
    planned = schedule(tasks, policy)
    order = [task for _, task in issue_order(planned, tasks)]
    assert sorted(order) == sorted(t.name for t in tasks.tasks)
    for task in tasks.tasks:
        assert all(order.index(d) < order.index(task.name) for d in task.deps)
    for lane, in_lane in planned.lanes:
        assert [t for t in order if planned.lane_of(t) == lane] == list(in_lane)


@given(st.sampled_from(UNTIMED), st.integers(1, 9), st.sampled_from(PHASES))
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
    with pytest.raises(PlanError, match="no schedule policy 'best'; known: serial, fifo, "):
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


# ------------------------------------------------------------------------------------------------ policies with times

TIMED = [name for name in sorted(POLICIES) if name != "schemoe"]


def makespan(graph: TaskGraph, policy: str) -> float:
    return simulate(graph, schedule(graph, policy)).makespan_s


@settings(max_examples=60)
@given(layers(3), st.sampled_from(TIMED))
def test_every_policy_gives_a_valid_schedule(graph, policy):
    planned = schedule(graph, policy)
    simulate(graph, planned).check()
    assert Schedule.parse(str(planned)) == planned


@pytest.mark.parametrize("policy", ["greedy", "exact", "auto"])
def test_a_policy_that_needs_times_says_so(policy):
    with pytest.raises(PlanError, match="has no time: price the graph"):
        schedule(graph(), policy)


@pytest.mark.parametrize("policy", TIMED)
def test_no_tasks(policy):
    empty = TaskGraph("forward", 1, ())
    assert simulate(empty, schedule(empty, policy)).makespan_s == 0.0


def test_the_theorems_order():
    chain = expert_parallel(2, "forward", LAYOUTS["schemoe"])
    assert dict(schemoe(chain).lanes) == {
        "compute": tuple("C1_0 C1_1 D1_0 E_0 C2_0 D1_1 E_1 C2_1 D2_0 D2_1".split()),
        "inter": tuple("A1_0 A1_1 A2_0 A2_1".split()),
    }


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(shared=True, permute=False), r"shared \(shared on compute\) has no place"),
        (Layout(permute=True), "encode_0"),
        (Layout(permute=False, split_links=True), "A1_0 .dispatch_inter_all_to_all"),
        (Layout(permute=False, shards=True), "AG_0"),
    ],
)
def test_the_theorems_order_is_for_its_chain_alone(layout, message):
    with pytest.raises(PlanError, match=message):
        schemoe(expert_parallel(2, "forward", layout))


def chain(degree: int, c1: float, a1: float, d1: float, e: float, c2: float, a2: float, d2: float) -> TaskGraph:
    kinds = ("dispatch_compress", "dispatch_all_to_all", "dispatch_decompress", "experts")
    kinds += ("combine_compress", "combine_all_to_all", "combine_decompress")
    return timed_layer(LAYOUTS["schemoe"], degree, "forward", dict(zip(kinds, (c1, a1, d1, e, c2, a2, d2))))


def test_the_theorem_is_optimal_where_it_holds():
    rng = random.Random(0)
    for _ in range(60):
        c, a, d, e = (rng.choice((rng.uniform(0, 1), rng.uniform(1, 5))) for _ in range(4))
        graph = chain(rng.randint(2, 4), c, a, d, e, c, a, d)
        assert not theorem_gaps(graph)
        assert makespan(graph, "schemoe") == pytest.approx(brute_orders.optimum(graph, equal_chunks=True), rel=1e-12)
        assert auto(graph) == schemoe(graph)


def test_the_theorem_where_it_does_not_hold():
    """Only the dispatch is compressed, and the combine is slow: with all C1 first the link waits for long."""
    graph = chain(2, 2.0, 0.1, 0.1, 0.1, 0.0, 2.0, 0.0)
    assert theorem_gaps(graph)[0].startswith("t(dispatch_compress) = 2000 ms is not t(combine_compress) = 0 ms")
    best = brute_orders.optimum(graph)
    assert best == pytest.approx(brute_orders.literal_optimum(graph))
    assert makespan(graph, "exact") == pytest.approx(best)
    assert makespan(graph, "auto") == pytest.approx(best)
    assert makespan(graph, "schemoe") > 1.2 * best


def compare(count: int, seed: int) -> tuple[float, float]:
    """The largest relative gaps of exact and auto to the optimum over all orders."""
    rng = random.Random(seed)
    gaps = []
    for _ in range(count):
        uneven = rng.random() < 0.1
        graph = random_layer(rng, degree=rng.randint(1, 2) if uneven else None, uneven=uneven)
        best = brute_orders.optimum(graph, equal_chunks=not uneven)
        gaps.append((makespan(graph, "exact") / best - 1, makespan(graph, "auto") / best - 1))
    return max(g for g, _ in gaps), max(g for _, g in gaps)


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_exact_and_auto_against_all_orders(count):
    exact_gap, auto_gap = compare(count, seed=count)
    assert exact_gap < 1e-12
    assert auto_gap < 0.01


@pytest.mark.parametrize("degree", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_auto_beyond_four_chunks(degree):
    """Here exact, checked above, is the yardstick; layers that no lower bound settles."""
    rng = random.Random(degree)
    hard = (random_layer(rng, rng.choice(("codec", "fsmoe_codec", "pipe_a2a")), degree) for _ in range(40))
    for graph in hard:
        if makespan(graph, "greedy") > 1.05 * lower_bound_s(graph):
            assert makespan(graph, "auto") <= 1.01 * makespan(graph, "exact")


def test_the_yardstick_against_every_order_simulated():
    """Two chunks: `optimum` with and without its assumption about equal chunks, against nothing but `simulate`."""
    rng = random.Random(1)
    for name in ("pipemoe", "schemoe", "fsmoe_codec"):
        graph = random_layer(rng, name, 2)
        if len(graph.tasks) > 18:
            continue
        best = brute_orders.literal_optimum(graph)
        assert brute_orders.optimum(graph) == pytest.approx(best)
        assert brute_orders.optimum(graph, equal_chunks=True) == pytest.approx(best)


def test_equal_chunks_are_ordered_and_unequal_ones_are_not():
    rng = random.Random(2)
    pairs = _orders.order_of_equals(random_layer(rng, "schemoe", 3))
    assert ("E_0", "E_1") in pairs and ("A1_1", "A1_2") in pairs
    uneven = random_layer(rng, "schemoe", 3, uneven=True)
    assert _orders.order_of_equals(uneven) == []
    graph = expert_parallel(2, "backward", LAYOUTS["fsmoe"]).timed(lambda task: 1.0)
    assert ("slice_0", "slice_1") in _orders.order_of_equals(graph)


def test_exact_that_cannot_prove_says_so(monkeypatch):
    monkeypatch.setattr(scheduling, "EXACT_STATES", 10)
    rng = random.Random(4)
    graph = next(g for g in (random_layer(rng, "fsmoe_codec", 4) for _ in range(99)) if _quick_gap(g) > 0.01)
    with pytest.raises(PlanError, match="no proof of the optimum for 3|no proof of the optimum for 4"):
        exact(graph)


def _quick_gap(graph: TaskGraph) -> float:
    return makespan(graph, "greedy") / lower_bound_s(graph) - 1


def test_slices_of_gradients_fill_idle_link_time():
    """Experts bound the pass: the link idles longer than the slices take, and they cost nothing."""
    seconds = {"dispatch_all_to_all": 1.0, "combine_all_to_all": 1.0, "experts_dgrad": 3.0, "experts_wgrad": 3.0}
    seconds["grad_all_reduce"] = 0.5
    without = timed_layer(Layout(permute=False), 3, "backward", seconds)
    sliced = timed_layer(Layout(permute=False, gradient_slices=6), 3, "backward", seconds)
    assert makespan(sliced, "auto") == pytest.approx(makespan(without, "auto"))
    assert makespan(sliced, "fifo") >= makespan(sliced, "auto")


def test_weight_gradients_compute_while_row_gradients_are_on_the_way():
    seconds = {"dispatch_all_to_all": 1.0, "combine_all_to_all": 1.0, "experts_dgrad": 1.0, "experts_wgrad": 1.0}
    graph = timed_layer(Layout(permute=False), 1, "backward", seconds)
    timeline = simulate(graph, schedule(graph, "auto"))
    assert timeline["W_0"].start_s == timeline["A2_0"].start_s
    assert timeline.makespan_s == 3.0


def test_auto_is_linear_in_the_degree():
    def seconds_for(degree: int) -> float:
        graph = expert_parallel(degree, "forward", LAYOUTS["fsmoe_codec"]).timed(lambda task: times[task.kind])
        began = time.perf_counter()
        schedule(graph, "auto")
        return time.perf_counter() - began

    rng = random.Random(5)
    kinds = {t.kind for t in expert_parallel(1, "forward", LAYOUTS["fsmoe_codec"]).tasks}
    times = {kind: rng.uniform(0.8, 1.2) for kind in sorted(kinds)}
    small = min(seconds_for(16) for _ in range(3))
    assert min(seconds_for(64) for _ in range(2)) < 12 * small + 0.2  # 4 x the tasks


# ------------------------------------------------------------------------------------------------ registry and degree


def test_a_policy_from_outside():
    def backwards(graph: TaskGraph) -> Schedule:
        return Schedule(graph.phase, graph.degree, (("compute", tuple(t.name for t in reversed(graph.tasks))),))

    try:
        register_policy("backwards", backwards)
        with pytest.raises(InputError, match="a schedule policy 'backwards' exists"):
            register_policy("backwards", backwards)
        with pytest.raises(PlanError, match="the schedule deadlocks"):
            schedule(graph(), "backwards")
        POLICIES["backwards"] = fifo
        assert schedule(graph(), "backwards") == fifo(graph())
    finally:
        del POLICIES["backwards"]


def affine(alpha: dict[str, float], total: dict[str, float], layout: Layout, phase: str = "forward"):
    """r -> a layer whose tasks take alpha + total / r seconds, those of no chunk `total`."""

    def build(degree: int) -> TaskGraph:
        def seconds(task: Task) -> float:
            if task.chunk == NO_CHUNK:
                return total[task.kind]
            return alpha[task.kind] + total[task.kind] / degree

        return expert_parallel(degree, phase, layout).timed(seconds)

    return build


def random_build(rng: random.Random, layout: str):
    phase = rng.choice(PHASES)
    kinds = sorted({t.kind for t in expert_parallel(1, phase, LAYOUTS[layout]).tasks})
    alpha = {kind: rng.uniform(0.02, 0.3) for kind in kinds}
    large = {kind for kind in kinds if "all_to_all" in kind or "experts" in kind}
    total = {kind: rng.uniform(0.5, 6) if kind in large else rng.uniform(0, 2) for kind in kinds}
    return affine(alpha, total, LAYOUTS[layout], phase)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_degree_and_order_together(layout):
    """exact proves both; auto stays within 1 %; fifo's degree is that of its enumeration."""
    rng = random.Random(7)
    for _ in range(3):
        build = random_build(rng, layout)
        capacity = 5
        every = {r: makespan(build(r), "exact") for r in range(1, capacity + 1)}
        proved = choose(build, capacity, "exact")
        assert proved.makespan_s == pytest.approx(min(every.values()), rel=1e-9)
        assert every[proved.degree] == pytest.approx(min(every.values()), rel=1e-9)
        assert choose(build, capacity, "auto").makespan_s <= 1.01 * min(every.values())
        in_order = {r: makespan(build(r), "fifo") for r in range(1, 25)}
        assert choose(build, 24, "fifo").makespan_s == pytest.approx(min(in_order.values()), rel=1e-9)


def test_forward_and_backward_differ():
    seconds = {"dispatch_all_to_all": 4.0, "combine_all_to_all": 4.0}
    start = {"dispatch_all_to_all": 0.1, "combine_all_to_all": 0.1}
    layout = replace(LAYOUTS["pipemoe"], split_backward=False)
    forward = affine({**start, "experts": 0.02}, {**seconds, "experts": 8.0}, layout)
    backward = affine({**start, "experts_backward": 0.04}, {**seconds, "experts_backward": 16.0}, layout, "backward")
    assert choose(forward, 64).degree < choose(backward, 64).degree


def test_degrees_outside_the_capacity():
    def build(degree: int) -> TaskGraph:
        return pipeline(degree, ("E", "compute", 1.0))

    with pytest.raises(InputError, match=r"between 1 and the capacity 4; got \[5\]"):
        choose(build, 4, degrees=[5])
    with pytest.raises(InputError, match="at least 1; got 0"):
        choose(build, 0)
    with pytest.raises(PlanError, match="no schedule policy 'best'"):
        choose(build, 4, "best")
    assert choose(build, 4, degrees=[2, 3]).tried_s == {2: 2.0, 3: 3.0}
    assert choose(build, 4).degree == 1
