"""Is the optimised model the original one, on a GPU, in the precisions that are used, and what does optimize() cost?

    python benchmarks/equivalence_gpu.py                             # an H100, minutes
    python benchmarks/equivalence_gpu.py --device cpu --small        # a dry run

Equivalence: the experts of Mixtral-, Qwen3-MoE-, DeepSeek-V3- and gpt-oss-style decoders, as they were (the eager loop
of Transformers) and optimised, against the same loop in float64 on the same numbers: the weights and inputs are rounded
to the dtype first, and all three are given the same expert ids and weights, so that no token changes its expert. An
error is a relative Frobenius norm; that of the optimised experts may be 1.5 times that of the original. Few tokens give
few numbers and a ratio of chance, so such cases are drawn several times and their errors pooled.

Besides: results equal bit for bit from run to run, chunked plans under random delays of their lanes, no host
synchronisation, cost of optimize() on two layers of Qwen3-30B-A3B, and their training step. The tables come last, and
go to --out as well. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import inspect
import math
import pstats
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import moefx  # noqa: E402
from moefx.block import Variant, rewritten  # noqa: E402
from moefx.options import Options  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ERROR_BAR = 1.5  # times the original's own error
SECONDS_BAR, BLOCKS_BAR, KEPT_BAR = 10.0, 1.0, 1 << 20  # cost of optimize(); KEPT_BAR in bytes is "nothing"
CHUNK_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # chunked against not chunked
DEGREES, DELAYED_RUNS, EQUAL_RUNS, TIMED_RUNS = (1, 2, 3, 4), 20, 5, 5
POOLED_TOKENS = 32  # a case of fewer tokens is drawn until it has so many
MIB, GIB = 1 << 20, 1 << 30
ERRORS_HEADER = ("block", "dtype", "y", "grad x", "grad w", "grad parameters", "worst case", "result")

Result = dict[str, Tensor]  # "y" and gradients by the name of what they belong to

# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class Width:
    """D model width, F expert width, E experts, K of them per token."""

    d: int
    f: int
    experts: int
    top_k: int


WIDTHS = {
    "mixtral": Width(1024, 1792, 8, 2),
    "qwen3_moe": Width(1024, 384, 32, 8),
    "deepseek_v3": Width(1024, 512, 32, 8),
    "gpt_oss": Width(768, 768, 32, 4),
}
SMALL = Width(64, 48, 8, 4)
CHUNKED = {"qwen3_moe": Width(512, 256, 16, 4), "gpt_oss": Width(512, 256, 16, 4)}


def decoder(family: str, width: Width, layers: int = 2) -> Any:
    """A configuration in the style of `family`: routing, expert layout and activation are the family's own."""
    import transformers

    common: dict[str, Any] = {
        "hidden_size": width.d, "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 4096, "num_experts_per_tok": width.top_k, "use_cache": False,
    }  # fmt: skip
    if family == "mixtral":
        return transformers.MixtralConfig(**common, intermediate_size=width.f, num_local_experts=width.experts)
    if family == "qwen3_moe":
        more = {"num_experts": width.experts, "moe_intermediate_size": width.f, "norm_topk_prob": True, "head_dim": 64}
        return transformers.Qwen3MoeConfig(**common, **more, intermediate_size=2 * width.f)
    if family == "gpt_oss":
        more = {"num_local_experts": width.experts, "intermediate_size": width.f, "head_dim": 64}
        return transformers.GptOssConfig(**common, **more)
    if family == "deepseek_v3":
        experts = {"n_routed_experts": width.experts, "moe_intermediate_size": width.f, "n_shared_experts": 1}
        groups = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "intermediate_size": 2 * width.f}
        latent = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16}
        heads = {"v_head_dim": 32, "head_dim": 16, "num_key_value_heads": 8}  # head_dim: the rotary part
        return transformers.DeepseekV3Config(**common | experts | groups | latent | heads)
    raise ValueError(f"no family {family!r}")


def qwen3_30b_a3b(small: bool) -> Any:
    """Two layers of the real width, and a small vocabulary."""
    import transformers

    if small:
        return decoder("qwen3_moe", Width(64, 24, 16, 8))
    return transformers.Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=2, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        intermediate_size=6144, num_attention_heads=32, num_key_value_heads=4, head_dim=128, norm_topk_prob=True,
        vocab_size=1024, max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip


def build(config: Any, device: torch.device, dtype: torch.dtype, **implementations: str) -> Any:
    """The model with random weights on the device; what starts at zero (biases) is random too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **implementations)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(0, 0.02)
    assert {p.device.type for p in model.parameters()} == {device.type}
    return model


def implementation(model: Any) -> str:
    return str(model.config._experts_implementation)


def token_ids(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator).to(model.device)


# ------------------------------------------------------------------------------------------------ one step of a block


def names_of(args: Sequence[Tensor]) -> list[str | None]:
    """x and w for the float arguments of experts, None for the others."""
    names = iter("xw")
    return [next(names) if t.is_floating_point() else None for t in args]


def forward_of(module: nn.Module, args: Sequence[Tensor]) -> Tensor:
    y = module(*args)
    return y[0] if isinstance(y, tuple) else y


def step(module: nn.Module, args: Sequence[Tensor], gy: Tensor) -> Result:
    """y and the gradients of x, w and the parameters; nothing here waits for the device."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in args]
    y = forward_of(module, leaves)
    sources = {name: t for name, t in zip(names_of(leaves), leaves) if name} | dict(module.named_parameters())
    found = torch.autograd.grad(y, list(sources.values()), gy, allow_unused=True, materialize_grads=True)
    return {"y": y.detach(), **dict(zip(sources, found))}


def differing(a: Result, b: Result) -> list[str]:
    """The names of what is not equal bit for bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Block:
    """The experts that were found (or, where the routing is inside it, the block that was found), before and after."""

    name: str
    original: nn.Module
    optimised: nn.Module
    parent: nn.Module  # the original MoE block: its router gives ids and weights
    optimised_parent: nn.Module
    routed: bool  # called with (x, ids, w)

    @staticmethod
    def of(name: str, original: nn.Module, optimised: nn.Module) -> Block:
        above = name.rpartition(".")[0]
        experts = original.get_submodule(name)
        routed = len(inspect.signature(type(experts).forward).parameters) > 3
        above = above if routed else name
        return Block(
            name, experts, optimised.get_submodule(name), original.get_submodule(above),
            optimised.get_submodule(above), routed,
        )  # fmt: skip

    def inputs(self, tokens: int, width: int, seed: int) -> tuple[Tensor, ...]:
        """Random activations [T, D] with what the original's router makes of them."""
        parameter = next(self.original.parameters())
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, tokens, width, generator=generator).to(parameter)
        if not self.routed:
            return (x,)
        seen: list[tuple[Any, dict[str, Any]]] = []
        hook = self.original.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
        try:
            with torch.no_grad():
                self.parent(x)
        finally:
            hook.remove()
        args, kwargs = seen[0]
        bound = inspect.signature(type(self.original).forward).bind(self.original, *args, **kwargs)
        return tuple(bound.args[1:])

    def variants(self) -> Iterator[Variant]:
        forward = rewritten(self.optimised)
        assert forward is not None, f"{self.name} is not rewritten"
        yield from (v for v in forward.variants.values() if isinstance(v, Variant))

    def set_delays(self, delays: Callable[[str], None] | None) -> None:
        for variant in self.variants():
            variant.compiled.delays = delays


def reasons(report: moefx.Report) -> str:
    """Why there is no block, briefly."""
    return one_line("; ".join(f"{d.name}: {d.reason}" for d in report.declined))


def one_line(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "/")[:200]


def cotangent(like: Tensor, shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(like)


# ------------------------------------------------------------------------------------------------ results


@dataclass
class Bench:
    """The settings, and what was found out so far."""

    device: torch.device
    small: bool
    budget: float
    out: Path | None
    start: float = field(default_factory=time.perf_counter)
    errors: list[tuple[str, ...]] = field(default_factory=list)  # rows of the table of errors
    checks: list[tuple[str, ...]] = field(default_factory=list)  # rows of the table of the other checks
    missed: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def log(self, text: str) -> None:
        print(f"[{self.elapsed:6.1f} s] {text}", flush=True)

    def check(self, what: str, case: str, measured: str, bar: str = "", passed: bool | None = None) -> None:
        """One row; passed=None: for information."""
        result = {True: "PASS", False: "FAIL", None: "info"}[passed]
        self.checks.append((what, case, measured, bar, result))
        self.log(f"{result} {what}: {case}: {measured}")
        if passed is False:
            self.missed.append(f"{what}: {case}: {measured} (bar: {bar})")

    def run(self, what: str, section: Callable[[], None]) -> None:
        """One section: its failure is a missed bar and no reason to stop."""
        if self.elapsed > self.budget:
            self.check(what, "all", f"skipped: over the budget of {self.budget:.0f} s", "run", False)
        else:
            try:
                section()
            except Exception as error:  # noqa: BLE001 - the other sections still tell something
                traceback.print_exc(file=sys.stdout)
                self.check(what, "all", one_line(f"{type(error).__name__}: {error}"), "run", False)
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
        if self.out is not None:
            self.out.write_text(self.tables(), encoding="utf-8")

    def tables(self) -> str:
        import transformers

        device = torch.cuda.get_device_name(self.device) if self.cuda else "CPU"
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        head = f"{device}{' (small)' if self.small else ''}, {versions}, {self.elapsed:.0f} s"
        lines = [head, ""]
        if self.errors:
            lines += [
                f"Relative error against float64, optimised / original = ratio, of the case with the worst ratio; bar "
                f"{ERROR_BAR}.",
                "",
                *table(ERRORS_HEADER, self.errors),
                "",
            ]
        lines += table(("check", "case", "measured", "bar", "result"), self.checks)
        lines += ["", *(f"MISSED {text}" for text in self.missed)] if self.missed else ["", "all bars met"]
        return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return [line(header), line(["---"] * len(header)), *map(line, rows)]


# ------------------------------------------------------------------------------------------------ equivalence


@dataclass(frozen=True)
class Case:
    """T tokens, routed as the model's router has it ("router"), all alike ("same"), or to odd experts only ("half")."""

    tokens: int
    routing: str

    def __str__(self) -> str:
        return f"T={self.tokens} {self.routing}"

    def ids(self, ids: Tensor, experts: int, seed: int) -> Tensor:
        if self.routing == "same":
            return torch.arange(ids.shape[1], device=ids.device).expand_as(ids).to(ids.dtype)
        if self.routing == "half":
            scores = torch.rand(ids.shape[0], experts // 2, generator=torch.Generator().manual_seed(seed))
            return (2 * scores.topk(ids.shape[1]).indices + 1).to(ids)
        return ids


@dataclass
class Errors:
    """Squared errors and squared size of one quantity, over all draws of a case."""

    original: float = 0.0
    optimised: float = 0.0
    size: float = 0.0

    def add(self, original: Tensor, optimised: Tensor, exact: Tensor) -> None:
        self.original += float((original.double() - exact).square().sum())
        self.optimised += float((optimised.double() - exact).square().sum())
        self.size += float(exact.square().sum())

    @property
    def pair(self) -> tuple[float, float]:
        size = math.sqrt(self.size) or 1e-300
        return math.sqrt(self.optimised) / size, math.sqrt(self.original) / size

    @property
    def ratio(self) -> float:
        optimised, original = self.pair
        if original == 0:
            return 0.0 if optimised == 0 else math.inf
        return optimised / original

    def __str__(self) -> str:
        return "{:.1e} / {:.1e} = {:.2f}".format(*self.pair, self.ratio)


def errors_of(block: Block, reference: nn.Module, case: Case, width: Width) -> tuple[dict[str, Errors], list[str]]:
    """Errors by quantity, and the parameters whose gradient is not zero at experts that no token reached."""
    errors: dict[str, Errors] = {}
    leaks: list[str] = []
    for seed in range(max(1, POOLED_TOKENS // case.tokens)):
        args = block.inputs(case.tokens, width.d, seed)
        args = tuple(t if t.is_floating_point() else case.ids(t, width.experts, seed) for t in args)
        gy = cotangent(args[0], args[0].shape, 100 + seed)
        exact = step(reference, [t.double() if t.is_floating_point() else t for t in args], gy.double())
        original, optimised = step(block.original, args, gy), step(block.optimised, args, gy)
        for name, want in exact.items():
            errors.setdefault(name, Errors()).add(original[name], optimised[name], want)
            if name not in ("y", "x", "w"):
                empty = (want.flatten(1) == 0).all(1)
                if bool(optimised[name].flatten(1)[empty].any()):
                    leaks.append(name)
    return errors, sorted(set(leaks))


def equivalence(bench: Bench, family: str, dtype_name: str, block: Block, width: Width) -> None:
    reference = copy.deepcopy(block.original).double()
    few, some, many = (1, 17, 64) if bench.small else (17, 512, 4096)
    tokens = (few, some, many) if bench.small else (1, few, some, many)
    routings = ("same", "half") if block.routed else ()
    cases = [*(Case(t, "router") for t in tokens), *(Case(t, routing) for routing in routings for t in (some, many))]
    worst: dict[str, tuple[Errors, str]] = {}
    leaks: list[str] = []
    for case in cases:
        errors, leaking = errors_of(block, reference, case, width)
        leaks += [f"{case}: {name}" for name in leaking]
        bench.log(f"{family} {dtype_name} {case}: " + ", ".join(f"{name} {error}" for name, error in errors.items()))
        for name, error in errors.items():
            kind = name if name in ("y", "x", "w") else "parameters"
            at = f"{case}, {name if name == 'y' else 'grad ' + name}"
            if not error.ratio <= ERROR_BAR:
                bench.missed.append(f"equivalence: {family} {dtype_name} {at}: {error}")
            if kind not in worst or not error.ratio <= worst[kind][0].ratio:
                worst[kind] = (error, at)
    bench.missed += [f"equivalence: {family} {dtype_name}: an unreached expert has a gradient: {at}" for at in leaks]
    _, at = max(worst.values(), key=lambda pair: math.inf if math.isnan(pair[0].ratio) else pair[0].ratio)
    passed = not leaks and all(error.ratio <= ERROR_BAR for error, _ in worst.values())
    cells = (str(worst[kind][0]) if kind in worst else "" for kind in ("y", "x", "w", "parameters"))
    note = at if block.routed else f"{at} (routing not fixed)"
    bench.errors.append((f"{family} {block.name}", dtype_name, *cells, note, "PASS" if passed else "FAIL"))


def determinism(bench: Bench, family: str, dtype_name: str, block: Block, width: Width) -> None:
    tokens = 64 if bench.small else 4096
    args = block.inputs(tokens, width.d, 7)
    gy = cotangent(args[0], args[0].shape, 8)
    first, *others = (step(block.optimised, args, gy) for _ in range(EQUAL_RUNS))
    different = sorted({name for other in others for name in differing(first, other)})
    measured = f"different: {', '.join(different)}" if different else f"{EQUAL_RUNS} runs bit-equal"
    bench.check("determinism", f"{family} {dtype_name} T={tokens}", measured, "bit-equal", not different)


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronises(module: nn.Module, args: Sequence[Tensor], gy: Tensor) -> str:
    """What waits for the device in a warm step; "" if nothing does."""
    for _ in range(2):
        step(module, args, gy)
    try:
        with synchronisation_is_an_error():
            step(module, args, gy)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        traceback.print_exc(file=sys.stdout)
        frames = traceback.extract_tb(error.__traceback__)
        return f"at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return ""


def synchronisation(bench: Bench, family: str, dtype_name: str, block: Block, width: Width) -> None:
    if not bench.cuda:
        bench.check("host synchronisation", f"{family} {dtype_name}", "n/a on the CPU")
        return
    tokens = 512
    args = block.inputs(tokens, width.d, 9)
    gy = cotangent(args[0], args[0].shape, 10)
    found = synchronises(block.optimised, args, gy)
    x = cotangent(args[0], torch.Size((1, tokens, width.d)), 11)
    around = synchronises(block.optimised_parent, (x,), torch.ones_like(x))
    measured = f"{found or 'none'}; with the model's own router: {around or 'none'}"
    bench.check("host synchronisation", f"{family} {dtype_name}", measured, "none", not found)


def family_checks(bench: Bench, family: str, dtype_names: Sequence[str]) -> None:
    """Equivalence, determinism and synchronisation of one family, in all dtypes of one optimised model."""
    width = SMALL if bench.small else WIDTHS[family]
    bench.log(f"{family}: {width}")
    model = build(decoder(family, width), bench.device, torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    original = copy.deepcopy(model)
    moefx.optimize(model, {"input_ids": token_ids(model, 1, 64)})
    report = moefx.explain(model)
    found = f"{len(report.found)} in {report.seconds:.1f} s" if report.found else f"0; {reasons(report)}"
    bench.check("blocks found", f"{family} eager", found, "2", len(report.found) == 2)
    if not report.found:
        return
    for dtype_name in dtype_names:
        dtype = DTYPES[dtype_name]
        original.to(dtype)
        model.to(dtype)
        block = Block.of(report.found[0].name, original, model)
        for what, section in (
            ("equivalence", equivalence),
            ("determinism", determinism),
            ("host synchronisation", synchronisation),
        ):
            bench.run(f"{what} {family} {dtype_name}", lambda: section(bench, family, dtype_name, block, width))  # noqa: B023


# ------------------------------------------------------------------------------------------------ chunks


@dataclass
class RandomDelays:
    """Up to about a millisecond of waiting on a lane at each call."""

    cuda: bool
    generator: torch.Generator
    calls: int = 0

    def __call__(self, lane: str) -> None:
        self.calls += 1
        cycles = int(torch.randint(1, 2_000_000, (1,), generator=self.generator))
        if self.cuda:
            torch.cuda._sleep(cycles)


def chunked(family: str, original: nn.Module, degree: int, width: Width) -> Block:
    """A copy of an MoE block, optimised with so many chunks."""
    optimised = copy.deepcopy(original)
    example = cotangent(next(original.parameters()), torch.Size((1, 64, width.d)), 12)
    moefx.optimize(optimised, (example,), Options(degree=degree))
    report = moefx.explain(optimised)
    if not report.found:
        raise RuntimeError(f"{family} degree {degree}: no block found: {reasons(report)}")
    return Block.of(report.found[0].name, original, optimised)


def delayed_differences(
    bench: Bench, block: Block, args: Sequence[Tensor], gy: Tensor, calm: Result
) -> tuple[int, int]:
    """How many runs with lanes slowed down at random differ from the calm one; delays of one run."""
    delays = RandomDelays(bench.cuda, torch.Generator().manual_seed(0))
    block.set_delays(delays)
    wrong = 0
    try:
        for _ in range(DELAYED_RUNS):
            late = step(block.optimised, args, gy)
            wrong += bool(differing(calm, late))
            for value in late.values():
                value.fill_(math.nan)  # memory that was given back too early shows in the next run
    finally:
        block.set_delays(None)
    return wrong, delays.calls // DELAYED_RUNS


def chunks(bench: Bench, family: str, dtype_name: str) -> None:
    """Each degree against degree 1, and against itself with lanes slowed down at random."""
    dtype, width = DTYPES[dtype_name], SMALL if bench.small else CHUNKED[family]
    tokens = 37 if bench.small else 1021  # a prime: the chunks are uneven
    model = build(decoder(family, width, layers=1), bench.device, dtype, attn_implementation="eager")
    model.set_experts_implementation("eager")
    original = model.model.layers[0].mlp
    whole: Result = {}
    against_whole: list[str] = []
    worst = 0.0
    wrong: dict[int, int] = {}
    delays: dict[int, int] = {}
    for degree in DEGREES:
        block = chunked(family, original, degree, width)
        args = block.inputs(tokens, width.d, 13)
        gy = cotangent(args[0], args[0].shape, 14)
        calm = step(block.optimised, args, gy)
        whole = whole or calm
        wrong[degree], delays[degree] = delayed_differences(bench, block, args, gy, calm)
        if degree > 1 and not delays[degree]:  # degree 1 has one lane only
            raise RuntimeError(f"degree {degree}: no lane was ever delayed")
        error = max(relative(calm[name], whole[name]) for name in whole)
        worst = error if not error <= worst else worst
        equal = [name for name in whole if name not in differing(whole, calm)]
        if degree > 1:
            against_whole.append(f"r={degree} {error:.1e} (bit-equal: {', '.join(equal) or 'none'})")
    case, tolerance = f"{family} {dtype_name} T={tokens}", CHUNK_TOLERANCE[dtype]
    bench.check("chunks against r=1", case, "; ".join(against_whole), f"{tolerance:.0e}", worst <= tolerance)
    each = ", ".join(f"r={degree}: {runs} ({delays[degree]} delays)" for degree, runs in wrong.items())
    measured = f"{each} of {DELAYED_RUNS} runs differ"
    bench.check("chunks under random delays", case, measured, "0", not any(wrong.values()))


# ------------------------------------------------------------------------------------------------ cost of optimize()


@dataclass(frozen=True)
class Cost:
    """Seconds of wall time; bytes of GPU memory above what there was, at the peak and afterwards; bytes on the host."""

    seconds: float
    peak: int
    kept: int
    host: int


def settle(bench: Bench) -> int:
    """Bytes of GPU memory in use by tensors when everything that can go is gone."""
    gc.collect()
    if not bench.cuda:
        return 0
    torch.cuda.synchronize()
    clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # torch's own, kept for the next product
    if clear_workspaces is not None:
        clear_workspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def measured_optimize(bench: Bench, model: nn.Module, ids: Tensor) -> Cost:
    before = settle(bench)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    moefx.optimize(model, example_inputs={"input_ids": ids})
    if bench.cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else 0
    host = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - host) * 1024
    return Cost(seconds, peak, settle(bench) - before, host)


def profile_optimize(bench: Bench, model: nn.Module, ids: Tensor, cold: float) -> None:
    """The same once more, warm, under the profiler."""
    moefx.restore(model)
    profile = cProfile.Profile()
    start = time.perf_counter()
    profile.runcall(moefx.optimize, model, {"input_ids": ids})
    seconds = time.perf_counter() - start
    bench.log(f"optimize() again, warm and profiled: {seconds:.1f} s; the first, cold and not profiled: {cold:.1f} s")
    stats = pstats.Stats(profile)
    stats.sort_stats("cumulative").print_stats(str(ROOT), 12)
    stats.sort_stats("tottime").print_stats(12)


def cost(bench: Bench, model: Any, ids: Tensor) -> None:
    """optimize() of `model` as it is; if it finds nothing there, of its eager form. Leaves the model optimised."""
    in_earnest = bench.cuda and not bench.small
    experts = next(m for m in model.modules() if any(p.dim() == 3 for p in m.parameters(recurse=False)))
    block_bytes = sum(p.numel() * p.element_size() for p in experts.parameters())
    default = implementation(model)
    for name in dict.fromkeys((default, "eager")):
        model.set_experts_implementation(name)
        with torch.no_grad():
            model(input_ids=ids)
        spent = measured_optimize(bench, model, ids)
        report = moefx.explain(model)
        found = f"{len(report.found)}" if report.found else f"0; {reasons(report)}"
        passed = len(report.found) == 2 if name == default else None
        bench.check("optimize()", f"{name}: blocks found", found, "2", passed)
        seconds, blocks = f"{spent.seconds:.1f} s", spent.peak / block_bytes
        within = spent.seconds <= SECONDS_BAR if in_earnest else None
        bench.check("optimize()", f"{name}: time", seconds, f"{SECONDS_BAR:.0f} s", within)
        peak = f"{blocks:.2f} blocks of {block_bytes / GIB:.2f} GiB"
        bench.check("optimize()", f"{name}: extra GPU memory at the peak", peak, "1 block",
                    blocks <= BLOCKS_BAR if in_earnest else None)  # fmt: skip
        bench.check("optimize()", f"{name}: GPU memory kept", f"{spent.kept / MIB:.3f} MiB", "0",
                    abs(spent.kept) <= KEPT_BAR if in_earnest else None)  # fmt: skip
        bench.check("optimize()", f"{name}: host memory, new peak", f"+{spent.host / GIB:.1f} GiB")
        if report.found:
            profile_optimize(bench, model, ids, spent.seconds)
            return
        moefx.restore(model)


# ------------------------------------------------------------------------------------------------ training step


def training_step(bench: Bench, model: Any, ids: Tensor) -> float:
    """Seconds of forward and backward."""
    if bench.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    if bench.cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def training(bench: Bench, original: Any, optimised: Any) -> None:
    batch, length = (2, 32) if bench.small else (4, 1024)
    ids = token_ids(original, batch, length)
    default = implementation(original)
    runs: dict[str, tuple[Any, str]] = {
        f"original, {default} (default)": (original, default),
        "original, eager": (original, "eager"),
        f"optimised ({len(moefx.explain(optimised).found)} blocks)": (optimised, implementation(optimised)),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, float] = {}
    for turn in range(2 + TIMED_RUNS):
        for name, (model, experts_implementation) in runs.items():
            model.set_experts_implementation(experts_implementation)
            before = torch.cuda.memory_allocated() if bench.cuda else 0
            if bench.cuda:
                torch.cuda.reset_peak_memory_stats()
            seconds = training_step(bench, model, ids)
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / GIB if bench.cuda else 0.0
            if turn >= 2:
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    default_seconds = next(iter(medians.values()))
    for name, seconds in medians.items():
        speed = f"{batch * length / seconds:,.0f} tokens/s, {1e3 * seconds:.1f} ms ({default_seconds / seconds:.2f}x)"
        measured = f"{speed}, {peaks[name]:.1f} GiB beside the weights at the peak"
        bench.check("training step", f"{batch} x {length}: {name}", measured)


def real_width(bench: Bench, sections: Sequence[str]) -> None:
    """Cost and training step: one model, before and after."""
    model = build(qwen3_30b_a3b(bench.small), bench.device, torch.bfloat16)
    bench.log(f"Qwen3-30B-A3B, 2 layers: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    original = copy.deepcopy(model)
    ids = token_ids(model, 1, 64)
    if "cost" in sections:
        bench.run("optimize()", lambda: cost(bench, model, ids))
    else:
        moefx.optimize(model, {"input_ids": ids})
    if "step" in sections:
        bench.run("training step", lambda: training(bench, original, model))


# ------------------------------------------------------------------------------------------------ main

SECTIONS = ("cost", "step", "families", "chunks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--families", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--budget", type=float, default=330.0, help="no new section after so many seconds")
    parser.add_argument("--out", type=Path, help="where to write the tables")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(torch.device(options.device), options.small, options.budget, options.out)
    if {"cost", "step"} & set(options.only):  # first: nothing is compiled yet
        bench.run("real width", lambda: real_width(bench, options.only))
    if "families" in options.only:
        for family in options.families:
            bench.run(family, lambda: family_checks(bench, family, options.dtypes))  # noqa: B023
    if "chunks" in options.only:
        for family in CHUNKED:
            for dtype_name in options.dtypes:
                bench.run("chunks", lambda: chunks(bench, family, dtype_name))  # noqa: B023
    print("\n" + bench.tables(), end="", flush=True)
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
