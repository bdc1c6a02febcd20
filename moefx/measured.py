"""Which of a few pipeline degrees is fastest on the ranks of a group: measured, where the cost model only promises.

The model ranks degrees by lines that were fitted one kind of work at a time. What runs beside an exchange may slow it, and be
slowed by it; that is seen only in the whole plan. So with degree "auto" the degrees around the one that the model chose run a
few times on the real parameters, with rows that are spread evenly.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefx.build import NOT_WORTH_A_CHUNK, PHASES
from moefx.compiled import CompiledRegion

ROUNDS = 5  # measured, after one that is not


class AtOnce:
    """An all-to-all that takes no time, to measure what a plan takes beside it: the rows that leave stand for those that come,
    in the same memory, and zeros where there are too few."""

    def start(self, send: Tensor, sent_rows: Sequence[int], received_rows: Sequence[int], all_rows: Any = None) -> Arrived:
        missing = sum(received_rows) - len(send)
        if missing > 0:
            send = torch.cat([send, send.new_zeros(missing, send.shape[1])])
        return Arrived(send[: sum(received_rows)])


@dataclass(frozen=True)
class Arrived:
    """Rows that are there already."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


def candidates(chosen: int, capacity: int) -> list[int]:
    """The degrees to measure: r = 1, 2, 3, 4, 8, the chosen one, half and twice of it, as far as there are rows for them."""
    return sorted({r for r in (1, 2, 3, 4, 8, chosen, chosen // 2, 2 * chosen) if 1 <= r <= max(1, capacity)})


def fastest(seconds: Mapping[int, float]) -> int:
    """The least degree that is not worth exchanging for a faster one."""
    least = min(seconds.values())
    return min(r for r, s in seconds.items() if s <= (1 + NOT_WORTH_A_CHUNK) * least)


def measure(
    regions: Mapping[int, CompiledRegion],
    params: Mapping[str, Tensor],
    trained: Collection[str],
    tokens: int,
    group: dist.ProcessGroup,
) -> dict[str, dict[int, float]]:
    """By phase, seconds of each region, by its degree: medians of the slowest rank, all of them in turns. All ranks call it.

    params: this rank's, by name. trained: those whose gradients are wanted. tokens: of this rank.
    """
    region = next(iter(regions.values())).region
    parameter = next(iter(params.values()))
    device, dtype = parameter.device, parameter.dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, region.d_model, generator=generator).to(device, dtype)
    gy = torch.randn(tokens, region.d_out, generator=generator).to(device, dtype)
    ids = (torch.arange(tokens, device=device)[:, None] + torch.arange(region.top_k, device=device)) % region.experts
    w = torch.full(ids.shape, 1 / region.top_k, dtype=dtype, device=device)
    seconds: dict[str, dict[int, list[float]]] = {phase: {r: [] for r in regions} for phase in PHASES}
    for turn in range(ROUNDS + 1):
        for r, compiled in regions.items():
            tensors = [params[name].detach() for name in compiled.binder.names]
            wanted = [name in trained for name in compiled.binder.names]
            forward_s, (_, saved) = _timed(partial(compiled.run_forward, x, ids, w, tensors, None), device, group)
            backward = partial(compiled.run_backward, saved, gy, tensors, wanted, True, None)
            backward_s, _ = _timed(backward, device, group)
            if turn:
                seconds["forward"][r].append(forward_s)
                seconds["backward"][r].append(backward_s)
    return {phase: _slowest({r: statistics.median(runs) for r, runs in of.items()}, device, group) for phase, of in seconds.items()}


def _timed(run: Callable[[], Any], device: torch.device, group: dist.ProcessGroup) -> tuple[float, Any]:
    dist.barrier(group)
    _synchronise(device)
    began = time.perf_counter()
    result = run()
    _synchronise(device)
    return time.perf_counter() - began, result


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(seconds: Mapping[int, float], device: torch.device, group: dist.ProcessGroup) -> dict[int, float]:
    values = torch.tensor(list(seconds.values()), device=device, dtype=torch.float32)
    dist.all_reduce(values, dist.ReduceOp.MAX, group)
    return dict(zip(seconds, values.tolist()))

