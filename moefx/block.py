"""What stands at `module.forward` of a rewritten block.

The module stays the user's object: class, parameters, names, hooks. Only its instance attribute `forward` is set. Each
distinct way of calling the block (train or eval, which arguments) has its own variant; a call for which there is none
runs the original, and the report says why.
"""

from __future__ import annotations

import copy
import inspect
import logging
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from moefx import region_op
from moefx.errors import Decline
from moefx.ir import Region
from moefx.parametrized import class_of
from moefx.python_state import PLAIN
from moefx.routing import Routing, region_inputs
from moefx.selection import outside, selecting
from moefx.settings import Setting, Way, dtypes, mode_on, submodules, ways
from moefx.structure import Structure
from moefx.watch import Watch

MAX_VARIANTS = 8  # ways of calling one block that are analysed
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One verified rewriting of a block: what it computes, how it runs, and how well it agreed with the original."""

    region: Region
    routing: Routing
    compiled: Any  # moefx.compiled.CompiledRegion
    forward: Callable[..., Any]
    structure: Structure  # of what `forward` returns
    source: str  # the canonical block
    kept: tuple[str, ...]
    swallowed: tuple[str, ...]
    skip: type[Exception]  # raised by `forward` when sizes branch differently
    lowest: torch.dtype  # the least precise dtype of the analysis: what a comparison may expect
    errors: dict[str, float]
    location: str
    stages: tuple[tuple[str, str], ...]  # (stage, text)
    settings: tuple[Setting, ...] = ()  # plain values it was made for
    types: tuple[tuple[str, type], ...] = ()  # of the submodules whose code it stands for
    graph: Any = None  # fx.Graph of `forward`
    features: int = -1  # see `probe.Example`
    ordered: bool = False  # what it draws at random, or changes in place, makes the order of its operations matter
    dtypes: tuple[torch.dtype, ...] = ()  # it was made for; nothing where its code names none
    modes: tuple[str, ...] = ()  # of torch, that its code asks for: it was made without
    computed: frozenset[str] = frozenset()  # parameters that the block computed at each call, see `moefx.parametrized`
    ways: tuple[Way, ...] = field(init=False)  # to the submodules that any of this is about
    places: tuple[tuple[str, str, str], ...] = field(init=False)  # of its parameters: the name, the submodule, the name there

    def __post_init__(self) -> None:
        split = [(name, *name.rpartition(".")) for name in self.compiled.binder.names]
        object.__setattr__(self, "places", tuple((name, path, last) for name, path, _, last in split))
        roots = [setting.root for setting in self.settings if isinstance(setting.root, str)]
        taken = [path for path, _ in self.types]
        object.__setattr__(self, "ways", ways((*roots, *taken, *(path for _, path, _ in self.places))))

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: Watch | None = None) -> Any:
        """The rewritten forward on normalised arguments (see `probe.bind`). watch: of this module, which has not moved."""
        return self._run(module, Moe(self, module, watch), args, kwargs)

    def parameters(self, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        """Parameters and buffers by name (None, with experts spread over ranks, where another one holds it).

        Raises `skip` where one is computed now that was none: `Watch` looks at how, but Dynamo cannot.
        """
        values: Any = {}
        for name, path, last in self.places:
            owner = modules[path]  # and then as `parametrized.value`, but no call for each: Dynamo traces them
            values[name] = owner._parameters.get(last, owner._buffers.get(last))
            if values[name] is None and parametrize.is_parametrized(owner, last):
                if name not in self.computed:
                    raise self.skip(f"{name} is computed at each call now")
                values[name] = getattr(owner, last)
        return values  # type: ignore[no-any-return]

    def watch(self, module: nn.Module) -> Watch:
        """Whether a module still is what this was made for. Raises as `Watch` does."""
        return Watch(self.settings, module, self.types, self.compiled.binder.names)

    def precompile(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rounds: list[list[str]]
    ) -> None:
        """Makes the kernels ready that such a call needs, and those of its backward; see `CompiledRegion.precompile`."""
        if rounds:  # gradients of what is computed are wanted for what it is computed from
            rounds = [*rounds[:-1], [*rounds[-1], *self.computed]]
        with torch.no_grad():
            self._run(module, _Ready(self, module, rounds), args, kwargs)

    def _run(self, module: nn.Module, moe: Moe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        enabled, tensors = torch.is_grad_enabled(), pytree.tree_leaves((args, kwargs))
        try:
            with selecting(self.compiled.kernels, tensors, self.region.d_model, self.region.experts):
                outputs = self.forward(module, moe, *tensors)
        finally:
            torch.set_grad_enabled(enabled)
        return self.structure.put_together(outputs)


class Moe:
    """The `moe` of a canonical block: its routed part, bound to the block's parameters as they are now."""

    def __init__(self, variant: Variant, module: nn.Module, watch: Watch | None = None) -> None:
        self.variant, self.module, self.watch = variant, module, watch

    def routed(self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None) -> Tensor:
        """x [..., D], router values as recorded -> routed output [..., d_out]."""
        tokens, slots, weights, params = self.inputs(x, ids, w, keep)
        compiled = self.variant.compiled
        if torch.compiler.is_compiling() or (compiled.handle is not None and region_op.counted()):
            y = region_op.routed(compiled.handle, tokens, slots, weights, params)
        else:
            with outside():
                y = compiled(tokens, slots, weights, params)
        return y.reshape(*x.shape[:-1], self.variant.region.d_out)

    def begin(self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None) -> Any:
        """With experts on several ranks: `routed`, of which `end` waits for the result."""
        inputs = self.inputs(x, ids, w, keep)
        with outside():
            return x.shape[:-1], self.variant.compiled.begin(*inputs)

    def end(self, begun: Any) -> Tensor:
        """The routed output of a call that was begun."""
        lead, call = begun
        with outside():
            y: Tensor = call.end()
        return y.reshape(*lead, self.variant.region.d_out)

    def inputs(
        self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """What the compiled region takes: x [T, D], ids and w [T, K], parameters by name."""
        region = self.variant.region
        tokens = x.reshape(-1, region.d_model)
        slots, weights = region_inputs(self.variant.routing, region.experts, tokens.shape[0], ids, w, keep)
        if weights is None:
            weights = torch.ones(slots.shape, dtype=x.dtype, device=x.device)
        if self.watch is not None:
            params = self.watch.parameters()
        else:
            params = self.variant.parameters(submodules(self.module, self.variant.ways))
        return tokens, slots, weights, params


class _Ready(Moe):
    """Makes the kernels of the routed part ready in place of running it. rounds: see `CompiledRegion.precompile`."""

    def __init__(self, variant: Variant, module: nn.Module, rounds: list[list[str]]) -> None:
        super().__init__(variant, module)
        self.rounds = rounds

    def routed(self, x: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None) -> Tensor:
        self.variant.compiled.precompile(*self.inputs(x, ids, w, keep), self.rounds)
        return x.new_zeros(*x.shape[:-1], self.variant.region.d_out)


def call_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a variant is specialised on: never sizes or dtypes. Made of plain Python, which Dynamo can follow."""
    return (module.training, _kind(args), _kind(kwargs))


def _kind(x: Any) -> Any:
    """A hashable picture of an argument: ranks of tensors, plain values, the structure around them, types of the rest."""
    if isinstance(x, Tensor):
        return ("tensor", x.dim(), x.is_floating_point())
    if isinstance(x, PLAIN):
        return (type(x).__name__, x)
    if type(x) in (tuple, list):
        return (type(x).__name__, *[_kind(v) for v in x])
    if type(x) is dict:
        return ("dict", *[(k, _kind(v)) for k, v in x.items()])
    leaves, spec = pytree.tree_flatten(x)
    return (type(x).__name__, "") if spec.is_leaf() else (str(spec), *[_kind(v) for v in leaves])


@dataclass(frozen=True)
class Parameters:
    """The parameters of a forward, for a binding of arguments that Dynamo can follow (`inspect` it cannot), and is fast.

    positional, keyword: names and defaults (`inspect.Parameter.empty` where there is none), `self` left out. known: the names
    that keywords may have; None with **kwargs.
    """

    positional: tuple[tuple[str, Any], ...]
    keyword: tuple[tuple[str, Any], ...]
    known: frozenset[str] | None = None

    @staticmethod
    def of(signature: inspect.Signature) -> Parameters:
        kinds = inspect.Parameter
        named = [(p.kind, (p.name, p.default)) for p in list(signature.parameters.values())[1:]]
        positional = [p for kind, p in named if kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        known = {name for kind, (name, _) in named if kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
        any_name = any(kind is kinds.VAR_KEYWORD for kind, _ in named)
        keyword = tuple(p for kind, p in named if kind is kinds.KEYWORD_ONLY)
        return Parameters(tuple(positional), keyword, None if any_name else frozenset(known))

    def fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether `normal_form` may be asked; False also for calls that only `inspect` can bind."""
        given, missing = self.positional[: len(args)], (*self.positional[len(args) :], *self.keyword)
        return (
            len(args) <= len(self.positional)
            and (self.known is None or self.known.issuperset(kwargs))
            and not any(name in kwargs for name, _ in given)
            and not any(default is inspect.Parameter.empty and name not in kwargs for name, default in missing)
        )

    def normal_form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `probe.bind`, for arguments that fit."""
        rest = dict(kwargs)
        missing = [rest.pop(name, default) for name, default in self.positional[len(args) :]]
        named = {name: rest.pop(name, default) for name, default in self.keyword}
        return (*args, *missing), {**named, **rest}


class OwnForward:
    """What moefx puts at `module.forward`. previous: what somebody else had put there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = module.__dict__.get("forward") if foreign_forward(module) else None
        self.__signature__ = inspect.signature(types.MethodType(type(module).forward, module))  # for those who ask

    def gather(self) -> None:
        """All parameters are on this rank: nothing to do."""

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = object.__new__(type(self))  # not copy.copy: that asks __reduce__
        twin.__dict__.update(self.__dict__)
        twin.module = copy.deepcopy(self.module, memo)
        return twin

    def __reduce__(self) -> Any:
        return (_original_forward, (self.module,))


class SelectingForward(OwnForward):
    """The forward of a module that chooses experts for a rewritten block from `scores` each: as it was, but that the choice
    is made by moefx's kernel where that pays; see `moefx.selection`."""

    def __init__(self, module: nn.Module, kernels: str, scores: int) -> None:
        super().__init__(module)
        self.kernels, self.scores = kernels, scores

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with selecting(self.kernels, (*args, *kwargs.values()), None, self.scores):
            return self.original(*args, **kwargs)


class RewrittenForward(OwnForward):
    """Callable at `module.forward`. `analyse(module, args, kwargs)` makes missing variants or raises Decline."""

    def __init__(
        self, module: nn.Module, analyse: Callable[..., Variant], variants: dict[Any, Variant | Decline]
    ) -> None:
        super().__init__(module)
        self.analyse, self.variants = analyse, variants
        self.watched: dict[int, Watch] = {}
        self.failed = self.stale = False
        self.signature = inspect.signature(type(module).forward)
        self.parameters = Parameters.of(self.signature)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(args, kwargs)
        flat_args, flat_kwargs = self._normal_form(args, kwargs)
        known = len(self.variants)
        variant = self.variant_for(flat_args, flat_kwargs)
        if len(self.variants) > known and isinstance(variant, Decline):
            log.warning(
                "moefx keeps the original %s for this way of calling it: %s", type(self.module).__name__, variant
            )
        if isinstance(variant, Decline):
            return self.original(*args, **kwargs)
        if change := self._change(variant, flat_args, flat_kwargs):
            if not self.stale:  # once: it may come back, or change in every step
                kind = type(self.module).__name__
                log.warning("moefx runs the original %s while it is not what it was rewritten for: %s", kind, change)
            self.stale = True
            return self.original(*args, **kwargs)
        try:
            return variant.run(self.module, flat_args, flat_kwargs, self.watched[id(variant)])
        except variant.skip:
            return self.original(*args, **kwargs)
        except (AttributeError, Decline, IndexError, RuntimeError, TypeError, ValueError) as error:  # the original decides
            result = self.original(*args, **kwargs)
            if not self.failed:  # once: the original takes what the rewritten block does not
                kind, text = type(self.module).__name__, f"{type(error).__name__}: {error}"
                log.warning("moefx runs the original %s for a call that its rewritten form fails on: %s", kind, text)
                log.debug("where it failed", exc_info=error)
            self.failed = True
            return result

    def _normal_form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `probe.bind`; raises TypeError, in Python's words, where the arguments do not fit."""
        if self.parameters.fit(args, kwargs):
            return self.parameters.normal_form(args, kwargs)
        bound = self.signature.bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.args[1:]), dict(bound.kwargs)

    def _traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`__call__` as Dynamo traces it, with the variants there are by now; what chooses among them becomes guards."""
        flat_args, flat_kwargs = self.parameters.normal_form(args, kwargs)
        key = call_key(self.module, flat_args, flat_kwargs)
        for known, variant in self.variants.items():
            if known == key and isinstance(variant, Variant):
                if not self._as_analysed(variant) or self._unlike(variant, flat_args, flat_kwargs):
                    break
                try:
                    return variant.run(self.module, flat_args, flat_kwargs)
                except variant.skip:
                    break
        return self.original(*args, **kwargs)

    def _as_analysed(self, variant: Variant) -> bool:
        """No `_change`, without its memory: nothing that is stored while Dynamo traces."""
        try:
            modules = submodules(self.module, variant.ways)
            for setting in variant.settings:
                if not setting.same(modules):
                    return False
        except KeyError:
            return False
        return not self._hooked(variant, modules)

    def variant_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant | Decline:
        """The variant for this way of calling, analysed now if it is new."""
        key = call_key(self.module, args, kwargs)
        if key not in self.variants and len(self.variants) >= MAX_VARIANTS:
            return Decline(f"it is called in more than {MAX_VARIANTS} different ways")
        if key not in self.variants:
            try:
                self.variants[key] = self.analyse(self.module, args, kwargs)
            except Decline as reason:
                self.variants[key] = reason.alone()
            except Exception as error:
                log.exception("moefx failed on %s", type(self.module).__name__)
                self.variants[key] = Decline(f"moefx itself failed: {type(error).__name__}: {error}")
        return self.variants[key]

    def _change(self, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What is not as it was in the analysis: a plain value that the block takes from somewhere (a scale, a top_k, the mode of a
        submodule), what this call has, a submodule. Nothing where all is."""
        watch = self.watched.get(id(variant))
        if watch is None or watch.moved():
            try:
                watch = self.watched[id(variant)] = variant.watch(self.module)
            except (KeyError, TypeError) as error:
                return f"it was rearranged ({error})"
        if watch.changed():
            return str(watch)
        if change := self._unlike(variant, args, kwargs):
            return change
        return "" if watch.untouched() else self._hooked(variant, submodules(self.module, variant.ways))

    def _unlike(self, variant: Variant, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """What this call has that its code may branch on, and the analysis had not; nothing where there is none."""
        if variant.modes and (mode := mode_on(variant.modes)):
            return f"its code asks for {mode}, which it was rewritten without"
        if variant.dtypes and (now := dtypes(self.module, args, kwargs)) != variant.dtypes:
            return f"its code names dtypes, and was rewritten for {list(variant.dtypes)}; now there are {list(now)}"
        return ""

    def _hooked(self, variant: Variant, modules: dict[str, nn.Module]) -> str:
        """A submodule whose work the region took over, and that only the original can honour: with hooks, or another one."""
        for path, kind in variant.types:
            child = modules[path]
            if class_of(child) is not kind:
                return f"{path} is a {type(child).__name__} and was a {kind.__name__}"
            if "forward" in child.__dict__ and foreign_forward(child):
                return f"{path} has a forward of its own"
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return f"{path} has hooks"
        return ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin.variants, twin.watched = dict(self.variants), {}
        return twin


def _original_forward(module: nn.Module) -> Any:
    """A pickled model comes back unoptimised."""
    return types.MethodType(type(module).forward, module)


def rewritten(module: nn.Module) -> RewrittenForward | None:
    """The rewriting in place at a module, if any."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, RewrittenForward) else None


def foreign_forward(module: nn.Module) -> bool:
    """Whether somebody else put a forward on this instance. What torch.compile made of a module has one, and runs the module's."""
    own = module.__dict__.get("forward")
    if own is None or isinstance(own, OwnForward) or hasattr(module, "_orig_mod"):
        return False
    return getattr(own, "__func__", None) is not type(module).forward


class Replicas:
    """At `module._replicate_for_data_parallel`, which torch.nn.DataParallel calls: what stands at `module.forward` is for the
    parameters of this module, and would be the replicas', too. They run the module's own code."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.said = module, False

    def __call__(self) -> nn.Module:
        replica: nn.Module = type(self.module)._replicate_for_data_parallel(self.module)
        del replica.__dict__["_replicate_for_data_parallel"]
        forward = replica.__dict__.pop("forward")
        if forward.previous is not None:
            replica.__dict__["forward"] = forward.previous
        if not self.said:
            kind = type(self.module).__name__
            log.warning("moefx leaves replicas of torch.nn.DataParallel as they are (%s): DistributedDataParallel has none", kind)
        self.said = True
        return replica

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return Replicas(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return (_original_replicas, (self.module,))


def _original_replicas(module: nn.Module) -> Any:
    return types.MethodType(type(module)._replicate_for_data_parallel, module)


def install(module: nn.Module, forward: OwnForward) -> None:
    module.__dict__.update(forward=forward, _replicate_for_data_parallel=Replicas(module))


def uninstall(module: nn.Module) -> bool:
    """Gives a module its own forward back; False if it had it."""
    module.__dict__.pop("_replicate_for_data_parallel", None)
    forward = own = module.__dict__.get("forward")
    if not isinstance(forward, OwnForward):
        if getattr(own, "__func__", None) is type(module).forward:  # what a pickled rewriting turned into
            del module.__dict__["forward"]
        return False
    if forward.previous is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward.previous
    return True
