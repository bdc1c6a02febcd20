"""benchmarks/emulated.py: what can be told of it without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import emulated  # noqa: E402


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "emulated.py"), "--out", str(tmp_path)]
    done = subprocess.run(script, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "this benchmark emulates an exchange on a GPU, and there is none"


def test_copies_of_an_exchange() -> None:
    """Large copies over the host's link, neither counts nor copies within the GPU."""
    from multi_gpu_parts.traces import overlap_of

    def copy(name: str, start: float, size: int) -> dict[str, Any]:
        return {"ph": "X", "cat": "gpu_memcpy", "name": name, "ts": start, "dur": 10.0, "args": {"bytes": size}}

    events = [
        copy("Memcpy DtoH (Device -> Pinned)", 0, 1 << 20), copy("Memcpy HtoD (Pinned -> Device)", 5, 1 << 20),
        copy("Memcpy HtoD (Pageable -> Device)", 100, 512), copy("Memcpy DtoD (Device -> Device)", 100, 1 << 20),
        {"ph": "X", "cat": "kernel", "name": "grouped_linear", "ts": 12.0, "dur": 30.0},
    ]  # fmt: skip
    found = overlap_of(events, emulated.is_copy)
    assert (found.communication, found.hidden, found.compute, found.span) == (15, 3, 30, 42)


def test_every_line_of_the_table_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    overlap = {"communication": 1000.0, "hidden": 500.0, "compute": 4000.0, "span": 5000.0, "share": 0.5}
    row = {
        "layer": "toy", "T": 8, "delays": {"r=1": "0 of 5 differ"}, "ms": {"r=1": 5.0}, "gain": {"r=1": 1.0},
        "hidden of what can be": {"r=1": 0.0}, "overlap": {"r=1": overlap}, "no exchange ms": 4.0,
    }  # fmt: skip
    lines = emulated.table([row])
    assert emulated.EMULATED in lines[0]
    assert "| toy | 8 | r=1 | 5.00 | 1.00 | 0 % | 1.00 | 50 % | 0.50 | 0 of 5 differ |" in lines
