"""Expert parallelism: the experts of a model's blocks spread over the ranks of a group, each block a scheduled plan.

    moefx.optimize(model, example_inputs, mesh=mesh["ep"])

Rank p of P holds experts p*m to (p+1)*m - 1, m = ceil(E / P), the last ones fewer or none. A parameter that stacks experts
becomes a DTensor sharded on dim 0; of experts that are modules of their own, a rank keeps the parameters of its own, the same
objects, and those of the others are None. So state_dict and torch.distributed.checkpoint save and load at another P, or into
the model as it was.

Each rank has its own batch. A parameter's gradient is that of the sum of all ranks' losses where experts are concerned, and
of the rank's own loss elsewhere; `sync_gradients` turns both into those of the mean. Nothing is averaged over experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree as pytree

import moefx
from moefx import calibrate, measured, probe, verify
from moefx.begun import Begun, BegunBackward, Steps, first_part, second_part
from moefx.block import RewrittenForward, Variant, rewritten
from moefx.build import PHASES, ParallelPlans, compile_parallel
from moefx.codegen.all_to_all import ALL_TO_ALLS, Topology, make_all_to_all
from moefx.codegen.codecs import CODECS, codec_for
from moefx.compiled import CompiledRegion, Saved, _autocast_dtype
from moefx.costs import Sizes
from moefx.errors import Decline, InputError
from moefx.exchange import Counted, Padded, Wire, experts_of
from moefx.ir import Leaf, Region
from moefx.leaves import LeafBinder, LeafGradients
from moefx.options import Options
from moefx.passes.beside import beside
from moefx.profile import Profile, cache_path, device_name
from moefx.report import FoundBlock, Report
from moefx.runtime import Runtime, ops_for

log = logging.getLogger(__name__)

Degrees = tuple[int, int]
MANY = 8  # chunks of a plan that shows what a chunk costs
MOST_TOKENS = 8192  # of a plan that shows what launching a chunk costs


# ------------------------------------------------------------------------------------------------ what a rank holds


@dataclass(frozen=True)
class Holding:
    """What a rank holds of a region: stacked parameters to cut on dim 0, parameters that are others' own, and those that all
    experts share, of which every rank has a copy."""

    region: Region
    stacked: tuple[str, ...]
    elsewhere: tuple[str, ...]
    shared: tuple[str, ...]

    @property
    def own(self) -> frozenset[str]:
        """The parameters of which this rank alone has a part, empty where it holds no experts."""
        here = {n for leaf in self.region.leaves for n in leaf.params if n not in self.shared}
        return frozenset(here.union(self.stacked))


@dataclass(frozen=True)
class Absent(Leaf):
    """A leaf on a rank without experts, of what dtype and device they are elsewhere. part: the parameter, if it is here, cut
    to nothing or shared. trained: elsewhere, so that all ranks have a backward to run."""

    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    part: str = ""
    trained: bool = False


class NoExperts(LeafBinder):
    """Leaves of no expert, [0, ...], so that a rank without experts runs the plan of all. Gradients of what it has are zero."""

    def __init__(self, leaves: tuple[Leaf, ...]) -> None:
        self.leaves, self.groups, self.loose = leaves, (), ()
        self.absent = [leaf for leaf in leaves if isinstance(leaf, Absent)]
        self.names = tuple(dict.fromkeys(leaf.part for leaf in self.absent if leaf.part))

    def bind(self, params: dict[str, Tensor], may_pack: bool = True) -> tuple[list[Tensor], list[str]]:
        here = [params[leaf.part] if leaf.part else leaf for leaf in self.absent]  # they move with the model
        sizes = [(0, *(leaf.shape or (1,))) for leaf in self.absent]
        return [torch.empty(size, dtype=at.dtype, device=at.device) for size, at in zip(sizes, here)], []

    def gradients(self, params: dict[str, Tensor], wanted: set[str]) -> LeafGradients:
        result = LeafGradients([None] * len(self.leaves), [], [])
        for name in self.names:
            if name in wanted:
                result.blocks.append(((name,), torch.zeros_like(params[name]).unsqueeze(0)))
        return result


def holding(region: Region, params: Mapping[str, Tensor], ranks: int, rank: int) -> Holding:
    """This rank's experts as a region of their own (K = 1, without weights). InputError where they cannot be spread."""
    experts = region.experts
    held = experts_of(experts, ranks, rank)
    stacked, elsewhere, shared, leaves = dict[str, None](), dict[str, None](), dict[str, None](), list[Leaf]()
    for i, leaf in enumerate(region.leaves):
        name, here, offsets = leaf.params[0], range(held.start, held.stop), leaf.offsets
        if leaf.shared:
            shared[name] = None
            here = range(len(held))
        elif leaf.stacked:
            step = _expert_size(i, leaf, params[name], ranks)
            stacked[name] = None
            offsets = tuple(offset - held.start * step for offset in offsets)
        else:
            elsewhere.update(dict.fromkeys(leaf.params[e] for e in range(experts) if e not in held))
        local = replace(leaf, params=tuple(leaf.params[e] for e in here), offsets=tuple(offsets[e] for e in here))
        if not held:
            at, part = params[name], name if leaf.shared or leaf.stacked else ""
            local = Absent(leaf.shape, leaf.strides, (), (), leaf.read_as, at.dtype, at.device, part, at.requires_grad)
        leaves.append(local)
    if tied := [name for leaf in leaves for name in leaf.params if name in elsewhere]:
        raise InputError(f"experts of several ranks use the parameter {tied[0]}: it cannot be spread")
    local_region = replace(
        region, experts=len(held), top_k=1, leaves=tuple(leaves), weight_position="none", identity=False
    )  # fmt: skip
    return Holding(local_region, tuple(stacked), tuple(elsewhere), tuple(shared))


def _expert_size(i: int, leaf: Leaf, param: Tensor, ranks: int) -> int:
    """Elements of one expert in a parameter that stacks them on dim 0. InputError where its pieces are not whole experts."""
    experts, name = leaf.experts, leaf.params[0]
    step = param.numel() // experts
    reach = sum(s * (n - 1) for s, n in zip(leaf.strides, leaf.shape))
    apart = all(e * step <= o and o + reach < (e + 1) * step for e, o in enumerate(leaf.offsets))
    rows = param.shape[0] // experts if param.dim() else 0
    whole = rows and param.shape[0] % experts == 0 and -(-param.shape[0] // ranks) == rows * -(-experts // ranks)
    if not (apart and whole and min(leaf.strides, default=1) > 0):
        raise InputError(
            f"leaf{i} of {name} {tuple(param.shape)}: its {experts} experts do not lie one behind the other on dim 0 in a way "
            f"that {ranks} equal pieces would be whole experts"
        )
    return step


# ------------------------------------------------------------------------------------------------ a region that runs


class ParallelRegion(CompiledRegion):
    """A region whose experts are spread over ranks: `compiled(x, ids, w, params) -> y`, called by all of them together."""

    def __init__(self, region: Region, local: Region, plans: ParallelPlans, kernels: str, wire: Wire) -> None:
        super().__init__(region, plans.graphs, plans.schedules, plans.plans, plans.emitted, kernels)
        self.held, self.wire, self.measured = local, wire, plans.measured
        self.binder = LeafBinder(local.leaves) if local.experts else NoExperts(local.leaves)
        if not local.experts:
            self.kernels = "torch"  # nothing to compute

    @property
    def degrees(self) -> Degrees:
        return self.plans[0].degree, self.plans[1].degree

    def __call__(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        return self.begin(x, ids, w, params).end()

    def begin(self, x: Tensor, ids: Tensor, w: Tensor, params: Mapping[str, Tensor]) -> Begun:
        """Sends what is to be sent first; `end` of the result gives y."""
        local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in params.items()}
        if torch.is_grad_enabled() and any(isinstance(leaf, Absent) and leaf.trained for leaf in self.held.leaves):
            w = w if w.requires_grad else w.detach().requires_grad_()  # not x: its gradients travel, or not, on all ranks
        self._check(x, ids, w, local)
        return Begun(self, x, ids, w, [local[name] for name in self.binder.names], _autocast_dtype(x.device.type))

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


class ShardedForward(RewrittenForward):
    """A block whose experts are spread over ranks: the original has not the weights to run any more."""

    def __init__(self, block: RewrittenForward, variants: dict[Any, Variant | Decline], held: Holding, mesh: DeviceMesh) -> None:
        self.__dict__.update(block.__dict__)
        self.variants, self.held, self.mesh = variants, held, mesh
        self.analyse = self._too_late
        self.watched = {}

    @torch.compiler.disable(reason="moefx: experts on several ranks exchange rows, which no graph of one rank can hold")  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        flat_args, flat_kwargs = tuple(bound.args[1:]), dict(bound.kwargs)
        variant = self.variant_for(flat_args, flat_kwargs)
        if isinstance(variant, Decline):
            raise InputError(f"{self._name()}: {variant}")
        if self._changed(variant) or self._hooked(variant):
            raise InputError(f"{self._name()} was changed after its experts were spread over ranks: moefx.restore(model) first")
        return variant.run(self.module, flat_args, flat_kwargs)

    def _name(self) -> str:
        return f"{type(self.module).__name__} with experts on {self.mesh.size()} ranks"

    def _too_late(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        raise Decline(
            "it is called in a way that was not analysed before its experts were spread over ranks; "
            "moefx.restore(model), then optimize with inputs of this kind"
        )

    def gather(self) -> None:
        """Every rank has all experts again; all ranks call it."""
        for name in self.held.stacked:
            owner, attribute = _owner(self.module, name)
            sharded = owner._parameters[attribute]
            if isinstance(sharded, DTensor):
                owner._parameters[attribute] = nn.Parameter(sharded.full_tensor().detach(), sharded.requires_grad)
        group, ranks = self.mesh.get_group(), self.mesh.size()
        region = next(v for v in self.variants.values() if isinstance(v, Variant)).region
        for leaf in region.leaves:
            if leaf.stacked or leaf.shared:
                continue
            for e, name in enumerate(leaf.params):
                source = next(p for p in range(ranks) if e in experts_of(region.experts, ranks, p))
                owner, attribute = _owner(self.module, name)
                mine = owner._parameters[attribute]
                about = [None if mine is None else (mine.shape, mine.dtype, mine.requires_grad)]
                dist.broadcast_object_list(about, dist.get_global_rank(group, source), group)
                shape, dtype, trained = about[0]  # type: ignore[misc]
                device = self.mesh.device_type
                value = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine.detach()
                dist.broadcast(value, dist.get_global_rank(group, source), group)
                if mine is None:
                    owner._parameters[attribute] = nn.Parameter(value, trained)


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


# ------------------------------------------------------------------------------------------------ the whole model


def as_mesh(mesh: Any) -> DeviceMesh:
    """A mesh of one dimension, from one or from a process group."""
    if not dist.is_available() or not dist.is_initialized():
        raise InputError("mesh needs a process group: start with torchrun and call torch.distributed.init_process_group")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise InputError(f"mesh has {mesh.ndim} dimensions; give the one of the experts, such as mesh['ep']")
        return mesh
    if isinstance(mesh, dist.ProcessGroup):
        return DeviceMesh.from_group(mesh, "cuda" if dist.get_backend(mesh) == "nccl" else "cpu")
    raise InputError(f"mesh is a DeviceMesh dimension or a ProcessGroup; got {type(mesh).__name__}")


def distribute(
    model: nn.Module, mesh: DeviceMesh, options: Options, report: Report, examples: Mapping[str, probe.Example]
) -> None:
    """Spreads the experts of the rewritten blocks of `model` over the ranks of `mesh`; all ranks call it.

    Every block is checked once more: the plan of all ranks against what one rank computed before.
    """
    group = mesh.get_group()
    blocks = [(name, module, forward) for name, module in model.named_modules() if (forward := rewritten(module))]
    _agree(group, model, options, report)
    wire = _wire(group, options, next(model.parameters()).device.type)
    decided: dict[str, ParallelPlans] = {}
    for name, module, forward in blocks:
        found = next(f for f in report.found if f.name == name)
        variants = {key: v for key, v in forward.variants.items() if isinstance(v, Variant)}
        params = dict(module.named_parameters())
        region = next(iter(variants.values())).compiled.region
        held = holding(region, params, mesh.size(), mesh.get_local_rank())
        example = examples[name]
        about = repr((region, example.token_sizes))
        if about not in decided:
            decided[about] = _decide(region, held, module, example, wire, options)
        plans = decided[about]
        one = replace(wire, experts=region.experts, layer=name or "the model")
        compiled = ParallelRegion(region, held.region, plans, options.kernels, one)
        spread: dict[Any, Variant | Decline] = {key: _spread(v, compiled) for key, v in variants.items()}
        sharded = ShardedForward(forward, spread, held, mesh)
        if not found.same_as:
            error = _check(module, forward, sharded, example, group)
            found.errors["ranks"] = error
        _shard(module, held, mesh)
        module.__dict__["forward"] = sharded
        _rewrite_report(report, found, compiled, held, mesh)
    # torch's DistributedDataParallel leaves these alone
    model.__dict__["_ddp_params_and_buffers_to_ignore"] = [name for name, _ in expert_parameters(model)]


def _spread(variant: Variant, compiled: ParallelRegion) -> Variant:
    """The same block with experts on ranks; what it computes beside them runs during their exchanges."""
    changed = beside(variant.graph, variant.ordered)
    source, forward = changed or (variant.source, variant.forward)
    return replace(variant, compiled=compiled, source=source, forward=forward)


def _agree(group: dist.ProcessGroup, model: nn.Module, options: Options, report: Report) -> None:
    """InputError naming what differs, unless all ranks have the same model, options and versions."""
    device = next(model.parameters()).device.type
    named: list[tuple[Any, str]] = [(ALL_TO_ALLS, options.all_to_all)]
    named += [(CODECS, name) for name in (options.codec, options.backward_codec)]
    mine: dict[str, Any] = {
        "versions": f"torch {torch.__version__}, moefx {moefx.__version__}",
        "options": repr(replace(options, profile=None)),
        "profile": Profile.load(Path(options.profile)).dumps() if options.profile is not None else "",
        "plug-ins": [f"{n} is {_kind_of(t[n])}" if n in t else n for t, n in named],
        "device": device,
        "blocks": [f"{f.name}: E={f.experts} K={f.top_k} D={f.d_model} F={f.d_expert} {f.routing}" for f in report.found],
        "parameters": [f"{n} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for n, p in model.named_parameters()],
        "regions": hashlib.sha256("".join(f.region + f.canonical for f in report.found).encode()).hexdigest(),
    }
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        for what in mine:
            reference = everyone[0][what]
            if other[what] != reference:
                a, b = _first_difference(reference, other[what])
                raise InputError(f"ranks 0 and {rank} differ in {what}: {a} and {b}; all ranks need the same model and options")
    if not report.found:
        log.warning("mesh: no MoE block was found, so nothing is spread over ranks")


def _kind_of(plug_in: Any) -> str:
    """A plug-in's class or function by its full name."""
    kind = plug_in if hasattr(plug_in, "__qualname__") else type(plug_in)
    return f"{kind.__module__}.{kind.__qualname__}"


def _first_difference(a: Any, b: Any) -> tuple[Any, Any]:
    if isinstance(a, list) and isinstance(b, list):
        for x, y in zip([*a, "nothing"], [*b, "nothing"]):
            if x != y:
                return x, y
    return a, b


def _wire(group: dist.ProcessGroup, options: Options, device: str) -> Wire:
    codecs = {"forward": options.codec, "backward": options.backward_codec}
    made = {phase: codec_for(name, device, options.kernels) for phase, name in codecs.items() if name != "none"}
    topology = Topology.discover(group)
    rows, counts = (make_all_to_all(name, group, topology) for name in (options.all_to_all, "direct"))
    return Wire(group, 0, rows, counts, made, capacity=options.capacity)


def _decide(
    region: Region, held: Holding, module: nn.Module, example: probe.Example, wire: Wire, options: Options
) -> ParallelPlans:
    """The plans of a region; rank 0 decides about the degrees and orders, and all follow."""
    group, parameter = wire.group, next(p for p in module.parameters())
    tokens = next((t for t in example.leaves() if isinstance(t, Tensor) and t.is_floating_point()), None)
    sizes = Sizes(
        tokens=max(1, tokens.numel() // tokens.shape[-1] if tokens is not None else 1),
        top_k=region.top_k, d_model=region.d_model, d_expert=region.d_expert,
        experts=-(-region.experts // group.size()) * group.size(), ranks=group.size(),
        bytes_per_element=parameter.element_size(), matrices=_matrices(region),
    )  # fmt: skip
    if options.capacity is not None:
        sizes = replace(sizes, capacity_factor=options.capacity * sizes.experts / (sizes.top_k * sizes.tokens))
    codecs = {"forward": options.codec, "backward": options.backward_codec}
    width, dtype = region.d_model, parameter.dtype
    shares = {
        phase: CODECS[name].wire_bytes(width, dtype) / (width * dtype.itemsize)
        for phase, name in codecs.items() if name != "none"
    }  # fmt: skip
    profile, chunk_s = None, dict[str, float]()
    if options.timed:
        profile = _profile(parameter.device.type, group, options)
        params = {n: _piece(p, group) if n in held.stacked else p for n, p in module.named_parameters()}
        exact = replace(wire, experts=region.experts, capacity=None)
        chunk_s = chunk_seconds(region, held.region, params, exact, options.kernels, sizes.tokens)

    def plans_of(chosen: Options) -> ParallelPlans:
        """Rank 0 decides what is open, the others follow."""
        texts: list[Any] = [None]
        if group.rank() == 0:
            first = compile_parallel(region, held.region, chosen, sizes, profile, shares, chunk_s=chunk_s)
            texts = [[str(s) for s in first.schedules]]
        dist.broadcast_object_list(texts, dist.get_global_rank(group, 0), group)
        return compile_parallel(region, held.region, chosen, sizes, profile, shares, tuple(texts[0]), chunk_s)

    plans = plans_of(options)
    if not options.measured or "auto" not in options.degrees:
        return plans
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    return measured_plans(region, held, params, trained, plans, plans_of, wire, options, sizes)


def measured_plans(
    region: Region,
    held: Holding,
    params: Mapping[str, Tensor],
    trained: set[str],
    plans: ParallelPlans,
    plans_of: Callable[[Options], ParallelPlans],
    wire: Wire,
    options: Options,
    sizes: Sizes,
) -> ParallelPlans:
    """The plans of the degrees that are fastest among those chosen by the costs and their neighbours; all ranks call it."""
    chosen = plans.schedules[0].degree, plans.schedules[1].degree
    around = [sorted({r for degree in chosen for r in measured.candidates(degree, sizes.capacity)})]  # ranks differ in sizes
    dist.broadcast_object_list(around, dist.get_global_rank(wire.group, 0), wire.group)
    one = replace(wire, experts=region.experts, capacity=None)  # rows that lie evenly overflow nothing
    made = {r: plans_of(replace(options, degree=r, backward_degree=r, capacity=None)) for r in around[0]}
    regions = {r: ParallelRegion(region, held.region, p, options.kernels, one) for r, p in made.items()}
    seconds = measured.measure(regions, params, trained, sizes.tokens, wire.group)
    best = [
        given if given != "auto" else measured.fastest(of) for given, of in zip(options.degrees, seconds.values())
    ]
    told = tuple(", ".join(f"r={r} {1e3 * s:.3g} ms" for r, s in of.items()) for of in seconds.values())
    return replace(plans_of(replace(options, degree=best[0], backward_degree=best[1])), measured=told)


def chunk_seconds(
    region: Region, local: Region, params: Mapping[str, Tensor], wire: Wire, kernels: str, tokens: int = 0
) -> dict[str, float]:
    """By phase, what one more chunk costs when there is next to nothing in it, and the same of an "exchange"; on the CPU also
    what all that is no exchange takes for `tokens` (0: not measured) in one chunk, as "compute forward" and so on.

    All ranks call it.

    Launches of kernels, messages without content and the plan's own Python: measured with plans of 1 and of MANY chunks of a
    few tokens, on this rank's pieces of the parameters. On CUDA, where the host does all that beside the device, only until
    the host is done, as "host forward" and so on, and what no chunk adds as "host forward once"; with up to MOST_TOKENS of
    `tokens`, because many rows have kernels of their own.
    """
    device = next(iter(params.values())).device
    cuda = device.type == "cuda"
    few = max(2 * MANY, wire.ranks, min(tokens, MOST_TOKENS) if cuda else 0)
    dtype = next(iter(params.values())).dtype
    x = torch.zeros(few, region.d_model, dtype=dtype, device=device)
    ids = torch.arange(few * region.top_k, device=device).view(few, -1) % region.experts
    w = torch.ones(ids.shape, dtype=dtype, device=device)
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    bare = replace(wire, codecs={})
    for degree in (1, MANY):
        options = Options(degree=degree, policy="fifo")
        sizes = Sizes(few, region.top_k, region.d_model, region.d_expert, wire.most * wire.ranks, wire.ranks)
        plans = compile_parallel(region, local, options, sizes, None, {})
        compiled = ParallelRegion(region, local, plans, kernels, bare)
        tensors = [params[name].detach() for name in compiled.binder.names]
        forward = lambda c=compiled, t=tensors: c.run_forward(x, ids, w, t, None)  # noqa: E731
        y, saved = forward()
        backward = lambda c=compiled, t=tensors, s=saved, g=y: c.run_backward(s, g, t, [False] * len(t), True, None)  # noqa: E731
        for phase, run in (("forward", forward), ("backward", backward)):
            seconds[phase].append(_median_s(run, wire.group, device, launches=cuda))
    few_rows, counts = x[: wire.ranks].contiguous(), [1] * wire.ranks
    exchange = _median_s(lambda: wire.all_to_all.start(few_rows, counts, counts).wait(), wire.group, device)
    chunk = {phase: max(0.0, (many - one) / (MANY - 1)) for phase, (one, many) in seconds.items()}
    if not cuda:
        compute = _compute_seconds(region, local, params, wire, kernels, tokens) if tokens else {}
        return chunk | {"exchange": exchange} | compute
    once = {f"host {phase} once": max(0.0, one - chunk[phase]) for phase, (one, _) in seconds.items()}
    return once | {f"host {phase}": s for phase, s in chunk.items()}


def _compute_seconds(
    region: Region, local: Region, params: Mapping[str, Tensor], wire: Wire, kernels: str, tokens: int
) -> dict[str, float]:
    """A whole phase of one chunk with rows that arrive at once; codecs are part of it."""
    sizes = Sizes(tokens, region.top_k, region.d_model, region.d_expert, wire.most * wire.ranks, wire.ranks)
    plans = compile_parallel(region, local, Options(degree=1, policy="fifo"), sizes, None, dict.fromkeys(wire.codecs, 1.0))
    one = ParallelRegion(region, local, plans, kernels, replace(wire, all_to_all=measured.AtOnce()))
    seconds = measured.measure({1: one}, params, set(params), tokens, wire.group)
    return {f"compute {phase}": of[1] for phase, of in seconds.items()}


def _median_s(run: Callable[[], Any], group: dist.ProcessGroup, device: torch.device, launches: bool = False) -> float:
    """launches: only until the host has launched everything."""
    times = []
    for _ in range(6):
        dist.barrier(group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        host_s = time.perf_counter() - began
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(host_s if launches else time.perf_counter() - began)
    return statistics.median(times[1:])


def _matrices(region: Region) -> int:
    """Products of an expert: 3 where it is gated, else 2, as `moefx.costs` counts them."""
    return 3 if sum(instr.kind == "linear" for instr in region.template.instrs) > 2 else 2


def _profile(device: str, group: dist.ProcessGroup, options: Options) -> Profile:
    """Rank 0's: the named file, the user's calibration of this device and group size, or one made now."""
    name = device_name(device)
    if options.profile is not None:
        found = Profile.load(Path(options.profile))
    else:
        path = cache_path(name, group.size())
        there: list[Any] = [path.read_text("utf-8") if group.rank() == 0 and path.exists() else None]
        dist.broadcast_object_list(there, dist.get_global_rank(group, 0), group)
        if there[0] is not None:
            return Profile.loads(there[0], str(path))
        if group.size() != dist.get_world_size():
            raise InputError("calibrating needs all ranks: run `moefx calibrate`, or give Options(profile=...) or degrees")
        log.warning("no profile of %d ranks of %s: calibrating now, once", group.size(), name)
        found = calibrate.calibrate(device, group.size())
        if group.rank() == 0:
            found.save()
    shared = [found.dumps()]
    dist.broadcast_object_list(shared, dist.get_global_rank(group, 0), group)
    return Profile.loads(shared[0])


def _check(
    module: nn.Module, before: RewrittenForward, after: ShardedForward, example: probe.Example, group: dist.ProcessGroup
) -> float:
    """The relative error of the plan of all ranks against that of one, forward and gradients; Decline on every rank if large."""
    region = next(v for v in before.variants.values() if isinstance(v, Variant)).region
    parameter = next(p for p in module.parameters())
    dtype = example.dtype if any(p.dtype == example.dtype for p in module.parameters()) else parameter.dtype
    cut = _Cut(module, after.held, group)
    worst, problem = 0.0, ""
    shapes = probe.shapes_for(example)[:3]
    slots = region.top_k * max(math.prod(tokens) for tokens in shapes)
    with probe.state_kept(module), probe.neutral(), _exactly(after, slots):
        for i, tokens in enumerate(shapes):
            drawn = probe.draw(example, tokens, 100 * i + group.rank(), region.experts, dtype=dtype)
            args, kwargs = pytree.tree_map(lambda t: t.to(parameter.device) if isinstance(t, Tensor) else t, drawn)
            expected = verify.run_once(lambda a, k: before(*a, **k), module, args, kwargs, True)
            actual = verify.run_once(lambda a, k: cut.run(after, a, k), module, args, kwargs, True)
            # one rank's gradients are those of its own tokens; an expert's are those of all tokens
            whole = {n: g if n.startswith("input ") else _sum(g, group) for n, g in expected.gradients.items()}
            whole = {n: cut.own(n, g) for n, g in whole.items()}
            pieces = {n: cut.own(n, _sum(g, group) if n in cut.replicated else g) for n, g in actual.gradients.items()}
            try:
                errors = verify.compare(
                    verify.Outcome(expected.outputs, whole), verify.Outcome(actual.outputs, pieces),
                    verify.ON_DEVICE[dtype], f"{group.size()} ranks", overflows=True,
                )  # fmt: skip
                worst = max(worst, *errors.values())
            except Decline as reason:
                problem = problem or str(reason)
    problems: list[Any] = [None] * group.size()
    dist.all_gather_object(problems, problem, group=group)
    if wrong := [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]:
        raise InputError(f"the plan for {group.size()} ranks does not compute what one rank does: {'; '.join(wrong)}")
    return worst


@contextlib.contextmanager
def _exactly(forward: ShardedForward, rows: int) -> Iterator[None]:
    """Without what codecs lose, and with room for `rows` where there is a capacity: the user's is for the user's batches."""
    regions = [v.compiled for v in forward.variants.values() if isinstance(v, Variant)]
    wires = [region.wire for region in regions]
    for region in regions:
        wire = replace(region.wire, codecs=dict.fromkeys(region.wire.codecs, CODECS["none"]))
        region.wire = wire if wire.capacity is None else replace(wire, capacity=rows)
    try:
        yield
    finally:
        for region, wire in zip(regions, wires):
            region.wire = wire


def _sum(gradient: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    if gradient is None:
        return None
    total = gradient.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


class _Cut:
    """Runs a block on this rank's pieces of parameters that are still whole, differentiably."""

    def __init__(self, module: nn.Module, held: Holding, group: dist.ProcessGroup) -> None:
        self.module, self.held, self.group = module, held, group
        self.replicated = {n for n, _ in module.named_parameters() if n not in held.own and n not in held.elsewhere}

    def run(self, after: ShardedForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        whole = {name: _owner(self.module, name) for name in self.held.stacked}
        kept = {name: owner._parameters[attribute] for name, (owner, attribute) in whole.items()}
        try:
            for name, (owner, attribute) in whole.items():
                owner._parameters[attribute] = _piece(kept[name], self.group)  # type: ignore[arg-type,assignment]
            return after(*args, **kwargs)
        finally:
            for name, (owner, attribute) in whole.items():
                owner._parameters[attribute] = kept[name]

    def own(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The part of a parameter's gradient that this rank answers for."""
        if name in self.held.elsewhere:
            return None
        if gradient is not None and name in self.held.stacked:
            return _piece(gradient, self.group)
        return gradient


def _piece(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = experts_of(whole.shape[0], group.size(), group.rank())
    return whole[rows.start : rows.stop]


def _shard(module: nn.Module, held: Holding, mesh: DeviceMesh) -> None:
    for name in held.stacked:
        owner, attribute = _owner(module, name)
        whole = owner._parameters[attribute]
        assert whole is not None, "a stacked parameter is whole until it is cut"
        own = _piece(whole.detach(), mesh.get_group()).clone()
        sharded = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        owner._parameters[attribute] = nn.Parameter(sharded, whole.requires_grad)
    for name in held.elsewhere:
        owner, attribute = _owner(module, name)
        owner._parameters[attribute] = None
    # parameters that were views of one buffer of all experts: each keeps its own part alone
    for leaf in held.region.leaves:
        for p in (module.get_parameter(name) for name in leaf.params if name in held.own and name not in held.stacked):
            if p.untyped_storage().nbytes() > p.numel() * p.element_size():
                p.data = p.data.clone()


def _rewrite_report(report: Report, found: FoundBlock, compiled: ParallelRegion, held: Holding, mesh: DeviceMesh) -> None:
    rank, ranks = mesh.get_local_rank(), mesh.size()
    experts = experts_of(compiled.region.experts, ranks, rank)
    which = f"experts {experts.start} to {experts.stop - 1}" if experts else "none"
    note = f"{which} of {compiled.region.experts} {'' if experts else 'experts '}on rank {rank} of {ranks}"
    timed = tuple(f"{p} measured: {text}" for p, text in zip(PHASES, compiled.measured) if text)
    changed = replace(
        found,
        partition="\n".join(map(str, compiled.graphs)),
        schedule="\n".join(map(str, compiled.schedules)),
        source=compiled.source,
        notes=(*found.notes, note, *timed),
    )
    report.found[report.found.index(found)] = changed


# ------------------------------------------------------------------------------------------------ gradients


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of this rank's experts in a model that `optimize(mesh=...)` spread over ranks."""
    for name, module in model.named_modules():
        forward = rewritten(module)
        if isinstance(forward, ShardedForward):
            own = forward.held.own
            yield from ((f"{name}.{n}".lstrip("."), p) for n, p in module.named_parameters() if n in own)


def sync_gradients(model: nn.Module, mesh: Any) -> None:
    """Turns the gradients of a model with experts on ranks into those of the mean of all ranks' losses; all ranks call it.

    For training without DistributedDataParallel: between backward and the optimizer's step. Gradients of experts are divided
    by P, all others summed over the ranks and divided by P. A parameter without a gradient on a rank counts as zero there.
    """
    group = as_mesh(mesh).get_group()
    experts = {id(p) for _, p in expert_parameters(model)}
    scale = 1.0 / group.size()
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in experts]
    with torch.no_grad():
        for p in model.parameters():
            if id(p) in experts and p.grad is not None:
                p.grad.mul_(scale)
        for dtype in dict.fromkeys(p.dtype for p in rest):
            some = [p for p in rest if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in some])
            dist.all_reduce(flat, group=group)
            for p, piece in zip(some, flat.mul_(scale).split([p.numel() for p in some])):
                p.grad = piece.view_as(p).clone()
