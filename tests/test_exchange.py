"""exchange: counts and orders of rows, against a list of rows written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefx.exchange import ParallelRuntime, Wire, experts_of
from moefx.ir import chunk_bounds
from moefx.ops import OPS


class Group:
    """Of a process group only its size and this rank."""

    def __init__(self, ranks: int, rank: int) -> None:
        self._size, self._rank = ranks, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def runtime(experts: int, ranks: int, rank: int, phase: Any, degrees: tuple[int, int], counts: Any = None) -> ParallelRuntime:
    wire = Wire(Group(ranks, rank), experts, None, counts, {})  # type: ignore[arg-type]
    return ParallelRuntime(OPS, torch.device("cpu"), None, True, None, wire, phase, degrees)


@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (8, 3), (10, 4), (1, 1), (7, 7), (5, 4)])
def test_experts_are_cut_as_torch_cuts(experts: int, ranks: int) -> None:
    pieces = [piece.tolist() for piece in torch.arange(experts).chunk(ranks)]
    pieces += [[]] * (ranks - len(pieces))
    assert [list(experts_of(experts, ranks, p)) for p in range(ranks)] == pieces


Cells = list[list[list[list[int]]]]
counts_of = st.tuples(*[st.integers(1, 3)] * 4).flatmap(
    lambda n: st.lists(st.integers(0, 4), min_size=n[0] * n[1] * n[2] * n[3], max_size=n[0] * n[1] * n[2] * n[3]).map(
        lambda values: torch.tensor(values).view(n)
    )
)


def arriving(received: torch.Tensor, chunks: Any) -> list[tuple[int, int, int, int]]:
    """The rows of some cells (cf, cb) as they arrive: by source rank, then expert, then token; (source, expert, cf, cb)."""
    _, _, ranks, experts = received.shape
    return [
        (s, e, f, b)
        for s in range(ranks)
        for e in range(experts)
        for f, b in chunks
        for _ in range(int(received[f, b, s, e]))
    ]


@given(counts_of)
def test_backward_chunks_find_their_rows(received: torch.Tensor) -> None:
    """Every chunk of backward picks, of what forward has in the order of experts, the rows of its own tokens."""
    forward, backward, ranks, experts = received.shape
    if forward == backward:
        return
    first = runtime(experts * ranks, ranks, 0, "forward", (forward, backward))
    second = runtime(experts * ranks, ranks, 0, "backward", (forward, backward))
    came, in_order, orders = [], [], []
    for f in range(forward):
        rows = arriving(received, [(f, b) for b in range(backward)])
        order, offsets, position = first.regroup(received, f)
        assert position[order, 0].tolist() == list(range(len(rows)))
        experts_in_order = [rows[i][1] for i in order.tolist()]
        assert experts_in_order == sorted(experts_in_order)
        assert offsets.tolist() == [sum(e < x for e in experts_in_order) for x in range(experts + 1)]
        came += rows
        in_order += [rows[i] for i in order.tolist()]
        orders.append(order)
    rorder_all = first.arrived_of_all(received, tuple(orders))
    for b in range(backward):
        rows = arriving(received, [(f, b) for f in range(forward)])
        gorder, _, _, rorder, rindex = second.regroup_picked(received, rorder_all, b)
        mine = [rows[i] for i in gorder.tolist()]
        assert [in_order[i] for i in rindex.tolist()] == mine
        assert [came[i] for i in rorder.tolist()] == mine
        assert len(set(rindex.tolist())) == len(mine)


class Echo:
    """Counts come back as if every rank had sent this one's."""

    def start(self, rows: torch.Tensor, sent: Any, received: Any, all_rows: Any = None) -> Echo:
        self.rows = rows
        return self

    def wait(self) -> torch.Tensor:
        return self.rows


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_counts(tokens: int, top_k: int, forward: int, backward: int, seed: int) -> None:
    """Every slot is counted once, in the chunks of its token; ids outside are not counted."""
    experts, ranks = 5, 2
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    rt = runtime(experts, ranks, 0, "forward", (forward, backward), Echo())
    sent, received = rt.counts(ids)
    expected = torch.zeros_like(sent)
    for t, row in enumerate(ids.tolist()):
        f, b = (
            next(c for c, (start, end) in enumerate(chunk_bounds(tokens, r)) if start <= t < end) for r in (forward, backward)
        )
        for e in row:
            if 0 <= e < experts:
                expected[f, 0 if forward == backward else b, e] += 1
    assert torch.equal(sent, expected)
    assert received.shape == (*sent.shape[:2], ranks, 3)
    assert torch.equal(received[:, :, 0], sent[:, :, :3])
