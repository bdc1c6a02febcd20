"""All-to-alls of rows: how the rows that each rank has for each other one get there.

P ranks, node = ranks with fast links among them, S rows to send and R rows that arrive, W elements a row.

    exchange = make_all_to_all("direct", group)                   # once; every rank of the group calls it
    pending = exchange.start(send, sent_rows, received_rows)      # [S, W], ordered by destination; does not block
    rows = pending.wait()                                         # [R, W], ordered by source

All ranks start the exchanges of a group in the same order; any number may be under way, and they may be awaited in any
order. On CPUs (gloo) messages go from rank to rank, each with its own tag, so that a failure names the peer. On CUDA (NCCL)
everything is enqueued: `start` picks up the current stream, and `wait` makes the then current stream wait, not the host.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.errors import CommunicationError, InputError
from moefx.registry import Registry

Rows = Sequence[int]  # rows for, or from, each rank of the group
Peers = dict[int, Tensor]  # rank -> rows for it, or from it

# Messages of one exchange have tags of their own: this many, and then the next exchange's. The program has those below.
TAGS = 4
FIRST_TAG = 2**20
TAGS_IN_ALL = 2**30
MOMENT_S = 0.1


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node: nodes[p] is the node of rank p of the group, a number from 0 on."""

    nodes: tuple[int, ...]

    @staticmethod
    def of(names: Sequence[object]) -> Topology:
        """Ranks with equal names share a node."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return Topology(tuple(numbers[name] for name in names))

    @staticmethod
    def discover(group: dist.ProcessGroup) -> Topology:
        """Asks every rank of the group: $MOEFX_NODE where it is set, else torchrun's $GROUP_RANK, else the host's name."""
        name = os.environ.get("MOEFX_NODE") or os.environ.get("GROUP_RANK") or socket.gethostname()
        names: list[Any] = [None] * group.size()
        dist.all_gather_object(names, name, group=group)
        return Topology.of(names)

    def members(self, node: int) -> tuple[int, ...]:
        """The ranks of a node, ascending."""
        return tuple(rank for rank, its_node in enumerate(self.nodes) if its_node == node)


class Pending(Protocol):
    """An exchange that is under way."""

    def wait(self) -> Tensor:
        """The rows that have arrived, [R, W], ordered by source. CommunicationError names the peer that failed."""
        ...


class AllToAll(Protocol):
    """An algorithm for one process group. One with an attribute `wants_all_rows = True` is given `all_rows` by plans."""

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        """Begin to exchange send [S, W], contiguous, any dtype, which must not change until the wait.

        sent_rows[p] rows go to rank p of the group and received_rows[p] come from it: S and R are their sums. all_rows[s][d],
        where the caller has it: the rows from s to d for all pairs, which spares some algorithms an exchange of counts. Plans
        have it for those that want it, and call the others without.
        """
        ...


MakeAllToAll = Callable[[dist.ProcessGroup, Topology], AllToAll]
ALL_TO_ALLS: Registry[MakeAllToAll] = Registry("all-to-all", requires=("__call__",))


def make_all_to_all(name: str, group: dist.ProcessGroup, topology: Topology | None = None) -> AllToAll:
    """The named algorithm for a group. Every rank of the group calls it; without a topology they find out theirs."""
    make = ALL_TO_ALLS[name]
    topology = Topology.of(topology.nodes) if topology else Topology.discover(group)
    if len(topology.nodes) != group.size():
        raise InputError(f"the topology has {len(topology.nodes)} ranks, the group {group.size()}")
    return make(group, topology)


# ------------------------------------------------------------------------------------------------ messages


def check_rows(group: dist.ProcessGroup, send: Tensor, sent_rows: Rows, received_rows: Rows) -> None:
    """InputError unless the arguments of `start` fit each other."""
    if send.dim() != 2 or not send.is_contiguous():
        raise InputError(f"rows to send are a contiguous [S, W]; got {tuple(send.shape)}, strides {send.stride()}")
    ranks = group.size()
    if len(sent_rows) != ranks or len(received_rows) != ranks or min(*sent_rows, *received_rows) < 0:
        raise InputError(f"counts of rows are >= 0, one for each of {ranks} ranks; got {sent_rows} and {received_rows}")
    if sum(sent_rows) != send.shape[0]:
        raise InputError(f"{send.shape[0]} rows to send, but the counts {list(sent_rows)} add up to {sum(sent_rows)}")
    if sent_rows[group.rank()] != received_rows[group.rank()]:
        own = sent_rows[group.rank()], received_rows[group.rank()]
        raise InputError(f"rank {group.rank()} keeps {own[0]} rows but receives {own[1]} of its own")


_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = weakref.WeakKeyDictionary()


def next_tag(group: dist.ProcessGroup) -> int:
    """The first of TAGS tags for the group's next exchange; equal on all ranks, since they start exchanges in one order."""
    return FIRST_TAG + next(_numbers.setdefault(group, itertools.count())) * TAGS % TAGS_IN_ALL


class Messages:
    """Messages between this rank and others, under way at once: sends[p] to rank p, receives[p] from rank p.

    None are sent for empty tensors. All are posted when this is made.
    """

    def __init__(self, group: dist.ProcessGroup, sends: Peers, receives: Peers, tag: int) -> None:
        self.group = group
        self._works: list[tuple[int | None, str, dist.Work]] = []  # whose part it is, and what it is; None: all of it
        self._failed: dict[int, str] = {}
        posts: list[tuple[str, Callable[..., Any], int, Tensor]]
        posts = [("sends", dist.irecv, peer, t) for peer, t in receives.items() if t.numel()]
        posts += [("takes", dist.isend, peer, t) for peer, t in sends.items() if t.numel()]
        if any(t.is_cuda for *_, t in posts):
            operations = [dist.P2POp(post, t, group=group, group_peer=peer, tag=tag) for _, post, peer, t in posts]
            self._works = [(None, "", work) for work in dist.batch_isend_irecv(operations)]
            return
        for verb, post, peer, t in posts:
            to = {"group_src" if post is dist.irecv else "group_dst": peer}
            try:
                self._works.append((peer, verb, post(t, group=group, tag=tag, **to)))
            except RuntimeError as error:
                self._failed.setdefault(peer, f"{verb} nothing: {error}")

    def wait(self) -> None:
        """Return when all have passed; CommunicationError names the peers that failed within the group's timeout."""
        deadline = time.monotonic() + (timeout_s(self.group) if self._works else 0.0)
        for peer, verb, work in self._works:
            if peer is None:
                work.wait()  # the current stream waits
                continue
            left = max(deadline - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                # After one failure the others have a moment to show whether they failed too, but are not blamed for it.
                in_time = not self._failed or time.monotonic() < deadline
                if in_time:
                    self._failed.setdefault(peer, f"{verb} nothing: {error}")
                deadline = time.monotonic() + MOMENT_S
        if self._failed:
            failed = {dist.get_global_rank(self.group, peer): reason for peer, reason in self._failed.items()}
            text = "; ".join(f"rank {peer} {reason}" for peer, reason in failed.items())
            raise CommunicationError(f"rank {dist.get_rank()} cannot exchange rows: {text}", list(failed))


def timeout_s(group: dist.ProcessGroup) -> float:
    """Seconds after which the group's messages fail."""
    seconds: float = group._get_backend(group._device_types[0]).options._timeout.total_seconds()
    return seconds


# ------------------------------------------------------------------------------------------------ algorithms


@dataclass
class Arriving:
    """Rows that messages bring to their places in `rows`. own: behind it this rank's own rows are in theirs, on CUDA."""

    rows: Tensor
    messages: Sequence[Messages | dist.Work]
    own: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        if self.own is not None:
            torch.cuda.current_stream(self.rows.device).wait_event(self.own)
        for messages in self.messages:
            messages.wait()
        return self.rows


def in_place(
    group: dist.ProcessGroup, send: Tensor, sent_rows: Rows, received_rows: Rows
) -> tuple[Tensor, Peers, Peers]:
    """The result [R, W], with this rank's own rows in it, and the views that go to and come from each other rank."""
    rows = send.new_empty(sum(received_rows), send.shape[1])
    leaving, arriving = send.split(list(sent_rows)), rows.split(list(received_rows))
    own = group.rank()
    arriving[own].copy_(leaving[own])
    others = [peer for peer in range(group.size()) if peer != own]
    return rows, {peer: leaving[peer] for peer in others}, {peer: arriving[peer] for peer in others}


class Direct:
    """One message for each pair of ranks, all at once."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        self.group = group
        connect(group)

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        check_rows(self.group, send, sent_rows, received_rows)
        if send.is_cuda:
            rows = send.new_empty(sum(received_rows), send.shape[1])
            splits = list(received_rows), list(sent_rows)
            return Arriving(rows, [dist.all_to_all_single(rows, send, *splits, group=self.group, async_op=True)])
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        return Arriving(rows, [Messages(self.group, sends, receives, next_tag(self.group))])


class Pipe:
    """Pipe-A2A (ScheMoE, EuroSys 2024): the messages within the node and those between nodes go at once, on two channels.

    With n nodes of m ranks, t1 and t2 seconds a message within and between: max(m t1, (P-m) t2) instead of their sum. The
    channel within the node is a group of its own: with CUDA a communicator with its own stream.
    """

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        self.group = self._near = group
        # A rank of this node -> its number in the channel's group, where global ranks ascend.
        mates = topology.members(topology.nodes[group.rank()])
        self._mates = {mate: mate for mate in mates}
        if 1 < len(mates) < group.size():
            ranks = sorted(dist.get_global_rank(group, mate) for mate in mates)
            self._mates = {mate: ranks.index(dist.get_global_rank(group, mate)) for mate in mates}
            self._near = dist.new_group(ranks, timedelta(seconds=timeout_s(group)), use_local_synchronization=True)
            connect(self._near)
        connect(group)

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        check_rows(self.group, send, sent_rows, received_rows)
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        # Where no message goes to or from other ranks, nothing else would tell that the own rows have been copied.
        own = torch.cuda.current_stream(send.device).record_event() if send.is_cuda else None
        tag = next_tag(self.group)
        between = Messages(self.group, self._outside(sends), self._outside(receives), tag)
        within = Messages(self._near, self._inside(sends), self._inside(receives), tag)
        return Arriving(rows, [within, between], own)

    def _outside(self, peers: Peers) -> Peers:
        return {peer: rows for peer, rows in peers.items() if peer not in self._mates}

    def _inside(self, peers: Peers) -> Peers:
        return {self._mates[peer]: rows for peer, rows in peers.items() if peer in self._mates}


class Hierarchical:
    """First within the node, then between nodes: n-1 messages leave a rank's node instead of P-m, each m times as large.

    Rank i of a node gathers from its mates all rows for the ranks that are number i of theirs, and forwards them. A node
    with fewer ranks than another forwards for several: number j is served by rank j mod m. Receivers put the rows in order.
    Without `all_rows`, mates first tell each other how many rows they will send; on CUDA the host then waits for these.
    One node, or nodes of one rank, leave nothing to gather: then it is `Direct`.
    """

    wants_all_rows: bool

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        self.group = group
        connect(group)
        own, ranks = group.rank(), range(group.size())
        nodes = [topology.members(node) for node in range(max(topology.nodes) + 1)]
        number = [nodes[topology.nodes[rank]].index(rank) for rank in ranks]
        self._mates = nodes[topology.nodes[own]]
        self._flat = Direct(group, topology) if len(nodes) in (1, group.size()) else None
        self.wants_all_rows = self._flat is None
        # duties[f]: the ranks that mate f forwards to, itself among them.
        size = len(self._mates)
        self._duties = {f: [d for d in ranks if number[d] % size == number[f]] for f in self._mates}
        # forwarders[f]: the ranks whose rows come here through f, a rank of another node.
        others = [node for node in nodes if own not in node]
        self._forwarders = {node[number[own] % len(node)]: node for node in others}
        self._stream = torch.cuda.Stream() if dist.get_backend(group) == "nccl" else None

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        if self._flat:
            return self._flat.start(send, sent_rows, received_rows)
        check_rows(self.group, send, sent_rows, received_rows)
        tag = next_tag(self.group)
        return later(lambda: self._run(send, sent_rows, received_rows, all_rows, tag), send, self._stream)

    def _run(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None, tag: int
    ) -> Tensor:
        own, width = self.group.rank(), send.shape[1]
        leaving = send.split(list(sent_rows))
        duties = self._duties[own]
        if all_rows is None:
            counts = self._counts(send, sent_rows, tag)
        else:
            counts = {mate: [all_rows[mate][d] for d in duties] for mate in self._mates}

        parts = {f: torch.cat([leaving[d] for d in self._duties[f]]) for f in self._mates}
        within = {mate: send.new_empty(sum(counts[mate]), width) for mate in self._mates}
        within[own] = parts[own]
        Messages(self.group, without(parts, own), without(within, own), tag + 1).wait()
        held = {mate: dict(zip(duties, within[mate].split(counts[mate]))) for mate in self._mates}

        forwarded = {d: torch.cat([held[mate][d] for mate in self._mates]) for d in duties if d != own}
        between = {
            f: send.new_empty(sum(received_rows[s] for s in node), width) for f, node in self._forwarders.items()
        }
        Messages(self.group, forwarded, between, tag + 2).wait()
        rows = {mate: held[mate][own] for mate in self._mates}
        for f, node in self._forwarders.items():
            rows |= dict(zip(node, between[f].split([received_rows[s] for s in node])))
        return torch.cat([rows[source] for source in range(self.group.size())])

    def _counts(self, send: Tensor, sent_rows: Rows, tag: int) -> dict[int, list[int]]:
        """counts[mate][i]: the rows that a mate has for the i-th of the ranks that this rank forwards to."""
        own = self.group.rank()
        tell = {
            f: torch.tensor([sent_rows[d] for d in duties], device=send.device) for f, duties in self._duties.items()
        }
        told = {mate: torch.empty_like(tell[own]) for mate in self._mates}
        told[own] = tell[own]
        Messages(self.group, without(tell, own), without(told, own), tag).wait()
        return {mate: counts.tolist() for mate, counts in told.items()}


def without(peers: Peers, own: int) -> Peers:
    return {peer: rows for peer, rows in peers.items() if peer != own}


def connect(group: dist.ProcessGroup) -> None:
    """NCCL sets up a group's connections in its first call, which must then be one of all ranks."""
    if dist.get_backend(group) == "nccl":
        dist.barrier(group)


# ------------------------------------------------------------------------------------------------ several steps


def later(steps: Callable[[], Tensor], send: Tensor, stream: torch.cuda.Stream | None) -> Pending:
    """Run steps beside the caller: in a thread on the CPU; on CUDA they are enqueued now, on a stream of their own."""
    return InThread(steps) if stream is None else OnStream(steps, send, stream)


class InThread:
    """Steps of an exchange, each of which waits for the one before. Every wait inside ends within the group's timeout."""

    def __init__(self, steps: Callable[[], Tensor]) -> None:
        self._steps = steps
        self._outcome: Tensor | BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="all-to-all")
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._steps()
        except BaseException as error:  # noqa: BLE001 - raised by `wait`
            self._outcome = error

    def wait(self) -> Tensor:
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class OnStream:
    """Steps of an exchange on a CUDA stream."""

    def __init__(self, steps: Callable[[], Tensor], send: Tensor, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream(send.device))
        with torch.cuda.stream(stream):
            send.record_stream(stream)
            self._rows = steps()
            self._done = stream.record_event()

    def wait(self) -> Tensor:
        current = torch.cuda.current_stream(self._rows.device)
        current.wait_event(self._done)
        self._rows.record_stream(current)
        return self._rows


ALL_TO_ALLS.register("direct", Direct)
ALL_TO_ALLS.register("hierarchical", Hierarchical)
ALL_TO_ALLS.register("pipe", Pipe)
