"""A Qwen3-MoE model of a few layers under torch.compile: moefx against Transformers.   python benchmarks/compile.py

Per row: tokens/s of a training step (forward + backward) and of prefill (forward without gradients), the median of rounds in
which every row has its turn; seconds from the first call to the first result, cold (empty caches) and warm (a new start of
Dynamo with the caches that the first one filled), training and prefill together; the share of this machine's matmul ceiling,
measured in the same run, that the useful FLOPs of training reach. All rows share one set of weights.

--toy: small sizes in float32 on the CPU, to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moefx


@dataclass(frozen=True)
class Row:
    """How a model is made fast: the experts' implementation of Transformers, moefx.optimize, arguments of torch.compile."""

    experts: str
    optimize: bool = False
    compile: dict[str, Any] | None = None


ROWS = {
    "hf eager": Row("eager"),
    "hf grouped_mm": Row("grouped_mm"),
    "hf grouped_mm, compile": Row("grouped_mm", compile={}),
    "hf grouped_mm, compile max-autotune": Row("grouped_mm", compile={"mode": "max-autotune-no-cudagraphs"}),
    "moefx.optimize": Row("grouped_mm", optimize=True),
    "moefx.optimize, compile": Row("grouped_mm", optimize=True, compile={}),
    "backend moefx": Row("grouped_mm", compile={"backend": "moefx"}),
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


@dataclass
class Result:
    """Seconds; `failed` says why a row has none."""

    cold_s: float = 0.0
    warm_s: float = 0.0
    train_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)
    failed: str = ""


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


def share(model: nn.Module, row: Row, inputs: dict[str, Any]) -> tuple[nn.Module, Callable[..., Any]]:
    """A copy of the model on the same parameters, and what is called in the row."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
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


def train(call: Callable[..., Any], model: nn.Module, inputs: dict[str, Any]) -> None:
    call(**inputs, labels=inputs["input_ids"]).loss.backward()


def prefill(call: Callable[..., Any], inputs: dict[str, Any]) -> None:
    with torch.no_grad():
        call(**inputs)


def matmul_ceiling(device: str, dtype: torch.dtype) -> float:
    """TFLOP/s of a dense product on this machine."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(times[1:]) / 1e12


def useful_flops(model: nn.Module, tokens: int) -> float:
    """Of a training step: 6 FLOPs a token and weight that it uses; attention scores aside."""
    config: Any = model.config
    used = 0.0
    for name, p in model.named_parameters():
        if p.dim() == 3:
            used += p.numel() * config.num_experts_per_tok / config.num_experts
        elif p.dim() == 2 and "embed" not in name:
            used += p.numel()
    return 6 * tokens * used


def first_calls(model: nn.Module, row: Row, inputs: dict[str, Any], device: str) -> tuple[float, tuple[nn.Module, Any]]:
    """Seconds until a new model of the row has trained once and read once; optimising it included."""
    torch._dynamo.reset()
    made: list[Any] = []

    def run() -> None:
        twin, call = share(model, row, inputs)
        train(call, twin, inputs)
        prefill(call, inputs)
        made.extend((twin, call))

    return timed(run, device), (made[0], made[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; --toy runs small sizes on the CPU")
    options.device, options.dtype = ("cpu", torch.float32) if options.toy else ("cuda", torch.bfloat16)
    if options.toy:
        options.layers, options.batch, options.length = min(options.layers, 2), 2, 64
    device, model = options.device, build(options)
    ids = torch.randint(model.config.vocab_size, (options.batch, options.length), device=device)  # type: ignore[union-attr]
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    results = {name: Result() for name in options.rows}
    calls: dict[str, tuple[nn.Module, Any]] = {}
    for name, result in results.items():
        try:
            from torch._inductor.utils import fresh_cache

            with fresh_cache():
                result.cold_s, _ = first_calls(model, ROWS[name], inputs, device)
                result.warm_s, calls[name] = first_calls(model, ROWS[name], inputs, device)
        except Exception as error:  # noqa: BLE001 - a peer that cannot run is a row of the table
            result.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
        print(f"{name}: first calls {result.cold_s:.1f} s cold, {result.warm_s:.1f} s warm {result.failed}", flush=True)
    for turn in range(options.rounds + 1):
        for name, (twin, call) in calls.items():
            model.zero_grad(set_to_none=True)
            step = timed(lambda: train(call, twin, inputs), device)  # noqa: B023
            model.zero_grad(set_to_none=True)
            read = timed(lambda: prefill(call, inputs), device)  # noqa: B023
            if turn:
                results[name].train_s.append(step)
                results[name].prefill_s.append(read)
    text = table(results, useful_flops(model, ids.numel()), ids, matmul_ceiling(device, options.dtype))
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def table(results: dict[str, Result], flops: float, ids: Tensor, ceiling: float) -> str:
    where = torch.cuda.get_device_name() if ids.is_cuda else "CPU"
    batch, length = ids.shape
    lines = [
        f"{where}, torch {torch.__version__}, {batch} x {length} tokens; matmul ceiling {ceiling:.3g} TFLOP/s",
        "",
        "| row | training tokens/s | of ceiling | prefill tokens/s | first calls cold s | warm s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        if r.failed:
            lines.append(f"| {name} | {r.failed} | | | | |")
            continue
        step, read = statistics.median(r.train_s), statistics.median(r.prefill_s)
        share_of = f"{flops / step / 1e12 / ceiling:.0%}"
        speeds = f"{ids.numel() / step:.0f} | {share_of} | {ids.numel() / read:.0f}"
        lines.append(f"| {name} | {speeds} | {r.cold_s:.1f} | {r.warm_s:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
