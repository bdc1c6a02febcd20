"""The analysis of one block: the pipeline, in `analyse`, from top to bottom, and the steps that it shares with other entrances."""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import logging
import math
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx import parametrized, probe, selection, verify
from moefx.block import Variant
from moefx.build import compile_region
from moefx.errors import Decline
from moefx.options import Options
from moefx.passes import find
from moefx.passes._lift import Lifter
from moefx.passes.canonicalise import GuardFailed, canonicalise, placeholder_names
from moefx.passes.capture import capture
from moefx.routing import Hypothesis
from moefx.settings import dtypes_of, modes_of, settings_of
from moefx.trace import Trace, Value, precision

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 27  # gradients of larger parameters are compared one at a time
MAX_HYPOTHESES = 8  # verified per block before it is declined


def analyse(
    module: nn.Module, twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> Variant:
    """capture -> find -> canonicalise -> partition -> schedule -> lower -> emit -> verify, for one way of calling a block.

    twin: a probe copy of it; args, kwargs: one real call in normal form (`probe.bind`). Raises Decline with the reason and
    the nearest miss.
    """
    for leaf in pytree.tree_leaves((args, kwargs)):
        if not isinstance(leaf, (Tensor, int, float, str, type(None), torch.dtype, torch.device, enum.Enum)):
            raise Decline(
                f"the block takes a {type(leaf).__name__}: what it holds cannot be followed from call to call"
            )
    parametrized.check(module)
    example = oriented(twin, probe.Example.of(args, kwargs), options.seed)
    experts = probe.guess_experts(module)
    reasons: list[Decline] = []
    near: list[str] = []
    for more in (1, 4, 16):  # more tokens, as long as some expert was reached by none
        tried = 0
        tokens = token_shape(example, module, experts, more)
        inputs = probe_inputs(twin, example, tokens, options.seed + more, experts)
        try:
            for hypothesis in hypotheses(twin, *inputs, near, all_reached=more < 16):
                try:
                    return _realise_either(module, twin, hypothesis, example, options)
                except Decline as reason:
                    log.debug("refuted: %s: %s", hypothesis.region.routing, reason)
                    reason.location = reason.location or hypothesis.combined.line
                    reasons.append(reason.alone())
                    tried += 1
                    if tried == MAX_HYPOTHESES:
                        break
            break
        except find.Unreached as missing:
            near.append(str(missing))
    raise best_reason(reasons, near, _source_line(type(module)))


def hypotheses(
    twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], near: list[str], all_reached: bool
) -> Generator[Hypothesis, None, None]:
    """What the block may compute. all_reached: stop at the first sign of experts that no token reached in this run.

    Once the generator is closed, its hypotheses' traces are no longer whole.
    """
    with contextlib.ExitStack() as at_last:

        def captured(watch: Lifter | None = None) -> Trace:
            trace = capture(twin, *copy.deepcopy((args, kwargs)), watch)
            at_last.callback(trace.release)
            return trace

        probe.unpack(twin)
        first = Lifter(twin)
        with probe.state_kept(twin):
            trace = captured(first)
        find.side_effects(trace)
        groups = find.expert_groups(first)
        if not groups:
            near.append("no parameters take each other's place in one computation, as experts do")
        for group in groups:
            probe.unpack(twin)
            lifter = Lifter(twin, group)
            with probe.state_kept(twin):
                trace = captured(lifter)
            if all_reached:
                find.check_reached(twin, lifter)
            ungated = yield from find.hypotheses(trace, lifter, _redrawn(twin, group, captured), near)
            near.extend(dict.fromkeys(lifter.notes))
            if ungated and all_reached:  # taken for shared experts, which was refuted
                raise find.Unreached(f"no token was given to {ungated}")


def _redrawn(twin: nn.Module, group: frozenset[str], captured: Callable[[], Trace]) -> Callable[[int], Trace | None]:
    """Runs the same inputs with other expert parameters (seed 0: puts the first ones back)."""
    tensors = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    kept: dict[str, Tensor] = {}
    traces: dict[int, Trace | None] = {0: None}

    def run(seed: int) -> Trace | None:
        generator = torch.Generator().manual_seed(seed)
        kept.update({name: tensors[name].detach().clone() for name in group if not kept.keys() >= group})
        for name, first in kept.items():
            tensors[name].detach().copy_(probe.random_like(first, first.dtype, generator) if seed else first)
        if seed not in traces:
            try:
                traces[seed] = captured()
            except Decline:
                traces[seed] = None
        return traces[seed]

    return run


def _realise_either(
    module: nn.Module, twin: nn.Module, hypothesis: Hypothesis, example: probe.Example, options: Options
) -> Variant:
    """Once with numbers that int() cut from sizes as expressions of sizes, and once as they stand."""
    if hypothesis.trace.log.truncations:
        with contextlib.suppress(Decline):
            return _realise(module, twin, hypothesis, example, options, restore_truncated=True)
    return _realise(module, twin, hypothesis, example, options, restore_truncated=False)


def _realise(
    module: nn.Module,
    twin: nn.Module,
    hypothesis: Hypothesis,
    example: probe.Example,
    options: Options,
    restore_truncated: bool,
) -> Variant:
    """A hypothesis made to run, and verified; Decline when it is refuted."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    rewrite = canonicalise(hypothesis, placeholder_names(example.args, example.kwargs, parameters), restore_truncated)
    compiled = compile_region(hypothesis.region, options.chunks, options.kernels)
    stages = (
        ("canonicalise", rewrite.source),
        ("partition", "\n".join(map(str, compiled.graphs))),
        ("schedule", "\n".join(map(str, compiled.schedules))),
        ("lower", "\n".join(map(str, compiled.plans))),
        ("emit", compiled.source),
    )
    lowest = precision([v.tensor for v in hypothesis.trace.values])
    location = _source_line(type(module))
    types = tuple((path, parametrized.class_of(module.get_submodule(path))) for path in rewrite.swallowed)
    variant = Variant(
        compiled.region, hypothesis.routing.alone(), compiled, rewrite.forward, rewrite.structure, rewrite.source, rewrite.kept,
        rewrite.swallowed, GuardFailed, lowest, {}, location, stages, settings_of(module, rewrite.kept),
        types, rewrite.graph, example.features,
        _order_matters(hypothesis.trace), dtypes_of(module, rewrite.kept, example.args, example.kwargs),
        modes_of(module, rewrite.kept), parametrized.computed_in(module),
    )  # fmt: skip
    run = lambda a, k: variant.run(twin, a, k)  # noqa: E731
    errors = verify.verify(twin, run, example, hypothesis.region.experts, lowest, GuardFailed)
    variant.errors.update(errors)
    return variant


RANDOM = ("dropout", "bernoulli", "rand", "multinomial", "normal", "uniform", "exponential", "gumbel", "poisson")


def _order_matters(trace: Trace) -> bool:
    """Whether the block draws random numbers, or changes its inputs in place."""
    given = {v.storage for v in trace.inputs if isinstance(v, Value)}
    return any(any(r in c.name for r in RANDOM) or any(v.storage in given for v in c.writes) for c in trace.calls)


def probe_inputs(
    twin: nn.Module, example: probe.Example, tokens: tuple[int, ...], seed: int, experts: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of `tokens` for a probe copy; of the example's sizes where it does not run on those."""
    inputs = probe.draw(example, tokens, seed, experts, dtype=probe.dtype_of(twin))
    if runs(twin, *inputs):
        return inputs
    return probe.draw(example, example.token_sizes, seed, experts, dtype=probe.dtype_of(twin))


def oriented(twin: nn.Module, example: probe.Example, seed: int) -> probe.Example:
    """The example, with the axis of features second where it is images and a probe copy runs on images of other sizes so, and not
    with features last."""
    images = any(isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 4 for t in example.leaves())
    for each in (example, replace(example, features=1)) if images else ():
        with contextlib.suppress(Decline):
            if runs(twin, *probe.draw(each, probe.shapes_for(each)[0], seed, 1, dtype=probe.dtype_of(twin))):
                return each
    return example


def runs(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad(), probe.Emulated(), probe.state_kept(twin):
            twin.forward(*copy.deepcopy(args), **copy.deepcopy(kwargs))
        return True
    except Exception:  # noqa: BLE001 - any failure of the block on these inputs
        return False


def runs_on_some(twin: nn.Module, example: probe.Example, dtype: torch.dtype, seed: int) -> bool:
    """Whether a probe copy runs on inputs like the example's, of few tokens or of its own sizes."""
    shapes = [example.token_sizes]
    with contextlib.suppress(Decline):
        shapes.insert(0, probe.shapes_for(example)[0])
    return any(runs(twin, *probe.draw(example, shape, seed, 1, dtype=dtype)) for shape in shapes)


def token_shape(example: probe.Example, module: nn.Module, experts: int, more: int) -> tuple[int, ...]:
    """Token sizes of the analysis run: enough to reach every expert where experts are separate modules."""
    shape = probe.shapes_for(example)[0]
    stacked = any(p.dim() >= 3 for p in module.parameters())
    heavy = sum(p.numel() for p in module.parameters()) > verify.HEAVY
    need = (24 if stacked and heavy else 53 if stacked else max(53, 6 * experts)) * more
    have = max(1, torch.Size(shape).numel()) ** example.repeats
    return (math.ceil((need * shape[0] ** example.repeats / have) ** (1 / example.repeats)), *shape[1:]) if shape else shape


def _source_line(cls: type) -> str:
    """file:line of a class."""
    try:
        return f"{inspect.getsourcefile(cls) or '?'}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return "?"


def best_reason(reasons: list[Decline], near: list[str], location: str) -> Decline:
    """The verdict that came furthest, with the nearest miss. location: of the block."""
    if reasons:
        last = reasons[0]
        return Decline(
            f"a match was found but refuted: {last.reason}",
            "; ".join(dict.fromkeys(r.reason for r in reasons[1:4])),
            last.location,
        )
    notes = list(dict.fromkeys(near))
    first = notes[0] if notes else "no parameters are used like experts"
    return Decline("no routed experts: " + first, "; ".join(notes[1:4]), location)


def gradient_rounds(module: nn.Module) -> list[list[str]]:
    """The parameters whose gradients are compared together: large ones one at a time, so that few gradients are alive at once."""
    sizes = {n: p.numel() * p.element_size() for n, p in module.named_parameters() if p.is_floating_point()}
    large = [n for n, size in sizes.items() if size > LARGE_BYTES]
    return [[n] for n in large] + [[n for n in sizes if n not in large]]


def own_weights(module: nn.Module, dtype: torch.dtype) -> str:
    """What a comparison runs on, for messages."""
    return f"its own weights ({dtype}, {next(module.parameters()).device.type})"


def compare_on_device(
    module: nn.Module,
    variant: Variant,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    rounds: list[list[str]],
) -> float:
    """Relative error on the block's own weights. rounds: see `gradient_rounds`; empty: no gradients."""
    device, where = next(module.parameters()).device, own_weights(module, dtype)
    gradients = bool(rounds)
    worst = 0.0
    for wanted in rounds or [[]]:
        try:
            run = lambda a, k: type(module).forward(module, *a, **k)  # noqa: E731
            expected = verify.run_once(run, module, args, kwargs, gradients, wanted)
        except Exception as error:
            raise Decline(
                f"the block does not run on {dtype} {device.type} inputs like its example: {error}"
            ) from error
        held = {n: None if g is None else _aside(g) for n, g in expected.gradients.items()}
        expected = verify.Outcome(expected.outputs, held)
        with verify.no_failure(where), selection.paying():
            actual = verify.run_once(lambda a, k: variant.run(module, a, k), module, args, kwargs, gradients, wanted)
        outputs = [v for v in expected.outputs if isinstance(v, Tensor)]
        low = precision([torch.zeros((), dtype=d) for d in (dtype, variant.lowest)] + outputs)
        worst = max(worst, *verify.compare(expected, actual, verify.ON_DEVICE[low], where, overflows=True).values())
        del expected, actual  # the next round's gradients take their memory
    return worst


def _aside(gradient: Tensor) -> Tensor:
    """Where it leaves room for the rewritten block's run: on the CPU, unless the device has plenty of memory."""
    if gradient.is_cuda:
        free = torch.cuda.mem_get_info(gradient.device)[0]
        unused = torch.cuda.memory_reserved(gradient.device) - torch.cuda.memory_allocated(gradient.device)
        return gradient if free + unused > 8 * gradient.nbytes else gradient.cpu()
    return gradient
