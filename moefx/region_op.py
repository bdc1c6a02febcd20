"""A region as operators of torch: what Dynamo, AOTAutograd, Inductor and torch.export see of it.

    moefx::routed(region, x, ids, w, params, matrix_dtype, save)  ->  [y, *saved]
    moefx::routed_backward(region, gy, saved, x, w, params, need_x, wanted, matrix_dtype)  ->  [gw, gx if need_x, *blocks]

Both are functional. `region` is the handle of a CompiledRegion: a hash of what it computes and of its emitted source, so
equal regions have equal handles in every process, and caches that keep a graph by its text stay right. `saved` is what a
backward reads, without x and w, which it has anyway; with save=False there is nothing of it. `blocks` are gradients of
parameters as `LeafBinder.blocks` lists them. On the CPU, where only rows that exist are held (see `moefx.ops`), saved rows
are padded to T*K, so that no shape depends on data.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode, register_flop_formula

from moefx.compiled import CompiledRegion, Saved, autocast_dtype
from moefx.errors import InputError, PlanError
from moefx.operators import shorten
from moefx.segments import Linear, steps, x_value
from moefx.shape_ops import SHAPE_OPS

LAYOUT = 1  # of what the operators take and give: a part of every handle

REGIONS: dict[str, CompiledRegion] = {}  # by handle; regions hold no tensors


def register(compiled: CompiledRegion) -> CompiledRegion:
    """Gives a region its handle: from now on the operators know it. None for a plan that they cannot run."""
    if all(_kind(name) for name in compiled.plans[0].saved):
        about = (LAYOUT, compiled.kernels, compiled.source, compiled.region.leaves)
        compiled.handle = hashlib.sha256("\n".join(map(repr, about)).encode()).hexdigest()[:16]
        REGIONS.setdefault(compiled.handle, compiled)
    return compiled


def region_of(handle: str) -> CompiledRegion:
    """The region of a handle. Raises InputError when this process has not made it."""
    try:
        return REGIONS[handle]
    except KeyError:
        raise InputError(
            f"this process has no moefx region {handle!r}: optimise or compile the model here before running a graph of it"
        ) from None


def routed(handle: str | None, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """y [T, d_out] for x [T, D], ids and w [T, K] and the parameters by name: the region called while a graph is made.

    Whether a backward will follow, and autocast, are read here and become a part of the graph.
    """
    if handle is None:
        raise InputError("this region has no operator that torch.compile could see: call the model without torch.compile")
    tensors = [params[name] for name in region_of(handle).binder.names]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w, *tensors))
    y: Tensor = torch.ops.moefx.routed(handle, x, ids, w, tensors, autocast_dtype(x.device.type), save)[0]
    return y


def counted() -> bool:
    """Whether torch counts FLOPs here, which it does operator by operator: then an eager call too should be one."""
    return any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())


# ------------------------------------------------------------------------------------------------ forward


@cache
def _kind(name: str) -> str:
    """What a saved value of a plan is: "input" (x, w), "routing", "rows" [R, n]; "" when that is not known."""
    kinds = {"input": r"[xw]", "routing": r"(order|offsets|position)(_\d+)?", "rows": r"v\d+(_\d+)?"}
    return next((kind for kind, pattern in kinds.items() if re.fullmatch(pattern, name)), "")


def _named(compiled: CompiledRegion, saved: Saved) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, value) of what is saved beside the inputs."""
    for name, value in zip(compiled.plans[0].saved, saved):
        if _kind(name) != "input":
            if value is None:
                raise PlanError(f"the plan has not made {name!r}, which its backward reads")
            yield name, _kind(name), value


def _result(compiled: CompiledRegion, y: Tensor, saved: Saved, save: bool) -> list[Tensor]:
    """[y, *saved], contiguous, apart from each other, with T*K rows each (T of the chunk)."""
    result = [y.contiguous()]
    if not save:
        return result
    values = {name: value for name, _, value in _named(compiled, saved)}
    storages = {result[0].untyped_storage()._cdata}
    for name, kind, value in _named(compiled, saved):
        if kind == "rows":
            rows = values["position" + (name[name.index("_") :] if "_" in name else "")].numel()
            if value.shape[0] != rows:
                value = torch.cat([value, value.new_zeros(rows - value.shape[0], value.shape[1])])
        value = value.contiguous()
        if value.untyped_storage()._cdata in storages:
            value = value.clone()
        storages.add(value.untyped_storage()._cdata)
        result.append(value)
    return result


_packing = [True]


@contextlib.contextmanager
def without_packing() -> Iterator[None]:
    """Inside, parameters stay where they are: Dynamo has seen their places, and the compiler is about to look again."""
    before, _packing[0] = _packing[0], False
    try:
        yield
    finally:
        _packing[0] = before


def _may_pack(params: Sequence[Tensor]) -> bool:
    """Packing is for the user's own objects; a compiler may hand over stand-ins for them, which it would be lost on."""
    return _packing[0] and all(isinstance(p, nn.Parameter) for p in params)


@torch.library.custom_op(
    "moefx::routed",
    mutates_args=(),
    schema="(str region, Tensor x, Tensor ids, Tensor w, Tensor[] params, ScalarType? matrix_dtype, bool save) -> Tensor[]",
)
def _routed(
    region: str, x: Tensor, ids: Tensor, w: Tensor, params: list[Tensor], matrix_dtype: torch.dtype | None, save: bool
) -> list[Tensor]:
    return region_of(region).forward_as(_result, x, ids, w, params, matrix_dtype, keep=save, may_pack=_may_pack(params))


@_routed.register_fake
def _(
    region: str, x: Tensor, ids: Tensor, w: Tensor, params: list[Tensor], matrix_dtype: torch.dtype | None, save: bool
) -> list[Tensor]:
    compiled = region_of(region)
    y, saved = compiled.shapes(x, ids, w, params, matrix_dtype, SHAPE_OPS)
    made = [y, *(value for _, _, value in _named(compiled, saved))] if save else [y]
    return [t.new_empty(t.shape) for t in made]


# ------------------------------------------------------------------------------------------------ backward


def _with_inputs(compiled: CompiledRegion, saved: Sequence[Tensor], x: Tensor, w: Tensor) -> Saved:
    """Everything that the emitted backward reads, rows cut to those that exist on the CPU."""
    given, inputs, result = iter(saved), {"x": x, "w": w}, dict[str, Tensor]()
    for name in compiled.plans[0].saved:
        value = inputs[name] if name in inputs else next(given)
        if _kind(name) == "rows" and not value.is_cuda and compiled.kernels != "triton":
            offsets = result["offsets" + (name[name.index("_") :] if "_" in name else "")]
            value = value[: int(offsets[-1])]
        result[name] = value
    return tuple(result.values())


def _differentiating() -> Any:
    """An operator runs below autograd; a segment without a kernel of its own is differentiated by autograd there."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@torch.library.custom_op(
    "moefx::routed_backward",
    mutates_args=(),
    schema="(str region, Tensor gy, Tensor[] saved, Tensor x, Tensor w, Tensor[] params, bool need_x, bool[] wanted, "
    "ScalarType? matrix_dtype) -> Tensor[]",
)
def _routed_backward(
    region: str, gy: Tensor, saved: list[Tensor], x: Tensor, w: Tensor, params: list[Tensor], need_x: bool,
    wanted: list[bool], matrix_dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    compiled = region_of(region)
    read = _with_inputs(compiled, saved, x, w)
    with _differentiating():
        gx, gw, grads = compiled.backward_blocks(read, gy, params, wanted, need_x, matrix_dtype, _may_pack(params))
    return [g.contiguous() for g in (gw, *([gx] if gx is not None else []), *(block for _, block in grads.blocks))]


@_routed_backward.register_fake
def _(
    region: str, gy: Tensor, saved: list[Tensor], x: Tensor, w: Tensor, params: list[Tensor], need_x: bool,
    wanted: list[bool], matrix_dtype: torch.dtype | None,
) -> list[Tensor]:  # fmt: skip
    named = dict(zip(region_of(region).binder.names, params))
    blocks = [(names, named[names[0]]) for names in _blocks(region, params, wanted)]
    shapes = [t.new_empty((len(names), *t.shape)) for names, t in blocks]
    return [w.new_empty(w.shape), *([x.new_empty(x.shape)] if need_x else []), *shapes]


def _blocks(region: str, params: Sequence[Tensor], wanted: Sequence[bool]) -> list[tuple[str, ...]]:
    binder = region_of(region).binder
    return binder.blocks(dict(zip(binder.names, params)), {n for n, want in zip(binder.names, wanted) if want})


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    region, x, _, w, params, matrix_dtype, save = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.region, ctx.matrix_dtype, ctx.save, ctx.params = region, matrix_dtype, save, len(params)
    if save:
        ctx.save_for_backward(x, w, *params, *output[1:])


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if not ctx.save:
        raise RuntimeError("moefx::routed ran with save=False: it was made for a graph without a backward")
    _, need_x, _, need_w, wanted, *_ = ctx.needs_input_grad
    gy = grads[0]
    if gy is None:
        return (None,) * 4 + ([None] * ctx.params, None, None)
    x, w, *stored = ctx.saved_tensors
    params, saved = stored[: ctx.params], stored[ctx.params :]
    gw, *made = torch.ops.moefx.routed_backward(
        ctx.region, gy, saved, x, w, params, need_x, list(wanted), ctx.matrix_dtype
    )
    gx = made.pop(0) if need_x else None
    by_name: dict[str, Tensor] = {}
    for names, block in zip(_blocks(ctx.region, params, wanted), made):
        by_name.update(zip(names, block.unbind(0)))
    names = region_of(ctx.region).binder.names
    return None, gx, None, gw if need_w else None, [by_name[n] if b else None for n, b in zip(names, wanted)], None, None


torch.library.register_autograd("moefx::routed", _gradients, setup_context=_save)
shorten(_routed)
shorten(_routed_backward)


# ------------------------------------------------------------------------------------------------ FLOPs


def _products(handle: str, slots: Sequence[int]) -> list[tuple[int, Linear]]:
    """The useful FLOPs of each linear of the experts for ids [T, K], 2 T K I O: no tile that is only partly filled, and
    nothing that is pointwise, as torch counts its own products."""
    region = region_of(handle).held
    linears = [step for step in steps(region.template) if isinstance(step, Linear)]
    return [(2 * slots[0] * slots[1] * math.prod(region.leaves[step.leaf].shape), step) for step in linears]


@register_flop_formula(torch.ops.moefx.routed)
def _flops(handle: str, x: Any, ids: Sequence[int], *_: Any, **__: Any) -> int:
    return sum(flops for flops, _ in _products(handle, ids))


@register_flop_formula(torch.ops.moefx.routed_backward)
def _backward_flops(
    handle: str, gy: Any, saved: Any, x: Any, w: Sequence[int], params: Any, need_x: bool, wanted: Sequence[bool],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Once more for the rows of each linear, but those of the tokens where nobody needs their gradient, and once for its
    matrix, unless it is frozen."""
    held = region_of(handle).held
    trained = {name for name, want in zip(region_of(handle).binder.names, wanted) if want}
    total = 0
    for flops, step in _products(handle, w):
        total += flops * (step.rows != x_value(held.template) or need_x or held.weight_position == "input")
        total += flops * bool(trained.intersection(held.leaves[step.leaf].params))
    return total
