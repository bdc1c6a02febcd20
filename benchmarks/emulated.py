"""One GPU in place of several: a layer's plan whose exchanges are EMULATED by copies to pinned host memory and back.

    python benchmarks/emulated.py                        # step times, hidden share, traces, random delays
    compute-sanitizer --tool memcheck  python benchmarks/emulated.py --sanitize
    compute-sanitizer --tool racecheck python benchmarks/emulated.py --sanitize

NCCL cannot host two ranks on one GPU. So one rank holds all experts, and an all-to-all of this file, registered from
outside of the package, takes every row over the host: out of the GPU on one stream and back on another, piece by piece, at
the rate of the host's link in each direction. What is measured is a plan's overlap and the streams' correctness; no number
here is one of a network.

    step      forward and backward, every degree in turns, medians; and the same without any exchange
    hidden    of the time that copies are under way, the share in which a kernel runs (intervals of the profiler)
    delays    bits of results under random delays of all lanes against those without

--out ($OUT, out/emulated): emulated.json and traces for Perfetto. Exit code 1 if a result differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layer import milliseconds  # noqa: E402
from multi_gpu_parts.correctness import delays, outcome  # noqa: E402
from multi_gpu_parts.plans import Batch, Layer, Spread, compile_kernels, own_weights, random_batch, step  # noqa: E402
from multi_gpu_parts.traces import Overlap, events_of, overlap_of, traced  # noqa: E402
from torch import Tensor  # noqa: E402

import moefx  # noqa: E402
from moefx.measured import AtOnce  # noqa: E402

EMULATED = "EMULATED exchange (pinned host copies on one GPU)"
PIECE_BYTES = 8 << 20  # a piece travels back while the next one leaves
LEAST_BYTES = 64 << 10  # of a copy that counts as an exchange: counts and orders are smaller

# F decides the balance: at 40 GB/s each way and 500 TFLOP/s an exchange takes as long as the experts' forward where F = 4166.
LAYERS = {
    "mixtral": (Layer(4096, 14336, 8, 2), 8192),
    "balanced": (Layer(4096, 8192, 8, 2), 8192),
    "qwen3-30b-a3b": (Layer(2048, 768, 128, 8), 8192),
}
SMALL = Layer(64, 48, 8, 2), 96


# ------------------------------------------------------------------------------------------------ the exchange


class HostCopies:
    """An all-to-all of one rank: its rows leave the GPU and come back, on two streams of their own."""

    def __init__(self, group: dist.ProcessGroup, topology: Any) -> None:
        if group.size() != 1:
            raise moefx.InputError(f"this emulation is of one rank; the group has {group.size()}")
        self.leaving, self.arriving = torch.cuda.Stream(), torch.cuda.Stream()

    def start(
        self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: Any = None
    ) -> UnderWay:
        here = torch.cuda.current_stream(send.device)
        rows = torch.empty_like(send)
        host = torch.empty(send.shape, dtype=send.dtype, pin_memory=True)
        for stream in (self.leaving, self.arriving):  # `rows` may lie where earlier work of this stream is still at
            stream.wait_stream(here)
        send.record_stream(self.leaving)
        rows.record_stream(self.arriving)
        most = max(1, PIECE_BYTES // max(1, send.shape[1] * send.element_size()))
        for piece, between, back in zip(send.split(most), host.split(most), rows.split(most)):
            with torch.cuda.stream(self.leaving):
                between.copy_(piece, non_blocking=True)
            self.arriving.wait_stream(self.leaving)
            with torch.cuda.stream(self.arriving):
                back.copy_(between, non_blocking=True)
        return UnderWay(rows, self.arriving.record_event(), host)


@dataclass
class UnderWay:
    rows: Tensor
    done: torch.cuda.Event
    host: Tensor  # until then

    def wait(self) -> Tensor:
        torch.cuda.current_stream(self.rows.device).wait_event(self.done)
        return self.rows


def is_copy(event: Mapping[str, Any]) -> bool:
    """Whether an event of a trace is a piece of an exchange."""
    if event.get("cat") != "gpu_memcpy" or not any(way in str(event.get("name")) for way in ("HtoD", "DtoH")):
        return False
    return int(event.get("args", {}).get("bytes", 0)) >= LEAST_BYTES


# ------------------------------------------------------------------------------------------------ one GPU as a bench


class OneGpu:
    """What the parts of multi_gpu.py want of a bench, for a group of one rank."""

    def __init__(self) -> None:
        self.rank, self.world, self.cuda, self.toy = 0, 1, True, False
        self.device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        self.group = dist.distributed_c10d._get_default_group()

    def share(self, value: Any) -> Any:
        return value


def in_turns(works: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 3) -> dict[str, float]:
    """Median milliseconds of each; all have their turn in every round."""
    for work in works.values():
        work()
        work()
    samples = {name: list[float]() for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            samples[name].append(milliseconds(work, repeats))
    return {name: statistics.median(times) for name, times in samples.items()}


def link_rates(bench: OneGpu) -> dict[str, float]:
    """GB/s of pinned copies: out, in, and through `HostCopies`, where both are at work."""
    rows = torch.empty(1 << 16, 2048, dtype=torch.bfloat16, device=bench.device)  # 256 MiB
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    exchange, counts = HostCopies(bench.group, None), [rows.shape[0]]
    works: dict[str, Callable[[], Any]] = {
        "device to host": lambda: host.copy_(rows, non_blocking=True),
        "host to device": lambda: rows.copy_(host, non_blocking=True),
        "emulated exchange, each way": lambda: exchange.start(rows, counts, counts).wait(),
    }
    return {name: rows.nbytes / ms / 1e6 for name, ms in in_turns(works, 5, 1).items()}


def traced_overlap(run: Callable[[], None], file: Path) -> Overlap:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with traced(file, True):
        run()
    return overlap_of(events_of(file), is_copy)


def layer_row(
    bench: OneGpu, name: str, layer: Layer, tokens: int, degrees: Sequence[int], rounds: int, out: Path | None
) -> dict[str, Any]:
    """All degrees of a layer. out: where traces go; None: none are made and nothing is timed (under a sanitizer)."""
    dtype = torch.bfloat16
    spread = Spread(bench, layer, own_weights(bench, layer, dtype))
    batch = random_batch(bench, layer, tokens, dtype)
    regions = {r: spread.plan(options_of(r), tokens)[0] for r in degrees}
    compile_kernels(regions.values(), spread.params, batch)
    row: dict[str, Any] = {"layer": f"{name} ({layer})", "T": tokens, "delays": differences(bench, regions, spread, batch)}
    if out is None:
        return row
    alone, _ = spread.plan(moefx.Options(degree=1, policy="fifo"), tokens)
    alone.wire = replace(alone.wire, all_to_all=AtOnce())
    works = {f"r={r}": step(region, spread.params, batch) for r, region in regions.items()}
    ms = in_turns(works | {"no exchange": step(alone, spread.params, batch)}, rounds)
    compute = ms.pop("no exchange")
    wire = ms["r=1"] - compute
    row |= {"no exchange ms": compute, "ms": ms, "gain": {n: ms["r=1"] / t for n, t in ms.items()}}
    row["hidden of what can be"] = {n: (ms["r=1"] - t) / min(wire, compute) if wire > 0 else None for n, t in ms.items()}
    row["overlap"] = {}
    for r in degrees:
        file = out / f"emulated_{name}_r{r}.json"
        found = traced_overlap(works[f"r={r}"], file)
        row["overlap"][f"r={r}"] = {**asdict(found), "share": found.share, "file": file.name}
    return row


def options_of(degree: int) -> moefx.Options:
    return moefx.Options(degree=degree, policy="fifo", all_to_all="host_copies")


def differences(bench: OneGpu, regions: Mapping[int, Any], spread: Spread, batch: Batch) -> dict[str, str]:
    """Runs under random delays that differ from one without, by degree."""
    result = {}
    for r, region in regions.items():
        calm = outcome(region, spread.params, batch)
        different, runs = delays(bench, region, spread.params, batch, calm, 5)
        result[f"r={r}"] = f"{different} of {runs} differ"
    return result


# ------------------------------------------------------------------------------------------------ output


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{EMULATED}; {torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, forward + backward", "",
        "| emulated layer | T | r | step ms | r=1 / this | of what can be hidden | copies ms (profiler) | hidden | exposed ms | "
        "runs under delays |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        for r, ms in row.get("ms", {}).items():
            o, could = row["overlap"][r], row["hidden of what can be"][r]
            exposed = (o["communication"] - o["hidden"]) / 1e3
            lines.append(
                f"| {row['layer']} | {row['T']} | {r} | {ms:.2f} | {row['gain'][r]:.2f} | "
                f"{'-' if could is None else f'{100 * could:.0f} %'} | {o['communication'] / 1e3:.2f} | {100 * o['share']:.0f} % | "
                f"{exposed:.2f} | {row['delays'][r]} |"
            )
        if "ms" in row:
            lines.append(f"| {row['layer']} | {row['T']} | no exchange | {row['no exchange ms']:.2f} | | | | | | |")
        else:
            lines += [f"| {row['layer']} | {row['T']} | {r} | | | | | | | {text} |" for r, text in row["delays"].items()]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--degrees", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sanitize", action="store_true", help="a small layer, nothing timed: for compute-sanitizer")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out/emulated")))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark emulates an exchange on a GPU, and there is none")
    began, bench = time.perf_counter(), OneGpu()
    moefx.register_all_to_all("host_copies", HostCopies)
    options.out.mkdir(parents=True, exist_ok=True)
    rates = {} if options.sanitize else link_rates(bench)
    for name, rate in rates.items():
        print(f"{EMULATED}: {name} {rate:.1f} GB/s", flush=True)
    rows = []
    layers = {"small": SMALL} if options.sanitize else {name: LAYERS[name] for name in options.layers}
    degrees = [1, 3] if options.sanitize else sorted({1, *options.degrees})
    for name, (layer, tokens) in layers.items():
        out = None if options.sanitize else options.out
        rows.append(layer_row(bench, name, layer, tokens, degrees, options.rounds, out))
        print(f"{EMULATED}: {name} done, {time.perf_counter() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
        content = {"what": EMULATED, "device": torch.cuda.get_device_name(), "GB/s": rates, "rows": rows}
        (options.out / "emulated.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print("\n".join(table(rows)))
    wrong = [f"{row['layer']} {r}: {text}" for row in rows for r, text in row["delays"].items() if not text.startswith("0 of")]
    print(f"{EMULATED}: {len(wrong)} results differ under delays", *wrong, sep="\n  ")
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
