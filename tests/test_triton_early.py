"""Kernels that begin before the one in front of them has ended: none touches memory before that has.

Compiled for sm_90 without a GPU, in a process of its own without Triton's interpreter.
"""

from __future__ import annotations

from triton_here import needs_triton  # first: it chooses Triton's interpreter

# isort: split

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moefx.codegen import triton_launch
from moefx.codegen.triton_launch import early

ROOT = Path(__file__).resolve().parent.parent
EARLY = {"topk_kernel", "place_few_kernel", "grouped_linear_kernel", "combine_kernel", "act_0_linear"}
MEMORY = re.compile(r"\b(ld\.global|st\.global|cp\.async|atom\.|red\.|tensormap)")


@pytest.fixture(autouse=True)
def _forget():
    early.cache_clear()
    yield
    early.cache_clear()


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    for copies in (False, True):
        monkeypatch.setattr(triton_launch, "has_copy_engine", lambda device, copies=copies: copies)
        early.cache_clear()
        options = early(torch.device("cuda", 0))
        assert options["EARLY"] is copies and ("launch_pdl" in options) is copies
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    early.cache_clear()
    assert early(torch.device("cpu")) == {"EARLY": False}


@needs_triton
def test_nothing_is_read_or_written_before_the_wait() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def compiled() -> None:
    import regions
    import triton_on_paper
    from moefx.codegen import triton_relaunch
    from moefx.codegen.triton_ops import OPS

    from moefx.build import compile_region

    triton_on_paper.use(lambda *_: None)
    triton_launch.has_copy_engine = lambda device: True
    made = {}

    def launch(kernel, grid, args, options):
        made[kernel.fn.__name__] = kernel.warmup(*args, grid=grid, **options)

    triton_relaunch.launch = launch
    region = regions.region("swiglu_fused")
    given = regions.inputs(region, 5, dtype=torch.float32)
    params = {n: p.detach() for n, p in regions.parameters("swiglu_fused", torch.float32).items()}
    with torch.no_grad():
        compile_region(region, kernels="triton")(given.x.detach(), given.ids, given.w.detach(), params)
    OPS["topk"](torch.zeros(3, 8), 2)
    assert set(made) >= EARLY, sorted(made)
    for name, kernel in made.items():
        text = kernel.asm["ptx"]
        waits = [m.start() for m in re.finditer(r"griddepcontrol\.wait", text)]
        assert bool(waits) == (name in EARLY), name
        assert bool(getattr(kernel.metadata, "launch_pdl", False)) == (name in EARLY), name
        if waits:
            assert waits[0] < MEMORY.search(text).start(), f"{name} does something before"
            assert waits[0] < text.index("griddepcontrol.launch_dependents"), "what comes next would not wait for what was before"


if __name__ == "__main__":
    compiled()
