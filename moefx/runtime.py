"""What an emitted file runs on: ops, lanes (CUDA streams; inline on the CPU) and events."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moefx.errors import InputError, PlanError
from moefx.ir import chunk_bounds
from moefx.ops import OPS

# The lane of the caller's own stream.
HOME_LANE = "compute"

OpTable = Mapping[str, Callable[..., Any]]
Tensors = Sequence[Tensor]
# The emitted function of a segment.
Activation = Callable[..., "Tensor | tuple[Tensor, ...]"]


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


@contextmanager
def compiler_prepared(devices: Iterable[torch.device], kernels: str) -> Iterator[None]:
    """Beside what is done inside, a thread makes the compiler of kernels ready, where one of `devices` is a GPU."""
    gpu = next((d for d in devices if d.type == "cuda"), None) if kernels != "torch" else None
    if gpu is None:
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_prepare_compiler, gpu, kernels)  # what fails here fails again, and is raised, with the first kernel
        yield


def _prepare_compiler(device: torch.device, kernels: str) -> None:
    with torch.cuda.device(device):
        ops_for(device.type, kernels)["prepare_compiler"]()


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

    pointwise: kernels of segments by name, others run as torch functions; keep: whether a backward will follow; once:
    what was saved is read for the last time, and its memory may be written.
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
        once: bool = False,
    ) -> None:
        self.ops = ops
        self._pointwise = pointwise or {}
        self._keep, self._overwrite = keep, once
        self._home = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._device = device
        self._delays = delays
        self._lane, self._stream = HOME_LANE, self._home  # where work goes now
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
        outer = self._lane, self._stream
        self._lane = name
        try:
            if self._home is None or name == HOME_LANE:
                self._stream = self._home and torch.cuda.current_stream(self._device)
                self._delay()
                yield
            else:
                self._stream = _stream(self._device, name)
                if name not in self._entered:
                    self._stream.wait_stream(self._home)
                    self._entered[name] = self._stream
                with torch.cuda.stream(self._stream):
                    self._delay()
                    yield
        finally:
            self._lane, self._stream = outer

    def _delay(self) -> None:
        if self._delays is not None:
            self._delays(self._lane)

    def record(self, event: str) -> None:
        """Marks the point that this lane has reached."""
        self._delay()
        self._events[event] = self._stream.record_event() if self._stream else None

    def wait(self, event: str) -> None:
        """This lane goes on only after the event."""
        if event not in self._events:
            raise PlanError(f"lane {self._lane} waits for event {event!r}, which nothing has recorded")
        recorded = self._events[event]
        if recorded is not None and self._stream is not None:
            self._stream.wait_event(recorded)

    def hold(self, *values: Tensor | None) -> None:
        """This lane uses values of other lanes: their memory is not given away before it has passed this point."""
        if self._stream is not None:
            for value in values:
                if value is not None:
                    value.record_stream(self._stream)

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

    def gather_linear(self, x: Tensor, order: Tensor, top_k: int, weight: Tensor, offsets: Tensor) -> Tensor:
        """`grouped_linear` of the tokens' rows, which are gathered on the way."""
        result: Tensor = self.ops["gather_linear"](x.to(weight.dtype), order, top_k, weight, offsets)
        return result

    def linear_combine(self, rows: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """`combine` of `grouped_linear`; where a backward follows or runs, memory counts for more than time."""
        result: Tensor = self.ops["linear_combine"](rows.to(weight.dtype), weight, *args, in_parts=self._keep)
        return result

    def grouped_wgrad(self, rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor | None) -> None:
        """Writes a matrix leaf's gradient; nothing to do for a frozen leaf (None)."""
        if out is not None:
            self.ops["grouped_wgrad"](rows.to(grad.dtype), grad, offsets, out)

    def grouped_wgrad_add(self, rows: Tensor, grad: Tensor, offsets: Tensor, out: Tensor | None) -> None:
        """Adds to a matrix leaf's gradient."""
        if out is not None:
            self.ops["grouped_wgrad_add"](rows.to(grad.dtype), grad, offsets, out)

    def gather_wgrad(self, x: Tensor, order: Tensor, top_k: int, grad: Tensor, offsets: Tensor, out: Tensor | None) -> None:
        """`grouped_wgrad` of the tokens' rows."""
        if out is not None:
            self.ops["gather_wgrad"](x.to(grad.dtype), order, top_k, grad, offsets, out)

    def wgrad_gather(self, rows: Tensor, gy: Tensor, order: Tensor, top_k: int, offsets: Tensor, out: Tensor | None) -> None:
        """`grouped_wgrad` whose gradient is that of the tokens."""
        if out is not None:
            self.ops["gather_wgrad"](gy, order, top_k, rows.to(gy.dtype), offsets, out.transpose(1, 2))

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

    def act(self, function: Activation, inputs: Tensors, leaves: Tensors, offsets: Tensor) -> Any:
        """The segment's outputs for inputs [R, width] and vector leaves [E, n] ([1, n] when shared)."""
        kernel = self._pointwise.get(function.__name__)
        outputs = kernel.forward(inputs, leaves, offsets) if kernel else self._run(function, inputs, leaves, offsets)
        return outputs if len(outputs) > 1 else outputs[0]

    def linear_act(
        self,
        function: Activation,
        rows: Tensor,
        weights: Tensors,
        leaves: Tensors,
        offsets: Tensor,
        order: Tensor | None = None,
        top_k: int = 1,
    ) -> tuple[Tensor | None, ...]:
        """The segment's inputs, made by linears of `rows` (None where no backward needs them), then its outputs.

        With order [T*K], `rows` are the tokens [T, D], and their rows are gathered on the way.
        """
        kernel = self._pointwise.get(function.__name__)
        if kernel and not kernel.why_not_linear:
            rows = rows.to(weights[0].dtype)
            inputs, outputs = kernel.linear(rows, weights, leaves, offsets, order, top_k, save=self._keep)
        else:
            if order is not None:
                rows = self.ops["gather_rows"](rows, order, top_k, offsets)
            inputs = [self.grouped_linear(rows, weight, offsets) for weight in weights]
            outputs = (
                kernel.forward(inputs, leaves, offsets) if kernel else self._run(function, inputs, leaves, offsets)
            )
        return (*(inputs if self._keep else [None] * len(weights)), *outputs)

    def act_vjp(
        self, function: Activation, inputs: Tensors, leaves: Tensors, offsets: Tensor, gradients: Tensors
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

    def act_weighted_vjp(
        self,
        function: Activation,
        inputs: Tensors,
        leaves: Tensors,
        offsets: Tensor,
        gradients: Tensors,
        order: Tensor,
        w: Tensor,
        beside: Tensor | None = None,
        alone: bool = True,
    ) -> tuple[Tensor, ...]:
        """`act_vjp` of a segment with one output a, which the routing weights w [T, K] multiply: for the gradient of w a
        it returns w a, the gradients of the segment's inputs and leaves, and that of w, to which `beside` [T, K] is added.
        alone: nobody else reads the inputs, and what was saved for the last time may be written over."""
        kernel = self._pointwise.get(function.__name__)
        if kernel:
            given = (inputs, leaves, offsets, gradients, order, w)
            in_place = self._overwrite and alone
            outputs, input_grads, leaf_grads, gw = kernel.weighted_vjp(*given, in_place=in_place, beside=beside)
            return (*outputs, *input_grads, *leaf_grads, gw)
        (g,) = gradients
        scale = self.ops["slot_rows"](w, order, offsets)
        a, *grads = self.act_vjp(function, inputs, leaves, offsets, [(g * scale).to(g.dtype)])
        gw = self.ops["slot_products"](a, g, order, offsets, w)
        return ((a * scale).to(a.dtype), *grads, gw if beside is None else (gw + beside).to(w.dtype))

    def _run(self, function: Activation, inputs: Tensors, leaves: Tensors, offsets: Tensor) -> tuple[Tensor, ...]:
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
