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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils import _pytree as pytree

import moefx
from moefx import calibrate, probe, verify
from moefx.block import RewrittenForward, Variant, rewritten
from moefx.build import ParallelPlans
from moefx.codegen.all_to_all import ALL_TO_ALLS, Topology, make_all_to_all
from moefx.codegen.codecs import CODECS, codec_for
from moefx.degrees import plans_for
from moefx.errors import Decline, InputError
from moefx.exchange import Wire, experts_of
from moefx.holding import Holding, holding
from moefx.ir import Region
from moefx.options import Options
from moefx.parallel_region import ParallelRegion
from moefx.passes.beside import beside
from moefx.profile import Profile, cache_path, device_name
from moefx.report import FoundBlock, Report

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ a block


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
        if change := self._change(variant, flat_args, flat_kwargs):
            advice = "was changed after its experts were spread over ranks: moefx.restore(model) first"
            raise InputError(f"{self._name()} {advice} ({change})")
        return variant.run(self.module, flat_args, flat_kwargs, self.watched[id(variant)])

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
    """Spreads the experts of the rewritten blocks of `model` over the ranks of `mesh`; all ranks call it. Experts that cannot be
    spread stay whole on every rank, and their block is that of one rank.

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
        try:
            held = holding(region, params, mesh.size(), mesh.get_local_rank())
        except Decline as reason:
            note = f"every rank keeps all experts: {reason}"
            log.warning("%s: %s", name or "the model", note)
            report.found[report.found.index(found)] = replace(found, notes=(*found.notes, note))
            continue
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
    """The plans of a region for as many tokens as its example has."""
    group, device = wire.group, next(module.parameters()).device
    of_tokens = next((t for t in example.leaves() if isinstance(t, Tensor) and t.is_floating_point()), None)
    tokens = max(1, of_tokens.numel() // of_tokens.shape[-1] if of_tokens is not None else 1)
    params = {n: _piece(p, group) if n in held.stacked else p for n, p in module.named_parameters()}
    profile = _profile(device.type, group, options) if options.timed else None
    return plans_for(region, held.region, params, tokens, replace(wire, experts=region.experts), options, profile)


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
    variant = next(v for v in before.variants.values() if isinstance(v, Variant))
    region, example = variant.region, replace(example, features=variant.features)
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
    changed = replace(
        found,
        partition="\n".join(map(str, compiled.graphs)),
        schedule="\n".join(map(str, compiled.schedules)),
        source=compiled.source,
        notes=(*found.notes, note, *compiled.measured),
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
