"""Regions written by hand, their parameters, and their meaning as a loop over tokens and slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template

E, D, F = 5, 8, 12
N = 3  # the width of narrow experts


def linear(rows: int, leaf: int, width: int) -> Instr:
    return Instr("linear", args=(Ref(rows), LeafRef(leaf)), width=width)


def op(name: str, *args: object, width: int, **kwargs: object) -> Instr:
    return Instr("op", f"aten.{name}", args, tuple(kwargs.items()), width)


def columns(rows: int, start: int, stop: int, step: int = 1) -> Instr:
    return Instr("columns", args=(Ref(rows), start, stop, step), width=len(range(start, stop, step)))


def stacked(
    name: str, *shape: int, at: int = 0, every: int | None = None, strides: tuple[int, ...] | None = None
) -> Leaf:
    """A leaf in one parameter; by default the parameter is [E, *shape]."""
    if strides is None:
        strides = tuple(torch.empty(shape).stride())
    every = every if every is not None else torch.Size(shape).numel()
    return Leaf(shape, strides, (name,) * E, tuple(at + e * every for e in range(E)))


def listed(name: str, shape: tuple[int, ...], strides: tuple[int, ...], at: int = 0) -> Leaf:
    """A leaf at the same place in E parameters."""
    return Leaf(shape, strides, tuple(f"{name}.{e}" for e in range(E)), (at,) * E)


def swiglu(gate: Instr, up: Instr, leaf: int, width: int = F) -> tuple[Instr, ...]:
    """x, gate (v1), up (v2), then (silu(gate) * up) @ leaf."""
    silu, mul = op("silu.default", Ref(1), width=width), op("mul.Tensor", Ref(3), Ref(2), width=width)
    return Instr("x", width=D), gate, up, silu, mul, linear(4, leaf, D)


X = Instr("x", width=D)


def _swiglu_fused() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """Gate and up side by side in one [E, 2F, D] parameter (as in Mixtral), down [E, D, F]."""
    leaves = (
        stacked("gate_up", D, F, every=2 * F * D, strides=(1, D)),
        stacked("gate_up", D, F, at=F * D, every=2 * F * D, strides=(1, D)),
        stacked("down", F, D, strides=(1, F)),
    )
    return swiglu(linear(0, 0, F), linear(0, 1, F), 2), leaves, {"gate_up": (E, 2 * F, D), "down": (E, D, F)}


def _narrow() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """As `_swiglu_fused`, with experts narrower than the model (as in Qwen3)."""
    leaves = (
        stacked("gate_up", D, N, every=2 * N * D, strides=(1, D)),
        stacked("gate_up", D, N, at=N * D, every=2 * N * D, strides=(1, D)),
        stacked("down", N, D, strides=(1, N)),
    )
    return swiglu(linear(0, 0, N), linear(0, 1, N), 2, N), leaves, {"gate_up": (E, 2 * N, D), "down": (E, D, N)}


def _narrow_bias() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """Narrow experts with a vector added last."""
    leaves = (stacked("up", D, N), stacked("down", N, D), stacked("bias", D))
    add = op("add.Tensor", Ref(3), LeafRef(2), width=D)
    instrs = (X, linear(0, 0, N), op("relu.default", Ref(1), width=N), linear(2, 1, D), add)
    return instrs, leaves, {"up": (E, D, N), "down": (E, N, D), "bias": (E, D)}


def _narrow_low_rank() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """A product of a product, as in experts that are low-rank adapters."""
    return (X, linear(0, 0, N), linear(1, 1, D)), (stacked("a", D, N), stacked("b", N, D)), {"a": (E, D, N), "b": (E, N, D)}


def _swiglu_separate() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    leaves = (stacked("gate", D, F), stacked("up", D, F), stacked("down", F, D))
    shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return swiglu(linear(0, 0, F), linear(0, 1, F), 2), leaves, shapes


def _interleaved_bias() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """gpt-oss: columns of gate and up in turn, clamps, biases."""
    leaves = (
        stacked("gate_up", D, F, every=2 * F * D, strides=(2 * F, 2)),
        stacked("gate_up", D, F, at=1, every=2 * F * D, strides=(2 * F, 2)),
        stacked("gate_up_bias", F, every=2 * F, strides=(2,)),
        stacked("gate_up_bias", F, at=1, every=2 * F, strides=(2,)),
        stacked("down", F, D),
        stacked("down_bias", D),
    )
    instrs = (
        X,
        linear(0, 0, F),
        linear(0, 1, F),
        op("add.Tensor", Ref(1), LeafRef(2), width=F),
        op("add.Tensor", Ref(2), LeafRef(3), width=F),
        op("clamp.default", Ref(3), None, 7.0, width=F),
        op("clamp.default", Ref(4), -7.0, 7.0, width=F),
        op("mul.Tensor", Ref(5), 1.702, width=F),
        op("sigmoid.default", Ref(7), width=F),
        op("mul.Tensor", Ref(5), Ref(8), width=F),
        op("add.Tensor", Ref(6), 1.0, width=F),
        op("mul.Tensor", Ref(9), Ref(10), width=F),
        linear(11, 4, D),
        op("add.Tensor", Ref(12), LeafRef(5), width=D),
    )
    shapes = {"gate_up": (E, D, 2 * F), "gate_up_bias": (E, 2 * F), "down": (E, F, D), "down_bias": (E, D)}
    return instrs, leaves, shapes


def _listed(width: int = F) -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """A ModuleList of experts with w1, w2, w3 as nn.Linear weights [out, in]."""
    leaves = (listed("w1", (D, width), (1, D)), listed("w3", (D, width), (1, D)), listed("w2", (width, D), (1, width)))
    shapes = {f"w1.{e}": (width, D) for e in range(E)} | {f"w3.{e}": (width, D) for e in range(E)}
    shapes |= {f"w2.{e}": (D, width) for e in range(E)}
    return swiglu(linear(0, 0, width), linear(0, 1, width), 2, width), leaves, shapes


def _residual_norm() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """x + scale_e * mlp(norm(x) * g): a shared vector, a scalar per expert, a shared matrix, x read three times."""
    shared_g = Leaf((D,), (1,), ("g",) * E, (0,) * E)
    shared_up = Leaf((D, F), (F, 1), ("up",) * E, (0,) * E)
    scale = Leaf((), (), ("scale",) * E, tuple(range(E)))
    leaves = (shared_g, shared_up, stacked("down", F, D), scale)
    instrs = (
        X,
        op("native_layer_norm.default", Ref(0), [D], None, None, 1e-5, width=D),
        Instr("item", args=(Ref(1), 0), width=D),
        op("mul.Tensor", Ref(2), LeafRef(0), width=D),
        linear(3, 1, F),
        op("gelu.default", Ref(4), width=F, approximate="tanh"),
        linear(5, 2, D),
        op("mul.Tensor", Ref(6), LeafRef(3), width=D),
        op("add.Tensor", Ref(7), Ref(0), width=D),
        op("add.Tensor", Ref(8), Ref(3), width=D),
    )
    return instrs, leaves, {"g": (D,), "up": (D, F), "down": (E, F, D), "scale": (E,)}


def _read_twice() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    """Two hidden layers, of which the second is gated by the first: a saved value that two segments read."""
    leaves = (stacked("up", D, F), stacked("mid", F, F), stacked("down", F, D))
    instrs = (
        X,
        linear(0, 0, F),
        op("relu.default", Ref(1), width=F),
        linear(2, 1, F),
        op("mul.Tensor", Ref(3), Ref(1), width=F),
        linear(4, 2, D),
    )
    return instrs, leaves, {"up": (E, D, F), "mid": (E, F, F), "down": (E, F, D)}


def _plain_relu() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    leaves = (stacked("up", D, F), stacked("down", F, D))
    instrs = (X, linear(0, 0, F), op("relu.default", Ref(1), width=F), linear(2, 1, D))
    return instrs, leaves, {"up": (E, D, F), "down": (E, F, D)}


def _one_linear() -> tuple[tuple[Instr, ...], tuple[Leaf, ...], dict[str, tuple[int, ...]]]:
    return (X, linear(0, 0, D)), (stacked("w", D, D),), {"w": (E, D, D)}


STYLES = {
    "swiglu_fused": _swiglu_fused,
    "narrow": _narrow,
    "narrow_bias": _narrow_bias,
    "narrow_low_rank": _narrow_low_rank,
    "narrow_listed": partial(_listed, N),
    "swiglu_separate": _swiglu_separate,
    "interleaved_bias": _interleaved_bias,
    "listed": _listed,
    "residual_norm": _residual_norm,
    "plain_relu": _plain_relu,
    "read_twice": _read_twice,
    "one_linear": _one_linear,
}


def region(style: str, top_k: int = 2, **changes: Any) -> Region:
    instrs, leaves, _ = STYLES[style]()
    template = Template(instrs)
    width = N if style.startswith("narrow") else F
    return Region(E, top_k, D, D, width, template, leaves, routing="by hand", layout=style, **changes)


def parameters(style: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = STYLES[style]()[2]
    return {
        name: torch.nn.Parameter((torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4).to(dtype))
        for name, shape in shapes.items()
    }


@dataclass
class Inputs:
    x: Tensor
    ids: Tensor
    w: Tensor


def inputs(
    region: Region, tokens: int, routing: str = "any", dtype: torch.dtype = torch.float64, seed: int = 1
) -> Inputs:
    """Routing "any": uniform; "outside": some ids are -1 or E; "one": all on expert 2; "few": on experts 1 and 3."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, region.top_k)
    low, high = {"any": (0, E), "outside": (-1, E + 1), "one": (2, 3), "few": (0, 2)}[routing]
    ids = torch.randint(low, high, shape, generator=generator)
    ids = ids * 2 + 1 if routing == "few" else ids
    x = torch.randn(tokens, region.d_model, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return Inputs(x, ids, w)


def _leaf(leaf: Leaf, e: int, params: dict[str, Tensor]) -> Tensor:
    flat = params[leaf.params[e]].flatten()
    index = torch.full(leaf.shape, leaf.offsets[e])
    for dim, stride in enumerate(leaf.strides):
        steps = torch.arange(leaf.shape[dim]) * stride
        index = index + steps.view([-1 if d == dim else 1 for d in range(len(leaf.shape))])
    return flat[index]


def expert(region: Region, e: int, row: Tensor, params: dict[str, Tensor]) -> Tensor:
    """f(row; theta_e) for row [1, D], instruction by instruction."""
    values: list = []

    def value(a: object) -> object:
        if isinstance(a, Ref):
            return values[a.index]
        if isinstance(a, LeafRef):
            return _leaf(region.leaves[a.index], e, params)
        return row.dtype if a == "model" else a

    for instr in region.template.instrs:
        args = [value(a) for a in instr.args]
        if instr.kind == "x":
            values.append(row)
        elif instr.kind == "linear":
            values.append(args[0] @ args[1])
        elif instr.kind == "columns":
            values.append(args[0][:, args[1] : args[2] : args[3]])
        elif instr.kind == "item":
            values.append(args[0][args[1]])
        else:
            target = torch.ops
            for part in instr.target.split("."):
                target = getattr(target, part)
            values.append(target(*args, **{k: value(v) for k, v in instr.kwargs}))
    return values[-1]


def reference(region: Region, given: Inputs, params: dict[str, Tensor]) -> Tensor:
    """y by the definition, one token and slot at a time."""
    rows = []
    for t in range(given.x.shape[0]):
        row, y = given.x[t : t + 1], torch.zeros(1, region.d_out, dtype=given.x.dtype)
        for k in range(region.top_k):
            e, w = int(given.ids[t, k]), given.w[t, k]
            if not 0 <= e < region.experts:
                y = y + w * row if region.identity else y
            elif region.weight_position == "output":
                y = y + w * expert(region, e, row, params)
            else:
                y = y + expert(region, e, w * row, params)
        rows.append(y)
    return torch.cat(rows) if rows else given.x.new_zeros(0, region.d_out)


def gradients(y: Tensor, of: list[Tensor], gy: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `y` for the incoming `gy`; zeros where `y` does not depend."""
    return torch.autograd.grad(y, of, gy, allow_unused=True, materialize_grads=True)
