"""The backend of torch.compile: Dynamo's graphs with their MoE regions replaced, handed on to an inner backend.

    torch.compile(model, backend="moefx", options={"inner": "inductor"})

    parts of the graph -> capture -> find -> ... -> emit -> verify -> splice -> the inner backend

A part is the nodes that one module call left in the graph (the whole graph where Dynamo knows of no modules). Parts are
tried deepest first, as `optimize` tries modules, and parts of equal structure share one analysis.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import operator
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from moefx import probe, region_op, search, verify
from moefx.api import (
    MAX_HYPOTHESES,
    _best_reason,
    _compare_on_device,
    _hypotheses,
    _inputs,
    _runs_on_some,
    _token_shape,
)
from moefx.build import compile_region
from moefx.compiled import CompiledRegion
from moefx.errors import Decline, InputError
from moefx.ir import Region
from moefx.options import Options
from moefx.passes import find
from moefx.passes.canonicalise import GuardFailed
from moefx.passes.splice import (
    Block,
    Change,
    FixedSizes,
    Part,
    Placed,
    Record,
    Roles,
    apply,
    dead_nodes,
    link,
    part_of,
    value_of,
)
from moefx.report import GRAPHS, DeclinedBlock, FoundBlock, GraphReport
from moefx.routing import Hypothesis, Routing, region_inputs
from moefx.trace import precision

log = logging.getLogger(__name__)
find_log = logging.getLogger("moefx.passes.find")

MAX_POSSIBLE = 64  # hypotheses of one part, with those that no change of the graph could follow; few tokens allow many
MOST_TOKENS = 2048  # that a part is probed on when it runs on no other number
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
    compiled = inner(gm, example_inputs)
    for region, params in bound:  # not before: the compiler has to find every parameter where Dynamo has seen it
        region.binder.bind(params)
    return compiled


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


# ------------------------------------------------------------------------------------------------ candidates


@dataclass
class Candidate:
    """A part of the graph that may hold an MoE block. scopes: the module calls whose nodes it is made of."""

    part: Part
    depth: int


def _candidates(graph: fx.Graph, is_param: Callable[[fx.Node], bool], params: dict[fx.Node, nn.Parameter]) -> list[Part]:
    """Plausible parts, deepest first; of those that hold several of equal structure only the members."""
    scopes: dict[str, tuple[int, str, list[fx.Node]]] = {}
    working = [n for n in graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    for node in working:
        for depth, (key, entry) in enumerate(node.meta.get("nn_module_stack", {}).items()):
            path = entry[0] if isinstance(entry, tuple) else str(entry)
            scopes.setdefault(str(key), (depth + 1, path, []))[2].append(node)
    found: list[tuple[int, Part]] = []
    for depth, path, nodes in [*scopes.values(), (0, "", working)]:
        with contextlib.suppress(Decline):
            part = part_of(path, nodes, is_param)
            if _plausible(part, params) and not _repeats(part, [p for _, p in found if len(p.nodes) < len(part.nodes)]):
                found.append((depth, part))
    return [part for _, part in sorted(found, key=lambda pair: -pair[0])]


def _plausible(part: Part, params: dict[fx.Node, nn.Parameter]) -> bool:
    """As `search.candidates`: parameters that could be experts, and a selection or routing that is given."""
    block = nn.Module()
    for i, node in enumerate(part.params):
        block.register_parameter(f"p{i}", params[node])
    if not search.plausible(block):
        return False
    names = {_name(n) for n in part.nodes}
    shapes = [(value_of(n).is_floating_point(), tuple(map(str, value_of(n).shape))) for n in part.inputs]
    given = {shape for floating, shape in shapes if not floating and len(shape) >= 2}
    routed = bool(names & search.STRONG) or any(floating and shape in given for floating, shape in shapes)
    weak = bool(names & search.WEAK) or any(not floating for floating, _ in shapes)
    return routed or weak and search.holds_alike(block)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]


def _repeats(part: Part, smaller: list[Part]) -> bool:
    """Whether it holds two apart of equal structure that select on their own: a stack of layers."""
    nodes = set(part.nodes)
    inside = [p for p in smaller if p.nodes[0] in nodes and {_name(n) for n in p.nodes} & (search.STRONG | search.WEAK)]
    seen: dict[Any, Part] = {}
    for p in inside:
        other = seen.setdefault(p.structure(), p)
        if other is not p and not set(other.nodes) & set(p.nodes):
            return True
    return False


# ------------------------------------------------------------------------------------------------ one observed run


@dataclass
class Observed:
    """What one run of the graph on its example inputs showed: the values that enter the parts.

    autocast: (device, dtype) of the autocast that the caller is in.
    """

    values: dict[fx.Node, Any]
    autocast: tuple[tuple[str, torch.dtype], ...]


class _Observer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted, self.seen = wanted, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result.detach().clone() if isinstance(result, Tensor) else result
        return result


def _observe(gm: fx.GraphModule, inputs: Sequence[Any], parts: list[Part], also: set[fx.Node]) -> Observed:
    """One run without gradients on copies of the inputs, of which the values of `also` are kept too.

    Raises Decline when the graph does not run on its inputs.
    """
    wanted = also.union(*((*part.inputs, *part.others, *part.sizes) for part in parts))
    copies = [x.detach().clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else _hint(x) for x in inputs]
    devices = list({x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"})
    autocast = tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))
    observer = _Observer(gm, wanted)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), _transforms_left():
            observer.run(*copies)
    except Exception as error:
        raise Decline(f"the graph does not run on its example inputs: {type(error).__name__}: {error}") from error
    return Observed(observer.seen, autocast)


def _hint(x: Any) -> Any:
    """The number that a symbolic one had in the call being compiled; asking for it makes no guard."""
    return x.node.hint if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool)) else x


# ------------------------------------------------------------------------------------------------ the region as a call


class Routed:
    """The call that stands for a region in a graph: (x, ids, w, keep, like, *params) -> y.

    like: a tensor of the leading sizes that y has, where x has others. shape: y's sizes from the last on.
    """

    def __init__(self, compiled: CompiledRegion, routing: Routing, leading: tuple[int, ...] | None, dtype: torch.dtype | None):
        self.compiled, self.leading, self.dtype = compiled, leading, dtype
        self.routing = replace(routing, ids=None, w=None, keep=None)
        self.__name__ = self.__qualname__ = f"routed_{compiled.handle}"
        self.__module__ = __name__

    def __call__(
        self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None, like: Tensor | None, *params: Tensor
    ) -> Tensor:
        region = self.compiled.region
        tokens, slots, weights, named = self.inputs(x, ids, w, keep, params)
        y = region_op.routed(self.compiled.handle, tokens, slots, weights, named)
        leading = x.shape[:-1] if like is None else like.shape[:-1]
        y = y.reshape(*(leading if self.leading is None else self.leading), region.d_out)
        return y if self.dtype is None else y.to(self.dtype)

    def inputs(
        self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None, params: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """What the region takes: x [T, D], ids and w [T, K], parameters by name."""
        region = self.compiled.region
        tokens = x.reshape(-1, region.d_model)
        slots, weights = region_inputs(self.routing, region.experts, tokens.shape[0], ids, w, keep)
        if weights is None:
            weights = torch.ones(slots.shape, dtype=x.dtype, device=x.device)
        return tokens, slots, weights, dict(zip(self.compiled.binder.names, params))


def _shape_of_result(
    part: Part, roles: Roles, dead: frozenset[fx.Node], region: Region
) -> tuple[fx.Node | None, tuple[int, ...] | None]:
    """Where the leading sizes of the combined output come from: (a node, or None for x; fixed sizes, or None)."""
    text = lambda n: tuple(map(str, value_of(n).shape))  # noqa: E731
    target = text(roles.combined[0])
    if target[-1] != str(region.d_out):
        raise Decline(f"the combined output has sizes {target}, whose last is not {region.d_out}")
    if target[:-1] == text(roles.x)[:-1]:
        return None, None
    if len(target) == 2:
        return None, (-1,)
    order = {n: i for i, n in enumerate(part.all_nodes)}
    for node in part.all_nodes:
        tensor = isinstance(value_of(node), Tensor) and node not in dead and order[node] < order[roles.after]
        if tensor and text(node)[:-1] == target[:-1]:
            return node, None
    if all(size.isdigit() for size in target):
        return None, tuple(map(int, target[:-1]))
    raise Decline(f"the leading sizes {target[:-1]} of the combined output are not those of another tensor")


# ------------------------------------------------------------------------------------------------ the analysis


@dataclass
class Found:
    """A verified change of all parts of one structure. name: of the part that was analysed. Holds no tensors."""

    name: str
    change: Placed
    compiled: CompiledRegion
    top_k: int
    errors: dict[str, float]


# Of earlier graphs: a model has one for training and one for inference, and one for each sort of sizes.
_KNOWN: dict[Any, Found] = {}
MAX_KNOWN = 256
moefx.reset = _KNOWN.clear  # type: ignore[attr-defined] # called by torch._dynamo.reset()


class _Analysis:
    """One part: its own parameters and entering values, its probe copies."""

    def __init__(
        self, gm: fx.GraphModule, part: Part, params: dict[fx.Node, nn.Parameter], seen: Observed, options: Options
    ) -> None:
        self.gm, self.part, self.options, self.autocast = gm, part, options, seen.autocast
        self.own = [params[n] for n in part.params]
        self.others = {n: seen.values[n] for n in part.others}
        self.entering = tuple(seen.values[n] for n in part.inputs)
        self.example = probe.Example.of(self.entering, {})
        floats = [p for p in self.own if p.is_floating_point()]
        if not floats or any(type(p) is not nn.Parameter for p in self.own):
            raise Decline("its parameters are not plain floating-point parameters of torch")
        self.dtype = max({p.dtype for p in floats}, key=lambda d: sum(p.numel() for p in floats if p.dtype is d))
        self.block = Block(part, self.own, gm, self.others)
        self.fixed = FixedSizes.of(part)
        self._check_sizes()
        self.twin = self._twin()
        self.tape: list[Record] = []

    def _check_sizes(self) -> None:
        """Raises Decline where the part would have to be probed on very many tokens."""
        static = not any(isinstance(size, torch.SymInt) for n in self.part.inputs for size in value_of(n).shape)
        tokens = math.prod(self.example.token_sizes)
        if self.fixed is None and static and tokens > MOST_TOKENS:
            raise Decline(
                f"its graph was made for {tokens} tokens, and which of the numbers in it are numbers of tokens is not "
                "clear: compile with dynamic=True, or mark the size with torch._dynamo.mark_dynamic"
            )

    def _twin(self) -> Block:
        """In float64, or in float32 where the part only runs in that."""
        for dtype in (torch.float64, torch.float32):
            generator = torch.Generator().manual_seed(self.options.seed)
            params = [probe.random_like(p, dtype, generator) for p in self.own]
            twin = Block(self.part, params, self.gm, self.others, {self.dtype: dtype}, torch.device("cpu"), self.fixed)
            if _runs_on_some(twin, self.example, dtype, self.options.seed):
                return twin
        return twin

    def found(self) -> Found:
        """The first hypothesis that holds. Raises Decline with the reason that came furthest."""
        experts = probe.guess_experts(self.block)
        reasons: list[Decline] = []
        near: list[str] = []
        for more in (1, 4, 16):
            tokens = _token_shape(self.example, self.block, experts, more)
            inputs = _inputs(self.twin, self.example, tokens, self.options.seed + more, experts)
            self.tape.clear()
            self.twin.listener = self.tape.append
            try:
                tried = 0
                hypotheses = _hypotheses(self.twin, *inputs, near, all_reached=more < 16)
                for hypothesis in itertools.islice(hypotheses, MAX_POSSIBLE):
                    try:
                        change = self._change(hypothesis)
                        tried += 1
                        return self._verified(hypothesis, change)
                    except Decline as reason:
                        find_log.debug("refuted: %s: %s", hypothesis.region.routing, reason)
                        reasons.append(reason)
                    if tried == MAX_HYPOTHESES:
                        break
                break
            except find.Unreached as missing:
                near.append(str(missing))
            finally:
                self.twin.listener = None
        raise _best_reason(reasons, near, _line(self.part.nodes[0]))

    def _change(self, hypothesis: Hypothesis) -> Change:
        """What a hypothesis changes in the part; Decline when that cannot be."""
        roles, record = self._roles(hypothesis)
        compiled = compile_region(hypothesis.region, self.options.chunks, self.options.kernels)
        by_name = {f"p{i}": n for i, n in enumerate(self.part.params)}
        theta = tuple(by_name[name] for name in compiled.binder.names)
        needed = (roles.x, roles.ids, roles.w, roles.keep)
        dead = dead_nodes(self.part, record, roles, needed)
        like, leading = _shape_of_result(self.part, roles, dead, compiled.region)
        self._check_others(dead, theta)
        have, want = value_of(roles.x).dtype, value_of(roles.combined[0]).dtype
        call = Routed(compiled, hypothesis.routing, leading, None if have == want else want)
        return Change(roles.after, roles.combined, (*needed, like, *theta), call, dead)

    def _verified(self, hypothesis: Hypothesis, change: Change) -> Found:
        """The change, if the part is the same with it, forward and backward; Decline when it is not."""
        call: Routed = change.call  # type: ignore[assignment]
        compiled = call.compiled
        lowest = precision([v.tensor for v in hypothesis.trace.values])
        probed = hypothesis.x.tensor.dtype, hypothesis.combined.tensor.dtype  # autocast is none of the probe's
        on_probe = Routed(compiled, call.routing, call.leading, None if probed[0] == probed[1] else probed[1])
        probing = replace(change, call=on_probe)
        run = lambda a, k: self.twin.run(a, probing)  # noqa: E731
        sizes = [size for n in self.part.inputs for size in value_of(n).shape]
        fixed = self.fixed is None and all(isinstance(size, int) for size in sizes)
        few = math.prod(self.example.token_sizes) <= FixedSizes.FEW
        listener, self.twin.listener = self.twin.listener, None
        try:
            errors = verify.verify(
                self.twin, run, self.example, compiled.region.experts, lowest, GuardFailed, own_sizes=fixed or few, fixed=fixed
            )
            errors["device"] = self._on_device(change, lowest)
        finally:
            self.twin.listener = listener
        return Found(self.part.name, change.placed(self.part), compiled, hypothesis.routing.top_k, errors)

    def _roles(self, hypothesis: Hypothesis) -> tuple[Roles, Record]:
        """The roles in that recorded run which the hypothesis was found in."""
        reason = Decline("no run was recorded")
        for record in self.tape:
            if any(m.storage == hypothesis.combined.storage and m.version == hypothesis.combined.version for m in record.made):
                try:
                    return link(hypothesis, self.part, record), record
                except Decline as error:
                    reason = error
        raise reason

    def _check_others(self, dead: frozenset[fx.Node], theta: tuple[fx.Node, ...]) -> None:
        for node in self.part.nodes:
            if node not in dead and any(source in theta for source in node.all_input_nodes):
                raise Decline(f"something besides the combined output still needs the experts' parameters: {node}")

    def _on_device(self, change: Change, lowest: torch.dtype) -> float:
        """The part itself against its changed form, on its own weights: on the values that entered, and at the same sizes
        on tokens that all choose alike, which any limit of how many an expert takes would show."""
        adapter = _OnDevice(self.block, change, lowest)
        leaves = tuple(t.detach() for t in self.entering)
        with _caller(self.autocast), _state_at(change.after):
            gradients = all(p.requires_grad for p in self.own) and _differentiable(self.block, leaves)
        worst = 0.0
        with probe.state_kept(self.block), _caller(self.autocast), _state_at(change.after):
            for inputs in (leaves, *(self._crowded(tokens) for tokens in ("alike", "one") if self.fixed)):
                with_gradients = gradients and inputs is leaves
                error = _compare_on_device(self.block, adapter, inputs, {}, self.dtype, with_gradients)  # type: ignore[arg-type]
                worst = max(worst, error)
        return worst

    def _crowded(self, tokens: str) -> tuple[Tensor, ...]:
        """Inputs of the example's sizes, dtypes and devices, all tokens of which choose the same experts."""
        experts = probe.guess_experts(self.block)
        drawn, _ = probe.draw(self.example, self.example.token_sizes, self.options.seed, experts, tokens, self.dtype)
        return tuple(t.to(own.device, own.dtype) for t, own in zip(drawn, self.entering))


@dataclass
class _OnDevice:
    """What the comparison on the device asks of a rewriting."""

    block: Block
    change: Change
    lowest: torch.dtype

    def run(self, _module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return self.block.run(args, self.change)

    def precompile(self, _module: nn.Module, args: tuple[Any, ...], _kwargs: Any, rounds: list[list[str]]) -> None:
        """Makes the kernels ready, side by side; see `CompiledRegion.precompile`."""
        call: Routed = self.change.call  # type: ignore[assignment]

        def ready(x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None, like: Any, *params: Tensor) -> Tensor:
            call.compiled.precompile(*call.inputs(x, ids, w, keep, params), rounds)
            raise _Ready

        with torch.no_grad(), contextlib.suppress(_Ready):
            self.block.run(args, replace(self.change, call=ready))


class _Ready(Exception):
    """Stops a run whose rest has no use."""


def _differentiable(block: Block, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the part as Dynamo recorded it has a backward outside of a compiler (Transformers' grouped_mm may not)."""
    try:
        verify.run_once(lambda a, k: block.run(a), block, inputs, {}, True)
        return True
    except Exception:  # noqa: BLE001 - then there is nothing to compare gradients with
        return False


# ------------------------------------------------------------------------------------------------ the whole graph


Bound = list[tuple[CompiledRegion, dict[str, Tensor]]]  # regions with their parameters


def _rewrite(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, report: GraphReport) -> Bound:
    """Finds and replaces the regions of a graph, and of the graphs that it calls, in place."""
    if any(isinstance(x, FakeTensor) for x in inputs):
        report.declined.append(DeclinedBlock("", "the graph came without real inputs, which an analysis needs"))
        return []
    params = _parameters(gm, inputs)
    transformed = _transformed(gm.graph)
    parts, called = [], list(_called(gm))
    for part in _candidates(gm.graph, params.__contains__, params):
        if inside := [n for n in part.nodes if n in transformed]:
            reason = "it enters a transform of torch.func (vmap, grad), inside of which nothing is followed"
            report.declined.append(DeclinedBlock(part.name, reason, location=_line(inside[0])))
            find_log.info("declined %s: %s", part.name or "the graph", reason)
        else:
            parts.append(part)
    bound: Bound = []
    try:
        if parts or called:
            seen = _observe(gm, inputs, parts, {n for _, operands in called for n in operands})
            bound = _rewrite_parts(gm, parts, params, seen, options, report)
            for inner, operands in called:
                bound += _rewrite(inner, [params.get(n, seen.values.get(n)) for n in operands], options, report)
    except Decline as reason:
        report.declined.append(DeclinedBlock("", reason.reason, reason.nearest, reason.location))
        find_log.info("declined the graph: %s", reason)
    _warn_of_fragments(gm.graph, report)
    return bound


def _transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that enter and leave transforms of torch.func, and those in between."""
    level, found = 0, set()
    for node in graph.nodes:
        functorch = node.op == "call_function" and "_functorch" in str(getattr(node.target, "__module__", ""))
        if functorch or level:
            found.add(node)
        if functorch:
            level += {"increment_nesting": 1, "decrement_nesting": -1}.get(_name(node).partition("_")[2].partition("_")[2], 0)
    return found


@contextlib.contextmanager
def _transforms_left() -> Iterator[None]:
    """A run that stops inside of a transform of torch.func does not leave the program there."""
    depth = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        yield
    finally:
        while len(torch._C._functorch.get_interpreter_stack() or ()) > depth:
            torch._C._functorch.pop_dynamic_layer_stack()


def _parameters(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, nn.Parameter]:
    """The nodes that are parameters: placeholders, or attributes of the graph's module."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    params = {n: x for n, x in zip(placeholders, inputs) if isinstance(x, nn.Parameter)}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and isinstance(value := _attribute(gm, node), nn.Parameter):
            params[node] = value
    return params


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _called(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, list[fx.Node]]]:
    """Graphs that a node runs once, as activation checkpointing does, with the nodes whose values they are given."""
    seen: set[fx.GraphModule] = set()
    for node in gm.graph.nodes:
        graphs = [n for n in node.all_input_nodes if n.op == "get_attr" and isinstance(_attribute(gm, n), fx.GraphModule)]
        if node.op != "call_function" or len(graphs) != 1:
            continue
        inner = _attribute(gm, graphs[0])
        count = sum(n.op == "placeholder" for n in inner.graph.nodes)
        operands = list(node.args)[len(node.args) - count :]
        if inner not in seen and all(isinstance(n, fx.Node) and n is not graphs[0] for n in operands):
            seen.add(inner)
            yield inner, operands


def _rewrite_parts(
    gm: fx.GraphModule,
    parts: list[Part],
    params: dict[fx.Node, nn.Parameter],
    seen: Observed,
    options: Options,
    report: GraphReport,
) -> Bound:
    bound: Bound = []
    analysed: dict[Any, Found | Decline] = {}
    taken: set[fx.Node] = set()
    for part in parts:
        if taken.intersection(part.nodes):
            continue
        key = _key(part, params, seen, options)
        if key not in analysed and key in _KNOWN:
            analysed[key] = replace(_KNOWN[key], name="")
        if key not in analysed:
            if len(analysed) == MAX_PARTS:
                raise Decline(f"more than {MAX_PARTS} different candidates in one graph")
            analysed[key] = _analyse(gm, part, params, seen, options)
            if isinstance(reason := analysed[key], Decline):
                report.declined.append(DeclinedBlock(part.name, reason.reason, reason.nearest, reason.location))
                find_log.info("declined %s: %s", part.name or "the graph", reason)
            elif all(n.op != "get_attr" for n in part.nodes):  # what those hold is no part of the structure
                if len(_KNOWN) >= MAX_KNOWN:
                    _KNOWN.pop(next(iter(_KNOWN)))
                _KNOWN[key] = reason
        found = analysed[key]
        if isinstance(found, Decline):
            continue
        taken.update(part.nodes)
        change = found.change.in_part(part)
        names = found.compiled.binder.names
        theta = [params[n] for n in change.arguments[-len(names) :] if n is not None]
        bound.append((found.compiled, dict(zip(names, theta))))
        _specialise(part)
        report.found.append(_reported(part, change, found))
        found.name = found.name or part.name  # of the first of its structure in this graph
        _inline(gm, apply(change))
        find_log.info("found %s: %s", part.name or "the graph", report.found[-1].routing)
    gm.graph.lint()
    gm.recompile()
    return bound


def _analyse(
    gm: fx.GraphModule, part: Part, params: dict[fx.Node, nn.Parameter], seen: Observed, options: Options
) -> Found | Decline:
    try:
        with probe.neutral():
            return _Analysis(gm, part, params, seen, options).found()
    except Decline as reason:
        return reason
    except Exception as error:
        log.exception("moefx failed on %s", part.name or "the graph")
        return Decline(f"moefx itself failed on this part, please report it: {type(error).__name__}: {error}")


def _specialise(part: Part) -> None:
    """Numbers that the region may have taken for constants: Dynamo shall compile anew when one of them changes."""
    for node in part.all_nodes:
        value = value_of(node)
        if isinstance(value, torch.SymFloat):
            float(value)


def _key(part: Part, params: dict[fx.Node, nn.Parameter], seen: Observed, options: Options) -> Any:
    """Equal for parts that one verified change suits."""
    tensors = [*(params[n] for n in part.params), *(seen.values[n] for n in part.inputs)]
    kinds = tuple((t.device, t.requires_grad) for t in tensors)
    return (part.structure(), kinds, seen.autocast, tuple(map(repr, _autocasts(part.nodes[0]).values())), repr(options))


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
        d_expert=region.d_expert, layout=region.layout, routing=region.routing, location=_line(change.after),
        errors=dict(found.errors), partition=texts["passes.partition"], schedule=texts["passes.schedule"], source=compiled.source,
        region=str(region), same_as="" if found.name == part.name else found.name,
    )  # fmt: skip


def _line(node: fx.Node) -> str:
    """file:line of the user's code that made a node."""
    places = [x for x in str(node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File ")]
    if not places:
        return "?"
    file, line = places[-1].strip().split(",")[:2]
    return f"{file[6:-1]}:{line.split()[-1]}"


# ------------------------------------------------------------------------------------------------ the call as nodes


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    """Puts the operators that a call is made of in its place, so that the graph holds nothing but operators of torch."""
    arguments = [n for n in node.args if isinstance(n, fx.Node)]
    present = [isinstance(n, fx.Node) for n in node.args]

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return node.target(*(next(rest) if p else None for p in present))  # type: ignore[operator, no-any-return]

    with _state_at(node), contextlib.ExitStack() as stack:
        fake = next(value_of(n).fake_mode for n in arguments)
        stack.enter_context(fake)
        traced = make_fx(call)(*(value_of(n) for n in arguments))
    env: dict[fx.Node, fx.Node] = {}
    given = iter(arguments)
    result: Any = None
    with gm.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(given)
            elif inner.op == "output":
                result = env[inner.args[0]]
            else:
                if inner.op == "get_attr":
                    copied = _as_node(gm.graph, getattr(traced, str(inner.target)))
                else:
                    copied = gm.graph.node_copy(inner, env.__getitem__)
                env[inner] = copied
                copied.meta["example_value"] = inner.meta.get("val")
                copied.meta.update({k: node.meta[k] for k in ("nn_module_stack", "stack_trace", "custom") if k in node.meta})
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _as_node(graph: fx.Graph, constant: Tensor) -> fx.Node:
    """A small constant as a call of torch.tensor: Dynamo knows of no attribute that it has not made."""
    value = constant.constant if isinstance(constant, FakeTensor) else constant
    if value is None:
        raise Decline("a constant of the region has no value while the graph is made")
    return graph.call_function(torch.tensor, (value.tolist(),), {"dtype": value.dtype, "device": constant.device})


@contextlib.contextmanager
def _caller(autocast: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    """In the autocast of the caller."""
    with contextlib.ExitStack() as stack:
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


def _autocasts(node: fx.Node) -> dict[fx.Node, tuple[Any, ...]]:
    """The nodes that entered an autocast which has not been left where the node stands, with their arguments."""
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    for other in itertools.takewhile(lambda n: n is not node, node.graph.nodes):
        if other.target is torch.amp.autocast_mode._enter_autocast:
            entered[other] = other.args
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(other.args[0], None)  # type: ignore[arg-type]
    return entered


@contextlib.contextmanager
def _state_at(node: fx.Node) -> Iterator[None]:
    """Grad mode and autocast as they are where the node stands: nodes before it may have changed the caller's."""
    grad = torch.is_grad_enabled()
    for other in itertools.takewhile(lambda n: n is not node, node.graph.nodes):
        if other.target is torch._C._set_grad_enabled:
            grad = bool(other.args[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype, enabled, cache in _autocasts(node).values():
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


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
        if chosen and isinstance(source, fx.Node) and _name(source) in search.STRONG and not report.found:
            report.declined.append(DeclinedBlock("", BROKEN, location=_line(source)))
            if BROKEN not in _warned:
                log.warning("%s (the routing is made at %s)", BROKEN, _line(source))
            _warned.add(BROKEN)
            return
