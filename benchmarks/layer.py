"""One MoE layer on one GPU: moefx against its peers, interleaved in one run.   python benchmarks/layer.py

Per shape and number of tokens: the routed layer (router, dispatch, experts, combine) forward and forward + backward, in
bf16 on random inputs: milliseconds (the median of rounds in which every peer has its turn, in one order and the other),
useful TFLOP/s (6 T K D F forward, 18 T K D F with backward), the share of the matmul ceiling measured in the same run; for
few tokens GB/s of the weights of the experts that are hit; memory at the peak of a step beside weights, inputs and
parameter gradients. A turn is several calls one after another, so that the host launches while the GPU computes, as in a
model; where the host is slower, its time counts. First all rounds of forwards, then all of steps: behind a step, which draws more
power, the same forward takes a tenth longer. For few tokens, where the host is the slower one, a third pair of times is that of
forward and step as CUDA graphs, where a peer can be captured. Up to 64 tokens the speed is that of the forward's graph; the row
"floor" is what is left of it where nothing is computed: the bytes of the experts that are hit, read by one kernel a product, plus
the model's router alone, compiled. The last column of moefx's rows of many tokens: its step with skewed routing (Zipf's
popularity of experts), as a multiple of that with even routing.

Peers: Hugging Face's own code with its `eager` and `grouped_mm` experts, and `grouped_mm` under torch.compile; where they are
installed Liger's experts (the `liger-kernel` package) in Hugging Face's block, and SonicMoE's layer (`sonic-moe`), both without
biases. moefx has two rows, the layer called eagerly and under torch.compile.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moefx


@dataclass(frozen=True)
class Shape:
    """E experts, D model width, F expert width, K experts per token; the architecture whose block is built."""

    experts: int
    d_model: int
    d_expert: int
    top_k: int
    family: str = "qwen3_moe"


SHAPES = {
    "qwen3-30b-a3b": Shape(128, 2048, 768, 8),
    "olmoe": Shape(64, 2048, 1024, 8),
    "mixtral-8x7b": Shape(8, 4096, 14336, 2),
    "deepseek-v3-shard": Shape(32, 7168, 2048, 1),
    "gpt-oss-20b": Shape(32, 2880, 2880, 4, "gpt_oss"),
    "qwen3-next": Shape(512, 2048, 512, 10),
}
TOKENS = (1, 16, 64, 512, 4096, 16384, 32768)
CALLS = 4  # of a turn
FEW_TOKENS = 64  # up to here the time is that of reading weights
HOST_BOUND = 512  # up to here the host, launching one kernel after another, may be slower than the GPU: graphs show the GPU's time
PEERS = ("hf eager", "hf grouped_mm", "hf grouped_mm compiled", "liger", "sonicmoe", "moefx", "moefx compiled")
WAITING = ("hf eager",)  # the host waits for the GPU inside: no graph can be made, and an attempt spoils torch's generator
PACKAGES = {"liger": "liger_kernel", "sonicmoe": "sonicmoe"}  # peers that may be missing


def build(shape: Shape, implementation: str, device: str) -> nn.Module:
    """The family's own MoE block with random bf16 weights; the same seed gives the same weights."""
    if shape.family == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP as Block

        config: Any = GptOssConfig(
            hidden_size=shape.d_model, intermediate_size=shape.d_expert, num_local_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
        )  # fmt: skip
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock as Block

        config = Qwen3MoeConfig(
            hidden_size=shape.d_model, num_experts=shape.experts, num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.d_expert, norm_topk_prob=True,
        )  # fmt: skip
    config._experts_implementation = implementation
    torch.manual_seed(0)
    with torch.device(device):
        block = Block(config).to(torch.bfloat16)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0, 0.02)
    return block


class Layer(nn.Module):
    """The block alone, as a model: `moefx.optimize` wants one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y[0] if isinstance(y, tuple) else y


class Sonic(nn.Module):
    """SonicMoE's layer of this shape: a router of its own, softmax and top-k as in Hugging Face's block."""

    def __init__(self, shape: Shape, device: str) -> None:
        from sonicmoe import KernelBackendMoE, MoE
        from sonicmoe.enums import ActivationType

        super().__init__()
        with torch.device(device):
            self.moe = MoE(
                num_experts=shape.experts, num_experts_per_tok=shape.top_k, hidden_size=shape.d_model,
                intermediate_size=shape.d_expert, activation_function=ActivationType.SWIGLU, add_bias=False, std=0.02,
            ).to(torch.bfloat16)  # fmt: skip
        self.kernels = KernelBackendMoE.sonicmoe

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.moe(x.flatten(0, 1), kernel_backend_moe=self.kernels)[0]
        return y.view_as(x)


def missing(peer: str, shape: Shape) -> str:
    """Why a peer has no row; empty where it has."""
    package = PACKAGES.get(peer)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "it has no experts with biases" if package and shape.family == "gpt_oss" else ""


def ours(peer: str) -> bool:
    return peer.startswith("moefx")


def make(peer: str, shape: Shape, device: str) -> nn.Module:
    if peer == "sonicmoe":
        return Layer(Sonic(shape, device))
    layer = Layer(build(shape, "eager" if peer == "hf eager" else "grouped_mm", device))
    if peer == "liger":
        from liger_kernel.transformers.swiglu import LigerExperts

        experts = layer.block.experts
        experts.forward = MethodType(LigerExperts.forward, experts)
    if ours(peer):
        moefx.optimize(layer, (torch.randn(1, 64, shape.d_model, device=device, dtype=torch.bfloat16),))
        report = moefx.explain(layer)
        if not report.found:
            raise SystemExit(f"moefx declined {shape}:\n{report}")
    if peer.endswith("compiled"):
        layer.compile(dynamic=False)
    return layer


def milliseconds(run: Callable[[], Any], calls: int = 1) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def median(run: Callable[[], Any], rounds: int = 7) -> float:
    run()
    return statistics.median(milliseconds(run) for _ in range(rounds))


@dataclass(frozen=True)
class Ceiling:
    """Of this machine in this run: dense bf16 matmul, and copies within GPU memory (bytes read and written)."""

    tflops: float
    gb_per_s: float


def ceiling() -> Ceiling:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    x, y = (torch.empty(1 << 29, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Ceiling(2 * 8192**3 / median(lambda: a @ b) / 1e9, 4 * x.numel() / median(lambda: y.copy_(x)) / 1e6)


@dataclass(frozen=True)
class Result:
    """Milliseconds; bytes of memory at the peak of a step, parameter gradients aside."""

    forward_ms: float
    step_ms: float
    peak_bytes: int
    graph_ms: float | None = None  # a forward
    graph_step_ms: float | None = None


def measure(layers: dict[str, nn.Module], shape: Shape, tokens: int, rounds: int, seconds: float) -> dict[str, Result]:
    """Every peer in turn, `rounds` times, every other time in the opposite order, first forwards and then steps; a peer slower
    than `seconds` has one turn."""
    x = torch.randn(1, tokens, shape.d_model, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gy = torch.randn(1, tokens, shape.d_model, device="cuda", dtype=torch.bfloat16)
    peaks: dict[str, int] = {}

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(x)

    def step(layer: nn.Module) -> None:
        clear(layer)
        layer(x).backward(gy)

    def clear(layer: nn.Module) -> None:
        x.grad = None
        for p in layer.parameters():
            p.grad = None

    def peak(layer: nn.Module) -> int:
        """Bytes at the peak of a step, parameter gradients aside; one ran before."""
        clear(layer)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(layer)
        return torch.cuda.max_memory_allocated() - before - sum(p.numel() * p.element_size() for p in layer.parameters())

    def in_turns(run: Callable[[nn.Module], None]) -> dict[str, list[float]]:
        """Of every peer, milliseconds of each round; what runs behind others finds a warmer GPU."""
        times: dict[str, list[float]] = {}
        active = dict(layers)
        for turn in range(rounds + 1):
            for peer, layer in list(active.items())[:: -1 if turn % 2 else 1]:
                ms = milliseconds(partial(run, layer), CALLS if turn else 1)
                clear(layer)
                if turn:
                    times.setdefault(peer, []).append(ms)
                elif ms > 1e3 * seconds:
                    times[peer] = [ms]
                    del active[peer]
        return times

    for peer, layer in layers.items():  # what compiles does it here
        for _ in range(2):
            forward(layer)
            step(layer)
        peaks[peer] = peak(layer)
        clear(layer)
    forwards, steps = in_turns(forward), in_turns(step)  # apart: who serves a model does not train it in between
    graphs: dict[str, tuple[float | None, float | None]] = {}
    for peer, layer in layers.items() if tokens <= HOST_BOUND else ():
        if peer not in WAITING:
            graphs[peer] = graph_ms(layer, x), step_graph_ms(layer, x, gy)
    return {
        p: Result(statistics.median(forwards[p]), statistics.median(steps[p]), peaks[p], *graphs.get(p, ())) for p in layers
    }


def graph_ms(layer: Callable[[Tensor], Any], x: Tensor) -> float | None:
    """The forward as a CUDA graph, replayed; None for a peer that cannot be captured (its host waits for the GPU). The graph
    has several calls with tokens of their own, so that not the same experts' weights lie in the cache."""
    with torch.no_grad():
        return captured_ms(layer, [torch.randn_like(x).requires_grad_() for _ in range(CALLS)])


def step_graph_ms(layer: nn.Module, x: Tensor, gy: Tensor) -> float | None:
    """As `graph_ms`, forward and backward; every call takes the memory of the one before it for its gradients."""
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step(x: Tensor) -> None:
        torch.autograd.grad(layer(x), [x, *parameters], gy)

    return captured_ms(step, [torch.randn_like(x).requires_grad_() for _ in range(CALLS)])


def captured_ms(run: Callable[[Any], Any], inputs: list[Any]) -> float | None:
    """A call of `run`, of one graph with a call for each of the inputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # autograd's nodes that gather gradients belong to the stream of their first call
        for each in inputs:
            run(each)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            for each in inputs:
                run(each)
    except Exception:  # noqa: BLE001 - torch says so in several ways
        torch.cuda.synchronize()
        return None
    return median(graph.replay, 15) / len(inputs)


BLOCK, STEPS, LOADING_WARPS = 2048, 2, 8  # the fastest, or within 2 % of it, of eight ways to read a few experts on an H200


@triton.jit
def read_kernel(weights, ids, sums, size, EACH: tl.constexpr, STEPS: tl.constexpr):
    """Reads the matrices weights [E, size] of the experts `ids`. Grid (size / (EACH * STEPS), how many ids)."""
    start = weights + tl.load(ids + tl.program_id(1)).to(tl.int64) * size
    total = tl.zeros((EACH,), dtype=tl.float32)
    for step in tl.static_range(STEPS):
        at = (tl.program_id(0) * STEPS + step) * EACH + tl.arange(0, EACH)
        total += tl.load(start + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(total, axis=0))


def floor_row(name: str, shape: Shape, tokens: int, layer: nn.Module, top: Ceiling) -> str:
    """What few tokens cost where nothing is computed: the experts' bytes and the router. layer: the model's own."""
    size = shape.d_model * shape.d_expert
    up, down = (torch.randn(shape.experts, n * size, device="cuda", dtype=torch.bfloat16) for n in (2, 1))
    hit = round(experts_hit(shape, tokens))
    sums = torch.empty(hit * triton.cdiv(2 * size, BLOCK * STEPS), device="cuda")

    def read(ids: Tensor) -> None:
        for weights in (up, down):
            grid = (triton.cdiv(weights.shape[1], BLOCK * STEPS), hit)
            read_kernel[grid](weights, ids, sums, weights.shape[1], EACH=BLOCK, STEPS=STEPS, num_warps=LOADING_WARPS)

    drawn = [torch.randperm(shape.experts, device="cuda")[:hit] for _ in range(CALLS)]
    read_ms = captured_ms(read, drawn)
    router = next(m for m in layer.block.children() if any(p.shape == (shape.experts, shape.d_model) for p in m.parameters()))
    x = torch.randn(tokens, shape.d_model, device="cuda", dtype=torch.bfloat16)
    router_ms = graph_ms(torch.compile(router, dynamic=False), x)
    assert read_ms is not None and router_ms is not None
    gb_per_s = 6 * hit * size / (read_ms + router_ms) / 1e6
    return (
        f"| {name} | {tokens} | floor | - / - / {read_ms:.3f} + {router_ms:.3f} | {gb_per_s:.0f} GB/s | "
        f"{gb_per_s / top.gb_per_s:.0%} (reading alone {6 * hit * size / read_ms / 1e6 / top.gb_per_s:.0%}) | | | |"
    )


def experts_hit(shape: Shape, tokens: int) -> float:
    """How many experts are expected to have a token, for uniform routing."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def skew(layer: nn.Module, shape: Shape, tokens: int) -> str:
    """The step with experts as popular as Zipf has it, against that with even routing; and the largest expert's share."""
    router = next(p for name, p in layer.named_parameters() if p.shape == (shape.experts, shape.d_model))
    x = torch.randn(1, tokens, shape.d_model, device="cuda", dtype=torch.bfloat16)
    x[..., 0] = 1.0  # a feature that is always there: its column of the router says how popular experts are
    gy, before = torch.randn_like(x), router.detach()[:, 0].clone()
    popular = torch.arange(1, shape.experts + 1, device="cuda").log().neg()
    spread = (router.detach().float() @ x[0, :256].T.float()).std()
    x.requires_grad_()

    def step() -> None:
        for p in (x, *layer.parameters()):
            p.grad = None
        layer(x).backward(gy)

    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(6):
        for skewed in times:
            with torch.no_grad():
                router[:, 0] = popular * spread if skewed else before
            ms = milliseconds(step, CALLS)
            if turn:
                times[skewed].append(ms)
    with torch.no_grad():
        router[:, 0] = popular * spread
        load = (x[0] @ router.T).topk(shape.top_k, -1).indices.flatten().bincount(minlength=shape.experts)
        router[:, 0] = before
    factor = statistics.median(times[True]) / statistics.median(times[False])
    return f"{factor:.2f}x (largest expert {load.max() / load.float().mean():.1f}x the mean)"


def rows(
    name: str, shape: Shape, tokens: int, results: dict[str, Result], top: Ceiling, skew_of: Callable[[], str]
) -> list[str]:
    flops = 6 * tokens * shape.top_k * shape.d_model * shape.d_expert
    others = [r for p, r in results.items() if not ours(p)]
    lines = []
    for peer, r in results.items():
        if tokens <= FEW_TOKENS:
            gb_per_s = 6 * experts_hit(shape, tokens) * shape.d_model * shape.d_expert / (r.graph_ms or r.forward_ms) / 1e6
            speed, share = f"{gb_per_s:.0f} GB/s", f"{gb_per_s / top.gb_per_s:.0%}"
        else:
            forward, both = flops / r.forward_ms / 1e9, 3 * flops / r.step_ms / 1e9
            speed, share = f"{forward:.0f} / {both:.0f} TFLOP/s", f"{forward / top.tflops:.0%} / {both / top.tflops:.0%}"
        ahead = ""
        if ours(peer) and others:
            best = min(o.forward_ms for o in others) / r.forward_ms, min(o.step_ms for o in others) / r.step_ms
            ahead = f"{best[0]:.2f}x / {best[1]:.2f}x" + graphs_ahead(r, others)
        times = f"{r.forward_ms:.3f} / {r.step_ms:.3f}"
        if tokens <= HOST_BOUND:
            times += " / " + ", ".join(f"{ms:.3f}" if ms else "-" for ms in (r.graph_ms, r.graph_step_ms))
        skewed = f" {skew_of()} |" if peer == "moefx" and tokens >= 4096 else " |"
        lines.append(
            f"| {name} | {tokens} | {peer} | {times} | {speed} | {share} | {r.peak_bytes / 1e9:.2f} | {ahead} |{skewed}"
        )
    return lines


def graphs_ahead(ours: Result, others: list[Result]) -> str:
    """How far ahead of the best peer a forward and a step are, each as a graph; nothing where there are none."""
    ratios = []
    for name in ("graph_ms", "graph_step_ms"):
        peers = [ms for other in others if (ms := getattr(other, name))]
        mine = getattr(ours, name)
        ratios.append(f"{min(peers) / mine:.2f}x" if mine and peers else "-")
    return f" / {', '.join(ratios)}" if ratios != ["-", "-"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow", type=float, default=0.2, help="seconds of a call after which a peer has one turn only")
    parser.add_argument("--budget", type=float, default=480.0, help="no new shape after so many seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    torch._dynamo.config.recompile_limit = 64  # every number of tokens has graphs of its own
    start, top = time.perf_counter(), ceiling()
    head = [
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16; matmul ceiling {top.tflops:.0f} TFLOP/s, "
        f"copy ceiling {top.gb_per_s:.0f} GB/s",
        "",
        "| layer | T | peer | ms forward / step / graphs of them | useful speed forward / step | share of ceiling | peak GB "
        "| best peer / moefx | skewed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(head), flush=True)
    for name in options.shapes:
        if time.perf_counter() - start > options.budget:
            print(f"{name} left out: over the budget of {options.budget:.0f} s")
            continue
        shape = SHAPES[name]
        without = {peer: why for peer in options.peers if (why := missing(peer, shape))}
        for peer, why in without.items():
            print(f"{name}: no row for {peer}: {why}")
        base = {peer: make(peer, shape, "cuda") for peer in options.peers if peer not in without}
        for tokens in options.tokens:
            if time.perf_counter() - start > options.budget:
                break
            results = measure(base, shape, tokens, options.rounds, options.slow)
            lines = rows(name, shape, tokens, results, top, partial(skew, base.get("moefx"), shape, tokens))
            if tokens <= FEW_TOKENS and (plain := next((p for p in base if p.startswith("hf")), None)):
                lines.append(floor_row(name, shape, tokens, base[plain], top))
            print("\n".join(lines), flush=True)
            head += lines
        del base
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    if options.out:
        options.out.write_text("\n".join(head) + "\n")


if __name__ == "__main__":
    main()
