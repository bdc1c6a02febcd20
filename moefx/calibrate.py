"""Measure what work costs on the running machine and fit one line a kind of work: `python -m moefx calibrate`.

Five runs a size. Half of the sizes are fitted by robust least squares on relative errors (a few large times must not
decide about the small ones, nor an interrupted run about any); the other half is held out and its error reported.
Collectives are measured in the process group that exists, or among `ranks` processes that are started for it.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from moefx.errors import InputError
from moefx.profile import Line, Profile, device_name, units_of
from moefx.runtime import ops_for

RUNS = 5
SIZES = 10  # a kind of work; every second one is held out
SHORTEST_RUN_S = 1e-3  # faster work is repeated within a run
SHORTEST_EXCHANGES_S = 2e-2  # on the CPU: links let through the first bytes after a pause faster than those that follow
CYCLES_A_LAUNCH = 500_000  # of a GPU, about 0.3 ms: longer than the host takes for a call
AHEAD = 50  # calls that the host gets ahead by, at most
HUBER = 1.345  # residuals beyond this many standard deviations count less


@dataclass(frozen=True)
class Sample:
    """The runs of one size: seconds of `units` of work."""

    units: float
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Probe:
    """One kind of work: make(scale) gives a function to time and its units, for scales from `low` to `high`."""

    kind: str
    unit: str
    make: Callable[[int], tuple[Callable[[], Any], float]]
    low: int
    high: int

    def scales(self, count: int = SIZES) -> list[int]:
        """`count` sizes, each the same factor above the last."""
        step = (self.high / self.low) ** (1 / (count - 1))
        return sorted({round(self.low * step**i) for i in range(count)})


def calibrate(device: str | None = None, ranks: int = 1, scale: float = 1.0) -> Profile:
    """Measure this machine: products, experts, permutation, codec, and collectives among `ranks`.

    device: "cpu", "cuda" or None for CUDA where there is one. scale: factor on all sizes. In a program that has a
    process group every rank calls this, `ranks` is the group's size, and each rank gets its own measurements.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"device is 'cpu', or 'cuda' where there is one; got {device!r}")
    in_group = dist.is_available() and dist.is_initialized()
    if ranks < 1 or (in_group and ranks not in (1, dist.get_world_size())):
        raise InputError(f"ranks is the size of the process group, or how many to start; got {ranks}")
    probes = [*local_probes(kind, scale), *codec_probes(kind, scale)]
    lines = {p.kind: line_of(_progress(p, measure(p, kind)), p.unit) for p in probes}
    count = ranks
    notes: tuple[str, ...] = ()
    if in_group:
        count = dist.get_world_size()
        lines |= _collective_lines(_measure_group(kind, scale))
    elif ranks > 1:
        lines |= _collective_lines(_in_processes(kind, ranks, scale))
    if count > 1 and (missing := [k for k in COLLECTIVES if k not in lines]):
        notes = (f"not measured, because the backend lacks them: {', '.join(missing)}",)
    return Profile(device_name(kind), lines, count, f"measured with torch {torch.__version__}", notes)


# ------------------------------------------------------------------------------------------------ the fit


def fit(samples: Iterable[Sample]) -> tuple[float, float]:
    """alpha_s, beta_s_per_unit >= 0 that minimise Huber's loss of the relative errors of all runs."""
    points = [(s.units, t) for s in samples for t in s.seconds]
    if len({x for x, _ in points}) < 2 or any(t <= 0 for _, t in points):
        raise InputError("a line needs times above zero of at least two sizes")
    weights = [1.0] * len(points)
    alpha = beta = 0.0
    for _ in range(50):
        before = alpha, beta
        alpha, beta = _least_squares(points, weights)
        errors = [(alpha + beta * x - t) / t for x, t in points]
        spread = 1.4826 * statistics.median(abs(e) for e in errors) or 1e-12
        weights = [min(1.0, HUBER * spread / abs(e)) if e else 1.0 for e in errors]
        if math.isclose(alpha, before[0], rel_tol=1e-9) and math.isclose(beta, before[1], rel_tol=1e-9):
            break
    return alpha, beta


def _least_squares(points: Sequence[tuple[float, float]], weights: Sequence[float]) -> tuple[float, float]:
    """Minimise sum of w ((alpha + beta x - t) / t)^2 with both >= 0: where one would be negative it is zero."""
    w = [weight / (t * t) for weight, (_, t) in zip(weights, points)]
    s1 = sum(w)
    sx = sum(v * x for v, (x, _) in zip(w, points))
    sxx = sum(v * x * x for v, (x, _) in zip(w, points))
    st = sum(v * t for v, (_, t) in zip(w, points))
    sxt = sum(v * x * t for v, (x, t) in zip(w, points))
    determinant = s1 * sxx - sx * sx
    alpha = (st * sxx - sx * sxt) / determinant
    beta = (s1 * sxt - sx * st) / determinant
    if alpha < 0:
        return 0.0, sxt / sxx
    return (st / s1, 0.0) if beta < 0 else (alpha, beta)


def line_of(samples: Sequence[Sample], unit: str) -> Line:
    """Fit every second size, the smallest and so on; r2 is that of the fitted sizes, the error that of the others."""
    ordered = sorted(samples, key=lambda s: s.units)
    fitted, held_out = ordered[::2], ordered[1::2]
    alpha, beta = fit(fitted)
    times = [s.median_s for s in fitted]
    mean = statistics.mean(times)
    total = sum((t - mean) ** 2 for t in times)
    r2 = 1 - sum((alpha + beta * s.units - s.median_s) ** 2 for s in fitted) / total if total else 1.0
    errors = [abs(alpha + beta * s.units - s.median_s) / s.median_s for s in held_out]
    error = statistics.median(errors) if errors else None
    return Line(alpha, beta, unit, r2, error, ordered[0].units, ordered[-1].units)


# ------------------------------------------------------------------------------------------------ what is measured


def measure(probe: Probe, device: str) -> Iterator[Sample]:
    """Time `RUNS` runs of every size, after one that is not counted."""
    for scale in probe.scales():
        work, units = probe.make(scale)
        once = seconds_of(work, device, 1)
        repeat = max(1, math.ceil(SHORTEST_RUN_S / max(once, 1e-7)))
        yield Sample(units, tuple(seconds_of(work, device, repeat) for _ in range(RUNS)))


def seconds_of(work: Callable[[], Any], device: str, repeat: int) -> float:
    """Seconds of one call, as the mean of `repeat`: by events on CUDA, by the clock on the CPU.

    On CUDA the device is given something else to do first, until the host is that far ahead: else short work would last as
    long as its launch, which `moefx.measured.block_times` sees.
    """
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(min(repeat, AHEAD) * CYCLES_A_LAUNCH)
        start.record()
        for _ in range(repeat):
            work()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / repeat
    began = time.perf_counter()
    for _ in range(repeat):
        work()
    return (time.perf_counter() - began) / repeat


FULL_ROWS = 256  # rows of an expert from which a GPU's blocks of 128 are mostly full: below, time does not fall with rows


def local_probes(device: str, scale: float = 1.0) -> list[Probe]:
    """Products, grouped products of experts, gather of rows, and a cast to half the bytes and back."""
    cuda = device == "cuda"
    width, hidden, experts = (2048, 1024, 16) if cuda else (256, 256, 8)
    dtype = torch.bfloat16 if cuda else torch.float32
    low, high = (round(scale * rows) for rows in ((1024, 65536) if cuda else (64, 4096)))
    low = max(low, experts)
    high = max(high, 2 * low)
    ops = ops_for(device, "auto")
    item = dtype.itemsize

    def values(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def gemm(rows: int) -> tuple[Callable[[], Any], float]:
        x, weight = values(rows, width), values(width, width)
        return lambda: x @ weight, 2.0 * rows * width * width

    def grouped(rows: int) -> tuple[Callable[[], Any], float]:
        rows -= rows % experts
        x, weight = values(rows, width), values(experts, hidden, width).transpose(1, 2)
        offsets = torch.arange(experts + 1, device=device, dtype=torch.int32) * (rows // experts)
        return lambda: ops["grouped_linear"](x, weight, offsets), 2.0 * rows * width * hidden

    def permute(rows: int) -> tuple[Callable[[], Any], float]:
        x = values(rows, width)
        order = torch.randperm(rows, device=device)
        offsets = torch.tensor([0, rows], device=device, dtype=torch.int32)
        return lambda: ops["gather_rows"](x, order, 1, offsets), 2.0 * rows * width * item

    def codec(rows: int) -> tuple[Callable[[], Any], float]:
        x = values(rows, width)
        half = torch.float16 if dtype == torch.float32 else torch.float8_e4m3fn
        return lambda: x.to(half), float(rows * width * (item + half.itemsize))

    return [
        Probe("gemm", "flops", gemm, low, high),
        Probe("experts", "flops", grouped, max(low, FULL_ROWS * experts) if cuda else low, high),
        Probe("permute", "hbm_bytes", permute, low, 4 * high),
        Probe("codec", "hbm_bytes", codec, low, 4 * high),
    ]


def codec_probes(device: str, scale: float = 1.0) -> list[Probe]:
    """Every codec that is known, there and back: half of the time is that of one way, as the cost of a task counts it."""
    from moefx.codegen.codecs import CODECS, codec_for

    width, dtype = (2048, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    low, high = (max(8, round(scale * rows)) for rows in ((1024, 65536) if device == "cuda" else (64, 4096)))

    def probe(name: str) -> Probe:
        codec = codec_for(name, device)

        def make(rows: int) -> tuple[Callable[[], Any], float]:
            x = torch.randn(rows, width, device=device).to(dtype)
            moved = rows * (width * dtype.itemsize + codec.wire_bytes(width, dtype))
            return lambda: codec.decode(codec.encode(x), width, dtype), 2.0 * moved

        return Probe(f"codec:{name}", "hbm_bytes", make, low, high)

    return [probe(name) for name in CODECS if name != "none"]


LARGE_MESSAGE = 262144  # kilobytes that a rank of a GPU sends, at most
COLLECTIVES = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")


def collective_probes(device: str, ranks: int, scale: float = 1.0) -> list[Probe]:
    """The collectives by what each rank puts on the wire; sizes are kilobytes of a rank's own buffer."""

    def buffers(kilobytes: int) -> tuple[Tensor, Tensor]:
        own = torch.zeros(max(1, kilobytes * 256 // ranks) * ranks, device=device)  # float32
        return own, torch.empty(own.numel() * ranks, device=device)

    def all_to_all(kilobytes: int) -> tuple[Callable[[], Any], float]:
        own, _ = buffers(kilobytes)
        out = torch.empty_like(own)
        return lambda: dist.all_to_all_single(out, own), 4 * own.numel() * (ranks - 1) / ranks

    def all_gather(kilobytes: int) -> tuple[Callable[[], Any], float]:
        own, everyone = buffers(kilobytes)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
        return lambda: gather(everyone, own), 4.0 * own.numel() * (ranks - 1)

    def reduce_scatter(kilobytes: int) -> tuple[Callable[[], Any], float]:
        own, everyone = buffers(kilobytes)
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        return lambda: scatter(own, everyone), 4.0 * own.numel() * (ranks - 1)

    def all_reduce(kilobytes: int) -> tuple[Callable[[], Any], float]:
        own, _ = buffers(kilobytes)
        return lambda: dist.all_reduce(own), 4 * own.numel() * 2 * (ranks - 1) / ranks

    makers = dict(zip(COLLECTIVES, (all_to_all, all_gather, reduce_scatter, all_reduce)))
    low, high = max(1, round(16 * scale)), max(32, round((LARGE_MESSAGE if device == "cuda" else 16384) * scale))
    return [Probe(kind, "wire_bytes", make, low, high) for kind, make in makers.items()]


def all_to_all_probes(device: str, group: dist.ProcessGroup, scale: float = 1.0) -> list[Probe]:
    """Every all-to-all algorithm that is known, by what each rank puts on the wire; all ranks call it."""
    from moefx.codegen.all_to_all import ALL_TO_ALLS, Topology, make_all_to_all

    ranks, topology = group.size(), Topology.discover(group)
    high = max(32, round((LARGE_MESSAGE if device == "cuda" else 8192) * scale))

    def probe(name: str) -> Probe:
        exchange = make_all_to_all(name, group, topology)

        def make(kilobytes: int) -> tuple[Callable[[], Any], float]:
            width = max(1, kilobytes * 256 // ranks)  # float32
            rows, counts = torch.zeros(ranks, width, device=device), [1] * ranks
            return lambda: exchange.start(rows, counts, counts, [counts] * ranks).wait(), 4.0 * width * (ranks - 1)

        return Probe(f"all_to_all:{name}", "wire_bytes", make, max(1, round(16 * scale)), high)

    return [probe(name) for name in ALL_TO_ALLS]


def _measure_group(device: str, scale: float) -> dict[str, list[Sample]]:
    """Measure the collectives in the process group; every rank does the same number of calls."""
    result: dict[str, list[Sample]] = {}
    group = dist.distributed_c10d._get_default_group()
    probes = [*collective_probes(device, group.size(), scale), *all_to_all_probes(device, group, scale)]
    shortest_s, most_repeats = (SHORTEST_RUN_S, 10) if device == "cuda" else (SHORTEST_EXCHANGES_S, 50)
    for probe in probes:
        samples: list[Sample] = []
        for size in _progress(probe, probe.scales()):
            work, units = probe.make(size)
            missing = torch.zeros((), device=device)
            try:
                work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # the backend has no such collective
                missing += 1
            dist.all_reduce(missing, dist.ReduceOp.MAX)  # all ranks leave it out, or none
            if missing:
                break
            once = torch.tensor(seconds_of(work, device, 1), device=device)
            dist.all_reduce(once, dist.ReduceOp.MAX)
            repeat = max(1, min(most_repeats, math.ceil(shortest_s / max(float(once), 1e-7))))
            runs = []
            for _ in range(RUNS):
                dist.barrier()
                seconds_of(work, device, repeat)  # what links let through at full speed after a pause is gone, as in a model
                runs.append(seconds_of(work, device, repeat))
            samples.append(Sample(units, tuple(runs)))
        if samples:
            result[probe.kind] = samples
    return result


def _collective_lines(samples: dict[str, list[Sample]]) -> dict[str, Line]:
    return {kind: line_of(rows, "wire_bytes") for kind, rows in samples.items() if units_of(kind)}


def _in_processes(device: str, ranks: int, scale: float) -> dict[str, list[Sample]]:
    """Start `ranks` processes of this machine: NCCL with a GPU each, gloo on the CPU; rank 0's measurements."""
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise InputError(f"{ranks} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.json"
        spawn(_rank_main, (ranks, _free_port(), device, scale, str(file)), nprocs=ranks)
        data = json.loads(file.read_text(encoding="utf-8"))
    return {kind: [Sample(units, tuple(seconds)) for units, seconds in rows] for kind, rows in data.items()}


def _rank_main(rank: int, ranks: int, port: int, device: str, scale: float, file: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    try:
        samples = _measure_group(device, scale)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        rows = {kind: [(s.units, s.seconds) for s in measured] for kind, measured in samples.items()}
        Path(file).write_text(json.dumps(rows), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _progress(probe: Probe, items: Iterable[Any]) -> list[Any]:
    """All items, while a bar counts the sizes of a probe."""
    return list(progress(items, f"measuring {probe.kind}", "size", SIZES))


def progress(items: Iterable[Any], what: str, unit: str, total: int | None = None) -> Iterable[Any]:
    """The items, with a progress bar on a terminal where tqdm is installed; on rank 0 alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Any] = tqdm(items, desc=what, total=total, unit=unit, disable=None, leave=False)
    return bar
