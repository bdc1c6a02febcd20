"""The main job in small: train a real Hugging Face MoE on real text, as it is and optimised, and compare.

Two copies of one Qwen3-MoE see the same batches, step by step in turn, so that noise of the machine meets both alike.
The experts run as Transformers runs them by default (`grouped_mm`); the optimised copy has gone through
`moefx.optimize`. The text is the reference documentation that Python installs; a token is a byte.
"""

from __future__ import annotations

import copy
import importlib
import math
import statistics
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import moefx

BATCH, LENGTH = 8, 128  # texts a step, bytes a text
LEARNING_RATE, WARM_UP_STEPS = 1e-3, 30
# Top-k routing is discontinuous: sooner or later a rounding difference sends a token to another expert, and Adam scales
# even the smallest gradient up to a full step. With this epsilon the runs stay comparable to the end.
ADAM_EPSILON = 3e-4
PROMPT, NEW_BYTES, TEMPERATURE = "The value of the ", 160, 0.5
HELD_OUT_BATCHES = 16
LOSS_TOLERANCE = 1e-3
SMALLEST_SHOWN = 1e-8  # a logarithmic axis has no zero
UNTIMED_STEPS = 5  # the first steps fill caches
SEED = 0


def run(steps: int, out: Path, options: moefx.Options) -> int:
    """Train both copies for `steps` steps, print and write the comparison; return 0 if they agree, 1 if not."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    text = Text.load()
    model = build_model()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"model      {type(model).__name__}, {parameters / 1e6:.1f} M parameters, experts as Transformers runs them: "
        f"{model.config._experts_implementation}"
    )
    print(
        f"text       {text.source}: {len(text.training) / 1e3:.0f} kB to train, "
        f"{len(text.held_out) / 1e3:.0f} kB held out"
    )
    print(f"training   {steps} steps of {BATCH} x {LENGTH} bytes, AdamW, float32, {torch.get_num_threads()} threads\n")

    original = Trainee.of(copy.deepcopy(model), steps)
    report = optimize(model, text, options)
    print(found_table(report) + "\n")
    if not report.found:
        print(f"FAILED: no MoE block was found\n{report}")
        return 1
    optimised = Trainee.of(model, steps)

    train(original, optimised, text, steps)
    print(loss_table(original.losses, optimised.losses) + "\n")
    final = held_out_loss(original.model, text), held_out_loss(optimised.model, text)
    print(step_times(original, optimised) + "\n")
    print(sample(original.model, optimised.model) + "\n")

    files = [out / "loss.png", out / "report.txt", *write_sources(report, out)]
    plot(original.losses, optimised.losses, files[0])
    files[1].write_text(f"{report}\n", encoding="utf-8")
    print("written    " + ", ".join(str(file) for file in files))
    print(f"time       {time.perf_counter() - began:.0f} s in all\n")
    return verdict(final, (original.losses[-1], optimised.losses[-1]))


@dataclass(frozen=True)
class Text:
    """Bytes of English, 0 to 255 each: [N] to train on, and others to measure with."""

    source: str
    training: Tensor
    held_out: Tensor

    @staticmethod
    def load() -> Text:
        """Take the topics of `help()`, or where a Python lacks them the source of its own library."""
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
            source, text = "pydoc_data.topics", "\n".join(topics[name] for name in sorted(topics))
        except ImportError:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            source, text = "the standard library's source", "\n".join(file.read_text("utf-8") for file in files)
        tokens = torch.tensor(list(text.encode()))
        split = len(tokens) * 9 // 10
        return Text(source, tokens[:split], tokens[split:])


@dataclass
class Trainee:
    """A model in training, what it lost and how long each step took."""

    model: Any
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, steps: int) -> Trainee:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPSILON)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / WARM_UP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2

        return Trainee(model.train(), optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss  # with the router's load-balancing loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def build_model() -> Any:
    """Return a Qwen3-MoE for bytes: the architecture as released, only smaller."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        output_router_logits=True,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    return Qwen3MoeForCausalLM(config)


def batches(tokens: Tensor, count: int, seed: int) -> list[Tensor]:
    """Return `count` batches of texts cut at random places: [BATCH, LENGTH] each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - LENGTH + 1, (count, BATCH, 1), generator=generator)
    return list(tokens[starts + torch.arange(LENGTH)])


def optimize(model: nn.Module, text: Text, options: moefx.Options) -> moefx.Report:
    """Optimise the model in place, with a small example: plans serve any number of tokens."""
    start = time.perf_counter()
    example = batches(text.training, 1, SEED)[0][:2, :32]
    moefx.optimize(model, {"input_ids": example, "labels": example}, options)
    print(f"optimised  in {time.perf_counter() - start:.1f} s")
    return moefx.explain(model)


def train(original: Trainee, optimised: Trainee, text: Text, steps: int) -> None:
    """Train both on the same batches, in turn; who goes first alternates."""
    progress = tqdm(batches(text.training, steps, SEED), desc="training", unit="step", disable=None, leave=False)
    for number, batch in enumerate(progress):
        for trainee in (original, optimised) if number % 2 == 0 else (optimised, original):
            trainee.step(batch)
        progress.set_postfix_str(f"loss {original.losses[-1]:.3f} | {optimised.losses[-1]:.3f}")


@torch.no_grad()
def held_out_loss(model: Any, text: Text) -> float:
    """Return the mean loss on text that neither copy has seen."""
    model.eval()
    return statistics.mean(
        model(input_ids=batch, labels=batch).loss.item() for batch in batches(text.held_out, HELD_OUT_BATCHES, SEED)
    )


def found_table(report: moefx.Report) -> str:
    """One line a block, with its relative errors against the original in the verification; layouts below."""
    kinds = list(dict.fromkeys(kind for block in report.found for kind in block.errors))
    rows = [("block", "E", "K", "D", "F", "routing", *(f"{kind} error" for kind in kinds))]
    for block in report.found:
        sizes = (str(size) for size in (block.experts, block.top_k, block.d_model, block.d_expert))
        rows.append((block.name, *sizes, block.routing, *(f"{block.errors.get(kind, 0.0):.1e}" for kind in kinds)))
    layouts = dict.fromkeys(f"layout: {block.layout}" for block in report.found)
    return "\n".join([_table(rows), *layouts])


def loss_table(original: Sequence[float], optimised: Sequence[float]) -> str:
    last = len(original) - 1
    shown = sorted({*range(0, last, max(1, math.ceil(last / 12))), last})
    rows = [("step", "loss as it is", "loss optimised", "difference")]
    for step in shown:
        difference = optimised[step] - original[step]
        rows.append((str(step + 1), f"{original[step]:.5f}", f"{optimised[step]:.5f}", f"{difference:+.1e}"))
    largest = max(abs(a - b) for a, b in zip(original, optimised))
    return f"{_table(rows)}\nlargest difference in any step: {largest:.1e}"


def step_times(original: Trainee, optimised: Trainee) -> str:
    medians = [
        1e3 * statistics.median(trainee.seconds[UNTIMED_STEPS:] or trainee.seconds) for trainee in (original, optimised)
    ]
    return (
        f"step time  as it is {medians[0]:.1f} ms, optimised {medians[1]:.1f} ms "
        f"(medians): {medians[0] / medians[1]:.2f} x as fast"
    )


@torch.no_grad()
def sample(original: Any, optimised: Any) -> str:
    """Let both copies continue the prompt with the same random numbers; return what the optimised one wrote."""
    prompt = torch.tensor([list(PROMPT.encode())])
    written = []
    for model in (original.eval(), optimised.eval()):
        torch.manual_seed(SEED)
        settings = {"max_new_tokens": NEW_BYTES, "do_sample": True, "temperature": TEMPERATURE}
        written.append(model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings))
    as_original, as_optimised = (bytes(ids[0].tolist()) for ids in written)
    same = "the same" if as_original == as_optimised else "a different text"
    lines = as_optimised.decode(errors="replace").splitlines()
    return "\n".join(
        [f"generated  by the optimised model; the original writes {same}", *(f"    {line}" for line in lines)]
    )


def write_sources(report: moefx.Report, out: Path) -> list[Path]:
    """Write each distinct generated source once; blocks of the same kind share theirs."""
    paths = []
    for number, source in enumerate(dict.fromkeys(block.source for block in report.found)):
        path = out / f"plan_{number}.py"
        path.write_text(source, encoding="utf-8")
        paths.append(path)
    return paths


def plot(original: Sequence[float], optimised: Sequence[float], path: Path) -> None:
    """Draw both losses, and below them how far they are apart."""
    from matplotlib.figure import Figure

    steps = range(1, len(original) + 1)
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    losses.plot(steps, original, color="#9ecae1", linewidth=5, label="as it is")
    losses.plot(steps, optimised, color="#08306b", linewidth=1.2, label="optimised by moefx")
    losses.set_ylabel("training loss (nats per byte)")
    losses.set_title("Qwen3-MoE on Python's documentation: same seed, same batches, float32")
    losses.legend()
    gaps = [max(abs(a - b), SMALLEST_SHOWN) for a, b in zip(original, optimised)]
    differences.semilogy(steps, gaps, color="#08306b", linewidth=1)
    differences.axhline(LOSS_TOLERANCE, color="#cb181d", linestyle="--", label=f"tolerance {LOSS_TOLERANCE:g}")
    differences.set_ylabel(f"|difference| (at least {SMALLEST_SHOWN:g})")
    differences.set_ylim(SMALLEST_SHOWN / 2, 10 * LOSS_TOLERANCE)
    differences.set_xlabel("step")
    differences.legend(loc="upper left")
    for axes in (losses, differences):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def verdict(held_out: tuple[float, float], last_step: tuple[float, float]) -> int:
    """Print the final losses, of (the original, the optimised); return 0 if both pairs are close, else 1."""
    differences = [abs(a - b) for a, b in (held_out, last_step)]
    line = "; ".join(
        f"{what} as it is {pair[0]:.5f}, optimised {pair[1]:.5f}, difference {difference:.1e}"
        for what, pair, difference in zip(("on held-out text", "in the last step"), (held_out, last_step), differences)
    )
    agree = all(difference <= LOSS_TOLERANCE for difference in differences)  # a NaN is not
    print(f"OK: final loss {line}" if agree else f"FAILED: final loss {line}; at most {LOSS_TOLERANCE:g} is allowed")
    return 0 if agree else 1


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
