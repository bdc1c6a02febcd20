"""A worker: one rank in the process group, its rows and its clock."""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layer import milliseconds
from multi_gpu import GRACE_S, GROUP_TIMEOUT_S, Result, begun_rows


class Bench:
    """A worker: this rank's device and group, what has been done, and what came out (on rank 0)."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.toy = options, options.toy
        self.folder, attempt = Path(os.environ["MOEFX_FOLDER"]), int(os.environ["MOEFX_ATTEMPT"])
        self.deadline, self.began = float(os.environ["MOEFX_DEADLINE"]), time.time()
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.skip = {row for rank in range(self.world) for row in begun_rows(self.folder, rank)}
        self.cuda = options.device == "cuda"
        self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            "nccl" if self.cuda else "gloo", init_method=f"file://{self.folder}/store_{attempt}", rank=self.rank,
            world_size=self.world, timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )  # fmt: skip
        self.group = dist.distributed_c10d._get_default_group()
        dist.barrier()
        self.outcomes = dist.FileStore(f"{self.folder}/outcomes_{attempt}", self.world)
        self.result = Result.load(options.out / "multi_gpu.json") if attempt else Result(options.out / "multi_gpu.json")
        device = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.result.head = f"{self.world} x {device}, torch {torch.__version__}{', toy sizes' if self.toy else ''}"
        settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(("NCCL_", "TORCH_NCCL_"))]
        settings += [f"reserve={options.reserve}"] if options.reserve else []
        self.result.head += f"; {' '.join(settings)}" if self.cuda else ""
        self.log(f"{self.result.head}; attempt {attempt}, {self.deadline - time.time():.0f} s left")

    def log(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        shared = [value]
        dist.broadcast_object_list(shared)
        return shared[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value."""
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def row(self, table: str, name: str, make: Callable[[], dict[str, Any]], reserve_s: float = 0.0) -> dict[str, Any]:
        """One row of a table, unless an earlier worker began it; make: gives its cells, on rank 0 those that are kept.

        What raises on all ranks costs this row; what raises on one alone ends the workers.
        """
        key = f"{table}: {name}"
        if key in self.skip or not re.search(self.options.rows, name):
            return {}
        if self.share(time.time() + reserve_s > self.deadline):
            self.keep(table, {"": name, "result": "left out: no time"})
            return {}
        with (self.folder / f"begun_{self.rank}").open("a", encoding="utf-8") as file:
            file.write(key + "\n")
        began, cells, problem = time.time(), dict[str, Any](), ""
        try:
            cells = make()
        except torch.OutOfMemoryError as error:
            problem = f"out of memory: {str(error)[:80]}"
        except Exception as error:  # noqa: BLE001 - the other rows still tell something
            traceback.print_exc()
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:200].replace("|", "/")
        problems = self.problems(key, problem)
        if problems or time.time() - began > 2:  # not after each of a hundred small rows
            gc.collect()
            if self.cuda:
                torch.cuda.empty_cache()
        if problems:
            cells = {"result": problems[0]}
            if not problems[0].startswith("out of memory"):
                self.result.failed.append(f"{key}: {problems[0]}")
        self.log(f"{key}: {', '.join(f'{k} {v}' for k, v in cells.items() if k[:1] != '_')} ({time.time() - began:.1f} s)")
        self.keep(table, {"": name, **cells})
        return cells

    def problems(self, row: str, own: str) -> list[str]:
        """What went wrong in a row, by the ranks where something did. Ends the worker if the others do not finish the row."""
        self.outcomes.set(f"{row} {self.rank}", own)
        try:
            patience = GRACE_S if own else 2 * GROUP_TIMEOUT_S
            self.outcomes.wait([f"{row} {rank}" for rank in range(self.world)], timedelta(seconds=patience))
        except RuntimeError:
            print(f"rank {self.rank}: {row}: {own or 'the other ranks do not finish'}", flush=True)
            os._exit(1)
        texts = [self.outcomes.get(f"{row} {rank}").decode() for rank in range(self.world)]
        return [text for text in texts if text]

    def keep(self, table: str, cells: dict[str, Any]) -> None:
        self.result.rows.setdefault(table, []).append(cells)
        if self.rank == 0:
            self.result.save()

    def judged(self, table: str, name: str, cells: dict[str, Any], passed: bool) -> dict[str, Any]:
        """Cells with a verdict: all ranks have to pass."""
        passed = all(self.gathered(passed))
        if not passed:
            self.result.failed.append(f"{table}: {name}: {cells}")
        return {**cells, "result": "OK" if passed else "FAIL"}

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def in_turns(self, works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Median seconds of each on the slowest rank. One sample: the mean of calls in a row, about 30 ms of them."""
        repeats: dict[str, int] = {}
        for name, work in works.items():
            work()  # compiles
            once = torch.tensor(self.seconds(work, 1), dtype=torch.float64, device=self.device)
            dist.all_reduce(once, dist.ReduceOp.MAX)
            repeats[name] = 1 if self.toy else max(1, min(10, math.ceil(0.03 / float(once))))
        samples = [[self.seconds(work, repeats[n]) for n, work in works.items()] for _ in range(rounds)]
        slowest = torch.tensor(samples, dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return dict(zip(works, slowest.median(0).values.tolist()))

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        dist.barrier()
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            return (time.perf_counter() - began) / repeats
        return 1e-3 * milliseconds(work, repeats)
