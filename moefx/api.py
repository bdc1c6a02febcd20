"""The public face: optimize, explain, restore. The pipeline of one block is `moefx.analysis.analyse`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from moefx import probe, search, verify
from moefx.analysis import analyse, compare_on_device, gradient_rounds, own_weights, runs, runs_on_some
from moefx.block import (
    Replicas,
    RewrittenForward,
    SelectingForward,
    Variant,
    _original_forward,
    call_key,
    foreign_forward,
    install,
    rewritten,
    uninstall,
)
from moefx.errors import Decline, InputError
from moefx.options import Options
from moefx.passes.beside import beside
from moefx.report import DeclinedBlock, FoundBlock, Report, graphs_of
from moefx.runtime import compiler_prepared
from moefx.selection import paying, prepare

log = logging.getLogger(__name__)

_STATE = "_moefx"  # instance attribute of an optimised model: its report, options and pending hooks


# ------------------------------------------------------------------------------------------------ the whole model


def optimize(
    model: nn.Module, example_inputs: Any = None, options: Options | None = None, mesh: Any = None
) -> nn.Module:
    """Rewrites the MoE blocks of `model` in place and returns the same object.

    example_inputs: a tuple of positional or a dict of keyword arguments of `model`; without them the first call of the
    model serves as the example. Parameters, names, state_dict and hooks stay. A block is replaced only after it agreed
    with the original, forward and gradients; `explain(model)` tells what happened, `restore(model)` undoes it.
    mesh: a DeviceMesh of one dimension or a process group, over whose ranks the experts are spread (`moefx.parallel`); every
    rank calls this with the same model, and its own example_inputs.
    model: also what torch.compile made of one, which then compiles the rewritten blocks in its next call.
    Raises InputError when example_inputs do not fit the model, or ranks differ in model or options.
    """
    _optimise(_plain(model), example_inputs, options, mesh)
    return model


def _optimise(model: nn.Module, example_inputs: Any, options: Options | None, mesh: Any) -> None:
    if mesh is not None:
        mesh = _parallel().as_mesh(mesh)
    if options is not None and not isinstance(options, Options):
        raise InputError(f"options must be moefx.Options; got {type(options).__name__}")
    state = _state(model)
    if state is not None:
        same = mesh is None or mesh == state["mesh"]
        if same and (options is None or state["options"] == options):
            if state["report"].pending and example_inputs is not None:
                mesh, options = state["mesh"], options or state["options"]
                restore(model)
                _optimise(model, example_inputs, options, mesh)
            return
        restore(model)
    options = options or Options()
    report = Report(pending=example_inputs is None)
    model.__dict__[_STATE] = _State(report=report, options=options, mesh=mesh)
    if example_inputs is None:
        _Waiting.put(model)
        return
    try:
        seen = _run_example(model, example_inputs)
    except Exception:
        del model.__dict__[_STATE]
        raise
    _rewrite(model, seen, options, report, replace=True, wide=mesh is not None)
    if mesh is not None:
        _spread(model, mesh, options, report, seen)


def _spread(model: nn.Module, mesh: Any, options: Options, report: Report, seen: search.Observation) -> None:
    """Experts over the ranks; a model for which that cannot be is as it was."""
    try:
        _parallel().distribute(model, mesh, options, report, seen.examples)
    except InputError:  # on all ranks alike
        restore(model)
        raise


def _parallel() -> Any:
    """`moefx.parallel`, which needs torch.distributed and is loaded when it is used."""
    from moefx import parallel

    return parallel


def explain(model: nn.Module, example_inputs: Any = None, options: Options | None = None) -> Report:
    """The report on a model: what was done if it is optimised, else what `optimize` would do (nothing is changed).

    model: also what torch.compile made of it. With backend="moefx" the report has its graphs, once they are compiled.
    Raises InputError when the model is neither optimised nor compiled and no example_inputs are given.
    """
    model = _plain(model)
    if options is not None and not isinstance(options, Options):
        raise InputError(f"options must be moefx.Options; got {type(options).__name__}")
    state, graphs = _state(model), graphs_of(model.parameters())
    if state is not None:
        report: Report = state["report"]
        report.graphs = graphs
        return report
    if example_inputs is None:
        if graphs:
            return Report(graphs=graphs)
        raise InputError(
            "explain needs example_inputs for a model that is not optimised: a tuple or a dict of its arguments"
        )
    report = Report(graphs=graphs)
    _rewrite(model, _run_example(model, example_inputs), options or Options(), report, replace=False)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Gives every rewritten block its own forward back. Parameters stay as they are. Idempotent.

    Experts that were spread over ranks come back to every rank, as new parameters; all ranks call it.
    """
    plain = _plain(model)
    plain.__dict__.pop(_STATE, None)
    waiting = plain.__dict__.get("forward")
    if isinstance(waiting, _Waiting):
        waiting.stop()
    for module in plain.modules():
        forward = rewritten(module)
        if forward is not None:
            forward.gather()
        uninstall(module)
    return model


class _State(dict):  # type: ignore[type-arg]
    """A pickled model comes back unoptimised: its state comes back as an empty dict."""

    def __reduce__(self) -> Any:
        return (dict, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        return _State(report=copy.deepcopy(self["report"], memo), options=self["options"], mesh=self["mesh"])


def _state(model: nn.Module) -> _State | None:
    state = model.__dict__.get(_STATE)
    return state if isinstance(state, _State) else None


def _plain(model: Any) -> nn.Module:
    """The model itself, of what torch.compile made of one."""
    if not isinstance(model, nn.Module):
        raise InputError(f"moefx works on a torch.nn.Module; got {type(model).__name__}")
    return getattr(model, "_orig_mod", model)


def _call(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, dict) or hasattr(example_inputs, "keys"):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs is a tuple of positional or a dict of keyword arguments; got {type(example_inputs).__name__}"
    )


def _run_example(model: nn.Module, example_inputs: Any) -> search.Observation:
    return _observe(model, *_call(model, example_inputs))


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> search.Observation:
    """One observed forward without gradients; random state and buffers are left as they were."""
    probe.bind(model, args, kwargs)
    inside: list[tuple[str, nn.Module]] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, n=name: inside.append((n, m))))
        handles.append(module.register_forward_hook(lambda m, a, out: inside.pop() and None))
    try:
        with probe.state_kept(model), search.observe(model) as seen, torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        name, module = inside[-1] if inside else ("", model)
        where = f"{name or 'the model'} ({type(module).__name__}.forward{inspect.signature(type(module).forward)})"
        raise InputError(
            f"the model does not run on example_inputs: {type(error).__name__} in {where}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Waiting:
    """Stands at `model.forward` until the first call that succeeds: observes it, and rewrites when it is over."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.previous = model, model.__dict__.get("forward")
        self.__signature__ = inspect.signature(model.forward)

    @staticmethod
    def put(model: nn.Module) -> None:
        """Lets the model wait. torch.compile shows real inputs to modules that have the two hooks of torch's lazy modules."""
        waiting = _Waiting(model)
        hooks = {"_initialize_hook": None, "_infer_parameters": _BeforeTracing(waiting)}
        model.__dict__.update(forward=waiting, _replicate_for_data_parallel=Replicas(model), **hooks)

    @torch.compiler.disable(reason="moefx rewrites this model at its first call")  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        self.stop()  # the model may call itself
        try:
            with search.observe(model, inside=True) as seen:
                # the observer's hooks were registered after this call began: the root's inputs are taken here
                with contextlib.suppress(Exception):
                    seen.examples[""] = probe.Example.of(*probe.bind(model, args, kwargs))
                result = model.forward(*args, **kwargs)
        except BaseException:
            _Waiting.put(model)
            raise
        self._rewrite(seen)
        return result

    def before_tracing(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first call of the compiled model: the model is rewritten before Dynamo traces it."""
        if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves((args, kwargs))):
            raise InputError(
                "moefx waits for a first call of this model, which is traced as a part of something else: "
                "give example inputs, moefx.optimize(model, example_inputs), or call it once before"
            )
        model = self.model
        self.stop()
        try:
            seen = _observe(model, args, kwargs)
        except BaseException:
            _Waiting.put(model)
            raise
        self._rewrite(seen)

    def _rewrite(self, seen: search.Observation) -> None:
        state = self.model.__dict__[_STATE]
        state["report"].pending = False
        _rewrite(self.model, seen, state["options"], state["report"], replace=True, wide=state["mesh"] is not None)
        if state["mesh"] is not None:
            _spread(self.model, state["mesh"], state["options"], state["report"], seen)

    def stop(self) -> None:
        """The model has its own forward again."""
        for name in ("forward", "_initialize_hook", "_infer_parameters", "_replicate_for_data_parallel"):
            self.model.__dict__.pop(name, None)
        if self.previous is not None:
            self.model.__dict__["forward"] = self.previous

    def __deepcopy__(self, memo: dict[int, Any]) -> _Waiting:
        twin = object.__new__(_Waiting)
        twin.__dict__.update(self.__dict__)
        twin.model, twin.previous = copy.deepcopy((self.model, self.previous), memo)
        return twin

    def __reduce__(self) -> Any:
        return (_original_forward, (self.model,))


class _BeforeTracing:
    """What torch.compile calls with the first inputs of a model that waits; nothing in a copy that was pickled."""

    def __init__(self, waiting: _Waiting | None = None) -> None:
        self.waiting = waiting

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.waiting is not None:
            self.waiting.before_tracing(args, kwargs)

    def __reduce__(self) -> Any:
        return (_BeforeTracing, ())

    def __deepcopy__(self, memo: dict[int, Any]) -> _BeforeTracing:
        return _BeforeTracing(copy.deepcopy(self.waiting, memo))


def _rewrite(
    model: nn.Module, seen: search.Observation, options: Options, report: Report, replace: bool, wide: bool = False
) -> None:
    """Tries every candidate, deepest first; equal structures share one analysis. wide: see `_Search.wider`."""
    with probe.neutral(), probe.eagerly():
        _Search(model, seen, options, report).run(replace, wide)


class _Search:
    """One pass over the candidates of a model."""

    def __init__(self, model: nn.Module, seen: search.Observation, options: Options, report: Report) -> None:
        self.model, self.seen, self.options, self.report = model, seen, options, report
        self.modules = dict(model.named_modules())
        self.analysed: dict[Any, tuple[str, dict[Any, Variant | Decline]]] = {}

    def run(self, replace: bool, wide: bool) -> None:
        start = time.perf_counter()
        names = search.candidates(self.model, self.seen)
        with compiler_prepared((p.device for name in names for p in self.modules[name].parameters()), self.options.kernels):
            choices = self._tried(names, replace, wide)
        self._install_choosers(choices)
        self.report.seconds = time.perf_counter() - start

    def _tried(self, names: list[str], replace: bool, wide: bool) -> dict[int, search.Choice]:
        """Who chooses the experts of the blocks that were found, by their place in the report."""
        done: list[str] = []
        choices: dict[int, search.Choice] = {}
        for name in names:
            if any(n == name or not name or n.startswith(name + ".") or name.startswith(n + ".") for n in done):
                continue  # a smaller part of it was rewritten, or all around it
            if rewritten(self.modules[name]) is not None:
                done.append(name)
                continue
            if reason := self.spread(name):
                self.report.declined.append(DeclinedBlock(name, reason))
                continue
            first, forward, variant = self.attempt(name)
            if isinstance(variant, Decline):
                if first == name:
                    self.report.declined.append(DeclinedBlock(name, variant.reason, variant.nearest, variant.location))
                continue
            alone = wide and beside(variant.graph, variant.ordered) is None
            if alone and (around := self.wider(name)) is not None:
                name, first, forward, variant = around
            done.append(name)
            self.report.found.append(_found(name, forward, variant, "" if first == name else first))
            if replace:
                install(self.modules[name], forward)
                if self.options.kernels != "torch" and (choice := search.chooser(self.seen, name)):
                    choices[len(self.report.found) - 1] = choice
            log.info("found %s: %s", name, self.report.found[-1].routing)
        return choices

    def _install_choosers(self, choices: dict[int, search.Choice]) -> None:
        """Modules that choose the experts of blocks, which come by their place in the report; nothing is analysed any more."""
        for place, choice in choices.items():
            module, found = self.modules[choice.module], self.report.found[place]
            if module.__dict__.get("forward") is None:
                try:
                    prepare(self.options.kernels, choice.device, choice.dtype, choice.scores, choice.ids.shape[-1])
                except Exception as error:  # noqa: BLE001 - whatever the compiler of kernels says
                    log.warning("%s keeps torch.topk: %s: %s", choice.module, type(error).__name__, error)
                    continue
                install(module, SelectingForward(module, self.options.kernels, choice.scores))
                note = f"torch.topk of {choice.module} runs as moefx::topk on a GPU, where that pays"
                self.report.found[place] = dataclasses.replace(found, notes=(*found.notes, note))

    def spread(self, name: str) -> str:
        """Whether somebody else has spread a module's parameters over ranks: they come and go, or are no plain tensors."""
        around = [m for n, m in self.modules.items() if n in ("", name) or name.startswith(f"{n}.") or n.startswith(f"{name}.")]
        fsdp, tensors = (sys.modules.get(f"torch.distributed.{part}") for part in ("fsdp", "tensor"))
        if fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in around):
            return "its parameters are spread over ranks by fully_shard: optimise the model before that"
        if tensors is not None and any(isinstance(p, tensors.DTensor) for p in self.modules[name].parameters()):
            return "its parameters are DTensors: optimise the model before its parameters are spread over ranks"
        return ""

    def attempt(self, name: str) -> tuple[str, RewrittenForward, Variant | Decline]:
        """The analysis of a candidate, and the name of the first one of its structure."""
        module, example = self.modules[name], self.seen.examples[name]
        key = (search.structure_key(module), _signature(example), module.training)
        first, variants = self.analysed.setdefault(key, (name, {}))
        analyser = Analyser(self.options)
        forward = RewrittenForward(module, analyser, variants)
        with analyser.keeping():
            return first, forward, _try(module, forward, analyser, example, first == name)

    def wider(self, name: str) -> tuple[str, str, RewrittenForward, Variant] | None:
        """The module around a block, if it computes something during which rows could travel, such as a shared expert.

        For several ranks, where that is worth more than the router's code as it stands.
        """
        around = name.rpartition(".")[0]
        if around == name or around not in self.seen.examples or rewritten(self.modules[around]) is not None:
            return None
        inside = {id(p) for p in self.modules[name].parameters()}
        others = [p for p in self.modules[around].parameters() if p.dim() == 2 and id(p) not in inside]
        if len(others) < 3:  # a router, and a shared expert's two at least
            return None
        first, forward, variant = self.attempt(around)
        if isinstance(variant, Decline) or beside(variant.graph, variant.ordered) is None:
            log.debug("nothing beside %s in %s: %s", name, around, variant if isinstance(variant, Decline) else "no work")
            return None
        return around, first, forward, variant


class Analyser:
    """Makes variants of blocks. Inside `keeping` the probe copy of a block serves all of its analyses."""

    def __init__(self, options: Options) -> None:
        self.options, self._keeps = options, False
        self._kept: nn.Module | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        with probe.neutral():
            return analyse(module, self.twin(module, probe.Example.of(args, kwargs)), args, kwargs, self.options)

    def twin(self, module: nn.Module, example: probe.Example) -> nn.Module:
        """A probe copy of `module`, in the mode that the module is in."""
        twin = self._kept or self._copy(module, example)
        self._kept = twin if self._keeps else None
        own = dict(module.named_modules())
        for name, copied in twin.named_modules():
            copied.training = own[name].training
        return twin

    def _copy(self, module: nn.Module, example: probe.Example) -> nn.Module:
        """In float64, or in float32 where the block only runs in that."""
        held = {p.dtype for p in module.parameters() if p.is_floating_point()}
        main = example.dtype if len(held) > 1 and example.dtype in held else None
        for dtype, kept in dict.fromkeys(((torch.float64, main), (torch.float64, None), (torch.float32, None))):
            twin = probe.probe_copy(module, self.options.seed, dtype, kept)
            if runs_on_some(twin, example, dtype, self.options.seed):
                return twin
        return probe.probe_copy(module, self.options.seed)  # capture says why it does not run

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """For work on one module."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps, self._kept = False, None


def _try(
    module: nn.Module, forward: RewrittenForward, analyser: Analyser, example: probe.Example, first: bool
) -> Variant | Decline:
    """Analyses the mode the block is in and the other one, and checks the block itself: its weights, dtype, device."""
    for name, child in module.named_modules():
        if foreign_forward(child):
            return Decline(f"{name or 'the block'} has a forward of its own on the instance: what it does is not known")
    try:
        variant = forward.variant_for(*copy.deepcopy((example.args, example.kwargs)))
        if isinstance(variant, Decline):
            return variant
        example = dataclasses.replace(example, features=variant.features)
        variant.errors["device"] = max(
            variant.errors.get("device", 0.0), _check_device(module, variant, example, first)
        )
        if first:
            with _mode(module, not module.training):
                _try_mode(forward, analyser, variant, example)
        return variant
    except Decline as reason:
        return reason.alone()
    except Exception as error:
        log.exception("moefx failed on %s", type(module).__name__)
        return Decline(f"moefx itself failed on this block, please report it: {type(error).__name__}: {error}")


def _try_mode(forward: RewrittenForward, analyser: Analyser, variant: Variant, example: probe.Example) -> None:
    """The same block in its other mode: the same rewriting if it verifies there too, else an analysis of its own."""
    args, kwargs = copy.deepcopy((example.args, example.kwargs))
    key = call_key(forward.module, args, kwargs)
    if key in forward.variants:
        return
    twin = analyser.twin(forward.module, example)
    run = lambda a, k: variant.run(twin, a, k)  # noqa: E731
    try:
        verify.verify(twin, run, example, variant.region.experts, variant.lowest, variant.skip, again=True)
        forward.variants[key] = variant
    except Decline:
        forward.variant_for(args, kwargs)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = {m: m.training for m in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for m, mode in before.items():
            m.training = mode


def _check_device(module: nn.Module, variant: Variant, example: probe.Example, gradients: bool) -> float:
    """The block itself against its rewritten form; gradients for the first of its structure."""
    parameter = next(p for p in module.parameters())
    shape = probe.shapes_for(example)[1]

    def inputs(dtype: torch.dtype) -> Any:
        drawn = probe.draw(example, shape, 5, variant.region.experts, dtype=dtype)
        return pytree.tree_map(lambda t: t.to(parameter.device) if isinstance(t, Tensor) else t, drawn)

    # the example's own dtype, unless it was one that only autocast made possible
    dtypes = list(dict.fromkeys(d for d in (example.dtype, parameter.dtype) if d.is_floating_point)) or [torch.float32]
    dtype = next((d for d in dtypes[:-1] if runs(module, *inputs(d))), dtypes[-1])
    args, kwargs = inputs(dtype)
    rounds = gradient_rounds(module) if gradients else []
    with probe.state_kept(module):
        if gradients:
            with verify.no_failure(own_weights(module, dtype)), paying():
                variant.precompile(module, args, kwargs, rounds)
        return compare_on_device(module, variant, args, kwargs, dtype, rounds)


def _signature(example: probe.Example) -> Any:
    def kind(x: Any) -> Any:
        return (x.dim(), x.dtype) if isinstance(x, Tensor) else repr(x)

    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    return (spec, tuple(kind(x) for x in leaves))


def _found(name: str, forward: RewrittenForward, variant: Variant, same_as: str) -> FoundBlock:
    region, stages = variant.region, dict(variant.stages)
    declined = [v for v in forward.variants.values() if isinstance(v, Decline)]
    other = "eval" if forward.module.training else "train"
    notes = (
        *(f"in {other} mode the original runs: {d.reason}" for d in declined),
        *variant.compiled.notes,
        *(f"without a kernel: {reason}" for reason in variant.compiled.without_kernel.values()),
    )
    return FoundBlock(
        name=name,
        experts=region.experts,
        top_k=variant.routing.top_k,
        d_model=region.d_model,
        d_expert=region.d_expert,
        layout=region.layout,
        routing=region.routing,
        location=variant.location,
        errors=dict(variant.errors),
        partition=stages["partition"],
        schedule=stages["schedule"],
        source=stages["emit"],
        canonical=stages["canonicalise"],
        region=str(region),
        same_as=same_as,
        notes=notes,
    )
