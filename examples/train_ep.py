"""Train a Mixtral whose experts are spread over ranks: torchrun --nproc-per-node 2 examples/train_ep.py

The same script on one rank: python examples/train_ep.py. Every rank reads its own part of the batch, so the loss curve is the
same for any number of ranks. With GPUs: one rank a GPU, NCCL; else gloo on CPUs. --save writes a checkpoint that any number of
ranks can load, and a model that moefx never touched.
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import moefx
from moefx.parallel import expert_parameters, sync_gradients

BATCH, LENGTH = 8, 64  # of all ranks together


def text() -> Tensor:
    """The bytes of the reference documentation that Python installs."""
    return torch.frombuffer(bytearray("".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8).long()


def batch(data: Tensor, step: int, rank: int, ranks: int) -> Tensor:
    """This rank's texts of a step, [BATCH / ranks, LENGTH]."""
    starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=torch.Generator().manual_seed(step))
    return torch.stack([data[s : s + LENGTH] for s in starts.tolist()[rank::ranks]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--degree", type=lambda r: r if r == "auto" else int(r), default=2, help="chunks, or auto")
    parser.add_argument("--all-to-all", default="direct")
    parser.add_argument("--codec", default="none")
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    if BATCH % ranks:
        sys.exit(f"{BATCH} texts a step cannot be shared out evenly among {ranks} ranks")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")

    torch.manual_seed(0)  # every rank makes the same model
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model: nn.Module = MixtralForCausalLM(config).to(device)
    data = text()
    example = {"input_ids": batch(data, 0, rank, ranks).to(device)}
    chosen = moefx.Options(
        degree=options.degree, policy="auto" if options.degree == "auto" else "fifo", all_to_all=options.all_to_all,
        codec=options.codec,
    )  # fmt: skip
    moefx.optimize(model, example, chosen, mesh=dist.group.WORLD if ranks > 1 else None)
    if rank == 0:
        print(moefx.explain(model).found[0].schedule)

    # The parameters after optimize: those of the experts are DTensors, which an optimizer keeps apart from plain ones.
    experts = [p for _, p in expert_parameters(model)]
    ids = {id(p) for p in experts}
    groups = [{"params": [p for p in model.parameters() if id(p) not in ids]}]
    groups += [{"params": experts}] if experts else []
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    for step in range(options.steps):
        ids_of_step = batch(data, step, rank, ranks).to(device)
        loss = model(input_ids=ids_of_step, labels=ids_of_step).loss
        loss.backward()
        if ranks > 1:
            sync_gradients(model, dist.group.WORLD)
            dist.all_reduce(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:3d}  loss {loss.item() / ranks:.6f}", flush=True)
    if options.save:
        checkpoint.save({"model": model.state_dict()}, checkpoint_id=options.save)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
