"""An all-to-all on symmetric memory, whose counts stay on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory
from torch import Tensor

from multi_gpu_parts.nodes import NODE_LAYERS
from multi_gpu_parts.plans import Layer, random_batch
from multi_gpu_parts.worker import Bench

MOST_SYMMETRIC = 15  # experts of a rank that `all_to_all_vdev_2d` can handle, in torch 2.11


def why_not_symmetric(bench: Bench) -> str:
    """What an all-to-all on symmetric memory lacks here; "" if nothing."""
    if not bench.cuda:
        return "needs CUDA"
    if not hasattr(torch.ops.symm_mem, "all_to_all_vdev_2d"):
        return f"torch {torch.__version__} has no symm_mem.all_to_all_vdev_2d"
    if not memory.is_nvshmem_available():
        return "NVSHMEM is not in this build of torch, or its library is not found"
    return ""


def symmetric_row(bench: Bench, layer: Layer, tokens: int) -> dict[str, Any]:
    """The dispatch of a layer by `all_to_all_vdev_2d`, whose counts stay on the device, against counts that the host reads.

    Both end with rows in the order of the experts here; rows start in the order of all experts.
    """
    if hasattr(memory, "set_backend"):
        memory.set_backend("NVSHMEM")
    group, ranks, held = bench.group.group_name, bench.world, layer.experts // bench.world
    if hasattr(memory, "enable_symm_mem_for_group"):
        memory.enable_symm_mem_for_group(group)
    most = 2 * tokens * layer.top_k  # that may arrive here

    def shared(*shape: int, dtype: torch.dtype) -> Tensor:
        tensor = memory.empty(*shape, dtype=dtype, device=bench.device)
        memory.rendezvous(tensor, group)
        return tensor

    send, out = (shared(n, layer.d_model, dtype=torch.bfloat16) for n in (tokens * layer.top_k, most))
    splits, received = shared(layer.experts, dtype=torch.int64), shared(2, layer.experts, dtype=torch.int64)
    ids = random_batch(bench, layer, tokens, torch.bfloat16).ids.reshape(-1)
    splits.copy_(torch.bincount(ids, minlength=layer.experts))
    send.copy_(torch.randn(send.shape, device=bench.device))
    torch.cuda.synchronize()
    dist.barrier()

    def on_device() -> None:
        torch.ops.symm_mem.all_to_all_vdev_2d(send, out, splits, received, group)

    def by_host() -> Tensor:
        arriving = torch.empty_like(splits)
        dist.all_to_all_single(arriving, splits)
        both = torch.stack([splits, arriving]).view(2, ranks, held)
        leaving, coming = both.sum(2).tolist()
        rows = send.new_empty(sum(coming), layer.d_model)
        dist.all_to_all_single(rows, send, coming, leaving)
        expert = torch.arange(held, device=bench.device).repeat(ranks).repeat_interleave(arriving, output_size=len(rows))
        return rows[expert.argsort(stable=True)]

    on_device()
    expected, (sizes, starts) = by_host(), received.tolist()
    pieces = torch.cat([out[start : start + size] for size, start in zip(sizes, starts)])
    dist.barrier()  # a rank's next call writes into the others' `received` before it waits for them
    seconds = bench.in_turns({"on the device": on_device, "counts by the host": by_host}, bench.options.rounds)
    moved = send.nbytes * (ranks - 1) / ranks
    cells = {
        **{f"{n} ms": f"{1e3 * t:.3f}" for n, t in seconds.items()},
        "GB/s out of a rank": f"{moved / seconds['on the device'] / 1e9:.0f}", "_seconds": seconds,
    }  # fmt: skip
    return bench.judged("symmetric", f"T={tokens}", cells, torch.equal(pieces, expected))


def symmetric(bench: Bench) -> None:
    layer, _ = NODE_LAYERS["phi-3.5-moe"]
    if reason := why_not_symmetric(bench):
        bench.row("symmetric", "all_to_all_vdev_2d", lambda: {"result": f"not available: {reason}"})
        return
    if layer.experts % bench.world or layer.experts // bench.world > MOST_SYMMETRIC:
        why = {"result": f"skipped: {layer.experts} experts on {bench.world} ranks; it takes up to {MOST_SYMMETRIC} a rank, evenly"}
        bench.row("symmetric", "all_to_all_vdev_2d", lambda: why)
        return
    for tokens in (4096, 16384):
        name = f"all_to_all_vdev_2d, dispatch of {layer}, T={tokens}"
        bench.row("symmetric", name, partial(symmetric_row, bench, layer, tokens))
