"""Compiled regions on Triton kernels against the definition: on CUDA, or in the interpreter on the CPU."""

from __future__ import annotations

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
