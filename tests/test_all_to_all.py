"""All-to-alls among processes: the same bits as torch's own, for any number of ranks and nodes; and peers that fail."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from moefx.codegen.all_to_all import ALL_TO_ALLS, Topology, make_all_to_all
from ranks import run_ranks


def group() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


def message(source: int, target: int, call: int) -> int:
    """Rows from a rank to another in a call; some are none."""
    return (3 * source + 5 * target + 7 * call) % 6


def exchanges(name: str, nodes: tuple[int, ...], calls: int, width: int, dtype: torch.dtype, known: bool) -> None:
    """Several exchanges under way at once, awaited in reverse, against `all_to_all_single`."""
    own, ranks = dist.get_rank(), dist.get_world_size()
    exchange = make_all_to_all(name, group(), Topology(nodes))
    pending, expected = [], []
    for call in range(calls):
        counts = [[message(s, d, call) for d in range(ranks)] for s in range(ranks)]
        sent, received = counts[own], [counts[s][own] for s in range(ranks)]
        send = torch.randint(0, 100, (sum(sent), width)).to(dtype)
        want = send.new_empty(sum(received), width)
        dist.all_to_all_single(want, send, received, sent)
        expected.append(want)
        pending.append(exchange.start(send, sent, received, counts if known else None))
    for want, exchange_under_way in zip(reversed(expected), reversed(pending)):
        got = exchange_under_way.wait()
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 1), (0, 0, 1), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("name", ALL_TO_ALLS)
def test_equal_to_torch(name: str, nodes: tuple[int, ...]) -> None:
    run_ranks(len(nodes), exchanges, name, nodes, 5, 3, torch.float32, False)
