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

# Messages of one exchange have tags of their own: this many, and then the next exchange's.
TAGS = 4
LAST_TAG = 2**30


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
    """An algorithm for one process group."""

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        """Begin to exchange send [S, W], contiguous, any dtype, which must not change until the wait.

        sent_rows[p] rows go to rank p of the group and received_rows[p] come from it: S and R are their sums. all_rows[s][d],
        where the caller has it: the rows from s to d for all pairs, which spares some algorithms an exchange of counts.
        """
        ...


MakeAllToAll = Callable[[dist.ProcessGroup, Topology], AllToAll]
ALL_TO_ALLS: Registry[MakeAllToAll] = Registry("all-to-all", requires=("__call__",))


def make_all_to_all(name: str, group: dist.ProcessGroup, topology: Topology | None = None) -> AllToAll:
    """The named algorithm for a group. Every rank of the group calls it; without a topology they find out theirs."""
    make = ALL_TO_ALLS[name]
    topology = topology or Topology.discover(group)
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
    return next(_numbers.setdefault(group, itertools.count())) * TAGS % LAST_TAG


class Messages:
    """Messages between this rank and others, under way at once: sends[p] to rank p, receives[p] from rank p.

    None are sent for empty tensors. All are posted when this is made.
    """

    def __init__(self, group: dist.ProcessGroup, sends: Peers, receives: Peers, tag: int) -> None:
        self.group = group
        self._works: list[tuple[int, str, dist.Work]] = []  # the peer, what it does not do if this fails
        self._failed: dict[int, str] = {}
        posts = [("sends", dist.irecv, peer, t) for peer, t in receives.items() if t.numel()]
        posts += [("takes", dist.isend, peer, t) for peer, t in sends.items() if t.numel()]
        if any(t.is_cuda for *_, t in posts):
            operations = [dist.P2POp(post, t, group=group, group_peer=peer, tag=tag) for _, post, peer, t in posts]
            self._works = [(-1, "", work) for work in dist.batch_isend_irecv(operations)]
            return
        for verb, post, peer, t in posts:
            to = {"group_src" if post is dist.irecv else "group_dst": peer}
            try:
                self._works.append((peer, verb, post(t, group=group, tag=tag, **to)))
            except RuntimeError as error:
                self._failed.setdefault(peer, f"{verb} nothing: {error}")

    def wait(self) -> None:
        """Return when all have passed; CommunicationError names the peers that failed within the group's timeout."""
        deadline = time.monotonic() + timeout_s(self.group)
        for peer, verb, work in self._works:
            if peer < 0:
                work.wait()  # the current stream waits
                continue
            # After a failure the others have a moment to show whether they failed too.
            left = max(deadline - time.monotonic(), 0.001) if not self._failed else 0.1
            try:
                work.wait(timedelta(seconds=left))
            except RuntimeError as error:
                self._failed.setdefault(peer, f"{verb} nothing: {error}")
        if self._failed:
            text = "; ".join(f"rank {peer} {reason}" for peer, reason in self._failed.items())
            own, ranks = self.group.rank(), self.group.size()
            raise CommunicationError(f"rank {own} of {ranks} cannot exchange rows: {text}", list(self._failed))


def timeout_s(group: dist.ProcessGroup) -> float:
    """Seconds after which the group's messages fail."""
    seconds: float = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return seconds


# ------------------------------------------------------------------------------------------------ algorithms


@dataclass
class Arriving:
    """Rows that messages bring to their places in `rows`."""

    rows: Tensor
    messages: Sequence[Messages]

    def wait(self) -> Tensor:
        for messages in self.messages:
            messages.wait()
        return self.rows


class Direct:
    """One message for each pair of ranks, all at once."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        self.group = group

    def start(
        self, send: Tensor, sent_rows: Rows, received_rows: Rows, all_rows: Sequence[Rows] | None = None
    ) -> Pending:
        check_rows(self.group, send, sent_rows, received_rows)
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        return Arriving(rows, [Messages(self.group, sends, receives, next_tag(self.group))])


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


ALL_TO_ALLS.register("direct", Direct)
