"""lower_parallel: plans of several ranks as text, and what is refused."""

from __future__ import annotations

import pytest
import regions
import torch
from moefx.codegen.emit import emit
from moefx.passes.lower_parallel import lower_parallel, saved_values
from moefx.passes.partition import Layout, expert_parallel
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify

from moefx.errors import PlanError
from moefx.ir import Plan, Region
from moefx.parallel import holding


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
