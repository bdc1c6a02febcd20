"""The runtime: op tables, lanes and events; on a GPU also that no event is missing and nothing waits for the device."""

from __future__ import annotations

import threading

import pytest
import regions
import torch
from regions import STYLES, gradients
from torch import Tensor

import moefx.runtime
from moefx.build import compile_region, load
from moefx.compiled import CompiledRegion
from moefx.errors import InputError, PlanError
from moefx.ops import OPS
from moefx.runtime import Runtime, ops_for


def test_op_tables():
    assert ops_for("cpu", "auto") is OPS and ops_for("cuda", "torch") is OPS
    with pytest.raises(InputError, match="kernels must be"):
        ops_for("cpu", "fast")


@pytest.mark.parametrize(
    ("devices", "kernels", "expected"),
    [(["cpu", "cuda:1", "cuda:0"], "auto", ["cuda:1"]), (["cpu"], "triton", []), ([], "auto", []), (["cuda:0"], "torch", [])],
)
def test_the_compiler_is_prepared_beside(
    devices: list[str], kernels: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another thread; what fails there is not raised, since the first kernel raises it."""
    asked, inside = [], threading.Event()

    def prepare(device: torch.device, kernels: str) -> None:
        assert inside.wait(20)
        asked.append(str(device))
        raise RuntimeError("no compiler")

    monkeypatch.setattr(moefx.runtime, "_prepare_compiler", prepare)
    with moefx.runtime.compiler_prepared(map(torch.device, devices), kernels):
        assert not asked
        inside.set()
    assert asked == expected


# ------------------------------------------------------------------------------------------------ lanes and events


def test_waiting_for_what_nobody_recorded():
    rt = Runtime(OPS, torch.device("cpu"))
    with rt.lane("memory"), pytest.raises(PlanError, match="lane memory waits for event 'dispatch_7'"):
        rt.wait("dispatch_7")
    with rt.lane("compute"):
        rt.record("dispatch_7")
    rt.wait("dispatch_7")


def test_an_unknown_op_is_an_error():
    with pytest.raises(AttributeError, match="no op 'scatter'"):
        Runtime(OPS, torch.device("cpu")).scatter  # noqa: B018


def test_delays_are_called_on_every_task_lane():
    compiled = compile_region(regions.region("swiglu_fused"), 2)
    given = regions.inputs(compiled.region, 9)
    seen: list[str] = []
    compiled.delays = seen.append
    compiled(given.x, given.ids, given.w, regions.parameters("swiglu_fused"))
    tasks = [lane for lane, names in compiled.schedules[0].lanes for _ in names]
    assert set(seen) == {"compute", "memory"} and len(seen) >= len(tasks)


@pytest.mark.gpu
@pytest.mark.parametrize("degree", [1, 2, 5])
@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("style", sorted(STYLES))
def test_streams_with_random_delays(style, kernels, degree):
    """On CUDA streams, slowed down at random, the numbers are those of the CPU."""
    region = regions.region(style)
    given, params = regions.inputs(region, 130, "outside", torch.float32), regions.parameters(style, torch.float32)
    of = [given.x, given.w, *params.values()]
    expected = compile_region(region, kernels="torch")(given.x, given.ids, given.w, params)
    gy = torch.randn_like(expected)
    wanted = (expected, *gradients(expected, of, gy))

    on_gpu = [t.detach().cuda().requires_grad_() for t in of]
    compiled = compile_region(region, degree, kernels)
    random = torch.Generator().manual_seed(degree)
    compiled.delays = lambda lane: torch.cuda._sleep(int(torch.randint(1, 2_000_000, (1,), generator=random)))
    for _ in range(3):
        y = compiled(on_gpu[0], given.ids.cuda(), on_gpu[1], dict(zip(params, on_gpu[2:])))
        got = (y, *gradients(y, on_gpu, gy.cuda()))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a.cpu(), b, rtol=2e-3, atol=2e-3)
            a.fill_(float("nan"))  # a buffer that was given back too early shows in the next round


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("style", sorted(STYLES))
def test_bf16_on_cuda_never_waits_for_the_device(style, degree, autocast):
    """bf16 parameters, or fp32 ones under autocast: near fp64, and no host synchronisation once warm."""
    region, dtype = regions.region(style), torch.float32 if autocast else torch.bfloat16
    given, params = regions.inputs(region, 65, "outside", dtype), regions.parameters(style, dtype)
    of = [given.x, given.w, *params.values()]
    exact = [t.detach().double().requires_grad_() for t in of]
    expected = regions.reference(region, regions.Inputs(exact[0], given.ids, exact[1]), dict(zip(params, exact[2:])))
    wanted = (expected, *gradients(expected, exact, torch.ones_like(expected)))
    there = [t.detach().cuda().requires_grad_() for t in of]
    compiled, ids = compile_region(region, degree), given.ids.cuda()

    def step() -> tuple[Tensor, ...]:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y = compiled(there[0], ids, there[1], dict(zip(params, there[2:])))
        return (y, *torch.autograd.grad(y.sum(), there))  # an expanded gradient comes in

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, a, b in zip(("y", "x", "w", *params), got, wanted):
        assert a.dtype == dtype
        assert (a.double().cpu() - b).norm() <= 3e-2 * b.norm(), name


@pytest.mark.gpu
def test_a_missing_event_is_seen():
    """The test above has teeth: without waits the numbers differ."""
    region = regions.region("swiglu_fused")
    given, params = regions.inputs(region, 130, "any", torch.float32), regions.parameters("swiglu_fused", torch.float32)
    compiled = compile_region(region, 2, "torch")
    tensors = {name: p.detach().cuda() for name, p in params.items()}
    args = (given.x.detach().cuda(), given.ids.cuda(), given.w.detach().cuda(), tensors)
    expected = compiled(*args)
    source = compiled.source.replace("rt.wait(", "rt.chunks(1, 1) or (")
    broken = CompiledRegion(compiled.region, compiled.graphs, compiled.schedules, compiled.plans, load(source), "torch")
    broken.delays = lambda lane: torch.cuda._sleep(20_000_000 if lane == "memory" else 1)
    assert not torch.equal(broken(*args), expected)
