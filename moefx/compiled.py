"""A region that runs: the emitted functions as one autograd node on the user's own parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from moefx.errors import InputError
from moefx.ir import Plan, Region, Schedule, TaskGraph
from moefx.leaves import LeafBinder, LeafGradients
from moefx.runtime import OpTable, Runtime, ops_for
from moefx.segments import Segment, steps

Made = TypeVar("Made")
# What forward leaves for backward; None where a plan saves a value that this run did not make.
Saved = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Emitted:
    """The functions of an emitted file."""

    source: str
    forward: Callable[..., tuple[Tensor, Saved]]
    backward: Callable[..., tuple[Tensor | None, Tensor]]


class CompiledRegion:
    """A region that runs: `compiled(x, ids, w, params) -> y`. Holds no tensors, so copies of a model may share it.

    delays: see `Runtime`; notes: what had to be copied at the last call; without_kernel: the segments that run as torch
    functions where a kernel was asked for, with the reasons.
    """

    def __init__(
        self,
        region: Region,
        graphs: tuple[TaskGraph, TaskGraph],
        schedules: tuple[Schedule, Schedule],
        plans: tuple[Plan, Plan],
        emitted: Emitted,
        kernels: str,
    ) -> None:
        self.region, self.graphs, self.schedules, self.plans = region, graphs, schedules, plans
        self.emitted, self.kernels = emitted, kernels
        self.held = region  # whose leaves are bound and whose segments run: with several ranks, those of this rank's experts
        self.binder = LeafBinder(region.leaves)
        self.handle: str | None = None  # the name by which operators of torch know it (`moefx.region_op`)
        self.delays: Callable[[str], None] | None = None
        self.notes: tuple[str, ...] = ()
        self._kernels: dict[str, Any] | None = None
        self._tapes: Any = None
        self._straight = all(len(schedule.lanes) == 1 for schedule in schedules)
        self.without_kernel: dict[str, str] = {}

    @property
    def source(self) -> str:
        """The emitted Python file."""
        return self.emitted.source

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledRegion:
        return self

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """y [T, d_out] in x's dtype, for x [T, D], ids [T, K] integer, w [T, K] and the parameters by name."""
        self._check(x, ids, w, params)
        tensors = [params[name] for name in self.binder.names]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, *tensors)):
            y: Tensor = _RegionFunction.apply(self, autocast_dtype(x.device.type), x, ids, w, *tensors)  # type: ignore[no-untyped-call]
            return y
        return self.run_forward(x, ids, w, tensors, autocast_dtype(x.device.type), keep=False)[0]

    def precompile(
        self,
        x: Tensor,
        ids: Tensor,
        w: Tensor,
        params: Mapping[str, Tensor],
        rounds: Sequence[Sequence[str]],
        every_size: bool = True,
        may_pack: bool = True,
    ) -> None:
        """Compiles the kernels that a call with these arguments and its backward need, side by side, and runs none.

        rounds: the parameters whose gradients are wanted, taken apart so that only one round's are allocated at once.
        every_size: also those for other numbers of tokens. may_pack: see `LeafBinder.bind`.
        """
        compiling = ops_for(x.device.type, self.kernels).get("only_compiling")
        if compiling is None:
            return
        self._check(x, ids, w, params)
        tensors = [params[name] for name in self.binder.names]
        dtype = autocast_dtype(x.device.type)
        with compiling(every_size):
            self.run_forward(x, ids, w, tensors, dtype, False, may_pack)
            y, saved = self.run_forward(x, ids, w, tensors, dtype, True, may_pack)
            for wanted in rounds:
                self.backward_blocks(saved, y, tensors, [n in wanted for n in self.binder.names], True, dtype, may_pack)

    def _check(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> None:
        region = self.region
        slots = (x.shape[0], region.top_k)
        if x.dim() != 2 or x.shape[1] != region.d_model:
            raise InputError(f"x must be [T, {region.d_model}]; got {list(x.shape)}")
        if tuple(ids.shape) != slots or ids.is_floating_point():
            raise InputError(f"ids must be integers [{slots[0]}, {slots[1]}]; got {ids.dtype} {list(ids.shape)}")
        if tuple(w.shape) != slots:
            raise InputError(f"w must be [{slots[0]}, {slots[1]}]; got {list(w.shape)}")
        if missing := [name for name in self.binder.names if name not in params]:
            raise InputError(f"parameters missing: {', '.join(missing)}")

    def _bind(self, tensors: list[Tensor], matrix_dtype: torch.dtype | None, may_pack: bool) -> list[Tensor]:
        """The leaves; under autocast the matrices are cast as a linear's weight would be."""
        leaves, notes = self.binder.bind(dict(zip(self.binder.names, tensors)), may_pack)
        self.notes = tuple(notes)
        return self._cast(leaves, matrix_dtype)

    def _cast(self, leaves: list[Tensor], matrix_dtype: torch.dtype | None) -> list[Tensor]:
        dtypes = [leaf.read_as or (matrix_dtype if len(leaf.shape) == 2 else None) for leaf in self.held.leaves]
        return [value if dtype is None else value.to(dtype) for value, dtype in zip(leaves, dtypes)]

    def run_forward(
        self,
        x: Tensor,
        ids: Tensor,
        w: Tensor,
        tensors: list[Tensor],
        matrix_dtype: torch.dtype | None,
        keep: bool = True,
        may_pack: bool = True,
    ) -> tuple[Tensor, Saved]:
        """y and, if `keep`, what backward needs, without recording gradients. may_pack: see `LeafBinder.bind`."""
        return self.forward_as(_as_it_is, x, ids, w, tensors, matrix_dtype, keep, may_pack)

    def forward_as(
        self,
        form: Callable[[CompiledRegion, Tensor, Saved, bool], Made],
        x: Tensor,
        ids: Tensor,
        w: Tensor,
        tensors: list[Tensor],
        matrix_dtype: torch.dtype | None,
        keep: bool = True,
        may_pack: bool = True,
    ) -> Made:
        """What `form` makes of `run_forward`'s y and saved values; a part of the tape, where there is one."""
        with _quietly(x.device.type):
            bound = None if self.binder.in_parameters else self._bind(tensors, matrix_dtype, may_pack)

            def made() -> Made:
                leaves = self._bind(tensors, matrix_dtype, may_pack) if bound is None else bound
                y, saved = self.emitted.forward(self._runtime(x.device, "forward", keep), x, ids, w, leaves)
                return form(self, y, saved, keep)

            given = tensors if bound is None else bound
            return self._again(("forward", form, keep, matrix_dtype), (x, ids, w, *given), x.device, made)

    def _again(
        self, flags: tuple[Any, ...], inputs: Sequence[Tensor | None], device: torch.device, body: Callable[[], Made]
    ) -> Made:
        """What an emitted function makes; from its tape, where the kernels have such a thing and it runs on one lane."""
        make = ops_for(device.type, self.kernels).get("Tapes")
        if make is None or not self._straight or self.delays is not None or self._kernels is None or self.without_kernel:
            return body()
        if self._tapes is None:
            self._tapes = make()
        made: Made = self._tapes.run(flags, inputs, body)
        return made

    def run_backward(
        self,
        saved: Saved,
        gy: Tensor,
        tensors: list[Tensor],
        wanted: list[bool],
        need_x: bool,
        matrix_dtype: torch.dtype | None,
        once: bool = False,
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """Gradients of x (None unless needed), w, and the tensors that are wanted. once: `saved` may be overwritten."""
        gx, gw, grads = self.backward_blocks(saved, gy, tensors, wanted, need_x, matrix_dtype, once=once)
        by_name = grads.params
        return gx, gw, [by_name[name] if want else None for name, want in zip(self.binder.names, wanted)]

    def backward_blocks(
        self,
        saved: Saved,
        gy: Tensor,
        tensors: list[Tensor],
        wanted: list[bool],
        need_x: bool,
        matrix_dtype: torch.dtype | None,
        may_pack: bool = True,
        once: bool = False,
    ) -> tuple[Tensor | None, Tensor, LeafGradients]:
        """Gradients of x (None unless needed), of w, and of the parameters in blocks."""
        named = dict(zip(self.binder.names, tensors))
        wanted_names = {name for name, want in zip(self.binder.names, wanted) if want}

        def places() -> tuple[list[Tensor], LeafGradients]:
            return self._bind(tensors, matrix_dtype, may_pack), self.binder.gradients(named, wanted_names)

        with _quietly(gy.device.type):
            bound = None if self.binder.in_parameters else places()

            def made() -> tuple[Tensor | None, Tensor, list[Tensor]]:
                leaves, grads = places() if bound is None else bound
                runtime = self._runtime(gy.device, "backward", once=once)
                gx, gw = self.emitted.backward(runtime, saved, gy, leaves, grads.leaves, need_x)
                if bound is not None:
                    return gx, gw, []
                grads.finish()
                return gx, gw, [block for _, block in grads.blocks]

            given = tensors if bound is None else [*bound[0], *bound[1].leaves]
            flags = ("backward", need_x, once, matrix_dtype, *wanted)
            gx, gw, blocks = self._again(flags, (*saved, gy, *given), gy.device, made)
            if bound is not None:
                bound[1].finish()
                return gx, gw, bound[1]
        return gx, gw, LeafGradients([], list(zip(self.binder.blocks(named, wanted_names), blocks)), [])

    def shapes(
        self, x: Tensor, ids: Tensor, w: Tensor, tensors: list[Tensor], matrix_dtype: torch.dtype | None, ops: OpTable
    ) -> tuple[Tensor, Saved]:
        """What `run_forward` gives, on a table of ops that know shapes and dtypes alone (`moefx.shape_ops`)."""
        leaves = self._cast(self.binder.shaped(dict(zip(self.binder.names, tensors))), matrix_dtype)
        return self.emitted.forward(Runtime(ops, torch.device("cpu")), x, ids, w, leaves)

    def _runtime(
        self, device: torch.device, phase: Literal["forward", "backward"], keep: bool = True, once: bool = False
    ) -> Runtime:
        ops = ops_for(device.type, self.kernels)
        return Runtime(ops, device, self._pointwise_kernels(ops), keep, self.delays, once)

    def _pointwise_kernels(self, ops: OpTable) -> dict[str, Any]:
        """The kernels of the segments, where the table can make them and they can be made."""
        if "compile_pointwise" not in ops:
            return {}
        if self._kernels is None:
            segments = [step for step in steps(self.held.template) if isinstance(step, Segment)]
            made = {s.name: ops["compile_pointwise"](self.held.template, s, self.held.leaves) for s in segments}
            self._kernels = {name: kernel for name, kernel in made.items() if kernel}
            self.without_kernel = {name: kernel.reason for name, kernel in made.items() if not kernel}
        return self._kernels


def _as_it_is(compiled: CompiledRegion, y: Tensor, saved: Saved, keep: bool) -> tuple[Tensor, Saved]:
    return y, saved


def _quietly(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Without gradients and autocast."""
    if torch.is_autocast_enabled(device_type):
        return _without_autocast(device_type)
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


@contextlib.contextmanager
def _without_autocast(device_type: str) -> Iterator[None]:
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


class _RegionFunction(torch.autograd.Function):
    """The region as one autograd node. The same tensor under two names gets the sum of both gradients from autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        compiled: CompiledRegion,
        matrix_dtype: torch.dtype | None,
        x: Tensor,
        ids: Tensor,
        w: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        y, saved = compiled.run_forward(x, ids, w, list(tensors), matrix_dtype)
        ctx.compiled, ctx.matrix_dtype, ctx.params = compiled, matrix_dtype, len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
        stored = ctx.saved_tensors  # read once: under checkpointing each reading computes forward again
        tensors, saved = list(stored[: ctx.params]), stored[ctx.params :]
        _, _, need_x, _, need_w, *wanted = ctx.needs_input_grad
        once = not torch._C._autograd._get_current_graph_task_keep_graph()  # no retain_graph, no create_graph
        gx, gw, grads = ctx.compiled.run_backward(saved, gy, tensors, wanted, need_x, ctx.matrix_dtype, once)
        result = [None, None, gx, None, gw if need_w else None, *grads]
        if torch.is_grad_enabled():  # create_graph=True
            result = [g if g is None else _Once.apply(g, gy, *stored) for g in result]  # type: ignore[no-untyped-call]
        return tuple(result)


class _Once(torch.autograd.Function):
    """A gradient that depends on `sources` in a way nobody can differentiate; torch would take it for a constant."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "a moefx region gives first derivatives only; for second ones put the original back: moefx.restore(model)"
        )
