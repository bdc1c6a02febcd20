"""The backend of torch.compile: Dynamo's graphs with their MoE regions replaced, handed on to an inner backend.

    torch.compile(model, backend="moefx", options={"inner": "inductor"})

    parts of the graph -> capture -> find -> ... -> emit -> verify -> splice -> the inner backend

A part is the nodes that one module call left in the graph (the whole graph where Dynamo knows of no modules). Parts are
tried deepest first, as `optimize` tries modules, and parts of equal structure share one analysis.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensor

from moefx import known, probe, region_op, search
from moefx.compiled import CompiledRegion
from moefx.errors import Decline, InputError
from moefx.graph_analysis import KNOWN, MAX_KNOWN, Analysis, Found, caller_autocast, entering, observe
from moefx.graph_nodes import above, autocasts, inline, line_of, name_of
from moefx.graph_parameters import GraphParameters, attribute
from moefx.options import Options
from moefx.passes.select import select
from moefx.passes.splice import Change, Part, apply, part_of, value_of
from moefx.report import GRAPHS, DeclinedBlock, FoundBlock, GraphReport
from moefx.runtime import compiler_prepared
from moefx.selection import TOPK, prepare

log = logging.getLogger(__name__)
find_log = logging.getLogger("moefx.passes.find")

ROUTER_NODES = 64  # above a region's ids and weights, among which the router's choice is looked for
MAX_PARTS = 64  # of different structure that are analysed in one graph
INNER = "inductor"
BROKEN = (
    "routing leaves this graph, so torch.compile seems to have broken a loop over experts into several graphs, none of "
    "which holds a whole MoE block: let moefx find the blocks before Dynamo does, torch.compile(moefx.optimize(model))"
)


@dataclass(frozen=True)
class BackendOptions(Options):
    """Options of the backend: those of `optimize`, and the backend that compiles the rewritten graph."""

    inner: str = INNER


def moefx(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The backend "moefx". options: see `BackendOptions`; mode: of Inductor, when that is the inner backend.

    Raises InputError for an unknown option, an unknown inner backend, or a mode that the inner backend does not have.
    """
    chosen = _options(options or {})
    inner = _inner(chosen.inner, mode)
    report = GraphReport(nodes=len(gm.graph.nodes), inner=chosen.inner)
    start = time.perf_counter()
    with region_op.without_packing():
        bound = _rewrite(gm, example_inputs, chosen, report)
    report.seconds = time.perf_counter() - start
    report.parameters = [weakref.ref(p) for p in example_inputs if isinstance(p, nn.Parameter)]
    GRAPHS.append(report)
    compiled = _compiled(gm, example_inputs, inner, chosen, beside=report.analysed > 0)
    for region, params in bound:  # not before: the compiler has to find every parameter where Dynamo has seen it
        region.binder.bind(params)
    return compiled


moefx.reset = KNOWN.clear  # type: ignore[attr-defined] # called by torch._dynamo.reset()


def _options(given: dict[str, Any]) -> BackendOptions:
    known = ("degree", "inner", "kernels", "seed")  # the others are for several ranks, which the backend does not spread over
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"unknown option {unknown[0]!r} of backend 'moefx'; it has {', '.join(known)}")
    return BackendOptions(**given)


def _inner(name: str, mode: str | None) -> Callable[..., Any]:
    if name == "moefx":
        raise InputError("option 'inner' of backend 'moefx' names the backend behind it, not itself")
    if name != INNER:
        if mode is not None:
            raise InputError(f"mode={mode!r} is Inductor's; the inner backend {name!r} has none")
        try:
            return lookup_backend(name)
        except torch._dynamo.exc.InvalidBackend as error:
            raise InputError(f"option 'inner' of backend 'moefx': {error}") from error
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = list_mode_options(mode) if mode is not None else None
    return lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches)


def wake_inductor() -> None:
    """Starts the processes in which Inductor compiles kernels for GPUs, beside an analysis. Inductor starts them with its first
    kernel, and compiles in this process until they have imported torch, which takes seconds."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.use_process_pool()


def _compiled(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any], options: BackendOptions, beside: bool
) -> Callable[..., Any]:
    """What the inner backend makes of the graph, with the kernels of its routers' choices ready.

    beside: they are compiled beside the inner backend. Where nothing had to be analysed they come out of a cache behind it: what
    is done first in a process, the hash of Triton's files, would else be done twice at the same time.
    """
    choices = _choices(gm.graph)
    with ThreadPoolExecutor(1) as pool:

        def ready() -> None:
            for choice in choices:
                pool.submit(prepare, options.kernels, *choice)  # what fails here fails again, and is raised, in the first call

        if beside:
            ready()
        compiled = inner(gm, inputs)
        if not beside:
            ready()
    return compiled


# ------------------------------------------------------------------------------------------------ candidates


@dataclass
class Candidate:
    """A part of the graph that may hold an MoE block. scopes: the module calls whose nodes it is made of."""

    part: Part
    depth: int


def _candidates(graph: fx.Graph, params: GraphParameters) -> list[Part]:
    """Plausible parts, deepest first; of those that hold several of equal structure only the members."""
    scopes: dict[str, tuple[int, str, list[fx.Node]]] = {}
    kinds = ("call_function", "call_method", "call_module")
    working = [n for n in graph.nodes if n.op in kinds and n not in params.computing]
    for node in working:
        for depth, (key, entry) in enumerate(node.meta.get("nn_module_stack", {}).items()):
            path = entry[0] if isinstance(entry, tuple) else str(entry)
            scopes.setdefault(str(key), (depth + 1, path, []))[2].append(node)
    found: list[tuple[int, Part]] = []
    for depth, path, nodes in [*scopes.values(), (0, "", working)]:
        with contextlib.suppress(Decline):
            part = part_of(path, nodes, params.__contains__)
            if _plausible(part, params) and not _repeats(part, [p for _, p in found if len(p.nodes) < len(part.nodes)]):
                found.append((depth, part))
    return [part for _, part in sorted(found, key=lambda pair: -pair[0])]


def _plausible(part: Part, params: GraphParameters) -> bool:
    """As `search.candidates`: parameters that could be experts, and a selection or routing that is given."""
    block = nn.Module()
    for i, node in enumerate(part.params):
        block.register_parameter(f"p{i}", params.like(node))
    if not search.plausible(block):
        return False
    names = {name_of(n) for n in part.nodes}
    shapes = [(value_of(n).is_floating_point(), tuple(map(str, value_of(n).shape))) for n in part.inputs]
    given = {shape for floating, shape in shapes if not floating and len(shape) >= 2}
    routed = bool(names & search.STRONG) or any(floating and shape in given for floating, shape in shapes)
    weak = bool(names & search.WEAK) or any(not floating for floating, _ in shapes)
    return routed or weak and search.holds_alike(block)


def _repeats(part: Part, smaller: list[Part]) -> bool:
    """Whether it holds two apart of equal structure that select on their own: a stack of layers."""
    nodes = set(part.nodes)
    inside = [p for p in smaller if p.nodes[0] in nodes and {name_of(n) for n in p.nodes} & (search.STRONG | search.WEAK)]
    seen: dict[Any, Part] = {}
    for p in inside:
        other = seen.setdefault(p.structure, p)
        if other is not p and not set(other.nodes) & set(p.nodes):
            return True
    return False


# ------------------------------------------------------------------------------------------------ the whole graph


def _choices(graph: fx.Graph) -> set[tuple[torch.device, torch.dtype, int, int]]:
    """Of the routers whose choice moefx makes: device and dtype of the scores, how many they are, and how many are chosen."""
    nodes = [n for n in graph.nodes if n.target is TOPK]
    values = [(value_of(n.args[0]), n.args[1]) for n in nodes]
    return {(v.device, v.dtype, v.shape[-1], k) for v, k in values if isinstance(v.shape[-1], int) and isinstance(k, int)}


Bound = list[tuple[CompiledRegion, dict[str, Tensor]]]  # regions with their parameters
Called = list[tuple[fx.GraphModule, list[fx.Node]]]  # graphs that a node runs, with the nodes whose values they are given


def _rewrite(gm: fx.GraphModule, inputs: Sequence[Any], options: BackendOptions, report: GraphReport) -> Bound:
    """Finds and replaces the regions of a graph, and of the graphs that it calls, in place."""
    if any(isinstance(x, FakeTensor) for x in inputs):
        report.declined.append(DeclinedBlock("", "the graph came without real inputs, which an analysis needs"))
        return []
    params, called = GraphParameters(gm, inputs), list(_called(gm))
    parts, transformed = _parts(gm.graph, params)
    for part, inside in transformed:
        reason = "it enters a transform of torch.func (vmap, grad), inside of which nothing is followed"
        report.declined.append(DeclinedBlock(part.name, reason, location=line_of(inside)))
        find_log.info("declined %s: %s", part.name or "the graph", reason)
    bound: Bound = []
    try:
        if parts or called:
            new = not _all_known(parts, params, called, options)
            devices = [p.device for p in params.held.values()] if new else []
            if options.inner == INNER and any(d.type == "cuda" for d in devices):
                wake_inductor()
            with compiler_prepared(devices, options.kernels):
                seen: dict[fx.Node, Any] = {}
                if new:
                    firsts = {_key(part, params, options): part for part in reversed(parts)}  # of each structure
                    seen = observe(gm, inputs, list(firsts.values()), {n for _, operands in called for n in operands})
                bound = _rewrite_parts(gm, inputs, parts, params, seen, options, report)
                for inner, operands in called:
                    bound += _rewrite(inner, [params.held.get(n, seen.get(n)) for n in operands], options, report)
    except Decline as reason:
        report.declined.append(DeclinedBlock("", reason.reason, reason.nearest, reason.location))
        find_log.info("declined the graph: %s", reason)
    _warn_of_fragments(gm.graph, report)
    return bound


def _parts(graph: fx.Graph, params: GraphParameters) -> tuple[list[Part], list[tuple[Part, fx.Node]]]:
    """The candidates that can be followed; those that cannot, each with the node that is why."""
    parts: list[Part] = []
    others: list[tuple[Part, fx.Node]] = []
    transformed = _transformed(graph)
    for part in _candidates(graph, params):
        inside = next((n for n in part.nodes if n in transformed), None)
        if inside is None:
            parts.append(part)
        else:
            others.append((part, inside))
    return parts, others


def _transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that enter and leave transforms of torch.func, and those in between."""
    level, found = 0, set()
    for node in graph.nodes:
        functorch = node.op == "call_function" and "_functorch" in str(getattr(node.target, "__module__", ""))
        if functorch or level:
            found.add(node)
        if functorch:
            level += {"increment_nesting": 1, "decrement_nesting": -1}.get(name_of(node).partition("_")[2].partition("_")[2], 0)
    return found


def _called(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, list[fx.Node]]]:
    """Graphs that a node runs once, as activation checkpointing does, with the nodes whose values they are given."""
    seen: set[fx.GraphModule] = set()
    for node in gm.graph.nodes:
        graphs = [n for n in node.all_input_nodes if n.op == "get_attr" and isinstance(attribute(gm, n), fx.GraphModule)]
        if node.op != "call_function" or len(graphs) != 1:
            continue
        inner = attribute(gm, graphs[0])
        count = sum(n.op == "placeholder" for n in inner.graph.nodes)
        operands = list(node.args)[len(node.args) - count :]
        if inner not in seen and all(isinstance(n, fx.Node) and n is not graphs[0] for n in operands):
            seen.add(inner)
            yield inner, operands


def _rewrite_parts(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    parts: list[Part],
    params: GraphParameters,
    seen: dict[fx.Node, Any],
    options: BackendOptions,
    report: GraphReport,
) -> Bound:
    """seen: the values that enter the first part of each structure; nothing where every part was found before."""
    bound: Bound = []
    analysed: dict[Any, Found | Decline] = {}
    taken: set[fx.Node] = set()
    routings: list[list[fx.Node]] = []
    for part in parts:
        if taken.intersection(part.nodes):
            continue
        key = _key(part, params, options)
        if key not in analysed and (before := _known(key, part)):
            analysed[key] = before
        if key not in analysed:
            if len(analysed) == MAX_PARTS:
                raise Decline(f"more than {MAX_PARTS} different candidates in one graph")
            if not seen.keys() >= entering(part):  # the first of its structure was a part of something else
                seen = observe(gm, inputs, [part], set())
            analysed[key] = _analyse(gm, part, params, seen, options)
            report.analysed += 1
            if isinstance(reason := analysed[key], Decline):
                report.declined.append(DeclinedBlock(part.name, reason.reason, reason.nearest, reason.location))
                find_log.info("declined %s: %s", part.name or "the graph", reason)
            else:
                _keep(key, part, reason)
        found = analysed[key]
        if isinstance(found, Decline):
            continue
        taken.update(part.nodes)
        change = found.change.in_part(part)
        names = found.compiled.binder.names
        theta = [n for n in change.arguments[-len(names) :] if n is not None]
        if all(n in params.held for n in theta):
            bound.append((found.compiled, {name: params.held[n] for name, n in zip(names, theta)}))
        _specialise(part)
        report.found.append(_reported(part, change, found))
        found.name = found.name or part.name  # of the first of its structure in this graph
        inline(gm, apply(change))
        routings.append([n for n in change.arguments[1:4] if n is not None])
        find_log.info("found %s: %s", part.name or "the graph", report.found[-1].routing)
    for routing in routings if options.kernels != "torch" else ():  # at last: other parts may hold a router's nodes
        select(above(routing, ROUTER_NODES), TOPK, lambda device: device.type == "cuda" or options.kernels == "triton")
    gm.graph.lint()
    gm.recompile()
    return bound


def _all_known(parts: list[Part], params: GraphParameters, called: Called, options: Options) -> bool:
    """Whether each part that would be analysed, here and in graphs that are called, was found before: then the graph need not
    run on its example inputs."""
    taken: set[fx.Node] = set()
    for part in parts:
        if not taken.intersection(part.nodes):
            if not _known(_key(part, params, options), part):
                return False
            taken.update(part.nodes)
    for inner, operands in called:
        own = GraphParameters(inner, [params.held.get(n) for n in operands])
        if not _all_known(_parts(inner.graph, own)[0], own, list(_called(inner)), options):
            return False
    return True


def _known(key: Any, part: Part) -> Found | None:
    """What was found for such parts in an earlier graph, of this process or another."""
    if key not in KNOWN and _whole(part) and (text := known.text_of(key)) and (found := known.load(text)):
        _remember(key, found)
    before = KNOWN.get(key)
    return before if before is None or before.name == known.EARLIER else replace(before, name="")


def _keep(key: Any, part: Part, found: Found) -> None:
    if not _whole(part):
        return
    _remember(key, found)
    if text := known.text_of(key):
        known.save(text, found)


def _remember(key: Any, found: Found) -> None:
    if len(KNOWN) >= MAX_KNOWN:
        KNOWN.pop(next(iter(KNOWN)))
    KNOWN[key] = found


def _whole(part: Part) -> bool:
    """Whether its structure says all of it: not what attributes of the graph's module hold, nor what its submodules do."""
    return all(n.op not in ("get_attr", "call_module") for n in part.nodes)


def _analyse(
    gm: fx.GraphModule, part: Part, params: GraphParameters, seen: dict[fx.Node, Any], options: BackendOptions
) -> Found | Decline:
    autocast = caller_autocast()  # which `neutral` leaves
    try:
        with probe.neutral():
            return Analysis(gm, part, params, seen, options, autocast).found()
    except Decline as reason:
        return reason.alone()
    except Exception as error:
        log.exception("moefx failed on %s", part.name or "the graph")
        return Decline(f"moefx itself failed on this part, please report it: {type(error).__name__}: {error}")


def _specialise(part: Part) -> None:
    """Numbers that the region may have taken for constants: Dynamo shall compile anew when one of them changes."""
    for node in part.all_nodes:
        value = value_of(node)
        if isinstance(value, torch.SymFloat):
            float(value)


def _key(part: Part, params: GraphParameters, options: Options) -> Any:
    """Equal for parts that one verified change suits."""
    kinds = (*(params.kind(n) for n in part.params), *(value_of(n).device for n in part.inputs))
    return (part.structure, kinds, caller_autocast(), tuple(map(repr, autocasts(part.nodes[0]).values())), repr(options))


def _reported(part: Part, change: Change, found: Found) -> FoundBlock:
    region, compiled = found.compiled.region, found.compiled
    texts = {
        "passes.partition": "\n".join(map(str, compiled.graphs)),
        "passes.schedule": "\n".join(map(str, compiled.schedules)),
        "passes.lower": "\n".join(map(str, compiled.plans)),
        "codegen.emit": compiled.source,
    }
    for stage, text in texts.items():
        logging.getLogger(f"moefx.{stage}").debug("%s\n%s", part.name, text)
    return FoundBlock(
        name=part.name, experts=region.experts, top_k=found.top_k, d_model=region.d_model,
        d_expert=region.d_expert, layout=region.layout, routing=region.routing, location=line_of(change.after),
        errors=dict(found.errors), partition=texts["passes.partition"], schedule=texts["passes.schedule"], source=compiled.source,
        region=str(region), same_as="" if found.name == part.name else found.name,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ broken loops


_warned: set[str] = set()


def _warn_of_fragments(graph: fx.Graph, report: GraphReport) -> None:
    """Says once that a loop over experts was broken: routing, ids and weights of one shape, leaves a graph without a region."""
    output = next(n for n in graph.nodes if n.op == "output")
    tensors = [(n, value_of(n)) for n in output.all_input_nodes if isinstance(value_of(n), Tensor)]
    shapes = [tuple(map(str, t.shape)) for _, t in tensors if t.is_floating_point()]
    for node, ids in tensors:
        chosen = not ids.is_floating_point() and ids.dim() >= 2 and tuple(map(str, ids.shape)) in shapes
        source = node.args[0] if node.target is operator.getitem else node
        if chosen and isinstance(source, fx.Node) and name_of(source) in search.STRONG and not report.found:
            report.declined.append(DeclinedBlock("", BROKEN, location=line_of(source)))
            if BROKEN not in _warned:
                log.warning("%s (the routing is made at %s)", BROKEN, line_of(source))
            _warned.add(BROKEN)
            return
