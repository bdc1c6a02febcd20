"""A pointwise segment of an expert template as kernels: its value, its gradient, and its value in the epilogue of the grouped
product that feeds it. `triton_program` says what is computed, `triton_source` how it is written; here it is launched.

All arithmetic is in fp32, whatever the storage dtype; casts between floating dtypes inside a segment therefore change
nothing but the dtype of the result.

    compile_pointwise(template, segment, leaves) -> Pointwise | Unsupported
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from moefx.codegen import triton_grouped, triton_tiles
from moefx.codegen.triton_launch import (
    cdiv,
    check_dtypes,
    described,
    described_rows,
    float32_precision,
    launch,
    launch_block,
    multiprocessors,
    on_device,
    power_of_2,
    row_tiles,
    tiles_with_rows,
    unit_columns,
)
from moefx.codegen.triton_permute import expert_sum, gather_rows
from moefx.codegen.triton_program import NoKernel, Program
from moefx.codegen.triton_source import Sources, load, write
from moefx.codegen.triton_tiles import Tile
from torch import Tensor

from moefx.errors import InputError
from moefx.ir import Leaf, LeafRef, Ref, Template
from moefx.segments import Segment, leaf_refs

# Generated kernels handle about this many elements a program.
ELEMENTS = 2048


@dataclass(frozen=True)
class Unsupported:
    """Why a segment has no Triton form: the caller runs it with torch."""

    reason: str

    def __bool__(self) -> bool:
        return False


class Pointwise:
    """A compiled segment: `forward`, `vjp` and, unless `why_not_linear` tells why not, `linear`. Holds no tensors.

    inputs: the values [R, width] of `segment.inputs`. leaves: the vectors [E, n] of `segment.leaves`; [1, n] for one
    that all experts share. offsets [E+1]: the rows of each expert.
    """

    def __init__(self, template: Template, segment: Segment, leaves: Sequence[Leaf], sources: Sources) -> None:
        self.template, self.segment, self._sources = template, segment, sources
        self._leaf_widths = [(*leaves[i].shape, 1)[0] for i in segment.leaves]
        self._dtypes: dict[tuple[torch.dtype, ...], list[torch.dtype]] = {}
        self._stages: dict[Hashable, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Pointwise:
        return self

    @property
    def source(self) -> str:
        """The generated module."""
        return self._sources.text

    @property
    def why_not_linear(self) -> str:
        """Why there is no `linear`; empty when there is."""
        return self._sources.why_not_linear

    @cached_property
    def _kernels(self) -> dict[str, Any]:
        return load(self._sources.text)

    def forward(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], offsets: Tensor) -> tuple[Tensor, ...]:
        """The segment's outputs [R, width]."""
        inputs = self._checked(inputs, leaves)
        outputs = self._new_outputs([t.dtype for t in inputs], leaves, inputs[0], inputs[0].shape[0])
        self._launch(self.segment.name, inputs, leaves, offsets, outputs)
        return tuple(outputs)

    def vjp(
        self, inputs: Sequence[Tensor], leaves: Sequence[Tensor], offsets: Tensor, grads: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(the outputs again, the gradient of each input, the gradient of each leaf) for the outputs' gradients."""
        return self._vjp(inputs, leaves, offsets, grads, None)[:3]

    def weighted_vjp(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        grads: Sequence[Tensor],
        order: Tensor,
        w: Tensor,
        in_place: bool = False,
        beside: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """`vjp` of w times the segment's one output, row by row: (w times the output, the gradients of the inputs and of
        the leaves, the gradient of w [T, K]). order [T*K]: the slot of each row.

        in_place: nobody else reads inputs and grads any more, and the results may take their memory. beside: [T, K], is
        added to the gradient of w.
        """
        outputs, inner, leaf, products = self._vjp(inputs, leaves, offsets, grads, (order, w), in_place)
        assert products is not None
        gw = products.sum(1).view(w.shape)
        return outputs, inner, leaf, (gw if beside is None else gw + beside).to(w.dtype)

    def _vjp(
        self,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        grads: Sequence[Tensor],
        weights: tuple[Tensor, Tensor] | None,
        in_place: bool = False,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        """(outputs, gradients of inputs and of leaves, products with the outputs of each slot and column block)."""
        inputs, sources = self._checked(inputs, leaves), self._sources
        check_dtypes(f"{self.segment.name}.vjp", {f"grad{n}": g for n, g in enumerate(grads)})
        rows = inputs[0].shape[0]
        # In place, a program reads its elements of all of them before it writes them, and no other program does.
        dtypes = [t.dtype for t in inputs]
        outputs = self._new_outputs(dtypes, leaves, inputs[0], rows, instead=grads if in_place else ())
        made = {
            s: t if in_place and t.is_contiguous() and self._writes_all(s) else self._new_gradient(s, t.shape, t)
            for s, t in zip(sources.inputs, inputs)
        }
        for s, n in zip(sources.leaves, self._leaf_widths):
            if s not in sources.same_grad:  # fp32, since a sum over all rows follows
                columns = cdiv(sources.width, self._block(sources.width)[1]) if n == 1 else n
                made[s] = self._new_gradient(s, (rows, columns), inputs[0], torch.float32, whole=n == 1)
        given: list[Any] = []
        for g in grads:
            g = unit_columns(g)
            given += [g, g.stride(0)]
        products, extra = None, [offsets, offsets, offsets]
        if weights is not None:
            order, w = weights
            columns = cdiv(sources.width, self._block(sources.width)[1])
            products = w.new_zeros(order.numel(), columns, dtype=torch.float32)
            extra = [order, w.contiguous(), products]
        self._launch(
            f"{self.segment.name}_vjp", inputs, leaves, offsets,
            [*outputs, *given, *(made[s] for s in sources.grads), *extra],
            WEIGHTED=weights is not None, IN_PLACE=in_place,
        )  # fmt: skip
        leaf_grads = [
            self._leaf_gradient(s, leaf, n, made, offsets)
            for s, leaf, n in zip(sources.leaves, leaves, self._leaf_widths)
        ]
        return tuple(outputs), tuple(made[s] for s in sources.inputs), tuple(leaf_grads), products

    def _new_gradient(
        self, source: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None, whole: bool = False
    ) -> Tensor:
        """Room for gradient rows: zeros unless the kernel writes all of it."""
        written = self._writes_all(source) or (whole and source in self._sources.grads)
        return (like.new_empty if written else like.new_zeros)(shape, dtype=dtype or like.dtype)

    def _writes_all(self, source: str) -> bool:
        """Whether the gradient rows of an input are written whole."""
        return source in self._sources.grads and source in self._sources.covered

    def linear(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        order: Tensor | None = None,
        top_k: int = 1,
        save: bool = True,
    ) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...]]:
        """(the linears' results if `save`, the outputs) of the segment in the epilogue of the linears that feed it.

        rows [R, I]; or, with order [T*K], the tokens [T, I] whose rows are gathered on the way. weights: one [E, I, O]
        (any strides; [1, I, O] when shared) for each of the segment's inputs.
        """
        name, sources = self.segment.name, self._sources
        if sources.why_not_linear:
            raise InputError(f"{name} has no fused linear: {sources.why_not_linear}")
        check_dtypes(f"{name}.linear", {"rows": rows, **{f"weight{n}": w for n, w in enumerate(weights)}}, same=True)
        widths = [self.template.instrs[i].width for i in self.segment.inputs]
        experts, inner = offsets.numel() - 1, rows.shape[1]
        weights = [w.expand(experts, -1, -1) if w.shape[0] == 1 else w for w in weights]
        if [tuple(w.shape) for w in weights] != [(experts, inner, n) for n in widths]:
            raise InputError(
                f"{name}.linear: weights {[tuple(w.shape) for w in weights]} do not fit "
                f"E={experts}, I={inner}, O={widths}"
            )
        rows = unit_columns(rows)
        total = rows.shape[0] if order is None else order.numel()
        # Not saved products are not written: any tensor of the right dtype stands for them.
        products = [rows.new_empty(total, n) if save else rows for n in widths]
        outputs = self._new_outputs([rows.dtype] * len(widths), leaves, rows, total)
        done = not total
        for tile in triton_tiles.tiles_for(rows.device, "act", cdiv(total, experts), inner, sources.width) if total else ():
            block_rows, block_order = rows, order
            if order is not None and tile.gathers and triton_grouped.many_rows(total, experts) and described(rows, (128, 64)):
                block_rows, block_order = gather_rows(rows, order, top_k, offsets), None
            done = self._launch_block(
                block_rows, weights, products, leaves, outputs, offsets, block_order, top_k, save, tile
            )
            del block_rows
        for tile in triton_grouped.pointer_tiles(rows, total, experts, sources.width, sources.products, done):
            tiles_m = tiles_with_rows(total, experts, tile.rows)
            tiles_n = cdiv(sources.width, tile.columns)
            args: list[Any] = []
            for weight, product in zip(weights, products):
                args += [weight, *weight.stride(), product]
            with on_device(rows):
                launch(
                    self._kernels[f"{name}_linear"], (tiles_m * tiles_n,),
                    rows, offsets if order is None else order, *args, *self._leaf_args(leaves), *outputs, offsets,
                    inner, rows.stride(0), experts, tiles_n, top_k, SAVE=save, GATHER=order is not None,
                    EVEN=inner % tile.inner == 0, PRECISION=float32_precision(), GROUP=tile.group,
                    BLOCK_E=power_of_2(experts), BM=tile.rows, BN=tile.columns, BK=tile.inner,
                    num_warps=tile.warps, num_stages=tile.stages,
                )  # fmt: skip
        return tuple(products) if save else None, tuple(outputs)

    def _launch_block(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        products: Sequence[Tensor],
        leaves: Sequence[Tensor],
        outputs: Sequence[Tensor],
        offsets: Tensor,
        order: Tensor | None,
        top_k: int,
        save: bool,
        tile: Tile,
    ) -> bool:
        """`linear` by the kernel `..._block`; False where it does not apply. tile: of two products, as of gate and up."""
        experts, inner, width = offsets.numel() - 1, rows.shape[1], self._sources.width
        if self._sources.products != 2:
            wide = self._sources.products == 1 and width >= 256
            tile = replace(tile, columns=2 * tile.columns if wide else tile.columns, stages=3)
        inner_last = weights[0].stride(1) == 1
        apply = width >= 128 and triton_grouped.many_rows(outputs[0].shape[0], experts)
        if not apply or any((w.stride(1) == 1) != inner_last for w in weights):
            return False
        left = triton_grouped.left_operand(rows, order, tile)
        args: list[Any] = []
        for form, weight, product in zip(self._sources.forms, weights, products):
            base, block = weight.transpose(1, 2) if inner_last else weight, [tile.columns]
            outs = [product if save else outputs[0]]  # not saved: any descriptor stands for it
            if form == "halves":
                base, block = base.unflatten(1 if inner_last else 2, (2, width)), [2, tile.columns]
                outs = [product[:, :width], product[:, width:]] if save else outs * 2
            elif form == "pairs":
                block = [2 * tile.columns]
            whole = [1, *block, tile.inner] if inner_last else [1, tile.inner, *block]
            args += [described(base, whole), *(described_rows(out, (tile.rows, tile.columns)) for out in outs)]
        results = [described_rows(out, (tile.rows, tile.columns)) for out in outputs]
        if left is None or None in args or None in results:
            return False
        programs = tile.programs * multiprocessors(rows.device)
        key = (rows.device, inner_last, order is not None, save, tile)
        with on_device(rows):
            return launch_block(
                self._stages, key, tile.stages, self._kernels[f"{self.segment.name}_block"], (programs,),
                left, offsets if order is None else order, *args, *self._leaf_args(leaves), *results, offsets,
                inner, rows.stride(0), experts, cdiv(width, tile.columns), top_k, SAVE=save,
                GATHER=order is not None, INNER_LAST=inner_last, GROUP=tile.group, PROGRAMS=programs,
                BLOCK_E=power_of_2(experts), BM=tile.rows, BN=tile.columns, BK=tile.inner, num_warps=tile.warps,
            )  # fmt: skip

    def _checked(self, inputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        name = self.segment.name
        check_dtypes(name, dict(zip((*self._sources.inputs, *self._sources.leaves), (*inputs, *leaves))))
        widths = [self.template.instrs[i].width for i in self.segment.inputs]
        if [t.shape[1] for t in inputs] != widths or len(leaves) != len(self._leaf_widths):
            raise InputError(
                f"{name} takes inputs of widths {widths} and {len(self._leaf_widths)} leaves; "
                f"got {[tuple(t.shape) for t in inputs]} and {len(leaves)} leaves"
            )
        return [unit_columns(t) for t in inputs]

    def _leaf_args(self, leaves: Sequence[Tensor]) -> list[Any]:
        """Each leaf with its strides: a leaf that all experts share has expert stride 0."""
        args: list[Any] = []
        for leaf, n in zip(leaves, self._leaf_widths):
            leaf = leaf.reshape(leaf.shape[0], n)
            args += [leaf, 0 if leaf.shape[0] == 1 else leaf.stride(0), leaf.stride(1)]
        return args

    def _launch(
        self,
        kernel: str,
        inputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        offsets: Tensor,
        more: Sequence[Any],
        **constants: Any,
    ) -> None:
        rows, width, experts = inputs[0].shape[0], self._sources.width, offsets.numel() - 1
        if not rows:
            return
        bm, bn = self._block(width)
        tiles = row_tiles(rows, experts, bm) if leaves else cdiv(rows, bm)
        args: list[Any] = []
        for t in inputs:
            args += [t, t.stride(0)]
        with on_device(inputs[0]):
            launch(
                self._kernels[kernel], (tiles, cdiv(width, bn)),
                *args, *self._leaf_args(leaves), *more, offsets, experts, **constants, BLOCK_E=power_of_2(experts),
                BM=bm, BN=bn,
            )  # fmt: skip

    @staticmethod
    def _block(width: int) -> tuple[int, int]:
        """(rows, columns) of a program's block."""
        columns = power_of_2(width, least=16, most=512)
        return ELEMENTS // columns, columns

    def _leaf_gradient(self, source: str, leaf: Tensor, n: int, made: dict[str, Tensor], offsets: Tensor) -> Tensor:
        """The gradient of a leaf, shaped and typed like it, from gradient rows."""
        if leaf.shape[0] == 1 and offsets.numel() > 2:
            offsets = torch.stack((offsets[0], offsets[-1]))
        if source not in self._sources.same_grad:
            summed = expert_sum(made[source], offsets)
            return (summed.sum(1) if n == 1 else summed).reshape(leaf.shape).to(leaf.dtype)
        sums: dict[str, Tensor] = {}
        gradient = leaf.new_zeros(leaf.shape[0], n)
        for own, other in self._sources.same_grad[source]:
            if other.source not in sums:
                sums[other.source] = expert_sum(made[other.source], offsets)
            columns = other.slice(self._sources.width)
            gradient[:, own.slice(self._sources.width)] = sums[other.source][:, columns]
        return gradient.reshape(leaf.shape)

    def _new_outputs(
        self, dtypes: list[torch.dtype], leaves: Sequence[Tensor], like: Tensor, rows: int, instead: Sequence[Tensor] = ()
    ) -> list[Tensor]:
        """Room for the outputs; an output takes the memory of its member of `instead` where that is alike."""
        key = (*dtypes, *(leaf.dtype for leaf in leaves))
        if key not in self._dtypes:
            self._dtypes[key] = self._output_dtypes(key)
        shape = (rows, self._sources.width)
        outputs = []
        for i, dtype in enumerate(self._dtypes[key]):
            old = instead[i] if i < len(instead) else None
            if old is None or old.shape != shape or old.dtype != dtype or not old.is_contiguous():
                old = like.new_empty(shape, dtype=dtype)
            outputs.append(old)
        return outputs

    def _output_dtypes(self, dtypes: tuple[torch.dtype, ...]) -> list[torch.dtype]:
        """What torch gives for inputs and leaves of these dtypes: the segment run on one meta row."""
        values: dict[int, Any] = {}
        leaf_rows: dict[int, Tensor] = {}
        for i, dtype in zip(self.segment.inputs, dtypes):
            values[i] = torch.empty(1, self.template.instrs[i].width, dtype=dtype, device="meta")
        for i, n, dtype in zip(self.segment.leaves, self._leaf_widths, dtypes[len(values) :]):
            leaf_rows[i] = torch.empty(1, n, dtype=dtype, device="meta")

        def argument(value: Any) -> Any:
            if isinstance(value, Ref):
                return values[value.index]
            if isinstance(value, LeafRef):
                return leaf_rows[value.index]
            return dtypes[0] if value == "model" else value

        for i in self.segment.body:
            instr = self.template.instrs[i]
            if instr.kind == "columns":
                rows, start, stop, step = instr.args
                values[i] = values[rows.index][:, start:stop:step]
            else:
                _, op, overload = instr.target.split(".")
                kwargs = {key: argument(value) for key, value in instr.kwargs if key != "device"}
                values[i] = getattr(getattr(torch.ops.aten, op), overload)(*map(argument, instr.args), **kwargs)
        return [values[i].dtype for i in self.segment.outputs]


def compile_pointwise(template: Template, segment: Segment, leaves: Sequence[Leaf]) -> Pointwise | Unsupported:
    """The segment as Triton kernels, or why it has none. `leaves` are the region's."""
    program = Program(template, segment, leaves)
    if not segment.inputs:
        return Unsupported(f"{segment.name} reads no rows")
    if any(
        isinstance(value, LeafRef)
        for i in segment.body
        for value in leaf_refs([v for _, v in template.instrs[i].kwargs])
    ):
        return Unsupported(f"{segment.name} passes a leaf by keyword")
    try:
        outputs = program.build()
    except NoKernel as decline:
        return Unsupported(f"{segment.name}: {decline}")
    return Pointwise(template, segment, leaves, write(program, outputs, segment.name))
