"""Pairs of GPUs (of two GPUs each one) as nodes, with links between them that are emulated: exchanges, and layers over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from moefx.codegen.all_to_all import (
    Messages,
    Pipe,
    Topology,
    check_rows,
    in_place,
    next_tag,
)
from torch import Tensor

import moefx
from moefx import calibrate
from multi_gpu_parts.layers import LAYERS, TOY_LAYERS, TOY_TOKENS, Shape, layer_row
from multi_gpu_parts.plans import Layer, exchange_of
from multi_gpu_parts.worker import Bench


class Throttled(Pipe):
    """Pipe-A2A with links between nodes that are EMULATED: rows for another node pass through the sender's host memory.

    one_by_one: the messages between nodes leave when those within the node have passed, as on one channel.
    """

    one_by_one = False

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        super().__init__(group, topology)
        self.link = torch.cuda.Stream() if dist.get_backend(group) == "nccl" else None
        self._hosts: dict[int, Tensor] = {}  # by peer: pinned memory, which the link's stream uses for one message at a time

    def start(
        self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: Any = None
    ) -> ThroughHosts:
        check_rows(self.group, send, sent_rows, received_rows)
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        tag = next_tag(self.group)
        within = Messages(self._near, self._inside(sends), self._inside(receives), tag)
        leaving, arriving = self._outside(sends), self._outside(receives)
        if self.link is None:
            if self.one_by_one:
                within.wait()  # gloo's messages can be awaited once
            between = Messages(self.group, leaving, arriving, tag)
            return ThroughHosts(rows, [between] if self.one_by_one else [within, between])
        self.link.wait_stream(torch.cuda.current_stream(send.device))
        send.record_stream(self.link)
        rows.record_stream(self.link)
        with torch.cuda.stream(self.link):
            if self.one_by_one:
                within.wait()
            hosts = {peer: self._host(peer, rows_of) for peer, rows_of in leaving.items()}
            for peer, host in hosts.items():
                host.copy_(leaving[peer], non_blocking=True)
            staged = {peer: host.to(send.device, non_blocking=True) for peer, host in hosts.items()}
            between = Messages(self.group, staged, arriving, tag)
            done = self.link.record_event()
        return ThroughHosts(rows, [within, between], done, list(staged.values()))

    def _host(self, peer: int, like: Tensor) -> Tensor:
        """Host memory for `like`, kept from message to message: pinning some takes longer than the message."""
        if peer not in self._hosts or self._hosts[peer].numel() < like.nbytes:
            self._hosts[peer] = torch.empty(2 * like.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._hosts[peer][: like.nbytes].view(like.dtype).view(like.shape)


class OneByOne(Throttled):
    one_by_one = True


@dataclass
class ThroughHosts:
    rows: Tensor
    messages: Sequence[Messages]
    done: torch.cuda.Event | None = None
    held: Sequence[Tensor] = ()  # until then

    def wait(self) -> Tensor:
        for messages in self.messages:
            messages.wait()
        if self.done is not None:
            here = torch.cuda.current_stream(self.rows.device)
            here.wait_event(self.done)
            for tensor in self.held:
                tensor.record_stream(here)
        return self.rows


def exchange_row(bench: Bench, topology: Topology, mebibytes: float) -> dict[str, Any]:
    """Times of one exchange in which every rank has as many bytes for each other."""
    count = max(1, int(mebibytes * 2**20 / 4096))
    send = torch.randn(count * bench.world, 1024, device=bench.device)
    counts = [count] * bench.world
    names = ("throttled_one_by_one", "throttled_pipe")
    made = {name: exchange_of(name, bench.group, topology) for name in names}
    works: dict[str, Callable[[], Any]] = {n: lambda e=e: e.start(send, counts, counts).wait() for n, e in made.items()}
    one, both = (work() for work in works.values())
    expected = exchange_of("direct", bench.group, topology).start(send, counts, counts).wait()
    passed = torch.equal(one, expected) and torch.equal(both, expected)
    # The two channels apart: messages within the node alone, and between nodes alone.
    mates = topology.members(topology.nodes[bench.rank])
    inside = [count if rank in mates else 0 for rank in range(bench.world)]
    outside = [count - n for n in inside]
    rows = {"within": send[: sum(inside)].contiguous(), "between": send[: sum(outside)].contiguous()}
    pipe = made["throttled_pipe"]
    works["within alone"] = lambda: pipe.start(rows["within"], inside, inside).wait()
    works["between alone"] = lambda: pipe.start(rows["between"], outside, outside).wait()
    seconds = bench.in_turns(works, 2 if bench.toy else bench.options.rounds)
    slow, fast = (seconds[name] for name in names)
    apart = seconds["within alone"], seconds["between alone"]
    cells = {f"{n} ms": f"{1e3 * s:.3f}" for n, s in seconds.items()} | {
        "one by one / pipe": f"{slow / fast:.2f}", "sum / max": f"{sum(apart) / max(apart):.2f}", "_seconds": seconds,
    }  # fmt: skip
    return bench.judged("nodes", f"{mebibytes} MiB", cells, passed)


# From links that wait for experts to experts that wait for links; Arctic's layer is the one where both take about as long.
NODE_LAYERS = {
    "mixtral": (LAYERS["mixtral"], (4096, 16384)),
    "phi-3.5-moe": (Layer(4096, 6400, 16, 2), (4096, 16384, 32768)),
    "arctic, 32 experts": (Layer(7168, 4864, 32, 2), (4096, 16384, 32768)),
    "deepseek-v3, 64 experts": (LAYERS["deepseek-v3, 64 experts"], (4096, 8192)),
}
EXCHANGED_MIB = (1, 4, 16, 64, 256)  # a pair of ranks; `line_of` fits every second


def nodes(bench: Bench) -> None:
    if bench.world % 2:
        skipped = {"result": f"skipped: needs 2, 4, 6 or 8 ranks, there are {bench.world}"}
        bench.row("nodes", "pairs of ranks as nodes", lambda: skipped)
        return
    mates = min(2, bench.world // 2)
    for name, make in (("throttled_pipe", Throttled), ("throttled_one_by_one", OneByOne)):
        moefx.register_all_to_all(name, make)
    topology = Topology(tuple(rank // mates for rank in range(bench.world)))
    where = f"EMULATED links, {bench.world // mates} nodes of {mates}"
    samples: list[calibrate.Sample] = []
    for mebibytes in (0.01, 0.1, 1) if bench.toy else EXCHANGED_MIB:
        row = partial(exchange_row, bench, topology, mebibytes)
        cells = bench.row("nodes", f"{where}, {mebibytes} MiB a pair", row, reserve_s=5)
        if "_seconds" in cells:
            samples.append(calibrate.Sample(mebibytes * 2**20 * (bench.world - 1), (cells["_seconds"]["throttled_pipe"],)))
    if len(samples) < 3:
        skipped = {"result": "skipped: the links' costs take three of the exchanges' rows"}
        bench.row("layers between nodes", where, lambda: skipped)
        return
    line = {"all_to_all:throttled_pipe": calibrate.line_of(samples, "wire_bytes")}
    bench.log(f"exchanges between nodes: {line}")
    toys = {name: (layer, TOY_TOKENS) for name, layer in TOY_LAYERS.items()}
    for name, (layer, sizes) in (toys if bench.toy else NODE_LAYERS).items():
        shape = Shape(bench, layer, line, topology)
        for tokens in sizes:
            row = partial(layer_row, bench, shape, tokens, "throttled_pipe")
            bench.row("layers between nodes", f"{where}, {name} ({layer}) T={tokens}", row, reserve_s=15)
