"""Does what goes over the wire change training?   python benchmarks/curves.py [--steps 200] [--out out/curves.png]

A small Mixtral on real text, its experts on two gloo ranks: r = 1, the chosen degree, and that with each codec, on what is
dispatched and combined alone (forward) and on gradients as well (both). Same seed and batches for all. Prints the losses as a
Markdown table for docs/parallel.md.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from moefx.codegen.codecs import CODECS  # noqa: E402
from moefx.models import BLOCKS, TinyMoELM  # noqa: E402
from ranks import run_ranks  # noqa: E402

import moefx  # noqa: E402
from moefx.parallel import sync_gradients  # noqa: E402

BATCH, LENGTH, WIDTH = 8, 64, 64


def batch(data: Tensor, step: int) -> Tensor:
    """This rank's texts, and one byte more of each: [BATCH / P, LENGTH + 1]."""
    starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[s : s + LENGTH + 1] for s in starts.tolist()[dist.get_rank() :: dist.get_world_size()]])


def train(steps: int, variants: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    text = "".join(pydoc_data.topics.topics.values()).encode()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    torch.manual_seed(0)
    start = TinyMoELM(BLOCKS["mixtral"], d_model=WIDTH)
    losses: dict[str, list[float]] = {}
    for name, options in variants.items():
        model = copy.deepcopy(start)
        moefx.optimize(model, (batch(data, 0)[:, :-1],), moefx.Options(**options), mesh=dist.group.WORLD)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)
        losses[name] = []
        for step in range(steps):
            ids = batch(data, step)
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            sync_gradients(model, dist.group.WORLD)
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses[name].append(float(mean) / dist.get_world_size())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="a plot, PNG")
    options = parser.parse_args()
    variants: dict[str, dict[str, Any]] = {"r=1": {"degree": 1, "policy": "fifo"}, "auto": {}}
    for codec in (name for name in CODECS if name != "none"):
        variants[f"auto, {codec} forward"] = {"codec": codec}
        variants[f"auto, {codec} both"] = {"codec": codec, "backward_codec": codec}
    losses = run_ranks(2, train, options.steps, variants, timeout_s=3600)[0]
    shown = sorted({0, *range(options.steps // 4 - 1, options.steps, options.steps // 4)})
    print("| run | " + " | ".join(f"step {s}" for s in shown) + " | mean of the last tenth | against r=1 |")
    print("| --- |" + " --- |" * (len(shown) + 2))
    tail = max(1, options.steps // 10)
    reference = sum(losses["r=1"][-tail:]) / tail
    for name, curve in losses.items():
        last = sum(curve[-tail:]) / tail
        cells = [f"{curve[s]:.4f}" for s in shown]
        print(f"| {name} | {' | '.join(cells)} | {last:.4f} | {last - reference:+.4f} |")
    if options.out:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        for name, curve in losses.items():
            axes.plot(curve, label=name, linewidth=1)
        axes.set(xlabel="step", ylabel="loss", title="Training with what goes over the wire encoded")
        axes.legend(fontsize=7)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
