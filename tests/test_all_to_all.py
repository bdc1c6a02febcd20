"""All-to-alls among processes: the same bits as torch's own, for any number of ranks and nodes; and peers that fail."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
import torch.distributed as dist
from moefx.codegen.all_to_all import ALL_TO_ALLS, AllToAll, Topology, make_all_to_all
from ranks import Place, run_ranks

from moefx.errors import CommunicationError, InputError

# Nodes of 1, 2, 3 and 4 ranks: one rank, one node, each its own, unequal nodes, nodes whose ranks are not neighbours.
NODES = [(0,), (0, 0), (0, 1), (0, 0, 1), (0, 1, 2), (0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1)]
NAMES = ["direct", "hierarchical", "pipe"]


def group() -> dist.ProcessGroup:
    return dist.distributed_c10d._get_default_group()


def on_device(x: torch.Tensor) -> torch.Tensor:
    return x.cuda() if dist.get_backend() == "nccl" else x


def random_counts(rng: random.Random, ranks: int) -> list[list[int]]:
    """Rows from each rank to each other; many pairs, and at times everybody, have none."""
    most = rng.choice([0, 1, 5, 40])
    return [[rng.choice([0, rng.randint(0, most)]) for _ in range(ranks)] for _ in range(ranks)]


def exchanges(name: str, nodes: tuple[int, ...], calls: int) -> int:
    """Exchanges under way at once, awaited in any order, against `all_to_all_single`; the rows that arrived."""
    own, ranks = dist.get_rank(), dist.get_world_size()
    exchange = make_all_to_all(name, group(), Topology(nodes))
    rng, rows = random.Random(ranks), 0
    for _ in range(calls):
        pending, expected = [], []
        for _ in range(rng.randint(1, 6)):
            counts = random_counts(rng, ranks)
            sent, received = counts[own], [counts[s][own] for s in range(ranks)]
            dtype, width = rng.choice([torch.uint8, torch.float64, torch.bfloat16]), rng.choice([0, 1, 7, 300])
            send = on_device(torch.randint(0, 100, (sum(sent), width)).to(dtype))
            want = send.new_empty(sum(received), width)
            dist.all_to_all_single(want, send, received, sent)
            expected.append(want)
            pending.append(exchange.start(send, sent, received, rng.choice([None, counts])))
        order = list(range(len(pending)))
        rng.shuffle(order)
        for i in order:
            got = pending[i].wait()
            assert got.dtype == expected[i].dtype and torch.equal(got, expected[i])
            rows += got.shape[0]
    return rows


@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_torch(name: str, nodes: tuple[int, ...]) -> None:
    assert set(NAMES) <= set(ALL_TO_ALLS)
    assert sum(run_ranks(len(nodes), exchanges, name, nodes, 8)) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_torch_on_gpus(name: str) -> None:
    if (ranks := min(4, torch.cuda.device_count())) < 2:
        pytest.skip("needs two CUDA devices")
    nodes = tuple(rank * 2 // ranks for rank in range(ranks))
    assert sum(run_ranks(ranks, exchanges, name, nodes, 8, backend="nccl")) > 0


def two_at_once(first: str, second: str) -> None:
    """Two algorithms on one group, and messages of the program's own."""
    own, ranks = dist.get_rank(), dist.get_world_size()
    exchanges_of = [make_all_to_all(name, group(), Topology((0, 0, 1, 1))) for name in (first, second)]
    send = torch.arange(ranks * 2.0).view(-1, 2) + 100 * own
    works = [dist.isend(torch.full((2,), -1.0), peer) for peer in range(ranks) if peer != own]
    pending = [exchange.start(send, [1] * ranks, [1] * ranks) for _ in range(5) for exchange in exchanges_of]
    x = torch.full((3,), float(own))
    dist.all_reduce(x)
    want = torch.stack([torch.arange(2.0) + 2 * own + 100 * source for source in range(ranks)])
    assert all(torch.equal(p.wait(), want) for p in pending) and x.tolist() == [6.0] * 3
    for peer in range(ranks):
        if peer != own:
            dist.recv(message := torch.empty(2), peer)
            assert message.tolist() == [-1.0, -1.0]
    for work in works:
        work.wait()


def test_several_algorithms_on_one_group() -> None:
    run_ranks(4, two_at_once, "hierarchical", "pipe")


def in_half_of_the_world(name: str) -> torch.Tensor:
    """Two groups of two ranks each, as in a mesh: (0, 2) and (1, 3)."""
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    own = dist.get_rank()
    half = halves[own % 2]
    exchange = make_all_to_all(name, half, Topology((0, 0) if own % 2 else (0, 1)))
    return exchange.start(torch.full((3, 1), own), [1, 2] if own < 2 else [0, 3], [1, 0] if own < 2 else [2, 3]).wait()


@pytest.mark.parametrize("name", NAMES)
def test_groups_that_are_not_the_world(name: str) -> None:
    rows = [x.flatten().tolist() for x in run_ranks(4, in_half_of_the_world, name)]
    assert rows == [[0], [1], [0, 0, 2, 2, 2], [1, 1, 3, 3, 3]]


# ------------------------------------------------------------------------------------------------ topology


def discovered() -> tuple[int, ...]:
    return Topology.discover(group()).nodes


def test_nodes_by_host_and_by_variable() -> None:
    assert run_ranks(2, discovered) == [(0, 0)] * 2
    places = [Place({"MOEFX_NODE": "b"}), Place({"GROUP_RANK": "1"}), Place({"MOEFX_NODE": "b", "GROUP_RANK": "1"})]
    assert run_ranks(3, discovered, places=places) == [(0, 1, 0)] * 3


def test_topology() -> None:
    topology = Topology.of(["x", "y", "x"])
    assert topology.nodes == (0, 1, 0) and topology.members(0) == (0, 2) and topology.members(1) == (1,)


# ------------------------------------------------------------------------------------------------ faults


def wrong_arguments() -> list[str]:
    exchange = make_all_to_all("direct", group())
    send = torch.zeros(3, 2)
    errors = []
    for args in [
        (torch.zeros(2, 3).T, [3], [3]),
        (torch.zeros(3), [3], [3]),
        (send, [1, 2], [3]),
        (send, [4], [4]),
        (send, [3], [2]),
        (send, [-3], [3]),
    ]:
        with pytest.raises(InputError) as caught:
            exchange.start(*args)
        errors.append(str(caught.value))
    with pytest.raises(InputError, match="the topology has 2 ranks, the group 1"):
        make_all_to_all("direct", group(), Topology((0, 0)))
    return errors


def test_wrong_arguments() -> None:
    errors = run_ranks(1, wrong_arguments)[0]
    parts = [
        "contiguous",
        "contiguous",
        "one for each of 1 ranks",
        "add up to 4",
        "keeps 3 rows but receives 2",
        ">= 0",
    ]
    assert all(part in error for part, error in zip(parts, errors, strict=True)), errors


def with_a_lost_rank(name: str, dies: bool, step: int) -> tuple[tuple[int, ...], str, float] | None:
    """Rank 1 dies or hangs before its exchange number `step`; who is blamed, how, and after how many seconds."""
    own, ranks = dist.get_rank(), dist.get_world_size()
    exchange: AllToAll = make_all_to_all(name, group(), Topology((0, 0, 1)))
    for i in range(step + 1):
        if own == 1 and i == step:
            if dies:
                os._exit(1)
            time.sleep(600)
        began = time.monotonic()
        try:
            exchange.start(torch.ones(2 * ranks, 5), [2] * ranks, [2] * ranks).wait()
        except CommunicationError as error:
            return error.peers, str(error), time.monotonic() - began
    return None


@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
@pytest.mark.parametrize("name", NAMES)
def test_a_lost_rank_is_named(name: str, dies: bool) -> None:
    outcomes = run_ranks(3, with_a_lost_rank, name, dies, 2, lost={1}, group_timeout_s=3, timeout_s=40)
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome is not None
        peers, text, seconds = outcome
        assert seconds < 15
        # Rank 2 hears from rank 1 only through rank 0 when that forwards: then it is rank 0 which has nothing to send.
        assert 1 in peers or (name == "hierarchical" and outcome is outcomes[2] and peers == (0,))
        assert f"rank {peers[0]} sends nothing: " in text or f"rank {peers[0]} takes nothing: " in text
