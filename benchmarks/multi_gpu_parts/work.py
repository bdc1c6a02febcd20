"""What a worker does: the parts, in their order."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from multi_gpu import PARTS

from multi_gpu_parts.correctness import correctness
from multi_gpu_parts.layers import calibration, layers
from multi_gpu_parts.model import model
from multi_gpu_parts.nodes import nodes
from multi_gpu_parts.symmetric import symmetric
from multi_gpu_parts.traces import trace
from multi_gpu_parts.worker import Bench


def work(options: argparse.Namespace) -> int:
    if options.device == "cuda" and torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
        print(f"{os.environ['WORLD_SIZE']} ranks need as many GPUs; this machine has {torch.cuda.device_count()}")
        return 2

    bench = Bench(options)
    parts: dict[str, Callable[[Bench], None]] = {
        "correctness": correctness, "calibrate": calibration, "layers": layers, "trace": trace, "model": model,
        "edges": partial(correctness, edges=True), "symmetric": symmetric, "nodes": nodes,
    }  # fmt: skip
    for name in PARTS:
        if name in options.only:
            began = time.time()
            parts[name](bench)
            bench.log(f"part {name}: {time.time() - began:.1f} s")
    bench.synchronize()
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all results are written; threads of groups that plug-ins made may abort an ordinary end
