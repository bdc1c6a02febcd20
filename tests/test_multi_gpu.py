"""benchmarks/multi_gpu.py at toy sizes with gloo, so that it is known to work before there is a machine with GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import multi_gpu  # noqa: E402
from multi_gpu_parts import layers, traces  # noqa: E402


def run(tmp_path: Path, ranks: int, *args: str, script: Path | None = None) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the results."""
    script = script or ROOT / "benchmarks" / "multi_gpu.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [*torchrun, str(script), "--device", "cpu", "--toy", "--out", str(tmp_path / "out"), *args],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    file = tmp_path / "out" / "multi_gpu.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return done.returncode, done.stdout + done.stderr, results


def test_all_parts_run(tmp_path: Path) -> None:
    code, text, results = run(tmp_path, 2, "--rows", "float32.*r=4/2|^(?!float32|bfloat16)")
    assert code == 0, text
    assert not results["failed"]
    rows = results["rows"]
    assert list(rows) == [*multi_gpu.PARTS, "layers between nodes"]
    assert [row["result"] for row in rows["nodes"]] == ["OK"] * 3, "nodes of one rank"
    assert len(rows["correctness"]) > 15
    assert {row["result"] for row in rows["correctness"]} == {"OK"}
    for row in rows["layers"]:
        assert set(row["_seconds"]) == set(row["_predicted"]) == {"r=1", "r=2", "auto", "costs"}
    for row in rows["trace"]:
        assert traces.events_of(tmp_path / "out" / row["file"])
    (model,) = rows["model"]
    assert model["result"] == "OK"
    assert "regret of auto" in text
    assert "0 failed" in text


def test_nodes_of_two(tmp_path: Path) -> None:
    """Both ways over throttled links bring what the direct exchange brings."""
    code, text, results = run(tmp_path, 4, "--only", "nodes")
    assert code == 0, text
    assert [row["result"] for row in results["rows"]["nodes"]] == ["OK"] * 3
    between = results["rows"]["layers between nodes"]
    assert [set(row["_seconds"]) for row in between] == [{"r=1", "r=2", "auto", "costs"}] * len(layers.TOY_TOKENS)


CRASH = """
import os, sys
sys.path[:0] = [{benchmarks!r}, {root!r}]
import multi_gpu

if "MOEFX_FOLDER" in os.environ:
    from moefx.codegen.codecs import CODECS, Cast

    class Deadly(Cast):
        def decode(self, wire, d_model, dtype):
            if os.environ["RANK"] == "1":
                {what}
            return super().decode(wire, d_model, dtype)

    CODECS["bf16"] = Deadly(CODECS["bf16"].target)
sys.exit(multi_gpu.main())
"""


@pytest.mark.parametrize("what", ["os._exit(3)", "raise ValueError('of one rank alone')"])
def test_a_crash_costs_one_row(tmp_path: Path, what: str) -> None:
    script = tmp_path / "crash.py"
    script.write_text(CRASH.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), what=what), encoding="utf-8")
    code, text, results = run(
        tmp_path, 2, "--only", "correctness,symmetric", "--rows", "float32, random, r=2/2|vdev", script=script
    )  # fmt: skip
    assert code == 1, text
    rows = {row[""]: row["result"] for row in results["rows"]["correctness"]}
    assert rows.get("float32, random, r=2/2, bf16") != "OK"
    assert rows["float32, random, r=2/2"] == rows["float32, random, r=2/2, zfp"] == "OK"
    assert results["rows"]["symmetric"]
    assert results["failed"]
    assert all("r=2/2, bf16" in text for text in results["failed"])


def test_a_wrong_result_fails(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    wrong = "return 1.1 * super().decode(wire, d_model, dtype)"
    script.write_text(CRASH.format(benchmarks=str(ROOT / "benchmarks"), root=str(ROOT), what=wrong), encoding="utf-8")
    code, text, results = run(tmp_path, 2, "--only", "correctness", "--rows", "float32, random, r=2/2, bf16", script=script)
    assert code == 1, text
    (row,) = results["rows"]["correctness"]
    assert row["result"] == "FAIL"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs")
def test_without_gpus_it_says_so(tmp_path: Path) -> None:
    code, text, _ = run(tmp_path, 1, "--device", "cuda")
    assert code == 1
    assert "1 ranks need as many GPUs; this machine has 0" in text


def kernel(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_hidden_share() -> None:
    """Communication counts once however many kernels it has, and is hidden where any compute runs."""
    events = [
        kernel("ncclDevKernel_SendRecv", 0, 10), kernel("ncclDevKernel_SendRecv", 5, 10),
        kernel("grouped_linear", 8, 3), kernel("act", 9, 4), kernel("combine", 20, 5),
        kernel("Memcpy HtoD", 0, 30, "gpu_memcpy"), {"ph": "M", "name": "process_name"},
    ]  # fmt: skip
    found = traces.overlap_of(events, traces.is_nccl)
    assert found == traces.Overlap(communication=15, hidden=5, compute=10, span=25)
    assert "33 % of 15 us hidden, 10 us exposed" in str(found)
