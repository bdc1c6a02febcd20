"""Where the Triton tests run: on CUDA if there is a device, else in Triton's interpreter on the CPU.

The interpreter must be chosen before triton is imported. Where that came too late, because something else in this
process imported triton first, `rerun` runs a test file in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402
from moefx.codegen.triton_launch import interpreted  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

# In the interpreter both our kernels and Triton's own library must be interpreted.
READY = DEVICE == "cuda" or (interpreted() and not isinstance(tl.sum, JITFunction))
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])

needs_triton = pytest.mark.skipif(not READY, reason="triton came up without its interpreter: see test_triton_rerun")


def rerun(file: str) -> None:
    """Runs a test file with the interpreter on, in a process of its own, where it does not run in this one."""
    if READY:
        pytest.skip("the tests of this file run here")
    if os.environ.get("MOEFX_TRITON_RERUN"):
        pytest.fail("Triton's interpreter does not come up even in a process of its own")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MOEFX_TRITON_RERUN": "1"}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to `want`; NaN counts as different."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{tuple(got.shape)} for {tuple(want.shape)}"
    difference = (got - want).norm().item()
    return difference / max(want.norm().item(), 1e-30) if difference == difference else float("inf")
