"""What the plan of a layer runs on when its experts are spread over ranks: counts of rows, exchanges, and orders of rows.

P ranks, E experts, m = ceil(E / P): rank p holds experts p*m to (p+1)*m - 1, the last ones fewer or none; e of them are this
rank's. T tokens of this rank in rf chunks forward and rb backward. `counts` says how many rows go where:

- `Counted`, dropless: the rows that there are travel, no others. int64 on the CPU, kept by both chunks of a token, so that one
  exchange serves both phases (n = rb, or n = 1 where rf = rb and the chunks are the same):

    sent [rf, n, E]            rows of this rank's tokens for each expert
    received [rf, n, P, e]     rows from each rank for each of this rank's experts
    pairs [rf, n, P, P]        rows from each rank to each other, for all-to-alls that want to know

  one beside the other in the last axis. Reading them is the only time the host waits for a GPU: when the first rows are to leave,
  for the counts alone. What the plan has in between is launched by then.
- `Padded`, a capacity C: each expert has room for C rows from each rank, which are chunks of C and travel whether there are
  that many or not. [P, e] on the device: rows from each rank for each expert here. The host reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import CapacityError, CommunicationError
from moefx.ir import chunk_bounds
from moefx.ops import exclusive, runs
from moefx.runtime import OpTable, Runtime

Rows = list[int]  # for each rank


def experts_of(experts: int, ranks: int, rank: int) -> range:
    """The experts that a rank holds; as `torch.chunk` and DTensor's Shard(0) cut."""
    most = -(-experts // ranks)
    return range(min(rank * most, experts), min((rank + 1) * most, experts))


@dataclass(frozen=True)
class Wire:
    """How rows get to other ranks. group: of the P ranks. all_to_all and counts: see `moefx.codegen.all_to_all.AllToAll`.

    codec: what the phase's rows are encoded with, or None. layer: the name of the layer, for messages. capacity: C, or None.
    """

    group: dist.ProcessGroup
    experts: int
    all_to_all: Any
    counts: Any
    codecs: Mapping[str, Any]
    layer: str = "the layer"
    capacity: int | None = None

    @cached_property
    def ranks(self) -> int:
        return self.group.size()

    @cached_property
    def held(self) -> range:
        return experts_of(self.experts, self.ranks, self.group.rank())

    @cached_property
    def most(self) -> int:
        return -(-self.experts // self.ranks)

    @cached_property
    def wants_all_rows(self) -> bool:
        """Whether the all-to-all asks for the rows between all pairs of ranks."""
        return getattr(self.all_to_all, "wants_all_rows", False)


@dataclass
class Exchange:
    """An exchange that is under way, and what to call it if it fails."""

    pending: Any
    task: str


class ParallelRuntime(Runtime):
    """One run of a plan of `lower_parallel`; see the head of this file. degrees: (rf, rb)."""

    def __init__(
        self,
        ops: OpTable,
        device: torch.device,
        pointwise: Mapping[str, Any] | None,
        keep: bool,
        delays: Callable[[str], None] | None,
        wire: Wire,
        phase: Literal["forward", "backward"],
        degrees: tuple[int, int],
    ) -> None:
        super().__init__(ops, device, pointwise, keep, delays)
        self.wire, self.phase, self.degrees = wire, phase, degrees
        self.codec = wire.codecs.get(phase)
        self._made: dict[Any, Any] = {}  # what was made for all chunks at once; on the device by the lane that is named

    # -------------------------------------------------------------------------------------------- exchanges

    def to_experts(self, rows: Tensor, counts: Tensor, chunk: int) -> Exchange:
        """Sends rows [R, W] in the order of experts to where these are; `arrive` gives those by (source rank, expert)."""
        leaving, coming, pairs = self.splits(counts, chunk)
        return self._start(self.wire.all_to_all, rows, leaving, coming, pairs, f"A1_{chunk}")

    def to_tokens(self, rows: Tensor, counts: Tensor, chunk: int) -> Exchange:
        """The way back: rows by (source rank, expert) return to their tokens' rank, in the order in which they left it."""
        leaving, coming, pairs = self.splits(counts, chunk)
        back = None if pairs is None else [list(column) for column in zip(*pairs)]
        return self._start(self.wire.all_to_all, rows, coming, leaving, back, f"A2_{chunk}")

    def splits(self, counts: Tensor, chunk: int) -> tuple[Rows, Rows, list[Rows] | None]:
        """Rows of a chunk that go to and come from the experts of each rank, and, if the all-to-all wants it, all_rows."""
        raise NotImplementedError

    def _start(
        self, algorithm: Any, rows: Tensor, leaving: Rows, coming: Rows, pairs: list[Rows] | None, task: str
    ) -> Exchange:
        # On CUDA more rows are held than exist; see `moefx.ops`.
        try:
            known = () if pairs is None else (pairs,)
            pending = algorithm.start(rows[: sum(leaving)].contiguous(), leaving, coming, *known)
        except RuntimeError as error:
            raise self._failure(task, error) from error
        return Exchange(pending, task)

    def arrive(self, exchange: Exchange) -> Tensor:
        """The rows of an exchange; CommunicationError says in which layer, task and chunk it failed, and because of whom."""
        rows = self._wait(exchange)
        self.hold(rows)
        return rows

    def _wait(self, exchange: Exchange) -> Tensor:
        try:
            rows: Tensor = exchange.pending.wait()
        except RuntimeError as error:
            raise self._failure(exchange.task, error) from error
        return rows

    def _failure(self, task: str, error: RuntimeError) -> CommunicationError:
        chunk = f" (chunk {task.rpartition('_')[2]} of {self.degrees[self.phase == 'backward']})" if "_" in task else ""
        where = f"{self.wire.layer}, {self.phase}, task {task}{chunk}"
        return CommunicationError(f"{where}: {error}", getattr(error, "peers", ()))

    def encode(self, rows: Tensor) -> Tensor:
        """What goes over the wire in place of rows [R, D]: [R, W] bytes."""
        wire: Tensor = self.codec.encode(rows)  # type: ignore[union-attr]
        return wire

    def decode(self, wire: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Rows [R, width] from their bytes."""
        rows: Tensor = self.codec.decode(wire, width, dtype)  # type: ignore[union-attr]
        return rows

    # -------------------------------------------------------------------------------------------- picked chunks

    @staticmethod
    def pick(values: Tensor, index: Tensor) -> Tensor:
        """Some rows of what all chunks of forward saved."""
        return values.index_select(0, index)

    def _made_once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made when it is first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _rows_by_expert(self, ids: Tensor, cell: Tensor | None, cells: int) -> Tensor:
        """[cells, P, m]: how many slots of ids [T, K] each expert has, by the cell [T] of the token (None: there is one)."""
        experts, ranks, most = self.wire.experts, self.wire.ranks, self.wire.most
        bins = ids.long().clamp(-1, experts) + 1  # the first and the last one are of no expert
        if cell is not None:
            bins = bins + (cell * (experts + 2)).unsqueeze(1)
        rows = torch.zeros(cells * (experts + 2), dtype=torch.int64, device=ids.device)
        rows.scatter_add_(0, bins.reshape(-1), torch.ones_like(bins).reshape(-1))
        inside = rows.view(cells, -1)[:, 1:-1]
        missing = ranks * most - experts  # places of the last ranks without an expert
        return (torch.nn.functional.pad(inside, (0, missing)) if missing else inside).unflatten(1, (ranks, most))

    def _tell(self, rows: Tensor) -> Tensor:
        """What all ranks tell this one in counts [P, n, W], of which they get one piece each, in the same shape."""
        each = [rows.shape[1]] * self.wire.ranks
        return self._wait(self._start(self.wire.counts, rows.flatten(0, 1), each, each, None, "counts")).view_as(rows)


class Counted(ParallelRuntime):
    """Exactly the rows that are routed travel."""

    _underway: torch.cuda.Event | None = None  # after which the counts are in the host's memory

    def counts(self, ids: Tensor) -> Tensor:
        """See the head of this file; ids outside [0, E) are sent nowhere."""
        forward, backward = self.degrees
        tokens, cell, cells = ids.shape[0], None, forward
        if max(forward, backward) > 1:
            token = torch.arange(tokens, device=ids.device)
            cell = _chunk_of_token(token, tokens, forward)
            if forward != backward:
                cell, cells = cell * backward + _chunk_of_token(token, tokens, backward), forward * backward
        rows = self._rows_by_expert(ids, cell, cells)  # [cells, P, m]
        ranks, held = self.wire.ranks, len(self.wire.held)
        if self.wire.wants_all_rows:
            told = self._tell(rows.flatten(1).expand(ranks, -1, -1)).view(ranks, cells, ranks, -1)
            received, pairs = told[:, :, self.wire.group.rank()], told.sum(3).transpose(0, 1)
        else:
            received, pairs = self._tell(rows.transpose(0, 1)), rows.new_empty(cells, 0)
        received = received[..., :held].transpose(0, 1)  # [cells, P, e]
        self._made[self._lane, "there"] = self._by_chunk(received.view(forward, cells // forward, ranks, held))
        parts = (rows.flatten(1)[:, : self.wire.experts], received, pairs)
        return self._download(torch.cat([part.flatten(1) for part in parts], 1).view(forward, cells // forward, -1))

    def _download(self, counts: Tensor) -> Tensor:
        """The counts in the host's memory, where they are when they are `_read`."""
        if self._device.type != "cuda":
            return counts.cpu()
        host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        self._underway = torch.cuda.current_stream(self._device).record_event()
        return host

    def _read(self, counts: Tensor) -> Tensor:
        """The counts, when they have come."""
        if self._underway is not None:
            self._underway.synchronize()
            self._underway = None
        return counts

    def parts(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """sent, received and, where the all-to-all wants them, pairs."""
        experts, ranks, held = self.wire.experts, self.wire.ranks, len(self.wire.held)
        sent, received, pairs = self._read(counts).tensor_split([experts, experts + ranks * held], dim=-1)
        known = pairs.unflatten(-1, (ranks, ranks)) if pairs.shape[-1] else None
        return sent, received.unflatten(-1, (ranks, held)), known

    def _by_chunk(self, counts: Tensor) -> Tensor:
        """[r, ...] of this phase's chunks, of counts [rf, n, ...]."""
        return counts.sum(1 if self.phase == "forward" or self.degrees[0] == self.degrees[1] else 0)

    def splits(self, counts: Tensor, chunk: int) -> tuple[Rows, Rows, list[Rows] | None]:
        splits: tuple[Rows, Rows, list[Rows] | None] = self._made_once("splits", lambda: self._splits(counts))[chunk]
        return splits

    def _splits(self, counts: Tensor) -> list[tuple[Rows, Rows, list[Rows] | None]]:
        experts, ranks, held = self.wire.experts, self.wire.ranks, len(self.wire.held)
        theirs = [experts_of(experts, ranks, p) for p in range(ranks)]
        pairs = experts + ranks * held  # where they begin
        return [
            (
                [sum(rows[of.start : of.stop]) for of in theirs],
                [sum(rows[i : i + held]) for i in range(experts, pairs, held)] if held else [0] * ranks,
                [rows[i : i + ranks] for i in range(pairs, len(rows), ranks)] or None,
            )
            for rows in self._by_chunk(self._read(counts)).tolist()
        ]

    # -------------------------------------------------------------------------------------------- orders

    def regroup(self, counts: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """order [R], offsets [e+1], position [R, 1] that bring rows by (source rank, expert) into the order of experts."""
        rows = sum(self.splits(counts, chunk)[1])
        there = self._made_once((self._lane, "there"), lambda: self._upload(self._by_chunk(self.parts(counts)[1])))
        result: tuple[Tensor, Tensor, Tensor] = self.ops["regroup"](there[chunk], rows)
        return result

    def regroup_picked(
        self, counts: Tensor, rorder_all: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """For a chunk of backward alone: `regroup` of its gradients; then, of each of its rows in the order of experts, the
        number among all rows that arrived in forward, and among all that forward had in the order of experts."""
        picked = self._made_once((self._lane, "picked"), lambda: self._picked(counts, rorder_all))[chunk]
        return (*self.regroup(counts, chunk), *picked)

    def _upload(self, table: Tensor) -> Tensor:
        """A tensor of the host on the device, without waiting for that."""
        return (table.pin_memory() if self._device.type == "cuda" else table).to(self._device, non_blocking=True)

    def _picked(self, counts: Tensor, rorder_all: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `regroup_picked` gives beyond `regroup`, of every chunk: made at once, with one upload.

        All are runs of ascending numbers. Each piece begins at a multiple of 16 bytes, as memory of its own would: kernels
        are compiled for that.
        """
        received = self.parts(counts)[1]
        lying = received.sum(1).transpose(1, 2)  # [rf, e, P]: how forward's chunks lie in memory
        first = exclusive(lying.reshape(-1)).view_as(lying).permute(1, 2, 0)
        of_before, of_chunk = (t.permute(1, 3, 2, 0) for t in (received.cumsum(1) - received, received))  # [r, e, P, rf]
        sizes = of_chunk.flatten(1).sum(1)
        even = torch.stack([torch.zeros_like(sizes), sizes % 2], 1)  # what makes every piece even
        table = [torch.cat([t.flatten(1), even[:, i : i + 1]], 1) for i, t in enumerate((first + of_before, of_chunk))]
        cuts = [n for size in sizes.tolist() for n in (size, size % 2)]
        begins, lengths = self._upload(torch.stack(table))
        numbers = runs(begins, lengths, sum(cuts))
        arrived = rorder_all.index_select(0, numbers) if rorder_all.numel() else rorder_all
        return list(zip(arrived.split(cuts)[::2], numbers.split(cuts)[::2]))

    def rows_of_all(self, counts: Tensor, positions: Sequence[Tensor]) -> Tensor:
        """position [T, K] of every slot among the rows of all chunks of forward; -1 stays.

        A chunk without rows begins nowhere: while kernels are only made ready, its positions are not -1.
        """
        rows = self.parts(counts)[0].sum((1, 2))
        begins = zip(positions, exclusive(rows).tolist(), rows.tolist())
        return torch.cat([torch.where(p < 0, p, p + start) if held else p for p, start, held in begins])

    def arrived_of_all(self, counts: Tensor, orders: Sequence[Tensor]) -> Tensor:
        """The order of what arrived in all chunks of forward, chunk by chunk."""
        starts = exclusive(self.parts(counts)[1].sum((1, 2, 3))).tolist()
        return torch.cat([order + start for order, start in zip(orders, starts)])

    def pick_own(self, h_all: Tensor, position_all: Tensor, order: Tensor, counts: Tensor, chunk: int) -> Tensor:
        """Of the results of all chunks those of one chunk of backward, in its own order."""
        first, end = chunk_bounds(position_all.shape[0], self.degrees[1])[chunk]
        rows = sum(self.splits(counts, chunk)[0])
        return h_all.index_select(0, position_all[first:end].reshape(-1).index_select(0, order[:rows]))


class Padded(ParallelRuntime):
    """Every expert takes C rows from every rank, chunk by chunk of those: what travels never depends on the routing.

    The places that no row takes hold copies of other rows. Who receives them knows by `counts`, and computes nothing of them.
    On the CPU orders are as long as there are rows; on CUDA, places without a row come last (see `moefx.ops`).
    """

    @property
    def capacity(self) -> int:
        assert self.wire.capacity is not None
        return self.wire.capacity

    def counts(self, ids: Tensor) -> Tensor:
        """See the head of this file. A rank with more rows for an expert than it has room for is an error on all ranks: a
        CapacityError, or on CUDA an assertion on the device, which the host sees when it next waits for that."""
        rows = self._rows_by_expert(ids, None, 1)[0]  # [P, m]
        told = self._tell(torch.cat([rows, rows.max().expand(self.wire.ranks, 1)], 1).unsqueeze(1)).squeeze(1)
        most = told[:, -1]
        if most.is_cuda:
            torch._assert_async((most <= self.capacity).all(), f"{self.wire.layer}: a rank has more rows than its capacity")
        elif int(most.max()) > self.capacity:
            rank = int(most.argmax())
            raise CapacityError(
                f"{self.wire.layer}: rank {rank} has {int(most[rank])} rows for one expert, and capacity={self.capacity} is "
                f"too few; choose the model's own capacity, or capacity=None, which counts"
            )
        return told[:, : len(self.wire.held)].contiguous()

    def _slice(self, chunk: int, phase: Literal["forward", "backward"] | None = None) -> tuple[int, int]:
        """The places of each expert, of C, that a chunk has."""
        return chunk_bounds(self.capacity, self.degrees[(phase or self.phase) == "backward"])[chunk]

    def splits(self, counts: Tensor, chunk: int) -> tuple[Rows, Rows, list[Rows] | None]:
        first, end = self._slice(chunk)
        leaving = [(end - first) * len(experts_of(self.wire.experts, self.wire.ranks, p)) for p in range(self.wire.ranks)]
        own = leaving[self.wire.group.rank()]
        return leaving, [own] * self.wire.ranks, [leaving] * self.wire.ranks if self.wire.wants_all_rows else None

    # -------------------------------------------------------------------------------------------- this rank's tokens

    def queue(self, ids: Tensor) -> Tensor:
        """[T, K]: the place of every slot among those of its expert; C for slots outside [0, E)."""
        _, offsets, position = self.route(ids, self.wire.experts)
        start = offsets.long()[ids.long().clamp(0, self.wire.experts - 1)]
        return torch.where(position < 0, self.capacity, position - start)

    def route_places(self, ids: Tensor, queue: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """`route` of the slots with a place in this chunk."""
        first, end = self._slice(chunk)
        mine = torch.where((queue >= first) & (queue < end), ids.long(), -1)
        order, offsets, position = self.route(mine, self.wire.experts)
        return _filled(order, offsets, self.wire.experts * (end - first)), offsets, position

    def _numbers(self, end: int, device: torch.device) -> Tensor:
        """0, 1, ... end - 1, made once by each lane."""
        numbers: Tensor = self._made_once((self._lane, end), lambda: torch.arange(end, device=device))
        return numbers

    @staticmethod
    def outside(ids: Tensor, experts: int) -> Tensor:
        """[T, K]: -1 for slots that are no expert's, else 0."""
        return -((ids < 0) | (ids >= experts)).long()

    def pad(self, rows: Tensor, offsets: Tensor, chunk: int) -> Tensor:
        """[E * c, W] of rows [R, W] in the order of experts: c places for every expert."""
        first, end = self._slice(chunk)
        place = offsets[:-1].unsqueeze(1) + self._numbers(end - first, rows.device)  # [E, c]
        if rows.shape[0] == 0:
            return rows.new_zeros(place.numel(), rows.shape[1])
        return rows.index_select(0, place.reshape(-1).clamp_(max=rows.shape[0] - 1))

    def unpad(self, padded: Tensor, order: Tensor, offsets: Tensor, chunk: int) -> Tensor:
        """The reverse: rows [R, W], as many as the order has."""
        first, end = self._slice(chunk)
        row, edges = self._numbers(order.numel(), padded.device), offsets.long()
        expert = torch.searchsorted(edges[1:].contiguous(), row, right=True).clamp_(max=self.wire.experts - 1)
        place = (row - edges[expert]).clamp_(max=max(0, end - first - 1))
        return padded.index_select(0, expert * (end - first) + place)

    # -------------------------------------------------------------------------------------------- what arrives

    def regroup(self, counts: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """order [R], offsets [e+1], position [P * e * c, 1] that bring places by (source rank, expert) into the order of
        experts; -1 for places without a row."""
        first, end = self._slice(chunk)
        owner = self._made_once((self._lane, "owners"), lambda: self._owners(counts))[:, :, first:end].reshape(-1, 1)
        order, offsets, position = self.route(owner, len(self.wire.held))
        return _filled(order, offsets, order.numel()), offsets, position

    def _owners(self, counts: Tensor) -> Tensor:
        """[P, e, C]: the expert of the row in every place, e where there is none."""
        held = len(self.wire.held)
        place = torch.arange(self.capacity, device=counts.device)
        expert = torch.arange(held, device=counts.device).view(1, held, 1)
        return torch.where(place < counts.unsqueeze(2), expert, held)

    def regroup_picked(
        self, counts: Tensor, rposition_all: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `Counted.regroup_picked`."""
        order, offsets, position = self.regroup(counts, chunk)
        held, ranks = len(self.wire.held), self.wire.ranks
        place = torch.arange(*self._slice(chunk), device=counts.device)
        _, start, size = _chunk_of(place, self.capacity, self.degrees[0])  # of forward's chunk that has the place
        cell = torch.arange(ranks * held, device=counts.device).unsqueeze(1)  # (source rank, expert)
        number = ranks * held * start + cell * size + place - start  # [P * e, c]
        arrived = number.reshape(-1).index_select(0, order)
        return order, offsets, position, arrived, rposition_all.index_select(0, arrived).clamp_(min=0)

    # -------------------------------------------------------------------------------------------- all chunks of forward

    def rows_of_all(self, counts: Tensor, positions: Sequence[Tensor]) -> Tensor:
        """As `Counted.rows_of_all`."""
        rows, result = 0, torch.full_like(positions[0], -1)
        for chunk, position in enumerate(positions):
            first, end = self._slice(chunk, "forward")
            if held := _rows(position, self.wire.experts * (end - first)):
                result = torch.where(position < 0, result, position + rows)
                rows += held
        return result

    def arrived_of_all(self, counts: Tensor, positions: Sequence[Tensor]) -> Tensor:
        """[sum of P * e * c]: the row, among those of all chunks in the order of experts, of every place; -1 without one."""
        rows, result = 0, []
        for position in positions:
            result.append(torch.where(position < 0, -1, position + rows).squeeze(1))
            rows += _rows(position, position.numel())
        return torch.cat(result)

    def pick_own(self, h_all: Tensor, position_all: Tensor, order: Tensor, counts: Tensor, chunk: int) -> Tensor:
        """Of the results of all chunks those of one chunk of backward, in its own order."""
        return h_all.index_select(0, position_all.reshape(-1).index_select(0, order).clamp_(min=0))


def _filled(order: Tensor, offsets: Tensor, places: int) -> Tensor:
    """What is kept of an order: on CUDA as many as there can be, on the CPU as many as there are."""
    return order[: places if order.is_cuda else int(offsets[-1])]


def _rows(position: Tensor, places: int) -> int:
    """How many rows are kept of slots or places at these positions; see `_filled`."""
    return min(places, position.numel()) if position.is_cuda else int((position >= 0).sum())


def _chunk_of_token(token: Tensor, tokens: int, degree: int) -> Tensor:
    """The chunk of each token, as `chunk_bounds` cuts."""
    base, more = divmod(tokens, degree)  # the first chunks, `more` of them, have one more
    return torch.maximum(token // (base + 1), (token - more) // max(base, 1))


def _chunk_of(number: Tensor, total: int, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk of each number below `total`, as `chunk_bounds` cuts; where that begins, and its size."""
    base, more = divmod(total, degree)
    chunk = _chunk_of_token(number, total, degree)
    return chunk, chunk * base + chunk.clamp(max=more), base + (chunk < more).long()
