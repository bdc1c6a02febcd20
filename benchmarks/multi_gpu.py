"""Experts on several GPUs of one host: is it right, is it fast, and is the chosen degree the best one?

    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py                                # NCCL, a GPU a rank, under 8 minutes
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --only layers trace            # some parts
    torchrun --nproc-per-node 2 benchmarks/multi_gpu.py --device cpu --toy             # gloo at toy sizes: does it all run?

    correctness   outputs and all gradients against float64 on one rank: degrees, codecs, all-to-alls, uneven and empty
                  routing; bit for bit under random delays and from one all-to-all to another
    calibrate     costs of this group, kept for the later parts
    layers        step time (forward + backward) of routed layers: every r, `auto`; regret; prediction
    trace         one step for Perfetto, and how much of NCCL's time is hidden behind compute
    model         training step of a few Qwen3-MoE layers against plain expert parallelism with grouped_mm
    edges         correctness where ranks have few tokens, or one has none
    symmetric     all-to-all on symmetric memory, if torch has it
    nodes         pairs of GPUs (two GPUs: each one) as nodes, with links throttled by host copies: exchanges, layers

Times are medians of rounds in which everything that is compared has its turn, on the slowest rank. Tables come last; all
numbers go to --out ($OUT, out/multi_gpu) as multi_gpu.json. Exit code 1 if a row of correctness fails or anything crashes.

Each rank's process starts a worker (multi_gpu_parts/) and watches it: a crash, a hang or a broken GPU context costs the
row in which it happened, and a new worker goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("correctness", "calibrate", "layers", "trace", "model", "edges", "symmetric", "nodes")
GROUP_TIMEOUT_S = 60.0
GRACE_S = 15.0  # for the other ranks, when something was raised on one
MOST_RESTARTS = 5
# NVLink multicast stays off in NCCL, PyTorch and NVSHMEM: a program that dies with it can take the host's GPUs along.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1",
}  # fmt: skip
# NCCL's kernels get the next free multiprocessors, before those of products that were launched earlier; the caller may differ.
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


# ------------------------------------------------------------------------------------------------ the watch


def watch(options: argparse.Namespace) -> int:
    """Runs this rank's worker, and another behind the row in which one failed; rank 0 prints the tables."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # the ranks of one torchrun share its process
    folder = Path(tempfile.gettempdir()) / f"moefx_multi_gpu_{os.getppid()}_{os.environ['MASTER_PORT']}"
    folder.mkdir(exist_ok=True)
    deadline = time.time() + options.budget
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    crashes: list[str] = []
    for attempt in range(MOST_RESTARTS + 1):
        at = {"MOEFX_FOLDER": str(folder), "MOEFX_ATTEMPT": str(attempt), "MOEFX_DEADLINE": str(deadline)}
        environment = {PRIORITY: "1"} | os.environ | ENVIRONMENT | at
        worker = subprocess.Popen([sys.executable, *sys.argv], env=environment)
        try:
            code = _outcome(worker, folder, attempt, deadline)
        finally:
            worker.kill()
            worker.wait()
        (folder / f"ended_{attempt}_{rank}").write_text(str(code), encoding="utf-8")
        codes = _all_ended(folder, attempt, world)
        if not any(codes):
            break
        begun = [begun_rows(folder, r)[-1:] for r in range(world)]
        where = ", ".join(sorted({row for rows in begun for row in rows})) or "at the start"
        crashes.append(f"{where}: exit codes of the ranks' workers: {codes}")
        if not any(begun) or time.time() > deadline:
            break
    if rank > 0:
        return 0
    result = Result.load(options.out / "multi_gpu.json")
    result.crashes += crashes
    result.save()
    print(result.tables(), flush=True)
    return 1 if result.failed else 0


def _outcome(worker: subprocess.Popen[bytes], folder: Path, attempt: int, deadline: float) -> int:
    """The worker's exit code, once it has ended or is past its time, or when another rank's has failed a while ago."""
    patience = math.inf
    while (code := worker.poll()) is None:
        failed = any(p.read_text(encoding="utf-8") not in ("", "0") for p in folder.glob(f"ended_{attempt}_*"))
        patience = min(patience, time.time() + GRACE_S) if failed else patience
        if time.time() > min(patience, deadline + GROUP_TIMEOUT_S):
            return -1
        time.sleep(0.1)
    return code


def _all_ended(folder: Path, attempt: int, world: int) -> list[int]:
    """The exit codes of all ranks' workers of one attempt."""
    until = time.time() + 2 * (GRACE_S + GROUP_TIMEOUT_S)
    while time.time() < until:
        files = [folder / f"ended_{attempt}_{rank}" for rank in range(world)]
        texts = [p.read_text(encoding="utf-8") if p.exists() else "" for p in files]
        if all(texts):
            return [int(text) for text in texts]
        time.sleep(0.1)
    raise SystemExit("the other ranks' watches are gone")


def begun_rows(folder: Path, rank: int) -> list[str]:
    """The rows that a rank's workers have begun, in order."""
    file = folder / f"begun_{rank}"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


# ------------------------------------------------------------------------------------------------ results


@dataclass
class Result:
    """Rows by table, what failed, and what crashed; a file that survives the worker."""

    file: Path
    head: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)

    @staticmethod
    def load(file: Path) -> Result:
        if not file.exists():
            return Result(file)
        return Result(file, **json.loads(file.read_text(encoding="utf-8")))

    def save(self) -> None:
        self.failed += [f"crashed: {text}" for text in self.crashes if f"crashed: {text}" not in self.failed]
        content = {k: v for k, v in vars(self).items() if k != "file"}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1), encoding="utf-8")

    def tables(self) -> str:
        lines = [self.head]
        for name, rows in self.rows.items():
            shown = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
            columns = list(dict.fromkeys(k for row in shown for k in row))
            lines += ["", f"## {name}", "", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
            lines += [f"| {' | '.join(str(row.get(c, '')) for c in columns)} |" for row in shown]
        lines += summary(self.rows)
        lines += ["", f"{len(self.failed)} failed", *(f"  {text}" for text in self.failed)]
        return "\n".join(lines)


def summary(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """The goals of the layers, in one line each."""
    found = [row for table in ("layers", "layers between nodes") for row in rows.get(table, ()) if "_seconds" in row]
    if not found:
        return []
    regrets = [row["_regret"] for row in found]
    gains = [row["_seconds"]["r=1"] / row["_seconds"]["auto"] for row in found]
    balance = [(row["_seconds"]["r=1"] - row["_compute"]) / row["_compute"] for row in found]  # exposed exchanges / compute
    even = min(range(len(found)), key=lambda i: abs(math.log(max(balance[i], 1e-6))))
    errors = [abs(row["_predicted"]["auto"] / row["_seconds"]["auto"] - 1) for row in found]
    within = sum(r <= 0.05 for r in regrets)
    return [
        "",
        f"auto against r=1: {min(gains):.2f} to {max(gains):.2f} (goal: never below 0.98)",
        f"most balanced, exchanges / compute {balance[even]:.2f}: {gains[even]:.2f} (goal 1.3): {found[even]['']}",
        f"regret of auto: <= 5 % in {within} of {len(found)} (goal 95 %), worst {100 * max(regrets):.1f} %",
        f"prediction of auto: median error {100 * statistics.median(errors):.1f} % (goal 10 %)",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", type=lambda text: text.split(","), help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--rows", default="", help="a regular expression: the rows with such names alone")
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 3, 4, 8])
    parser.add_argument("--reserve", type=int, default=0, help="multiprocessors that chunked plans of layers and traces leave free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-layers", type=int, default=3)
    parser.add_argument("--recalibrate", action="store_true", help="measure costs again, where they are in the user's cache")
    parser.add_argument("--budget", type=float, default=440.0, help="no new row after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/multi_gpu")))
    options = parser.parse_args()
    options.only = [part for parts in options.only for part in parts] if options.only else list(PARTS)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"no parts {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 benchmarks/multi_gpu.py")
    if "MOEFX_FOLDER" in os.environ:
        from multi_gpu_parts.work import work

        return work(options)
    return watch(options)


if __name__ == "__main__":
    sys.exit(main())
