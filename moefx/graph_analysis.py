"""The analysis of one part of a graph of Dynamo's: from values that its nodes once had to a verified change of the graph."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from moefx import probe, region_op, verify
from moefx.analysis import (
    MAX_HYPOTHESES,
    best_reason,
    compare_on_device,
    gradient_rounds,
    hypotheses,
    oriented,
    probe_inputs,
    runs_on_some,
    token_shape,
)
from moefx.build import compile_region
from moefx.compiled import CompiledRegion
from moefx.errors import Decline
from moefx.graph_nodes import autocasts, in_autocast, line_of, state_at, transforms_left
from moefx.graph_parameters import GraphParameters
from moefx.ir import Region
from moefx.options import Options
from moefx.passes import find
from moefx.passes.canonicalise import GuardFailed
from moefx.passes.splice import Block, Change, FixedSizes, Part, Placed, Record, Roles, dead_nodes, link, value_of
from moefx.routing import Hypothesis, Routing, region_inputs
from moefx.trace import precision

find_log = logging.getLogger("moefx.passes.find")

MAX_POSSIBLE = 64  # hypotheses of one part, with those that no change of the graph could follow; few tokens allow many
MOST_TOKENS = 2048  # that a part is probed on when it runs on no other number


# ------------------------------------------------------------------------------------------------ one observed run


class _Observer(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(gm)
        self.wanted, self.seen = wanted, dict[fx.Node, Any]()
        self.last: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result.detach().clone() if isinstance(result, Tensor) else result
            if len(self.seen) == len(self.wanted):
                raise _AllSeen
        return result

    def leave(self) -> None:
        """The autocasts that the nodes have entered, where the run did not get to the end."""
        for node in reversed(autocasts(self.last)) if self.last else ():
            torch.amp.autocast_mode._exit_autocast(self.env[node])


class _AllSeen(Exception):
    """Stops a run whose rest has no use."""


def entering(part: Part) -> set[fx.Node]:
    """The nodes whose values an analysis of the part needs."""
    return {*part.inputs, *part.others, *part.sizes}


def observe(gm: fx.GraphModule, inputs: Sequence[Any], parts: list[Part], also: set[fx.Node]) -> dict[fx.Node, Any]:
    """The values that enter the parts, and those of `also`, in one run without gradients on copies of the inputs, which ends
    when all are seen.

    Raises Decline when the graph does not run on its inputs.
    """
    wanted = also.union(*map(entering, parts))
    copies = [x.detach().clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else _hint(x) for x in inputs]
    devices = list({x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"})
    observer = _Observer(gm, wanted)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices), transforms_left(), contextlib.suppress(_AllSeen):
            try:
                observer.run(*copies)
            finally:
                observer.leave()
    except Exception as error:
        raise Decline(f"the graph does not run on its example inputs: {type(error).__name__}: {error}") from error
    return observer.seen


def caller_autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """(device, dtype) of the autocast that is on."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


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
        self.routing = routing.alone()
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
KNOWN: dict[Any, Found] = {}
MAX_KNOWN = 256


class Analysis:
    """One part: its own parameters and entering values, its probe copies. autocast: see `caller_autocast`."""

    def __init__(
        self,
        gm: fx.GraphModule,
        part: Part,
        params: GraphParameters,
        seen: dict[fx.Node, Any],
        options: Options,
        autocast: tuple[tuple[str, torch.dtype], ...],
    ) -> None:
        self.gm, self.part, self.options, self.autocast = gm, part, options, autocast
        self.own = [params.value(n) for n in part.params]
        self.others = {n: seen[n] for n in part.others}
        self.entering = tuple(seen[n] for n in part.inputs)
        self.example = probe.Example.of(self.entering, {})
        floats = [p for p in self.own if p.is_floating_point()]
        if not floats or any(type(p) is not nn.Parameter for p in self.own):
            raise Decline("its parameters are not plain floating-point parameters of torch")
        self.dtype = max({p.dtype for p in floats}, key=lambda d: sum(p.numel() for p in floats if p.dtype is d))
        self.block = Block(part, self.own, gm, self.others)
        self.fixed = FixedSizes.of(part)
        self._check_sizes()
        self.twin = self._twin()
        self.example = oriented(self.twin, self.example, options.seed)
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
            if runs_on_some(twin, self.example, dtype, self.options.seed):
                return twin
        return twin

    def found(self) -> Found:
        """The first hypothesis that holds. Raises Decline with the reason that came furthest."""
        experts = probe.guess_experts(self.block)
        reasons: list[Decline] = []
        near: list[str] = []
        for more in (1, 4, 16):
            tokens = token_shape(self.example, self.block, experts, more)
            inputs = probe_inputs(self.twin, self.example, tokens, self.options.seed + more, experts)
            self.tape.clear()
            self.twin.listener = self.tape.append
            try:
                tried = 0
                possible = hypotheses(self.twin, *inputs, near, all_reached=more < 16)
                for hypothesis in itertools.islice(possible, MAX_POSSIBLE):
                    try:
                        change = self._change(hypothesis)
                        tried += 1
                        return self._verified(hypothesis, change)
                    except Decline as reason:
                        find_log.debug("refuted: %s: %s", hypothesis.region.routing, reason)
                        reasons.append(reason.alone())
                    if tried == MAX_HYPOTHESES:
                        break
                break
            except find.Unreached as missing:
                near.append(str(missing))
            finally:
                self.twin.listener = None
        raise best_reason(reasons, near, line_of(self.part.nodes[0]))

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
            errors["device"] = _OnDevice(self, change, lowest).error()
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
                    reason = error.alone()
        raise reason

    def _check_others(self, dead: frozenset[fx.Node], theta: tuple[fx.Node, ...]) -> None:
        for node in self.part.nodes:
            if node not in dead and any(source in theta for source in node.all_input_nodes):
                raise Decline(f"something besides the combined output still needs the experts' parameters: {node}")


class _OnDevice:
    """The part itself against its changed form, on its own weights: on the values that entered, and at the same sizes
    on tokens that all choose alike, which any limit of how many an expert takes would show."""

    def __init__(self, analysis: Analysis, change: Change, lowest: torch.dtype) -> None:
        self.of, self.change, self.lowest = analysis, change, lowest
        self.entered = tuple(t.detach() for t in analysis.entering)
        with self._state():
            gradients = all(p.requires_grad for p in analysis.own) and _differentiable(analysis.block, self.entered)
        self.rounds = gradient_rounds(analysis.block) if gradients else []

    @contextlib.contextmanager
    def _state(self) -> Iterator[None]:
        """As where the region stands in the graph."""
        with probe.state_kept(self.of.block), in_autocast(self.of.autocast), state_at(self.change.after):
            yield

    def run(self, _module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
        return self.of.block.run(args, self.change)

    def error(self) -> float:
        """Relative, the worst."""
        if self.rounds:
            self._compile()
        crowded = [self._crowded(tokens) for tokens in self._crowds()]
        with self._state():
            return max(
                compare_on_device(self.of.block, self, inputs, {}, self.of.dtype, rounds)  # type: ignore[arg-type]
                for inputs, rounds in ((self.entered, self.rounds), *((inputs, []) for inputs in crowded))
            )

    def _crowds(self) -> Iterator[str]:
        if self.of.fixed:
            yield "alike"
            if any(not t.is_floating_point() and t.dim() > 1 for t in self.entered):  # experts that were chosen outside
                yield "one"

    def _crowded(self, tokens: str) -> tuple[Tensor, ...]:
        """Inputs of the example's sizes, dtypes and devices, all tokens of which choose the same experts."""
        experts = probe.guess_experts(self.of.block)
        drawn, _ = probe.draw(self.of.example, self.of.example.token_sizes, self.of.options.seed, experts, tokens, self.of.dtype)
        return tuple(t.to(own.device, own.dtype) for t, own in zip(drawn, self.entered))

    def _compile(self) -> None:
        """Makes the kernels ready, side by side. A graph for one number of tokens needs only the kernels for those."""
        call: Routed = self.change.call  # type: ignore[assignment]
        every_size = any(isinstance(size, torch.SymInt) for n in self.of.part.inputs for size in value_of(n).shape)

        def ready(x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None, like: Any, *params: Tensor) -> Tensor:
            call.compiled.precompile(*call.inputs(x, ids, w, keep, params), self.rounds, every_size, may_pack=False)
            raise _AllSeen

        with self._state(), torch.no_grad(), contextlib.suppress(_AllSeen):
            self.of.block.run(self.entered, replace(self.change, call=ready))


def _differentiable(block: Block, inputs: tuple[Tensor, ...]) -> bool:
    """Whether the part as Dynamo recorded it has a backward outside of a compiler (Transformers' grouped_mm may not)."""
    try:
        verify.run_once(lambda a, k: block.run(a), block, inputs, {}, True)
        return True
    except Exception:  # noqa: BLE001 - then there is nothing to compare gradients with
        return False
