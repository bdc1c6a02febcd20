"""What an emitted file runs on: ops, lanes (CUDA streams; inline on the CPU), events, and the autograd node."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moefx.errors import InputError, PlanError
from moefx.ir import Plan, Region, Schedule, TaskGraph, chunk_bounds
from moefx.leaves import LeafBinder
from moefx.ops import OPS
from moefx.segments import Segment as SegmentStep
from moefx.segments import steps

# The lane of the caller's own stream.
HOME_LANE = "compute"

OpTable = Mapping[str, Callable[..., Any]]
Saved = tuple[Tensor | None, ...]
Tensors = Sequence[Tensor]
# An emitted activation function.
Segment = Callable[..., "Tensor | tuple[Tensor, ...]"]


def ops_for(device_type: str, kernels: str) -> OpTable:
    """The op table: Triton's kernels on CUDA ("auto") or anywhere ("triton"); torch for every op without a kernel."""
    if kernels not in ("auto", "torch", "triton"):
        raise InputError(f"kernels must be 'auto', 'torch' or 'triton'; got {kernels!r}")
    if kernels == "triton" or (kernels == "auto" and device_type == "cuda"):
        return _triton_ops()
    return OPS


@cache
def _triton_ops() -> OpTable:
    kernels: OpTable = importlib.import_module("moefx.codegen.triton_ops").OPS
    return {**OPS, "grouped_wgrad_add": _adding(kernels["grouped_wgrad"]), **kernels}


def _adding(wgrad: Callable[..., None]) -> Callable[..., None]:
    """The adding form of a kernel that only writes: each share is rounded to the dtype of `out`, as is each sum."""

    def grouped_wgrad_add(rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor) -> None:
        share = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        wgrad(rows, grad, offsets, share)
        out += share

    return grouped_wgrad_add


# ------------------------------------------------------------------------------------------------ lanes and events


@cache
def _stream(device: torch.device, lane: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Runtime:
    """One run of a plan. Ops of the table are attributes: `rt.combine(...)`.

    pointwise: kernels of segments by name, others run as torch functions; keep: whether a backward will follow.
    `delays`, a function of the lane's name, is called on entering a lane and before each record: tests put random
    waits there to bring out a missing event.
    """

    def __init__(
        self,
        ops: OpTable,
        device: torch.device,
        pointwise: Mapping[str, Any] | None = None,
        keep: bool = True,
        delays: Callable[[str], None] | None = None,
    ) -> None:
        self.ops = ops
        self._pointwise = pointwise or {}
        self._keep = keep
        self._home = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._device = device
        self._delays = delays
        self._lane = HOME_LANE
        self._entered: dict[str, torch.cuda.Stream] = {}
        self._events: dict[str, torch.cuda.Event | None] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        try:
            return self.ops[name]
        except KeyError:
            raise AttributeError(f"no op {name!r}; the table has {', '.join(sorted(self.ops))}") from None

    @staticmethod
    def chunks(tokens: int, degree: int) -> list[slice]:
        """Each chunk's tokens."""
        return [slice(a, b) for a, b in chunk_bounds(tokens, degree)]

    @contextmanager
    def lane(self, name: str) -> Iterator[None]:
        """Work in this context goes to the lane. A side lane starts behind what the caller's stream holds so far."""
        outer, self._lane = self._lane, name
        try:
            if self._home is None or name == HOME_LANE:
                self._delay()
                yield
            else:
                stream = _stream(self._device, name)
                if name not in self._entered:
                    stream.wait_stream(self._home)
                    self._entered[name] = stream
                with torch.cuda.stream(stream):
                    self._delay()
                    yield
        finally:
            self._lane = outer

    def _delay(self) -> None:
        if self._delays is not None:
            self._delays(self._lane)

    def record(self, event: str) -> None:
        """Marks the point that this lane has reached."""
        self._delay()
        self._events[event] = torch.cuda.current_stream(self._device).record_event() if self._home else None

    def wait(self, event: str) -> None:
        """This lane goes on only after the event."""
        if event not in self._events:
            raise PlanError(f"lane {self._lane} waits for event {event!r}, which nothing has recorded")
        recorded = self._events[event]
        if recorded is not None:
            torch.cuda.current_stream(self._device).wait_event(recorded)

    def hold(self, *values: Tensor | None) -> None:
        """This lane uses values of other lanes: their memory is not given away before it has passed this point."""
        if self._home is not None:
            stream = torch.cuda.current_stream(self._device)
            for value in values:
                if value is not None:
                    value.record_stream(stream)

    def join(self, *values: Tensor | None) -> None:
        """The caller's stream goes on after all lanes, and holds `values`."""
        if self._home is not None:
            for stream in self._entered.values():
                self._home.wait_stream(stream)
        self.hold(*values)

    # Ops with a little more meaning than the table's.

    def grouped_linear(self, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """The rows are cast to the weight's dtype, as a linear under autocast does."""
        result: Tensor = self.ops["grouped_linear"](rows.to(weight.dtype), weight, offsets)
        return result

    def grouped_wgrad(self, rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor | None) -> None:
        """Writes a matrix leaf's gradient; nothing to do for a frozen leaf (None)."""
        if out is not None:
            self.ops["grouped_wgrad"](rows.to(grad.dtype), grad, offsets, out)

    def grouped_wgrad_add(self, rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor | None) -> None:
        """Adds to a matrix leaf's gradient."""
        if out is not None:
            self.ops["grouped_wgrad_add"](rows.to(grad.dtype), grad, offsets, out)

    @staticmethod
    def write(out: Tensor | None, value: Tensor) -> None:
        """Writes a vector leaf's gradient, unless it is frozen (None)."""
        if out is not None:
            out.copy_(value)

    @staticmethod
    def add_into(out: Tensor | None, value: Tensor) -> None:
        """Adds to a vector leaf's gradient."""
        if out is not None:
            out += value

    # Segments: by their kernel, or by the emitted function.

    def act(self, function: Segment, inputs: Tensors, leaves: Tensors, offsets: Tensor) -> Any:
        """The segment's outputs for inputs [R, width] and vector leaves [E, n] ([1, n] when shared)."""
        kernel = self._pointwise.get(function.__name__)
        outputs = kernel.forward(inputs, leaves, offsets) if kernel else self._run(function, inputs, leaves, offsets)
        return outputs if len(outputs) > 1 else outputs[0]

    def linear_act(
        self, function: Segment, rows: Tensor, weights: Tensors, leaves: Tensors, offsets: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The segment's inputs, made by linears of `rows` (None where no backward needs them), then its outputs."""
        kernel = self._pointwise.get(function.__name__)
        if kernel and not kernel.why_not_linear:
            inputs, outputs = kernel.linear(rows.to(weights[0].dtype), weights, leaves, offsets, save=self._keep)
        else:
            inputs = [self.grouped_linear(rows, weight, offsets) for weight in weights]
            outputs = (
                kernel.forward(inputs, leaves, offsets) if kernel else self._run(function, inputs, leaves, offsets)
            )
        return (*(inputs if self._keep else [None] * len(weights)), *outputs)

    def act_vjp(
        self, function: Segment, inputs: Tensors, leaves: Tensors, offsets: Tensor, gradients: Tensors
    ) -> tuple[Tensor, ...]:
        """The segment's outputs again, then the gradients of its inputs and of its leaves."""
        kernel = self._pointwise.get(function.__name__)
        if kernel:
            outputs, input_grads, leaf_grads = kernel.vjp(inputs, leaves, offsets, gradients)
            return (*outputs, *input_grads, *leaf_grads)
        with torch.enable_grad():
            rows = [self._spread(leaf, offsets, inputs) for leaf in leaves]
            args = [t.detach().requires_grad_() for t in (*inputs, *rows)]
            outputs = _several(function(*args))
        grads = torch.autograd.grad(outputs, args, gradients, materialize_grads=True)
        sums = [self._gathered(leaf, g, offsets) for leaf, g in zip(leaves, grads[len(inputs) :])]
        return (*(y.detach() for y in outputs), *grads[: len(inputs)], *sums)

    def _run(self, function: Segment, inputs: Tensors, leaves: Tensors, offsets: Tensor) -> tuple[Tensor, ...]:
        return _several(function(*inputs, *(self._spread(leaf, offsets, inputs) for leaf in leaves)))

    def _spread(self, leaf: Tensor, offsets: Tensor, inputs: Tensors) -> Tensor:
        """A vector leaf over the rows, [R, n]."""
        rows = inputs[0].shape[0]
        return leaf.expand(rows, -1) if leaf.shape[0] == 1 else self.ops["expert_rows"](leaf, offsets, rows)

    def _gathered(self, leaf: Tensor, gradient: Tensor, offsets: Tensor) -> Tensor:
        """The gradient of a vector leaf from that of its rows: a shared leaf has all rows for its own."""
        ends = torch.stack([offsets[0], offsets[-1]]) if leaf.shape[0] == 1 else offsets
        result: Tensor = self.ops["expert_sum"](gradient, ends)
        return result


def _several(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# ------------------------------------------------------------------------------------------------ compiled regions


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
        self.binder = LeafBinder(region.leaves)
        self.delays: Callable[[str], None] | None = None
        self.notes: tuple[str, ...] = ()
        self._kernels: dict[str, Any] | None = None
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
            y: Tensor = _RegionFunction.apply(self, _autocast_dtype(x.device.type), x, ids, w, *tensors)  # type: ignore[no-untyped-call]
            return y
        return self.run_forward(x, ids, w, tensors, _autocast_dtype(x.device.type), keep=False)[0]

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

    def _bind(self, tensors: list[Tensor], matrix_dtype: torch.dtype | None) -> list[Tensor]:
        """The leaves; under autocast the matrices are cast as a linear's weight would be."""
        leaves, notes = self.binder.bind(dict(zip(self.binder.names, tensors)))
        self.notes = tuple(notes)
        if matrix_dtype is None:
            return leaves
        matrix = [len(leaf.shape) == 2 for leaf in self.region.leaves]
        return [leaf.to(matrix_dtype) if is_matrix else leaf for leaf, is_matrix in zip(leaves, matrix)]

    def run_forward(
        self,
        x: Tensor,
        ids: Tensor,
        w: Tensor,
        tensors: list[Tensor],
        matrix_dtype: torch.dtype | None,
        keep: bool = True,
    ) -> tuple[Tensor, Saved]:
        """y and, if `keep`, what backward needs, without recording gradients."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            leaves = self._bind(tensors, matrix_dtype)
            return self.emitted.forward(self._runtime(x.device, keep), x, ids, w, leaves)

    def run_backward(
        self,
        saved: Saved,
        gy: Tensor,
        tensors: list[Tensor],
        wanted: list[bool],
        need_x: bool,
        matrix_dtype: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """Gradients of x (None unless needed), w, and the tensors that are wanted."""
        names = self.binder.names
        with torch.no_grad(), torch.autocast(gy.device.type, enabled=False):
            leaves = self._bind(tensors, matrix_dtype)
            wanted_names = {name for name, want in zip(names, wanted) if want}
            grads = self.binder.gradients(dict(zip(names, tensors)), wanted_names)
            gx, gw = self.emitted.backward(self._runtime(gy.device), saved, gy, leaves, grads.leaves, need_x)
            by_name = grads.finish()
        return gx, gw, [by_name[name] if want else None for name, want in zip(names, wanted)]

    def _runtime(self, device: torch.device, keep: bool = True) -> Runtime:
        ops = ops_for(device.type, self.kernels)
        return Runtime(ops, device, self._pointwise_kernels(ops), keep, self.delays)

    def _pointwise_kernels(self, ops: OpTable) -> dict[str, Any]:
        """The kernels of the segments, where the table can make them and they can be made."""
        if "compile_pointwise" not in ops:
            return {}
        if self._kernels is None:
            segments = [step for step in steps(self.region.template) if isinstance(step, SegmentStep)]
            made = {s.name: ops["compile_pointwise"](self.region.template, s, self.region.leaves) for s in segments}
            self._kernels = {name: kernel for name, kernel in made.items() if kernel}
            self.without_kernel = {name: kernel.reason for name, kernel in made.items() if not kernel}
        return self._kernels


def _autocast_dtype(device_type: str) -> torch.dtype | None:
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
        gx, gw, grads = ctx.compiled.run_backward(saved, gy, tensors, wanted, need_x, ctx.matrix_dtype)
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
