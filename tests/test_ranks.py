"""The helper that starts ranks: results, failures with their tracebacks, and that nothing is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks


def total(scale: int) -> tuple[int, torch.Tensor]:
    x = torch.full((2,), float(scale * dist.get_rank()))
    dist.all_reduce(x)
    return dist.get_rank(), x


def fails(bad: int) -> None:
    if dist.get_rank() == bad:
        raise ValueError(f"rank {bad} has had enough")
    dist.barrier()


def dies(bad: int) -> str:
    if dist.get_rank() == bad:
        os._exit(7)
    try:
        dist.barrier()
    except RuntimeError as error:
        return type(error).__name__
    return "no error"


def hangs(bad: int) -> int:
    if dist.get_rank() == bad:
        time.sleep(600)
    return os.getpid()


def kinds_of_threads() -> dict[str, int]:
    """By name, how the kernel schedules this process's threads."""
    kinds = {}
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # threads may end meanwhile
            kinds[comm.read_text(encoding="utf-8").strip()] = os.sched_getscheduler(int(comm.parent.name))
    return kinds


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("world", [1, 3])
def test_results_by_rank(world: int) -> None:
    expected = 10.0 * sum(range(world))
    results = run_ranks(world, total, 10)
    assert [rank for rank, _ in results] == list(range(world))
    assert all(x.tolist() == [expected, expected] for _, x in results)


def test_the_threads_of_gloo_are_batch_work_and_no_other() -> None:
    for kinds in run_ranks(2, kinds_of_threads):
        assert kinds.pop("gloo_tcp_loop") == os.SCHED_BATCH
        assert set(kinds.values()) == {os.SCHED_OTHER}


def test_a_failure_carries_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*ValueError: rank 1 has had enough"):
        run_ranks(3, fails, 1)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 1: died with exit code 7"):
        run_ranks(2, dies, 1)


def test_a_rank_that_is_meant_to_die() -> None:
    assert run_ranks(3, dies, 2, lost={2}, group_timeout_s=10) == ["RuntimeError", "RuntimeError", None]


def test_a_rank_that_hangs_shows_where() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: (still running|died).*in hangs"):
        run_ranks(2, hangs, 1, timeout_s=4)
    pid, none = run_ranks(2, hangs, 1, lost={1})
    assert none is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_only_what_can_be_imported() -> None:
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object|test_only_what"):
        run_ranks(1, lambda: None)
