"""The table of Triton ops: the names and signatures of `moefx.ops`, for CUDA tensors (or Triton's interpreter).

R, the number of routed rows held, is always T*K here: no size depends on data and the host never waits. Rows behind
offsets[E] keep whatever the memory held; no op reads them. Beyond the ops of `moefx.ops` the table has

    compile_pointwise(template, segment, leaves)                a segment's own kernels (moefx.codegen.triton_pointwise)
    grouped_linear_act(pointwise, rows, weights, leaves, offsets, order=None, top_k=1, save=True)
                                                                linears with their segment in the epilogue
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moefx.codegen.triton_grouped import (
    gather_linear,
    grouped_linear,
    grouped_wgrad,
    grouped_wgrad_add,
)
from moefx.codegen.triton_launch import interpreted, only_compiling, prepare_compiler, supports
from moefx.codegen.triton_permute import combine, combine_backward, expert_rows, expert_sum, gather_rows, rows_backward
from moefx.codegen.triton_pointwise import Pointwise, Unsupported, compile_pointwise
from moefx.codegen.triton_route import regroup, route
from moefx.codegen.triton_tape import Tapes
from moefx.codegen.triton_topk import topk
from moefx.codegen.triton_workspace import gather_wgrad, linear_combine
from torch import Tensor

__all__ = ["OPS", "Pointwise", "Unsupported", "compile_pointwise", "interpreted", "supports"]


def grouped_linear_act(
    pointwise: Pointwise,
    rows: Tensor,
    weights: Sequence[Tensor],
    leaves: Sequence[Tensor],
    offsets: Tensor,
    order: Tensor | None = None,
    top_k: int = 1,
    save: bool = True,
) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
    """(the pre-activations [R, O] if `save`, the segment's outputs [R, F]); see `Pointwise.linear`."""
    return pointwise.linear(rows, weights, leaves, offsets, order, top_k, save)


OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        topk,
        route,
        regroup,
        gather_rows,
        rows_backward,
        grouped_linear,
        grouped_wgrad,
        grouped_wgrad_add,
        expert_rows,
        expert_sum,
        combine,
        combine_backward,
        linear_combine,
        gather_linear,
        gather_wgrad,
        compile_pointwise,
        grouped_linear_act,
        only_compiling,
        prepare_compiler,
        Tapes,
    )
}
