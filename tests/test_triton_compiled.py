"""Compiled regions on Triton kernels against the definition: on CUDA, or in the interpreter on the CPU."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import regions
import torch
from triton_here import DEVICE, DTYPES, needs_triton, relative

from moefx.build import compile_region

CASES = [(style, 1, 9, "outside", dtype) for style in sorted(regions.STYLES) for dtype in DTYPES]
CASES += [(style, 3, 7, "few", torch.float32) for style in sorted(regions.STYLES)]
CASES += [("swiglu_fused", 2, 1, "any", torch.float32), ("swiglu_fused", 1, 0, "any", torch.float32)]


@needs_triton
@pytest.mark.parametrize(("style", "degree", "tokens", "routing", "dtype"), CASES)
def test_equals_the_definition(style, degree, tokens, routing, dtype):
    region = regions.region(style)
    given, params = regions.inputs(region, tokens, routing, dtype), regions.parameters(style, dtype)
    of = [given.x, given.w, *params.values()]
    exact = [t.detach().double().requires_grad_() for t in of]
    expected = regions.reference(region, regions.Inputs(exact[0], given.ids, exact[1]), dict(zip(params, exact[2:])))
    gy = torch.randn_like(expected).to(dtype)
    wanted = (
        torch.autograd.grad(expected, exact, gy.double(), allow_unused=True, materialize_grads=True)
        if tokens
        else [torch.zeros_like(t) for t in of]
    )

    there = [t.detach().to(DEVICE).requires_grad_() for t in of]
    compiled = compile_region(region, degree, "triton")
    y = compiled(there[0], given.ids.to(DEVICE), there[1], dict(zip(params, there[2:])))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip((y, *torch.autograd.grad(y, there, gy.to(DEVICE))), (expected, *wanted)):
        assert got.dtype == dtype
        assert relative(got, want) <= tolerance

    with torch.no_grad():
        quiet = compiled(there[0], given.ids.to(DEVICE), there[1], dict(zip(params, there[2:])))
    assert torch.equal(quiet, y)


@needs_triton
def test_segments_without_a_kernel_are_named():
    region = regions.region("residual_norm")
    given, params = regions.inputs(region, 4, dtype=torch.float32), regions.parameters("residual_norm", torch.float32)
    compiled = compile_region(region, kernels="triton")
    there = {name: p.detach().to(DEVICE) for name, p in params.items()}
    compiled(given.x.detach().to(DEVICE), given.ids.to(DEVICE), given.w.detach().to(DEVICE), there)
    assert "act_0" in compiled.without_kernel and compiled.without_kernel["act_0"]


@needs_triton
def test_what_was_saved_is_overwritten_only_by_the_last_backward() -> None:
    """With retain_graph a second backward reads it again."""
    region = regions.region("swiglu_fused")
    compiled = compile_region(region, kernels="triton")
    params = {n: p.detach().float().to(DEVICE).requires_grad_() for n, p in regions.parameters("swiglu_fused").items()}
    given = regions.inputs(region, 11)
    x, w = (t.detach().float().to(DEVICE).requires_grad_() for t in (given.x, given.w))
    sources = [x, w, *params.values()]
    y = compiled(x, given.ids.to(DEVICE), w, params).square().sum()
    first = torch.autograd.grad(y, sources, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, sources)))


def test_what_makes_the_compiler_ready_is_there() -> None:
    """A function of torch's that other versions of it could lack."""
    from torch._inductor.async_compile import AsyncCompile
    from torch.utils._triton import triton_hash_with_backend

    assert callable(triton_hash_with_backend) and callable(AsyncCompile.use_process_pool)


@pytest.mark.gpu
def test_the_compiler_is_ready_for_its_first_kernel() -> None:
    """In a new process: after `prepare_compiler` the hash of Triton's files is not made any more."""
    code = """
        from moefx.codegen.triton_launch import prepare_compiler
        from torch._inductor.runtime.triton_compat import triton_key

        assert triton_key.cache_info().currsize == 0
        prepare_compiler()
        assert triton_key.cache_info().currsize == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


class NoTapes:
    def run(self, flags, inputs, body):
        return body()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("style", sorted(regions.STYLES))
def test_from_tapes_it_is_the_same_bit_for_bit(style: str, dtype: torch.dtype) -> None:
    """Fresh inputs, routing and parameters at each call, in memory that was not a number before; two sizes in turns."""
    region = regions.region(style)
    taped, plain = compile_region(region, kernels="triton"), compile_region(region, kernels="triton")
    plain._tapes = NoTapes()
    for call in range(10):
        given = regions.inputs(region, 9 if call % 2 else 600, "outside", dtype, seed=call)
        params = {n: p.detach().cuda().requires_grad_() for n, p in regions.parameters(style, dtype, seed=call).items()}
        of = [given.x.detach().cuda().requires_grad_(), given.w.detach().cuda().requires_grad_(), *params.values()]
        ids, results = given.ids.cuda(), []
        for compiled in (plain, taped):
            poison = [torch.full((1 << n,), float("nan"), device="cuda") for n in range(8, 22)]
            del poison
            y = compiled(of[0], ids, of[1], params)
            torch.manual_seed(call)
            results.append((y, *torch.autograd.grad(y, of, torch.randn(y.shape, device="cuda").to(dtype))))
        assert all(torch.equal(a, b) for a, b in zip(*results)), call
    seen = list(taped._tapes.seen.values()) if taped._tapes else []
    assert bool(seen) == (not taped.without_kernel)
    assert all(hasattr(tape, "replay") for tape in seen), seen


@pytest.mark.gpu
@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias"])
def test_a_captured_step_replays_right_after_the_routing_changes(style: str) -> None:
    """Forward and backward as one CUDA graph, against the same step launched anew, bit for bit."""
    region = regions.region(style)
    compiled = compile_region(region, kernels="triton")
    drawn = [regions.inputs(region, 600, "outside", torch.bfloat16, seed=seed) for seed in range(4)]
    params = {n: p.detach().cuda().requires_grad_() for n, p in regions.parameters(style, torch.bfloat16).items()}
    x, w, ids = drawn[0].x.detach().cuda(), drawn[0].w.detach().cuda(), drawn[0].ids.cuda()
    of = [x.requires_grad_(), w.requires_grad_(), *params.values()]
    gy = torch.randn(600, region.d_out, device="cuda").bfloat16()

    def step() -> tuple[torch.Tensor, ...]:
        y = compiled(x, ids, w, params)
        return y, *torch.autograd.grad(y, of, gy)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for given in drawn[::-1]:
        with torch.no_grad():
            x.copy_(given.x.detach())
            w.copy_(given.w.detach())
            ids.copy_(given.ids)
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step()))
    assert not torch.equal(drawn[0].ids, drawn[1].ids)
