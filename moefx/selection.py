"""A router's choice of experts by one kernel, in place of torch's `topk`.

    moefx::topk(x, k) -> (values, ids)      the operator: what torch.compile, autograd and torch.export see
    Selecting()                             inside this mode it makes the calls of torch.topk that it serves, on a GPU
    selecting(...)                          the mode, where it is worth its time on the host

The results are those of torch.topk, but that equal scores come in their order, where torch promises none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from moefx.operators import shorten
from moefx.ops import topk_serves
from moefx.runtime import ops_for

PLAIN = (Tensor, nn.Parameter)  # what lies in one place: no DTensor, nothing fake
# On a slow host the mode costs 0.2 ms a router. It pays where the choice alone takes long on the GPU, or all of the block does:
SCORES, FEATURES = 1 << 21, 1 << 25  # of all tokens

_always = [False]


@contextlib.contextmanager
def paying() -> Iterator[None]:
    """Inside, the mode always pays: for comparisons with torch."""
    before, _always[0] = _always[0], True
    try:
        yield
    finally:
        _always[0] = before


def selecting(
    kernels: str, values: Iterable[Any], width: int | None, scores: int
) -> contextlib.AbstractContextManager[Any]:
    """The mode `Selecting` where it pays, for a module that chooses among `scores` experts for each token: where the GPU takes
    longer than the host, or repeats later what it is given now.

    kernels: as in `moefx.optimize`. values: the arguments of the module; the first of floats is the tokens', of `width`
    features each (None: its last axis).
    """
    tokens = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)
    if tokens is None or kernels == "torch" or not (tokens.is_cuda or kernels == "triton"):
        return contextlib.nullcontext()
    if torch.compiler.is_compiling() or _always[0]:  # before sizes are compared, which would bind a graph to them
        return Selecting(kernels)
    features = tokens.numel()
    pays = features >= FEATURES or features // (width or tokens.shape[-1] or 1) * scores >= SCORES
    if pays or (tokens.is_cuda and torch.cuda.is_current_stream_capturing()):
        return Selecting(kernels)
    return contextlib.nullcontext()


def prepare(kernels: str, device: torch.device, dtype: torch.dtype, scores: int, k: int) -> None:
    """Makes the kernel of such choices ready, so that no step of the user's does."""
    if device.type == "cuda" and kernels != "torch":
        ops_for("cuda", kernels)["topk"](torch.zeros(1, scores, dtype=dtype, device=device), k)


def outside() -> contextlib.AbstractContextManager[Any]:
    """Leaves the mode, in eager mode: it is not for what moefx itself calls."""
    if torch._C._len_torch_function_stack() and isinstance(_get_current_function_mode(), Selecting):
        return torch._C.DisableTorchFunction()  # type: ignore[no-any-return]
    return contextlib.nullcontext()


class Selected(NamedTuple):
    """What torch.topk returns."""

    values: Tensor
    indices: Tensor


class Selecting(TorchFunctionMode):
    """Inside, torch.topk is made by `moefx::topk` where that serves. Dynamo follows it.

    kernels: as in `moefx.optimize`: with "auto" that is on GPUs.
    """

    def __init__(self, kernels: str = "auto") -> None:
        super().__init__()
        self.kernels = kernels

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (func is torch.topk or func is Tensor.topk) and "out" not in kwargs:
            return self._topk(*args, **kwargs)
        return func(*args, **kwargs)

    def _topk(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        served = topk_serves(input, k, dim, largest) and (input.is_cuda or self.kernels == "triton")
        if not served or type(input) not in PLAIN:
            return torch.topk(input, k, dim, largest, sorted)
        if torch.compiler.is_compiling():
            return Selected(*torch.ops.moefx.topk(input, k))
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return torch.topk(input, k, dim, largest, sorted)
        if torch.is_grad_enabled() and input.requires_grad:
            return Selected(*_Select.apply(input, k, self.kernels))
        return Selected(*ops_for(input.device.type, self.kernels)["topk"](input, k))


def _scattered(ids: Tensor, scores: int, grad: Tensor) -> Tensor:
    return grad.new_zeros(*ids.shape[:-1], scores).scatter(-1, ids, grad)


class _Select(torch.autograd.Function):
    """The operator without the dispatcher's detours, for calls in eager mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: int, kernels: str) -> tuple[Tensor, Tensor]:
        values, ids = ops_for(x.device.type, kernels)["topk"](x, k)
        _save(ctx, (x, k), (values, ids))
        return values, ids

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None]:
        return (*_gradient(ctx, *grads), None)


@torch.library.custom_op("moefx::topk", mutates_args=(), schema="(Tensor x, int k) -> (Tensor, Tensor)")
def _topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, ids = ops_for(x.device.type, "auto")["topk"](x, k)
    return values, ids


@_topk.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.scores = inputs[0].shape[-1]


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
    (ids,) = ctx.saved_tensors
    return None if grad is None else _scattered(ids, ctx.scores, grad), None


torch.library.register_autograd("moefx::topk", _gradient, setup_context=_save)
shorten(_topk)

TOPK = torch.ops.moefx.topk.default  # for graphs
