"""A region whose experts are spread over ranks, as something that runs: both halves of both phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moefx.begun import Begun, BegunBackward, Steps, first_part, second_part
from moefx.build import ParallelPlans
from moefx.compiled import CompiledRegion, Saved, autocast_dtype
from moefx.exchange import Counted, Padded, Wire
from moefx.holding import Absent, NoExperts
from moefx.ir import Region
from moefx.leaves import LeafBinder, LeafGradients
from moefx.runtime import Runtime, ops_for


class ParallelRegion(CompiledRegion):
    """A region whose experts are spread over ranks: `compiled(x, ids, w, params) -> y`, called by all of them together."""

    def __init__(self, region: Region, local: Region, plans: ParallelPlans, kernels: str, wire: Wire) -> None:
        super().__init__(region, plans.graphs, plans.schedules, plans.plans, plans.emitted, kernels)
        self.held, self.wire, self.measured = local, wire, plans.measured
        self.binder = LeafBinder(local.leaves) if local.experts else NoExperts(local.leaves)
        if not local.experts:
            self.kernels = "torch"  # nothing to compute

    @property
    def degrees(self) -> tuple[int, int]:
        return self.plans[0].degree, self.plans[1].degree

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self.begin(x, ids, w, params).end()

    def begin(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Begun:
        """Sends what is to be sent first; `end` of the result gives y."""
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in params.items()}
        if torch.is_grad_enabled() and any(isinstance(leaf, Absent) and leaf.trained for leaf in self.held.leaves):
            w = w if w.requires_grad else w.detach().requires_grad_()  # not x: its gradients travel, or not, on all ranks
        self._check(x, ids, w, local)
        return Begun(self, x, ids, w, [local[name] for name in self.binder.names], autocast_dtype(x.device.type))

    def begin_forward(
        self, x: Tensor, ids: Tensor, w: Tensor, tensors: list[Tensor], matrix_dtype: torch.dtype | None, keep: bool = True,
        may_pack: bool = True,
    ) -> Steps:  # fmt: skip
        """`run_forward` up to where the caller's code may run."""
        leaves = self._bind(tensors, matrix_dtype, may_pack)
        steps: Any = self.emitted.forward(self._runtime(x.device, "forward", keep), x, ids, w, leaves)
        return first_part(steps, x.device.type)

    def run_forward(
        self, x: Tensor, ids: Tensor, w: Tensor, tensors: list[Tensor], matrix_dtype: torch.dtype | None, keep: bool = True,
        may_pack: bool = True,
    ) -> tuple[Tensor, Saved]:  # fmt: skip
        result: tuple[Tensor, Saved]
        result = second_part(self.begin_forward(x, ids, w, tensors, matrix_dtype, keep, may_pack), x.device.type)
        return result

    def begin_backward(
        self, saved: Saved, gy: Tensor, tensors: list[Tensor], wanted: list[bool], need_x: bool,
        matrix_dtype: torch.dtype | None, may_pack: bool = True,
    ) -> tuple[Steps, LeafGradients]:  # fmt: skip
        """`backward_blocks` up to where other nodes may run, and the gradients that it fills."""
        named = dict(zip(self.binder.names, tensors))
        leaves = self._bind(tensors, matrix_dtype, may_pack)
        grads = self.binder.gradients(named, {name for name, want in zip(named, wanted) if want})
        steps: Any = self.emitted.backward(self._runtime(gy.device, "backward"), saved, gy, leaves, grads.leaves, need_x)
        return first_part(steps, gy.device.type), grads

    def end_backward(
        self, begun: BegunBackward, wanted: list[bool], device_type: str
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """What `run_backward` gives."""
        gx, gw = second_part(begun.steps, device_type)
        with torch.no_grad():
            by_name = begun.leaves.finish()
        return gx, gw, [by_name[name] if want else None for name, want in zip(self.binder.names, wanted)]

    def run_backward(
        self, saved: Saved, gy: Tensor, tensors: list[Tensor], wanted: list[bool], need_x: bool,
        matrix_dtype: torch.dtype | None, once: bool = False,
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:  # fmt: skip
        steps, grads = self.begin_backward(saved, gy, tensors, wanted, need_x, matrix_dtype)
        return self.end_backward(BegunBackward(steps, grads, ()), wanted, gy.device.type)

    def _runtime(
        self, device: torch.device, phase: Literal["forward", "backward"], keep: bool = True, once: bool = False
    ) -> Runtime:
        ops = ops_for(device.type, self.kernels)
        kernels = self._pointwise_kernels(ops)
        runtime = Counted if self.wire.capacity is None else Padded
        return runtime(ops, device, kernels, keep, self.delays, self.wire, phase, self.degrees)
