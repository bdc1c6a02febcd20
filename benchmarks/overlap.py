"""Expert parallelism on real links, in a netbox (tests/netbox.py).   python benchmarks/overlap.py links | codecs

    links    alpha and beta of every all-to-all between hosts, against each other and against ScheMoE's formula
    codecs   bytes on the wire, errors against their bounds, and the link below which a codec pays

What is compared is measured in turns within one run; times are medians. Absolute times are those of this machine.
Tables are Markdown, for docs/parallel.md.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from moefx.codegen.all_to_all import (  # noqa: E402
    ALL_TO_ALLS,
    Arriving,
    Messages,
    Pending,
    Topology,
    in_place,
    make_all_to_all,
    next_tag,
)
from moefx.codegen.codecs import CODECS  # noqa: E402
from netbox import netbox, why_not  # noqa: E402

import moefx  # noqa: E402
from moefx.calibrate import Sample, line_of  # noqa: E402


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths)) + " |")
    print()


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, one run of each a round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


# ------------------------------------------------------------------------------------------------ links


class OneByOne:
    """A rank's messages one after the other, as in ScheMoE's model of a direct all-to-all: in step k with rank xor k."""

    def __init__(self, group: dist.ProcessGroup, topology: Topology) -> None:
        self.group = group

    def start(
        self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: object = None
    ) -> Pending:
        rows, sends, receives = in_place(self.group, send, sent_rows, received_rows)
        tag = next_tag(self.group)
        for step in range(1, self.group.size()):
            peer = self.group.rank() ^ step
            Messages(self.group, {peer: sends[peer]}, {peer: receives[peer]}, tag).wait()
        return Arriving(rows, [])


BASELINE = "one by one"


def measure_links(sizes: Sequence[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """On a rank: seconds of each run, by bytes of a message between two ranks and by algorithm.

    "within" and "between" are one message from every rank to one other, in its host and on another one.
    """
    if BASELINE not in ALL_TO_ALLS:
        moefx.register_all_to_all(BASELINE, OneByOne)
    group = dist.distributed_c10d._get_default_group()
    own, ranks = group.rank(), group.size()
    topology = Topology.discover(group)
    exchanges = {name: make_all_to_all(name, group, topology) for name in ALL_TO_ALLS}
    mates = len(topology.members(topology.nodes[own]))

    def message(size: int, peer: int) -> Callable[[], None]:
        out, back = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        return lambda: Messages(group, {peer: out}, {peer: back}, next_tag(group)).wait()

    def exchange(name: str, size: int) -> Callable[[], object]:
        send, counts = torch.zeros(ranks, size, dtype=torch.uint8), [1] * ranks
        return lambda: exchanges[name].start(send, counts, counts, [counts] * ranks).wait()

    result: dict[int, dict[str, list[float]]] = {}
    for size in sizes:
        works = {name: exchange(name, size) for name in exchanges}
        works["between"] = message(size, own ^ mates)
        if mates > 1:
            works["within"] = message(size, own ^ 1)
        runs: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(rounds + 1):
            for name, work in works.items():
                dist.barrier()
                began = time.perf_counter()
                work()
                if turn:
                    runs[name].append(time.perf_counter() - began)
        result[size] = runs
    return result


def links(options: argparse.Namespace) -> None:
    if reason := why_not():
        sys.exit(reason)
    sizes = [4096 * 2**i for i in range(options.sizes)]
    for mates, between, within in LINKS:
        with netbox(2, mates, between, within) as box:
            by_rank = box.run(measure_links, sizes, options.rounds, timeout_s=900)
        inside = f", {within}/s inside" if within else ""
        print(f"### 2 hosts of {mates} rank{'s' * (mates > 1)}, {between}/s out of each{inside}\n")
        # A run takes as long as its slowest rank.
        runs = {
            size: {name: [max(at) for at in zip(*(r[size][name] for r in by_rank))] for name in by_rank[0][size]}
            for size in sizes
        }
        _report_times(runs, 2 * mates, mates)
        _report_lines(runs, 2 * mates, mates)


# Ranks a host, rate out of each host, rate inside. The last: m-1 messages inside take as long as P-m between.
LINKS = (
    (1, "200mbit", None),
    (2, "200mbit", None),
    (2, "800mbit", None),
    (2, "200mbit", "100mbit"),
)

Runs = dict[int, dict[str, list[float]]]


def _report_times(runs: Runs, ranks: int, mates: int) -> None:
    names = [name for name in next(iter(runs.values())) if name not in ("within", "between")]
    rows = []
    for size, of_size in runs.items():
        seconds = {name: statistics.median(times) for name, times in of_size.items()}
        near, far = (mates - 1) * seconds.get("within", 0.0), (ranks - mates) * seconds["between"]
        over_direct = [seconds[name] / seconds["direct"] for name in names if name != "direct"]
        promised = [(near + far) / seconds["direct"], max(near, far) / seconds["direct"]]
        rows.append(
            [f"{size // 1024}", f"{1e3 * seconds['direct']:.2f}", *(f"{x:.2f}" for x in [*over_direct, *promised])]
        )
    print(
        "direct in ms by KiB a message; then times relative to it. sum, max: ScheMoE's (m-1) t1 + (P-m) t2 and the larger"
    )
    print("of the two, with t1 and t2 measured: a message from every rank to a mate, and to another host.\n")
    table(["KiB", "direct (ms)", *(name for name in names if name != "direct"), "sum", "max"], rows)


def _report_lines(runs: Runs, ranks: int, mates: int) -> None:
    names = [name for name in next(iter(runs.values())) if name != "within"]
    rows = []
    for name in names:
        peers = 1 if name == "between" else ranks - mates
        samples = [Sample(float(size * peers), tuple(times[name])) for size, times in runs.items()]
        line = line_of(samples, "wire_bytes")
        error = f"{100 * line.held_out_error:.1f} %" if line.held_out_error is not None else "-"
        rate = f"{8e-6 / line.beta_s_per_unit:.0f}" if line.beta_s_per_unit else "-"
        rows.append([name, f"{1e3 * line.alpha_s:.2f}", rate, f"{line.r2:.4f}", error])
    print(
        "alpha + beta * bytes that a rank sends to other hosts. Half of the sizes are fitted, the error is that of the others.\n"
    )
    table(["all-to-all", "alpha (ms)", "1 / beta (Mbit/s)", "r2", "held-out error"], rows)


# ------------------------------------------------------------------------------------------------ codecs


def _rows(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    if kind == "outliers":  # one number in a hundred is thirty times as large
        x = torch.where(torch.rand(shape, generator=generator) < 0.01, 30 * x, x)
    return x.to(dtype)


def _error(name: str, rows: Tensor) -> tuple[float, float]:
    """(rms of the errors over rms of the numbers, largest share of a row's bound)."""
    codec = CODECS[name]
    back = codec.decode(codec.encode(rows), rows.shape[1], rows.dtype).double()
    error = back - rows.double()
    bound = codec.error_bound(rows)
    share = (error.abs().amax(1) / bound.clamp(min=1e-300)).max().item() if name != "none" else 0.0
    return (error.pow(2).mean() / rows.double().pow(2).mean()).sqrt().item(), share


def codecs(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"### {str(dtype).removeprefix('torch.')}, rows [{options.rows}, {options.width}]\n")
        head = ["codec", "ratio", "error, noise", "error, outliers", "of the bound", "encode / copy", "decode / copy"]
        rows = _rows("noise", (options.rows, options.width), dtype)
        table([*head, "pays below (Mbit/s)"], _codec_table(rows, options.rounds))


def _codec_table(rows: Tensor, rounds: int) -> list[list[str]]:
    width, dtype = rows.shape[1], rows.dtype
    works: dict[str, Callable[[], object]] = {"copy": rows.clone}
    for name, codec in CODECS.items():
        works[f"{name} encode"] = partial(codec.encode, rows)
        works[f"{name} decode"] = partial(codec.decode, codec.encode(rows), width, dtype)
    seconds = in_turns(works, rounds)
    message = rows.numel() * dtype.itemsize
    lines = []
    for name, codec in CODECS.items():
        ratio = width * dtype.itemsize / codec.wire_bytes(width, dtype)
        noise, share = _error(name, rows)
        outliers, other_share = _error(name, _rows("outliers", (rows.shape[0], width), dtype))
        # The bytes that are saved on the wire take as long there as the codec does.
        saved, both = message * (1 - 1 / ratio), seconds[f"{name} encode"] + seconds[f"{name} decode"]
        pays = f"{8e-6 * saved / both:.0f}" if saved > 0 else "-"
        times = [f"{seconds[f'{name} {way}'] / seconds['copy']:.1f}" for way in ("encode", "decode")]
        errors = [f"{100 * noise:.2g} %", f"{100 * outliers:.2g} %", f"{100 * max(share, other_share):.0f} %"]
        lines.append([name, f"{ratio:.2f}", *errors, *times, pays])
    return lines


# ------------------------------------------------------------------------------------------------ commands


def main() -> None:
    parser = argparse.ArgumentParser(description="Expert parallelism on real links.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Callable[[argparse.Namespace], None], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(run.__name__, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    sub = command(links, "alpha and beta of every all-to-all between hosts")
    sub.add_argument(
        "--sizes", type=int, default=10, help="how many sizes of a message, from 4 KiB on, each twice the last"
    )
    sub.add_argument("--rounds", type=int, default=7)

    sub = command(codecs, "bytes on the wire, errors, and the link below which a codec pays")
    sub.add_argument("--rows", type=int, default=1024)
    sub.add_argument("--width", type=int, default=1024)
    sub.add_argument("--rounds", type=int, default=7)

    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
