"""What the plan of a layer runs on when its experts are spread over ranks: counts of rows, exchanges, and orders of rows.

P ranks, E experts, m = ceil(E / P): rank p holds experts p*m to (p+1)*m - 1, the last ones fewer. T tokens of this rank in
rf chunks forward and rb backward. Counts are kept by both chunks of a token, so that one exchange serves both phases:

    sent [rf, n, E]            rows of this rank's tokens for each expert
    received [rf, n, P, e]     rows from each rank for each of this rank's e experts       (both int64, on the CPU)

with n = rb, or n = 1 where rf = rb and the chunks are the same. Reading them is the only time the host waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import CommunicationError
from moefx.ir import chunk_bounds
from moefx.runtime import OpTable, Runtime


def experts_of(experts: int, ranks: int, rank: int) -> range:
    """The experts that a rank holds; as `torch.chunk` and DTensor's Shard(0) cut."""
    most = -(-experts // ranks)
    return range(min(rank * most, experts), min((rank + 1) * most, experts))


@dataclass(frozen=True)
class Wire:
    """How rows get to other ranks. group: of the P ranks. all_to_all and counts: see `moefx.codegen.all_to_all.AllToAll`.

    codec: what the phase's rows are encoded with, or None. layer: the name of the layer, for messages.
    """

    group: dist.ProcessGroup
    experts: int
    all_to_all: Any
    counts: Any
    codecs: Mapping[str, Any]
    layer: str = "the layer"

    @property
    def ranks(self) -> int:
        return self.group.size()

    @property
    def held(self) -> range:
        return experts_of(self.experts, self.ranks, self.group.rank())

    @property
    def most(self) -> int:
        return -(-self.experts // self.ranks)


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

    # -------------------------------------------------------------------------------------------- counts

    def counts(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """sent and received for expert ids [T, K]; ids outside [0, E) are sent nowhere."""
        forward, backward = self.degrees
        cells = forward * (1 if forward == backward else backward)
        experts, ranks, most = self.wire.experts, self.wire.ranks, self.wire.most
        cell = _chunk_of(ids, forward)
        if forward != backward:
            cell = cell * backward + _chunk_of(ids, backward)
        bins = (cell.unsqueeze(1) * (ranks * most) + ids.long()).reshape(-1)
        outside = (ids < 0) | (ids >= experts)
        bins = bins.masked_fill(outside.reshape(-1), cells * ranks * most)
        rows = torch.zeros(cells * ranks * most + 1, dtype=torch.int64, device=ids.device)
        rows.scatter_add_(0, bins, torch.ones_like(bins))
        rows = rows[:-1].view(cells, ranks, most)
        out = rows.transpose(0, 1).reshape(ranks * cells, most).contiguous()
        arrived = self._wait(self._start(self.wire.counts, out, [cells] * ranks, [cells] * ranks, "counts"))
        both = torch.stack([rows.reshape(-1), arrived.reshape(-1)]).cpu()
        sent = both[0].view(forward, -1, ranks * most)[..., :experts]
        received = both[1].view(ranks, forward, cells // forward, most).permute(1, 2, 0, 3)[..., : len(self.wire.held)]
        return sent.contiguous(), received.contiguous()

    def _of_chunk(self, counts: Tensor, chunk: int) -> Tensor:
        """The counts of one chunk of this phase."""
        if self.phase == "forward" or self.degrees[0] == self.degrees[1]:
            return counts[chunk].sum(0)
        return counts[:, chunk].sum(0)

    def _by_rank(self, sent: Tensor, received: Tensor, chunk: int) -> tuple[list[int], list[int]]:
        """Rows of a chunk that go to and come from the experts of each rank."""
        mine = torch.nn.functional.pad(self._of_chunk(sent, chunk), (0, self.wire.ranks * self.wire.most - self.wire.experts))
        return mine.view(self.wire.ranks, -1).sum(1).tolist(), self._of_chunk(received, chunk).sum(1).tolist()

    # -------------------------------------------------------------------------------------------- exchanges

    def to_experts(self, rows: Tensor, sent: Tensor, received: Tensor, chunk: int) -> Exchange:
        """Sends rows [R, W] in the order of experts to where these are; `arrive` gives those by (source rank, expert)."""
        leaving, coming = self._by_rank(sent, received, chunk)
        return self._start(self.wire.all_to_all, rows, leaving, coming, f"A1_{chunk}")

    def to_tokens(self, rows: Tensor, sent: Tensor, received: Tensor, chunk: int) -> Exchange:
        """The way back: rows by (source rank, expert) return to their tokens' rank, in the order in which they left it."""
        leaving, coming = self._by_rank(sent, received, chunk)
        return self._start(self.wire.all_to_all, rows, coming, leaving, f"A2_{chunk}")

    def _start(self, algorithm: Any, rows: Tensor, leaving: list[int], coming: list[int], task: str) -> Exchange:
        # On CUDA more rows are held than exist; see `moefx.ops`.
        try:
            pending = algorithm.start(rows[: sum(leaving)].contiguous(), leaving, coming)
        except RuntimeError as error:
            raise self._failure(task, error) from error
        return Exchange(pending, task)

    def arrive(self, exchange: Exchange) -> Tensor:
        """The rows of an exchange; CommunicationError says in which layer, task and chunk it failed, and because of whom."""
        rows = self._wait(exchange)
        if rows.is_cuda:
            rows.record_stream(torch.cuda.current_stream(rows.device))
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

    # -------------------------------------------------------------------------------------------- orders

    def regroup(self, received: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        """order [R], offsets [e+1], position [R, 1] that bring rows by (source rank, expert) into the order of experts."""
        rows = self._of_chunk(received, chunk)  # [P, e]
        starts = _exclusive(rows.reshape(-1)).view_as(rows)
        order = self._segments(starts.t(), rows.t())
        position = torch.empty_like(order)
        position[order] = torch.arange(order.numel(), device=order.device)
        offsets = torch.nn.functional.pad(rows.sum(0).cumsum(0), (1, 0)).int().to(self._device, non_blocking=True)
        return order, offsets, position.unsqueeze(1)

    def regroup_picked(
        self, received: Tensor, rorder_all: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """For a chunk of backward alone: `regroup` of its gradients; then, of each of its rows in the order of experts, the
        number among all rows that arrived in forward, and among all that forward had in the order of experts."""
        order, offsets, position = self.regroup(received, chunk)
        by_forward = received.sum(1)  # [rf, P, e]
        by_expert = by_forward.transpose(1, 2)  # [rf, e, P]: how forward's chunks lie in memory
        starts = _exclusive(by_expert.reshape(-1)).view_as(by_expert)
        starts = starts + received[:, :chunk].sum(1).transpose(1, 2)
        index = self._segments(starts.permute(1, 2, 0), received[:, chunk].permute(2, 1, 0))
        return order, offsets, position, rorder_all.index_select(0, index), index

    def _segments(self, starts: Tensor, lengths: Tensor) -> Tensor:
        """start, start + 1, ... of every segment, one behind the other: int64 on the device, without the host waiting."""
        lengths = lengths.reshape(-1)
        total = int(lengths.sum())
        shift = starts.reshape(-1) - _exclusive(lengths)
        shift, lengths = torch.stack([shift, lengths]).to(self._device, non_blocking=True)
        repeated = torch.repeat_interleave(shift, lengths, output_size=total)
        return repeated + torch.arange(total, device=self._device)

    # -------------------------------------------------------------------------------------------- picked chunks

    def rows_of_all(self, sent: Tensor, positions: tuple[Tensor, ...]) -> Tensor:
        """position [T, K] of every slot among the rows of all chunks of forward; -1 stays."""
        starts = _exclusive(sent.sum((1, 2))).tolist()
        return torch.cat([torch.where(p < 0, p, p + start) for p, start in zip(positions, starts)])

    def arrived_of_all(self, received: Tensor, orders: tuple[Tensor, ...]) -> Tensor:
        """The order of what arrived in all chunks of forward, chunk by chunk."""
        starts = _exclusive(received.sum((1, 2, 3))).tolist()
        return torch.cat([order + start for order, start in zip(orders, starts)])

    def pick_own(self, h_all: Tensor, position_all: Tensor, order: Tensor, sent: Tensor, chunk: int) -> Tensor:
        """Of the results of all chunks those of one chunk of backward, in its own order."""
        first, end = chunk_bounds(position_all.shape[0], self.degrees[1])[chunk]
        rows = int(self._of_chunk(sent, chunk).sum())
        return h_all.index_select(0, position_all[first:end].reshape(-1).index_select(0, order[:rows]))

    @staticmethod
    def pick(values: Tensor, index: Tensor) -> Tensor:
        """Some rows of what all chunks of forward saved."""
        return values.index_select(0, index)


def _chunk_of(ids: Tensor, degree: int) -> Tensor:
    """[T]: the chunk of each token, as `chunk_bounds` cuts."""
    tokens = ids.shape[0]
    base, more = divmod(tokens, degree)
    token = torch.arange(tokens, device=ids.device)
    large = more * (base + 1)
    return torch.where(token < large, token // (base + 1), more + (token - large) // max(base, 1))


def _exclusive(counts: Tensor) -> Tensor:
    """Sums of all that come before."""
    return counts.cumsum(0) - counts
