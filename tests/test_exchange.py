"""exchange: counts and orders of rows, against a list of rows written out; what the host reads of them."""

from __future__ import annotations

from typing import Any

import pytest
import regions
import torch
from hypothesis import given
from hypothesis import strategies as st
from moefx.codegen.emit import emit
from moefx.passes.lower_parallel import lower_parallel
from moefx.passes.partition import Layout, expert_parallel
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify
from torch.overrides import TorchFunctionMode

from moefx.begun import first_part, second_part
from moefx.build import load
from moefx.exchange import Counted, Padded, Wire, experts_of
from moefx.holding import holding
from moefx.ir import chunk_bounds
from moefx.leaves import LeafBinder
from moefx.ops import OPS


class Group:
    """Of a process group only its size and this rank."""

    def __init__(self, ranks: int, rank: int) -> None:
        self._size, self._rank = ranks, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def runtime(experts: int, ranks: int, rank: int, phase: Any, degrees: tuple[int, int], counts: Any = None) -> Counted:
    wire = Wire(Group(ranks, rank), experts, None, counts, {})  # type: ignore[arg-type]
    return Counted(OPS, torch.device("cpu"), None, True, None, wire, phase, degrees)


def without_sent(received: torch.Tensor) -> torch.Tensor:
    """Counts of a rank that sends nothing."""
    forward, backward, ranks, experts = received.shape
    return torch.cat([received.new_zeros(forward, backward, ranks * experts), received.flatten(2)], 2)


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


def test_positions_that_no_kernel_has_written_are_rows_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """While kernels are only made ready positions are zeros, also in chunks that have no rows; what is read by them exists."""
    monkeypatch.setattr("moefx.exchange._rows", lambda position, places: min(places, position.numel()))  # as on CUDA
    wire = Wire(Group(2, 0), 7, None, None, {}, capacity=2)  # type: ignore[arg-type]
    padded = Padded(OPS, torch.device("cpu"), None, True, None, wire, "backward", (4, 2))
    positions = [torch.zeros(3, 3, dtype=torch.int64) for _ in range(4)]
    rows = sum(min(7 * (end - first), 9) for first, end in chunk_bounds(2, 4))
    assert 0 <= int(padded.rows_of_all(torch.empty(0), positions).max()) < rows

    counted = runtime(2, 1, 0, "backward", (3, 1))
    sent = torch.tensor([[[1, 2]], [[2, 1]], [[0, 0]]])  # [rf, n, E]: the last chunk's slots are no expert's
    counts = torch.cat([sent, sent.new_zeros(3, 1, 2)], 2)
    found = counted.rows_of_all(counts, positions[:3])
    assert found[:6].unique_consecutive().tolist() == [0, 3] and int(found.max()) < 6


@given(counts_of)
def test_backward_chunks_find_their_rows(received: torch.Tensor) -> None:
    """Every chunk of backward picks, of what forward has in the order of experts, the rows of its own tokens."""
    forward, backward, ranks, experts = received.shape
    if forward == backward:
        return
    first = runtime(experts * ranks, ranks, 0, "forward", (forward, backward))
    second = runtime(experts * ranks, ranks, 0, "backward", (forward, backward))
    counts = without_sent(received)
    came, in_order, orders = [], [], []
    for f in range(forward):
        rows = arriving(received, [(f, b) for b in range(backward)])
        order, offsets, position = first.regroup(counts, f)
        assert position[order, 0].tolist() == list(range(len(rows)))
        assert all(part.data_ptr() % 16 == 0 for part in (order, offsets, position) if part.numel())
        experts_in_order = [rows[i][1] for i in order.tolist()]
        assert experts_in_order == sorted(experts_in_order)
        assert offsets.tolist() == [sum(e < x for e in experts_in_order) for x in range(experts + 1)]
        came += rows
        in_order += [rows[i] for i in order.tolist()]
        orders.append(order)
    rorder_all = first.arrived_of_all(counts, orders)
    for b in range(backward):
        rows = arriving(received, [(f, b) for f in range(forward)])
        gorder, offsets, _, rorder, rindex = second.regroup_picked(counts, rorder_all, b)
        assert all(part.data_ptr() % 16 == 0 for part in (gorder, offsets, rorder, rindex) if part.numel())
        mine = [rows[i] for i in gorder.tolist()]
        assert [in_order[i] for i in rindex.tolist()] == mine
        assert [came[i] for i in rorder.tolist()] == mine
        assert len(set(rindex.tolist())) == len(mine)


class Echo:
    """What is sent comes back, as if every rank had sent this one's."""

    rows: torch.Tensor

    def start(self, rows: torch.Tensor, sent: Any, received: Any, all_rows: Any = None) -> Echo:
        pending = Echo()
        pending.rows = rows
        return pending

    def wait(self) -> torch.Tensor:
        return self.rows


@given(st.integers(0, 20), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_counts(tokens: int, top_k: int, forward: int, backward: int, seed: int) -> None:
    """Every slot is counted once, in the chunks of its token; ids outside are not counted."""
    experts, ranks = 5, 2
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    rt = runtime(experts, ranks, 0, "forward", (forward, backward), Echo())
    sent, received, pairs = rt.parts(rt.counts(ids))
    assert pairs is None
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


# ------------------------------------------------------------------------------------------------ what the host reads


THERE = torch.device("cpu", 0)  # the host is the "cpu" without a number


class OnDevice(torch.Tensor):
    """Claims to be on a GPU. The host gets at its values by `cpu` alone, which is counted."""

    reads = 0

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return THERE

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("item", "tolist", "numpy", "__int__", "__bool__", "__float__", "__index__", "nonzero"):
            raise AssertionError(f"the host waits for the device in {func.__name__}")
        if func is torch.Tensor.cpu:
            OnDevice.reads += 1
            return plain(args[0])
        return super().__torch_function__(func, types, args, kwargs)


class MadeThere(TorchFunctionMode):
    """What is made on the device is on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        there = (kwargs or {}).get("device") == THERE
        return result.as_subclass(OnDevice) if there and isinstance(result, torch.Tensor) else result


def plain(x: Any) -> Any:
    return x.as_subclass(torch.Tensor) if isinstance(x, torch.Tensor) else x


def as_kernel(op: Any) -> Any:
    """An op that reads the device's memory itself, as a kernel does."""
    return lambda *args: None if (y := op(*map(plain, args))) is None else y.as_subclass(OnDevice)


def whole(steps: Any) -> Any:
    """What a plan returns when nothing runs beside it."""
    return second_part(first_part(steps, "cpu"), "cpu")


KERNELS = {**OPS, **{name: as_kernel(OPS[name]) for name in ("grouped_linear", "grouped_wgrad", "grouped_wgrad_add")}}


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("degrees", [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize("capacity", [None, 20])
def test_the_host_waits_once_without_a_capacity_and_never_with_one(
    capacity: int | None, degrees: tuple[int, int], position: Any, identity: bool
) -> None:
    """Per layer, in forward; nothing is read in backward. Numbers are those of the definition."""
    region = simplify(regions.region("swiglu_fused", weight_position=position, identity=identity))
    params = {n: torch.randn(s, dtype=torch.float64) for n, s in regions.STYLES["swiglu_fused"]()[2].items()}
    local = holding(region, params, 1, 0).region
    plans = []
    for phase, degree in zip(("forward", "backward"), degrees):
        graph = expert_parallel(degree, phase, Layout())  # type: ignore[arg-type]
        order = schedule(graph, "fifo")
        plans.append(lower_parallel(region, local, graph, order, degrees[0], padded=capacity is not None))
    emitted = load(emit(local, *plans, name="region"))
    wire = Wire(Group(1, 0), regions.E, Echo(), Echo(), {}, capacity=capacity)  # type: ignore[arg-type]

    def runtime(phase: Any) -> Any:
        made = (Counted if capacity is None else Padded)(
            KERNELS, torch.device("cpu"), None, True, None, wire, phase, degrees
        )
        made.arrive = lambda exchange: exchange.pending.wait()  # no stream holds its rows
        return made

    x, w, gy = (torch.randn(n, dtype=torch.float64) for n in ((9, regions.D), (9, 2), (9, regions.D)))
    ids = torch.stack([torch.randperm(regions.E + 1)[:2] for _ in range(9)])
    binder = LeafBinder(local.leaves)
    leaves = [leaf.as_subclass(OnDevice) for leaf in binder.bind(params, False)[0]]
    grads = binder.gradients(params, set(params))
    leaf_grads = [g.as_subclass(OnDevice) for g in grads.leaves if g is not None]
    given = (t.as_subclass(OnDevice) for t in (x, ids, w))
    with MadeThere():
        OnDevice.reads = 0
        y, saved = whole(emitted.forward(runtime("forward"), *given, leaves))
        reads = [OnDevice.reads]
        gx, gw = whole(emitted.backward(runtime("backward"), saved, gy.as_subclass(OnDevice), leaves, leaf_grads))
    assert [*reads, OnDevice.reads - reads[0]] == [int(capacity is None), 0]

    sources = [t.requires_grad_() for t in (x, w, *params.values())]
    inputs = regions.Inputs(x, ids, w)
    expected = regions.reference(region, inputs, params)
    torch.testing.assert_close(plain(y), expected, rtol=1e-10, atol=1e-10)
    mine = [plain(gx), plain(gw), *(grads.finish()[name] for name in params)]
    for got, want in zip(mine, regions.gradients(expected, sources, gy)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
