"""partition: a region becomes tasks, one set per chunk of tokens.

Forward, chunk c:   route_c -> dispatch_c -> experts_c -> combine_c
Backward, chunk c:  d_combine_c -> d_experts_c -> d_dispatch_c, and d_experts_c -> w_experts_c

d_experts is the gradient with respect to rows, w_experts with respect to the experts' parameters. Every chunk adds to
the same parameter gradients, so w_experts_c comes after w_experts_{c-1}.
"""

from __future__ import annotations

from typing import Literal

from moefx.errors import PlanError
from moefx.ir import Region, Task, TaskGraph


def partition(region: Region, degree: int, phase: Literal["forward", "backward"]) -> TaskGraph:
    """The tasks of one phase of `region`, cut into `degree` >= 1 chunks of tokens."""
    if degree < 1:
        raise PlanError(f"a region is cut into at least one chunk; got degree {degree}")
    if region.identity and region.d_out != region.d_model:
        raise PlanError(f"identity experts return x, so d_out must be d_model; got {region.d_out} and {region.d_model}")
    chunk_tasks = {"forward": _forward, "backward": _backward}[phase]
    return TaskGraph(phase, degree, tuple(task for c in range(degree) for task in chunk_tasks(c)))


def _forward(c: int) -> list[Task]:
    return [
        Task(f"route_{c}", "route", c, "memory"),
        Task(f"dispatch_{c}", "dispatch", c, "memory", (f"route_{c}",)),
        Task(f"experts_{c}", "experts", c, "compute", (f"dispatch_{c}",)),
        Task(f"combine_{c}", "combine", c, "memory", (f"experts_{c}",)),
    ]


def _backward(c: int) -> list[Task]:
    earlier_sum = (f"w_experts_{c - 1}",) if c else ()
    return [
        Task(f"d_combine_{c}", "d_combine", c, "memory"),
        Task(f"d_experts_{c}", "d_experts", c, "compute", (f"d_combine_{c}",)),
        Task(f"w_experts_{c}", "w_experts", c, "compute", (f"d_experts_{c}", *earlier_sum)),
        Task(f"d_dispatch_{c}", "d_dispatch", c, "memory", (f"d_experts_{c}",)),
    ]
