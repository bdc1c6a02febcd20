"""How long `moefx.optimize` takes on a deep model of tiny width, by the way its experts run.   python benchmarks/optimize_time.py

Equal layers share one analysis, so the time should hardly grow with depth. Prints one line per implementation and depth.
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import moefx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 24])
    parser.add_argument("--experts", type=int, default=64)
    options = parser.parse_args()
    ids = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        for layers in options.layers:
            config = Qwen3MoeConfig(
                hidden_size=64, num_hidden_layers=layers, num_experts=options.experts, num_experts_per_tok=8,
                moe_intermediate_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                norm_topk_prob=True, vocab_size=256,
            )  # fmt: skip
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
            start = time.perf_counter()
            moefx.optimize(model, {"input_ids": ids})
            seconds = time.perf_counter() - start
            found = len(moefx.explain(model).found)
            print(f"{implementation:11s} {layers:3d} layers x {options.experts} experts: {seconds:5.1f} s, {found} found")


if __name__ == "__main__":
    main()
