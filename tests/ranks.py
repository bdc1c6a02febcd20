"""Ranks in processes of one machine: `run_ranks(4, function, *args)` is what `function(*args)` returns on each rank.

The function runs inside an initialised process group, with one torch thread. No process outlives the call: a rank ends
itself when its time is up, and its own tracebacks are part of the error. Function, arguments and results must be
picklable; the function must be importable, so that one defined inside a test is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Between the first failure and the end of the other ranks: time for them to say what they saw.
GRACE_S = 3.0
NETNS = 0x40000000  # CLONE_NEWNET

# Forks of one clean process that has moefx imported: a rank starts in milliseconds. It ends with this process.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch.distributed", "moefx.codegen.all_to_all"])


class RankError(AssertionError):
    """Some ranks failed; the message has their tracebacks, the first failure first."""


@dataclass(frozen=True)
class Place:
    """Where a rank runs: variables of its environment, and a network namespace by name (None: this one).

    With MASTER_ADDR and MASTER_PORT in the environment the ranks meet there, else in a file.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = None


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    group_timeout_s: float | None = None,
    lost: Collection[int] = (),
    places: Sequence[Place] | None = None,
    backend: str = "gloo",
) -> list[Any]:
    """`function(*args)` on `world` ranks; their results by rank. RankError when one raises, dies or takes too long.

    group_timeout_s: the timeout of the process group (default: timeout_s). lost: ranks that are meant to die or to hang; they
    are ended when all others are done, and their result is None. places: where each rank runs. backend: "gloo" or "nccl".
    """
    task = pickle.dumps((backend, function, args))
    places = places or [Place()] * world
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        children: list[_Child] = []
        try:
            for rank in range(world):
                children.append(
                    _Child(rank, world, task, places[rank], folder, timeout_s, group_timeout_s or timeout_s)
                )
            return _collect(children, lost, deadline)
        finally:
            for child in children:
                child.end()


class _Child:
    """One rank's process, seen from here."""

    def __init__(
        self, rank: int, world: int, task: bytes, place: Place, folder: str, timeout_s: float, group_s: float
    ) -> None:
        self.rank = rank
        self.tracebacks = Path(folder) / f"tracebacks_{rank}"
        self.pipe, theirs = _processes.Pipe()
        args = (rank, world, task, place, folder, timeout_s, group_s, theirs)
        self.process = _processes.Process(target=_rank_main, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        """Kill the process, if it still runs, and wait until it is gone."""
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def outcome(self) -> tuple[bool, Any]:
        """(True, result), or (False, what went wrong); call it once the pipe is readable."""
        try:
            done, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            return False, f"died with exit code {self.process.exitcode}\n{self.stacks()}"
        return done, value

    def stacks(self) -> str:
        """What the process wrote when its time was up."""
        return self.tracebacks.read_text(encoding="utf-8") if self.tracebacks.exists() else ""


def _collect(children: Sequence[_Child], lost: Collection[int], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[str] = []
    waiting = {child.pipe: child for child in children if child.rank not in lost}
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(pipe, Connection)
            child = waiting.pop(pipe)
            done, value = child.outcome()
            if done:
                results[child.rank] = value
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
            failures.append(f"rank {child.rank}: {value}")
            child.end()  # its connections close, as those of a process that ended by itself
    for child in waiting.values():
        child.process.join(1.0)  # if its own time is up too, it leaves its tracebacks
        failures.append(f"rank {child.rank}: still running\n{child.stacks()}")
    if failures:
        raise RankError("\n".join([f"{len(failures)} of {len(children)} ranks failed", *failures]))
    return [results.get(child.rank) for child in children]


def _rank_main(
    rank: int, world: int, task: bytes, place: Place, folder: str, timeout_s: float, group_s: float, pipe: Connection
) -> None:
    """The process of one rank. It stays until it is ended, so that no rank's leaving disturbs the others."""
    with open(Path(folder) / f"tracebacks_{rank}", "w", encoding="utf-8") as stacks:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=stacks)
        try:
            if place.namespace is not None:
                enter(place.namespace)
            os.environ.update(place.environment)
            answer = pickle.dumps((True, _run(rank, world, task, folder, group_s)))
        except BaseException:  # noqa: BLE001 - whatever it is, the caller gets to see it
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
        try:
            pipe.recv_bytes()
        except EOFError:
            os._exit(1)  # whoever started it is gone


def _run(rank: int, world: int, task: bytes, folder: str, group_s: float) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    at = "env://" if "MASTER_PORT" in os.environ else f"file://{folder}/store"
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    backend, function, args = pickle.loads(task)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=at, rank=rank, world_size=world, timeout=timedelta(seconds=group_s))
    dist.barrier()  # a rank that dies in the function does not die while others still connect
    let_senders_finish()
    return function(*args)


def let_senders_finish() -> None:
    """Keep gloo's own threads from taking a core from a thread that is sending.

    A sender holds its connection's lock while the kernel takes the bytes. gloo's thread, woken by what arrives meanwhile, spins
    for that lock; where cores are fewer than threads, it spins on the sender's core, which the sender gets back with the next
    tick of the clock, 4 ms later. A thread of batch work waits its turn instead.
    """
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads may end meanwhile
            if comm.read_text(encoding="utf-8").startswith("gloo"):
                os.sched_setscheduler(int(comm.parent.name), os.SCHED_BATCH, os.sched_param(0))


def enter(namespace: str) -> None:
    """Put this process into a network namespace that `ip netns` knows by name."""
    with open(f"/run/netns/{namespace}", encoding="utf-8") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NETNS):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
