"""lower_parallel: plans of several ranks as text, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import regions
import torch
from hypothesis import given
from hypothesis import strategies as st
from moefx.codegen.emit import emit
from moefx.passes._launches import check_lanes, values_of
from moefx.passes.lower import lower
from moefx.passes.lower_parallel import lower_parallel, saved_values
from moefx.passes.partition import Layout, expert_parallel, partition
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify

from moefx.build import compile_parallel
from moefx.costs import BlockTimes, Sizes
from moefx.errors import PlanError
from moefx.holding import holding
from moefx.ir import Launch, Plan, Region, Schedule
from moefx.options import Options
from moefx.profile import preset


def local(region: Region) -> Region:
    shapes = regions.STYLES["swiglu_fused"]()[2]
    return holding(region, {name: torch.empty(shape) for name, shape in shapes.items()}, 3, 0).region


def plan(
    phase: str, degree: int, forward_degree: int, codec: bool = False, padded: bool = False, **changes: object
) -> Plan:
    region = simplify(regions.region("swiglu_fused", **changes))
    graph = expert_parallel(degree, phase, Layout(codec=codec))  # type: ignore[arg-type]
    return lower_parallel(region, local(region), graph, schedule(graph, "fifo"), forward_degree, codec, padded)


@pytest.mark.parametrize(
    ("phase", "degree", "forward_degree", "kind"),
    [
        ("forward", 2, 2, ""),
        ("backward", 2, 2, ""),
        ("backward", 2, 1, ""),
        ("forward", 1, 1, "codec"),
        ("forward", 2, 2, "padded"),
        ("backward", 2, 1, "padded"),
    ],
)
def test_golden(golden, phase: str, degree: int, forward_degree: int, kind: str) -> None:
    name = f"lower_parallel_{phase}_r{degree}_of_{forward_degree}{f'_{kind}' if kind else ''}"
    golden(name, str(plan(phase, degree, forward_degree, kind == "codec", kind == "padded")))


def test_golden_source(golden) -> None:
    region = simplify(regions.region("swiglu_fused"))
    golden("emit_parallel_r2_r1", emit(local(region), plan("forward", 2, 2), plan("backward", 1, 2), name="region"))


def test_exchanges_begin_before_the_compute_that_does_not_need_them() -> None:
    """The second chunk is on its way when the first one's experts begin."""
    tasks = [x.task for x in plan("forward", 2, 2).launches]
    assert tasks.index("A1_1") < tasks.index("E_0") < tasks.index("A2_0") < tasks.index("E_1")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("position", ["output", "input"])
def test_backward_reads_what_forward_saves(position: str, identity: bool, padded: bool) -> None:
    changes = {"weight_position": position, "identity": identity, "padded": padded}
    forward = plan("forward", 3, 3, **changes)
    for degree in (3, 2):
        inputs = plan("backward", degree, 3, **changes).inputs
        assert len(forward.saved) == inputs.index("gy")
    region = simplify(regions.region("swiglu_fused", weight_position=position, identity=identity))
    assert forward.saved == saved_values(region, local(region), 3, padded)
    assert any(name.startswith("h_") for name in forward.saved) == (position == "output")


def test_unknown_tasks_are_refused() -> None:
    region = simplify(regions.region("swiglu_fused"))
    graph = expert_parallel(1, "forward", Layout(shared=True))
    with pytest.raises(PlanError, match="no meaning for the tasks shared"):
        lower_parallel(region, local(region), graph, schedule(graph, "fifo"), 1)


def test_a_graph_without_codec_tasks_is_refused() -> None:
    region = simplify(regions.region("swiglu_fused"))
    graph = expert_parallel(1, "forward", Layout())
    with pytest.raises(PlanError, match="the task graph lacks C1_0, D1_0, C2_0, D2_0"):
        lower_parallel(region, local(region), graph, schedule(graph, "fifo"), 1, codec=True)


# ------------------------------------------------------------------------------------------------ between lanes


@given(
    st.sampled_from(sorted(regions.STYLES)), st.sampled_from(["output", "input"]), st.booleans(), st.booleans(), st.booleans(),
    st.integers(1, 5), st.integers(1, 5), st.sampled_from(["fifo", "serial"]),
)  # fmt: skip
def test_lanes_wait_for_what_they_use(
    style: str, position: Any, identity: bool, codec: bool, padded: bool, forward: int, backward: int, policy: str
) -> None:
    """`check_lanes`, which every plan passes when it is made, of all kinds of plans of both phases."""
    region = simplify(regions.region(style, weight_position=position, identity=identity))
    shapes = regions.STYLES[style]()[2]
    held = holding(region, {name: torch.empty(shape) for name, shape in shapes.items()}, 1, 0).region
    for phase, degree in (("forward", forward), ("backward", backward)):
        graph = expert_parallel(degree, phase, Layout(codec=codec))  # type: ignore[arg-type]
        check_lanes(lower_parallel(region, held, graph, schedule(graph, policy), forward, codec, padded))
        alone = partition(region, degree, phase)  # type: ignore[arg-type]
        lanes = tuple((f"lane{n}", (t.name,)) for n, t in enumerate(alone.tasks))  # each task on a lane of its own
        check_lanes(lower(region, alone, Schedule(phase, degree, lanes)))


def without(plan: Plan, field: str) -> list[tuple[Launch, Plan]]:
    """The plan with one entry of that field less, for each there is, and the launch that lost it."""
    plans = []
    for n, x in enumerate(plan.launches):
        for entry in getattr(x, field):
            poorer = replace(x, **{field: tuple(e for e in getattr(x, field) if e != entry)})
            plans.append((x, replace(plan, launches=(*plan.launches[:n], poorer, *plan.launches[n + 1 :]))))
    return plans


def test_a_lane_that_does_not_wait_or_hold_is_refused() -> None:
    """Take away any event that a lane waits for, or any value that it holds."""
    for phase, padded in itertools.product(("forward", "backward"), (False, True)):
        whole = plan(phase, 3, 3, True, padded)
        for field, problem in (("waits", "may run before"), ("uses", "nothing holds the memory")):
            first = next(x for x in whole.launches if x.lane == "inter")  # its lane begins behind all before it
            poorer = [broken for x, broken in without(whole, field) if field == "uses" or x != first]
            assert len(poorer) >= 5, "of three chunks each, there and back"
            for broken in poorer:
                with pytest.raises(PlanError, match=problem):
                    check_lanes(broken)


def test_writing_in_place_what_another_lane_writes_is_refused() -> None:
    whole = plan("backward", 2, 2)
    moved = [replace(x, lane="w", uses=values_of(x)) if x.op == "grouped_wgrad" else x for x in whole.launches]
    with pytest.raises(PlanError, match="may run before dleaf"):
        check_lanes(replace(whole, launches=tuple(moved)))


# ------------------------------------------------------------------------------------------------ what was measured


def test_what_a_chunk_more_costs_lowers_the_degree() -> None:
    region, profile = simplify(regions.region("swiglu_fused")), preset("pipemoe-16")
    profile = replace(profile, lines={**profile.lines, "permute": replace(profile.lines["experts"], unit="hbm_bytes")})
    sizes = Sizes(tokens=8192, top_k=2, d_model=4096, d_expert=4096, experts=6, ranks=3)
    degrees = []
    for chunk_s in (0.0, 1e-3, 1e-2, 1.0):
        times = {phase: BlockTimes({1: 0.5, 4: 0.5 + 3 * chunk_s}) for phase in ("forward", "backward")}
        plans = compile_parallel(region, local(region), Options(), sizes, profile, {}, times=times)
        degrees.append([s.degree for s in plans.schedules])
    for of_phase in zip(*degrees):
        assert of_phase[0] > of_phase[-1] == 1
        assert list(of_phase) == sorted(of_phase, reverse=True)


def test_what_a_block_takes_is_taken_as_measured() -> None:
    """The profile divides it among the tasks; a chunk more costs what was measured for one; no exchange is too fast."""
    region, profile = simplify(regions.region("swiglu_fused")), preset("pipemoe-16")
    profile = replace(profile, lines={**profile.lines, "permute": replace(profile.lines["experts"], unit="hbm_bytes")})
    sizes = Sizes(tokens=8192, top_k=2, d_model=4096, d_expert=4096, experts=6, ranks=3)
    times = {"forward": BlockTimes({1: 0.5, 4: 0.53}), "backward": BlockTimes({1: 1.5, 4: 1.56}, exchange_s=7.0)}
    for degree in (1, 4):
        options = Options(degree=degree, backward_degree=degree)
        plans = compile_parallel(region, local(region), options, sizes, profile, {}, times=times)
        for timeline, measured in zip(plans.timelines, times.values()):
            assert timeline is not None
            assert timeline.busy_s["compute"] == pytest.approx(measured.computed_s[degree])
        assert plans.timelines[1].busy_s["inter"] == pytest.approx(2 * degree * 7.0)  # type: ignore[union-attr]


def test_an_exchange_of_a_chunk_is_a_share_of_the_measured_one() -> None:
    """As the profile's line divides it, start and all."""
    region, profile = simplify(regions.region("swiglu_fused")), preset("pipemoe-16")
    profile = replace(profile, lines={**profile.lines, "permute": replace(profile.lines["experts"], unit="hbm_bytes")})
    sizes = Sizes(tokens=8192, top_k=2, d_model=4096, d_expert=4096, experts=6, ranks=3)
    busy = {}
    for whole_s in (0.0, 0.25):
        times = {phase: BlockTimes({1: 0.5}, whole_exchange_s=whole_s) for phase in ("forward", "backward")}
        for degree in (1, 4):
            options = Options(degree=degree, backward_degree=degree)
            plans = compile_parallel(region, local(region), options, sizes, profile, {}, times=times)
            busy[whole_s, degree] = [timeline.busy_s["inter"] for timeline in plans.timelines]  # type: ignore[union-attr]
    assert busy[0.25, 1] == pytest.approx([0.5, 0.5])  # there and back
    for by_line, by_measure, whole in zip(busy[0.0, 4], busy[0.25, 4], busy[0.0, 1]):
        assert by_measure > 0.5
        assert by_measure / 0.5 == pytest.approx(by_line / whole)


def test_between_measured_numbers_of_chunks_lies_a_straight_line() -> None:
    """It falls where more chunks computed faster, but not beyond the last one that was measured."""
    times = BlockTimes({1: 0.8, 4: 0.5, 16: 1.1})
    assert [times.compute_s(r) for r in (1, 2, 4, 10, 16, 28)] == pytest.approx([0.8, 0.7, 0.5, 0.8, 1.1, 1.7])
    assert BlockTimes({1: 0.8, 4: 0.5}).compute_s(10) == 0.5
    assert BlockTimes({1: 0.8}).compute_s(10) == 0.8
