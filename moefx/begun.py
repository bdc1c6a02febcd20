"""A call of a region whose experts are on several ranks, in two parts: `begin` sends the first rows, `end` gives the result.

What the block computes between the two, such as a shared expert, runs while rows are on their way. To autograd the parts are
two nodes, and it runs the nodes that were made last first: backward begins with sending gradients, which `end` does, goes on
with what the block computed between, and waits for the rest in `begin`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefx.compiled import _Once
from moefx.errors import PlanError
from moefx.leaves import LeafGradients

# An emitted function of a plan of ranks: it yields once, where the caller's own code may run.
Steps = Generator[None, None, Any]


def first_part(steps: Steps, device_type: str) -> Steps:
    """Runs a plan up to where it yields."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        next(steps)
    return steps


def second_part(steps: Steps, device_type: str) -> Any:
    """The rest of a plan; what it returns."""
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            next(steps)
    except StopIteration as end:
        return end.value
    raise PlanError("a plan of ranks yields once")


@dataclass
class BegunBackward:
    """steps and leaves: the plan under way, and where it puts the gradients. sources: what these depend on."""

    steps: Steps
    leaves: LeafGradients
    sources: tuple[Tensor, ...]


class Begun:
    """A call that is under way. region: a `moefx.parallel.ParallelRegion`; tensors: its parameters here."""

    def __init__(self, region: Any, x: Tensor, ids: Tensor, w: Tensor, tensors: list[Tensor], dtype: torch.dtype | None):
        self.region, self.dtype, self.device_type = region, dtype, x.device.type
        self.tensors, self.token = tensors, None
        self.steps: Steps | None = None
        self.backward: BegunBackward | None = None
        self.needs_x, self.wanted = False, list[bool]()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, *tensors)):
            self.token = _Begin.apply(self, x, ids, w, *tensors)  # type: ignore[no-untyped-call]
        else:
            self.steps = region.begin_forward(x, ids, w, tensors, dtype, keep=False)

    def end(self) -> Tensor:
        """y [T, d_out]; once."""
        token, self.token = self.token, None  # nothing here may hold the graph that holds this
        if token is None:
            y: Tensor = self.rest()[0]
            return y
        result: Tensor = _End.apply(self, token)  # type: ignore[no-untyped-call]
        return result

    def rest(self) -> Any:
        """What the forward plan returns."""
        steps, self.steps = self.steps, None
        assert steps is not None, "a call ends once"
        return second_part(steps, self.device_type)


class _Begin(torch.autograd.Function):
    """Forward begins; backward ends."""

    @staticmethod
    def forward(ctx: Any, begun: Begun, x: Tensor, ids: Tensor, w: Tensor, *tensors: Tensor) -> Tensor:
        ctx.begun = begun
        _, begun.needs_x, _, ctx.needs_w, *begun.wanted = ctx.needs_input_grad
        begun.steps = begun.region.begin_forward(x, ids, w, list(tensors), begun.dtype)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        begun: Begun = ctx.begun
        backward, begun.backward = begun.backward, None
        assert backward is not None, "autograd runs the node that ends a call before the one that begins it"
        gx, gw, grads = begun.region.end_backward(backward, begun.wanted, begun.device_type)
        result = [None, gx, None, gw if ctx.needs_w else None, *grads]
        if torch.is_grad_enabled():  # create_graph=True
            result = [g if g is None else _Once.apply(g, *backward.sources) for g in result]  # type: ignore[no-untyped-call]
        return tuple(result)


class _End(torch.autograd.Function):
    """Forward ends; backward begins."""

    @staticmethod
    def forward(ctx: Any, begun: Begun, token: Tensor) -> Tensor:
        y, saved = begun.rest()
        ctx.begun, ctx.params = begun, len(begun.tensors)
        ctx.save_for_backward(*begun.tensors, *saved)
        begun.tensors = []
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        begun: Begun = ctx.begun
        stored = ctx.saved_tensors  # read once: under checkpointing each reading computes forward again
        tensors, saved = list(stored[: ctx.params]), stored[ctx.params :]
        steps, leaves = begun.region.begin_backward(saved, gy, tensors, begun.wanted, begun.needs_x, begun.dtype)
        sources = (gy, *(t for t in stored if t is not None)) if torch.is_grad_enabled() else ()
        begun.backward = BegunBackward(steps, leaves, sources)
        return None, gy.new_zeros(0)
