"""A routed layer on ranks: its weights, its plans of any degree, codec and all-to-all, one step of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from moefx.codegen.all_to_all import (
    Topology,
    make_all_to_all,
)
from moefx.codegen.codecs import codec_for
from moefx.passes.simplify import simplify
from torch import Tensor

from moefx.costs import BlockTimes
from moefx.degrees import plans_for
from moefx.exchange import Wire, experts_of
from moefx.holding import holding
from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template
from moefx.measured import block_times
from moefx.parallel_region import ParallelRegion
from multi_gpu_parts.worker import Bench


@dataclass(frozen=True)
class Layer:
    """D model width, F expert width, E experts, K experts a token; SwiGLU experts as Transformers stacks them."""

    d_model: int
    d_expert: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"D={self.d_model} F={self.d_expert} E={self.experts} K={self.top_k}"

    def region(self) -> Region:
        """What moefx finds in such a block."""
        d, f, e = self.d_model, self.d_expert, self.experts

        def leaf(name: str, inputs: int, outputs: int) -> Leaf:
            starts = tuple(i * inputs * outputs for i in range(e))
            return Leaf((inputs, outputs), (1, inputs), (name,) * e, starts)

        instrs = (
            Instr("x", width=d),
            Instr("linear", args=(Ref(0), LeafRef(1)), width=2 * f),
            Instr("columns", args=(Ref(1), 0, f, 1), width=f),
            Instr("op", "aten.silu.default", (Ref(2),), (), f),
            Instr("columns", args=(Ref(1), f, 2 * f, 1), width=f),
            Instr("op", "aten.mul.Tensor", (Ref(3), Ref(4)), (), f),
            Instr("linear", args=(Ref(5), LeafRef(0)), width=d),
        )
        leaves = (leaf("down", f, d), leaf("gate_up", d, 2 * f))
        return simplify(Region(e, self.top_k, d, d, f, Template(instrs), leaves))

    def shapes(self, experts: int) -> dict[str, tuple[int, int, int]]:
        return {"gate_up": (experts, 2 * self.d_expert, self.d_model), "down": (experts, self.d_model, self.d_expert)}


_exchanges: dict[tuple[str, Any], Any] = {}


def exchange_of(name: str, group: Any, topology: Any = None) -> Any:
    """One all-to-all of each kind for the life of the process group: making one is collective."""
    topology = topology or Topology((0,) * group.size())
    if (name, topology) not in _exchanges:
        _exchanges[name, topology] = make_all_to_all(name, group, topology)
    return _exchanges[name, topology]


class Spread:
    """This rank's part of a layer: its experts' weights, and plans of any degree, codec and all-to-all for them."""

    def __init__(
        self, bench: Bench, layer: Layer, params: dict[str, Tensor], profile: Any = None, topology: Any = None
    ) -> None:
        self.bench, self.layer, self.params, self.profile, self.topology = bench, layer, params, profile, topology
        whole = {n: torch.empty(shape, device="meta") for n, shape in layer.shapes(layer.experts).items()}
        self.region = layer.region()
        self.held = holding(self.region, whole, bench.world, bench.rank)
        self.dtype = next(iter(params.values())).dtype
        self.times: dict[int, dict[str, BlockTimes]] = {}  # by tokens

    def wire(self, options: Any) -> Any:
        named = {"forward": options.codec, "backward": options.backward_codec}
        codecs = {phase: codec_for(name, self.bench.device.type) for phase, name in named.items() if name != "none"}
        rows, counts = (exchange_of(n, self.bench.group, self.topology) for n in (options.all_to_all, "direct"))
        return Wire(self.bench.group, self.layer.experts, rows, counts, codecs, capacity=options.capacity)

    def plan(self, options: Any, tokens: int) -> tuple[Any, tuple[Any, Any]]:
        """The region as these options have it, and the timelines that the cost model promises (None without a profile)."""
        wire, here = self.wire(options), (self.region, self.held.region, self.params, max(1, tokens))
        if self.profile is not None and tokens not in self.times:
            self.times[tokens] = block_times(*here, replace(wire, codecs={}), "auto")
        plans = plans_for(*here, wire, options, self.profile, self.times.get(tokens, {}))
        return ParallelRegion(self.region, self.held.region, plans, "auto", wire), plans.timelines


@dataclass
class Batch:
    """Tokens of this rank, their routing, and the gradient of the output.

    others: more ids and weights, for steps that are timed. One routing is faster by a tenth in this plan, another in that.
    """

    x: Tensor
    ids: Tensor
    w: Tensor
    gy: Tensor
    others: Sequence[tuple[Tensor, Tensor]] = ()


def own_weights(bench: Bench, layer: Layer, dtype: Any) -> dict[str, Tensor]:
    """Random weights of this rank's experts, that ask for gradients."""
    torch.manual_seed(bench.rank)
    own = len(experts_of(layer.experts, bench.world, bench.rank))
    made = {n: torch.randn(shape, device=bench.device, dtype=dtype) for n, shape in layer.shapes(own).items()}
    return {n: t.mul_(t.shape[-1] ** -0.5).requires_grad_() for n, t in made.items()}


def random_batch(bench: Bench, layer: Layer, tokens: int, dtype: Any, routings: int = 1) -> Batch:
    """Every token has K different experts, any of them with the same chance."""
    torch.manual_seed(1000 + bench.rank)
    x, gy = (torch.randn(tokens, layer.d_model, device=bench.device, dtype=dtype) for _ in range(2))
    draws = [torch.rand(tokens, layer.experts, device=bench.device).topk(layer.top_k) for _ in range(routings)]
    (ids, w), *others = [(ids, (w / w.sum(1, keepdim=True)).to(dtype)) for w, ids in draws]
    return Batch(x.requires_grad_(), ids, w, gy, others)


@contextmanager
def beside(region: Any, reserve: int) -> Iterator[None]:
    """Inside, persistent kernels of a plan with several chunks leave so many multiprocessors to the exchanges beside them."""
    if not reserve or max(region.degrees) == 1:
        yield
        return
    users = [importlib.import_module(f"moefx.codegen.{name}") for name in ("triton_grouped", "triton_pointwise", "gluon_grouped")]
    all_of_them = users[0].multiprocessors
    try:
        for module in users:
            module.multiprocessors = lambda device: all_of_them(device) - reserve
        yield
    finally:
        for module in users:
            module.multiprocessors = all_of_them


def compile_kernels(regions: Iterable[Any], params: dict[str, Tensor], batch: Batch, reserve: int = 0) -> None:
    """All kernels of these plans at once, instead of one after the other when they first run."""
    for region in regions:
        with beside(region, reserve):
            region.precompile(batch.x, batch.ids, batch.w, params, [list(params)])


def step(region: Any, params: dict[str, Tensor], batch: Batch, reserve: int = 0) -> Callable[[], None]:
    """Forward and backward, with gradients of tokens and weights; the next routing in each call."""
    routings = cycle([(batch.ids, batch.w), *batch.others])

    def run() -> None:
        ids, w = next(routings)
        for tensor in (batch.x, *params.values()):
            tensor.grad = None
        with beside(region, reserve):
            region(batch.x, ids, w, params).backward(batch.gy)

    return run
