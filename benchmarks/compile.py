"""A Qwen3-MoE model of a few layers under torch.compile: moefx against Transformers.   python benchmarks/compile.py

Per row: tokens/s of training steps (forward + backward) and of prefills (forward without gradients), the median of rounds in
which every row has its turn, in one order and the other. A turn is several steps right behind one another, then as long
prefills, so that the host is ahead of the GPU as in training, and the GPU as warm. Then the share of this machine's matmul
ceiling, measured in the same run, that the useful FLOPs of training reach; the peak of allocated GPU memory in a training
step, weights and gradients included; seconds from a new model to its first training step and its first prefill, optimising
and compiling included: "cold" with empty caches, "warm" with those that the cold one filled, each in a process of its own.
All rows share one set of weights, and a row whose loss is not that of the first is a failure, as is a row of moefx in which
not every block is replaced.

The row "bound" is the compiled model without its experts, plus the FLOPs of the experts at the matmul ceiling: what no way to
run the experts can pass, since all the rest is the same in every compiled row. The row "dense" has the experts' products as
dense ones: every token K times through the first expert, compiled, in the same model and so at the same clock. Nothing is
routed there: it is what grouped products as fast as the library's dense ones of the same sizes would give.

--caches: a folder in which the rows' compiled code stays, for a later run that shall find it there (no first call is cold then).
--quick: fewer layers and rounds. --toy: small sizes in float32 on the CPU, to see that it runs. --kernels: the kernels of one
training step of every row, the longest first. $OUT, if set, is a folder that gets the table, the numbers (compile.json) and
what moefx.explain says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moefx
from moefx.backend import moefx as backend


@dataclass(frozen=True)
class Row:
    """How a model is made fast: the experts' implementation of Transformers, moefx.optimize, arguments of torch.compile."""

    experts: str
    optimize: bool = False
    compile: dict[str, Any] | None = None


BOUND, DENSE = "bound", "dense"
CEILINGS = BOUND, DENSE  # which are no way to run the model
TURN_S = 0.3  # of a row's steps, and of its prefills
ROWS = {  # the one that compiles longest comes last
    "hf eager": Row("eager"),
    "hf grouped_mm": Row("grouped_mm"),
    "moefx.optimize": Row("grouped_mm", optimize=True),
    "hf grouped_mm, compile": Row("grouped_mm", compile={}),
    "moefx.optimize, compile": Row("grouped_mm", optimize=True, compile={}),
    "backend moefx": Row("grouped_mm", compile={"backend": "moefx"}),
    BOUND: Row("none", compile={}),
    DENSE: Row("dense", compile={}),
    "hf grouped_mm, compile max-autotune": Row("grouped_mm", compile={"mode": "max-autotune-no-cudagraphs"}),
    "backend moefx max-autotune": Row("grouped_mm", compile={"backend": "moefx", "mode": "max-autotune-no-cudagraphs"}),
}


# Qwen3-30B-A3B with a smaller vocabulary (and fewer layers); and what a CPU can do
REAL = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32768,
}  # fmt: skip
TOY = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip
LOSS = 1e-2  # relative difference of a row's loss from the first row's; in bfloat16 some tokens choose other experts


@dataclass
class Result:
    """Seconds and bytes, one of each round; `failed` says why a row has none. None: not measured."""

    cold_s: float | None = None
    warm_s: float | None = None
    loss: float | None = None
    train_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    peak: int = 0
    failed: str = ""
    repeats: tuple[int, int] = (1, 1)  # steps and prefills in a turn


def build(options: argparse.Namespace) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**(TOY if options.toy else REAL), num_hidden_layers=options.layers)
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", dtype=options.dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1.0)
    return model


class NoExperts(nn.Module):
    """In place of a block's experts: nothing but the routing weights, whose gradient the router needs."""

    def __init__(self, _: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        return x * w.sum(-1, keepdim=True).to(x.dtype)


class Dense(nn.Module):
    """In place of a block's experts, on their parameters: every token goes K times through the first one."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        rows = x.repeat_interleave(ids.shape[-1], 0)
        gate, up = nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, -1)
        y = nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj[0])
        return (y.view(*ids.shape, -1) * w.unsqueeze(-1).to(y.dtype)).sum(-2)


CEILING_EXPERTS = {"none": NoExperts, "dense": Dense}


def share(model: nn.Module, row: Row, inputs: dict[str, Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """A copy of the model on the same parameters, and what is called in the row."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if row.experts in CEILING_EXPERTS:
        for block in [m for m in twin.modules() if hasattr(m, "experts")]:
            block.experts = CEILING_EXPERTS[row.experts](block.experts)
    else:
        twin.set_experts_implementation(row.experts)  # type: ignore[operator]
    if row.optimize:
        moefx.optimize(twin, inputs)
    return twin, twin if row.compile is None else torch.compile(twin, **row.compile)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def train(call: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    loss: Tensor = call(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach()


def prefill(call: Callable[..., Any], inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        call(**inputs)


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a dense product on this machine."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device) for _ in range(12)]
    return 2 * n**3 / statistics.median(times[2:]) / 1e12


def useful_flops(model: nn.Module, tokens: int) -> tuple[float, float]:
    """Of a training step, and of its experts alone: 6 FLOPs a token and weight that it uses; attention scores aside."""
    config: Any = model.config
    experts = rest = 0.0
    for name, p in model.named_parameters():
        if p.dim() == 3:
            experts += p.numel() * config.num_experts_per_tok / config.num_experts
        elif p.dim() == 2 and "embed" not in name:
            rest += p.numel()
    return 6 * tokens * (experts + rest), 6 * tokens * experts


# ------------------------------------------------------------------------------------------------ first calls


class Model:
    """The shared weights, one input, and the folders in which the rows keep their compiled code."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        self.model = build(options)
        vocabulary = self.model.config.vocab_size  # type: ignore[union-attr]
        ids = torch.randint(vocabulary, (options.batch, options.length), device=self.device)  # type: ignore[arg-type]
        self.inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}

    def first_calls(self, name: str) -> tuple[float, float, nn.Module, Callable[..., Any]]:
        """Seconds until a new model of the row has trained once and read once; its loss, and what was made."""
        made: list[Any] = []

        def run() -> None:
            twin, call = share(self.model, ROWS[name], self.inputs)
            loss = train(call, self.inputs)
            prefill(call, self.inputs)
            made.extend((loss, twin, call))

        seconds = timed(run, self.device)
        self.model.zero_grad(set_to_none=True)
        loss, twin, call = made
        return seconds, float(loss), twin, call


def use_cache(folder: Path) -> None:
    """Compiled code of Inductor and Triton is kept in this folder from now on."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


def apart(name: str, folder: Path, arguments: list[str], seconds: float) -> float:
    """Seconds of the row's first calls in a process of its own, with the caches in `folder`. Raises when it fails, or takes
    longer than `seconds`."""
    command = [sys.executable, __file__, *arguments, "--rows", name, "--first-calls", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(done.stdout.strip().splitlines()[-1])


class OutOfTimeError(BaseException):
    """Not an Exception: no compiler shall take it for a graph that it cannot compile."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in what runs longer."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(name: str, model: nn.Module, call: Any, text: list[str]) -> None:
    """Raises when moefx has not replaced every block of the row."""
    row = ROWS[name]
    if not row.optimize and (row.compile or {}).get("backend") != "moefx":
        return
    report = moefx.explain(call)
    text.append(f"{name}\n{report}\n")
    layers = model.config.num_hidden_layers  # type: ignore[union-attr]
    found = [len(report.found)] if row.optimize else [len(graph.found) for graph in report.graphs if graph.found]
    if len(found) < (1 if row.optimize else 2) or any(count != layers for count in found):  # graphs of training and of prefill
        raise RuntimeError(f"{found} blocks replaced, of {layers}")


# ------------------------------------------------------------------------------------------------ the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--budget", type=float, default=240.0, help="seconds after which no row is made ready any more")
    parser.add_argument("--cold", nargs="*", choices=list(ROWS), help="the rows whose first calls are timed: all that compile")
    parser.add_argument("--together", action="store_true", help="processes of first calls side by side: sooner, their times longer")
    parser.add_argument("--caches", type=Path, help="where compiled code stays; without it, in a folder that goes at the end")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--first-calls", type=Path, help=argparse.SUPPRESS)  # what these processes do
    options = parser.parse_args()
    start = time.perf_counter()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; --toy runs small sizes on the CPU")
    options.device, options.dtype = ("cpu", torch.float32) if options.toy else ("cuda", torch.bfloat16)
    if options.toy:
        options.layers, options.batch, options.length = min(options.layers, 2), 2, 64
    if options.quick:
        options.layers, options.rounds = min(options.layers, 2), min(options.rounds, 5)
    if "moefx" not in torch._dynamo.list_backends(exclude_tags=()):  # a checkout that is not installed
        torch._dynamo.register_backend(backend, name="moefx")
    torch._dynamo.config.recompile_limit = 64  # rows share the code of one class, and each has graphs of its own
    if options.first_calls:
        use_cache(options.first_calls)
        print(Model(options).first_calls(options.rows[0])[0])
        return
    arguments = [a for a in ("--toy", "--quick") if getattr(options, a[2:])]
    arguments += [f"--{n}={getattr(options, n)}" for n in ("layers", "batch", "length")]
    with tempfile.TemporaryDirectory() as folder:
        measure(options, arguments, options.caches or Path(folder), start + options.budget)


def measure(options: argparse.Namespace, arguments: list[str], folder: Path, end: float) -> None:
    made = Model(options)
    results = {name: Result() for name in options.rows}
    calls: dict[str, Callable[..., Any]] = {}
    explained: list[str] = []

    def fail(name: str, error: BaseException) -> None:
        traceback.print_exception(error, limit=-6)
        lines = str(error).strip().splitlines() or [""]
        results[name].failed = f"{type(error).__name__}: {lines[0][:100]}"
        calls.pop(name, None)
        made.model.zero_grad(set_to_none=True)

    def apart_of(name: str) -> None:
        """Cold and warm."""
        try:
            results[name].cold_s = apart(name, caches[name], arguments, end - time.perf_counter())
            results[name].warm_s = apart(name, caches[name], arguments, end - time.perf_counter())
        except Exception as error:  # noqa: BLE001 - the row may still run, and the others must
            print(f"{name}: no time of first calls: {str(error)[-300:]}", flush=True)

    caches = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in results}
    compiled = [name for name in results if ROWS[name].compile is not None or ROWS[name].optimize]
    if options.cold is not None:
        compiled = [name for name in compiled if name in options.cold]
    if options.together:
        with ThreadPoolExecutor(len(compiled) or 1) as pool:
            list(pool.map(apart_of, compiled))
    for name, result in results.items():
        if time.perf_counter() > end:
            result.failed = "not begun: the time was over"
            continue
        if name in compiled and not options.together:
            apart_of(name)
        use_cache(caches[name])
        try:
            with at_most(end - time.perf_counter()):
                _, result.loss, twin, calls[name] = made.first_calls(name)
            check(name, twin, calls[name], explained)
        except (Exception, OutOfTimeError) as error:  # noqa: BLE001 - a peer that cannot run is a row of the table
            fail(name, error)
        print(f"{name}: first calls {seconds(result.cold_s)} s cold, {seconds(result.warm_s)} s warm {result.failed}", flush=True)
    reference = next((r.loss for r in results.values() if r.loss is not None), 0.0)
    for name, result in results.items():
        if name not in CEILINGS and result.loss is not None and abs(result.loss - reference) > LOSS * abs(reference):
            fail(name, RuntimeError(f"the loss is {result.loss:.5f} instead of {reference:.5f}"))
    for turn in range(options.rounds + 1):
        for name, call in list(calls.items())[:: -1 if turn % 2 else 1]:
            try:
                one_turn(made, call, results[name], counts=turn > 0)
            except Exception as error:  # noqa: BLE001
                fail(name, error)
        if turn:  # so that a run that is stopped leaves what it has
            write(options, made, results, explained)
    whole = table_of(options, made, results)
    if options.kernels:
        for name, call in calls.items():
            try:
                print(f"{name}\n{kernels(made, call)}\n")
            except Exception as error:  # noqa: BLE001 - the table is worth more than a profile
                print(f"{name}: no profile: {error}\n")
    print(whole)


def kernels(made: Model, call: Callable[..., Any]) -> str:
    """The kernels of one training step (on the CPU, its operators): milliseconds, how often, the name; from 0.5 % on."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = made.device == "cuda"
    made.model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        train(call, made.inputs)
        synchronise(made.device)
    events = profiler.key_averages()
    times = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in events]
    whole = sum(us for us, *_ in times)
    most = sorted((t for t in times if t[0] > whole / 200), reverse=True)
    lines = [f"{1e-3 * us:9.3f} ms {count:5d} x {name[:110]}" for us, count, name in most]
    return "\n".join([f"{1e-3 * whole:9.3f} ms in all", *lines])


def one_turn(made: Model, call: Callable[..., Any], result: Result, counts: bool) -> None:
    """The first turn, which does not count, says how many steps and prefills one has."""

    def step() -> None:
        made.model.zero_grad(set_to_none=True)
        train(call, made.inputs)

    if made.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps, reads = result.repeats
    step_s = timed(lambda: [step() for _ in range(steps)], made.device) / steps
    peak = torch.cuda.max_memory_allocated() if made.device == "cuda" else 0
    made.model.zero_grad(set_to_none=True)
    read_s = timed(lambda: [prefill(call, made.inputs) for _ in range(reads)], made.device) / reads
    if counts:
        result.train_s.append(step_s)
        result.prefill_s.append(read_s)
        result.peak = max(result.peak, peak)
    else:
        result.repeats = max(1, round(TURN_S / step_s)), max(1, round(TURN_S / read_s))


def table_of(options: argparse.Namespace, made: Model, results: dict[str, Result]) -> str:
    ids = made.inputs["input_ids"]
    return table(results, useful_flops(made.model, ids.numel()), ids, options.layers, matmul_ceiling(made.device, options.dtype))


def write(options: argparse.Namespace, made: Model, results: dict[str, Result], explained: list[str]) -> None:
    if out := os.environ.get("OUT"):
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compile.md").write_text(table_of(options, made, results) + "\n")
        (folder / "compile.json").write_text(json.dumps({n: asdict(r) for n, r in results.items()}, indent=1))
        (folder / "explain.txt").write_text("\n".join(explained))


def table(results: dict[str, Result], flops: tuple[float, float], ids: Tensor, layers: int, ceiling: float) -> str:
    """flops: see `useful_flops`; ceiling: TFLOP/s."""
    where = torch.cuda.get_device_name() if ids.is_cuda else "CPU"
    batch, length = ids.shape
    lines = [
        f"{where}, torch {torch.__version__}, {layers} layers, {batch} x {length} tokens; matmul ceiling {ceiling:.3g} TFLOP/s",
        "",
        "| row | training tokens/s | of ceiling | prefill tokens/s | peak GiB | first calls cold s | warm s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    times: dict[str, tuple[float, float]] = {}
    for name, r in results.items():
        if r.failed or not r.train_s:
            lines.append(f"| {name} | {r.failed} | | | | {seconds(r.cold_s)} | {seconds(r.warm_s)} |")
            continue
        experts_s = flops[1] / ceiling / 1e12 if name == BOUND else 0.0
        step = statistics.median(r.train_s) + experts_s
        read = statistics.median(r.prefill_s) + experts_s / 3
        times[name] = step, read
        speeds = f"{ids.numel() / step:.0f} | {flops[0] / step / 1e12 / ceiling:.0%} | {ids.numel() / read:.0f}"
        rest = "- | - | -" if name in CEILINGS else f"{r.peak / 2**30:.1f} | {seconds(r.cold_s)} | {seconds(r.warm_s)}"
        lines.append(f"| {name} | {speeds} | {rest} |")
    return "\n".join([*lines, "", *ahead(times)])


def ahead(times: dict[str, tuple[float, float]]) -> list[str]:
    """How far the rows of moefx are ahead of the best other one. times: seconds of a training step and of prefill by row."""
    others = [t for name, t in times.items() if "moefx" not in name and name not in CEILINGS]
    if not others:
        return []
    step, read = (min(t[i] for t in others) for i in range(2))
    mine = {name: t for name, t in times.items() if "moefx" in name or name in CEILINGS}
    against = "against the best row without moefx"
    return [f"{name} {against}: {step / t[0]:.2f}x training, {read / t[1]:.2f}x prefill" for name, t in mine.items()]


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
