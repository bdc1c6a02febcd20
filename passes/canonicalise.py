"""canonicalise: Hypothesis --> a torch.fx graph of the block in which the routed part is one node.

    y = moe.routed(x, ids, w)

before:  router -> any spelling of dispatch, experts, combine -> the rest
after:   router -> moe.routed(x, ids, w) -> the rest

The router and the rest stay torch-level nodes as the user wrote them; submodules there stay module calls, so their hooks
fire and their buffers update. What only served the experts is gone: liveness from the block's results says what that is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from moefx import sizes
from moefx.errors import Decline
from moefx.routing import Hypothesis
from moefx.structure import Structure
from moefx.trace import Call, ModuleCall, Trace, Value, rebuild, values_in

SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device)

UNSEEN = (
    "the block uses a tensor that no torch function made (of a global, a list or the like), of which changes are not seen: "
    "make it a buffer"
)
OF_FLOAT64 = {getattr(torch.finfo(torch.float64), name): name for name in ("min", "max", "eps", "tiny")}  # in a probe's dtype


class GuardFailed(Exception):
    """The rewritten block met sizes for which its Python code would have branched differently."""


def check_size(actual: Any, recorded: Any) -> None:
    """A comparison of sizes that the block's Python code made must come out as it did while recording."""
    if actual != recorded:
        raise GuardFailed


def without_grad(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`fn` as the block called it: under torch.no_grad()."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return fn(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"no_grad_{name.strip('_')}"
    return call


@dataclass(frozen=True)
class Rewrite:
    """The canonical block. `forward(block, moe, *tensors)` returns the flat outputs; `structure` puts them together.

    kept: paths of submodules that are still called; swallowed: submodules that are not, since the region or nodes of this
    graph do their work (hooks on those can only be honoured by the original).
    """

    graph: fx.Graph
    source: str
    forward: Callable[..., Any]
    structure: Structure
    kept: tuple[str, ...]
    swallowed: tuple[str, ...]
    guards: int

    def __str__(self) -> str:
        return self.source


def canonicalise(hypothesis: Hypothesis, names: tuple[str, ...], restore_truncated: bool = True) -> Rewrite:
    """Builds the canonical graph. names: one placeholder name for each flattened input.

    restore_truncated: a plain number equal to one that int() cut from sizes is taken to be that expression.

    Raises Decline when something that stays needs what the region replaces, or when Python did what a graph cannot.
    """
    return _Builder(hypothesis, names, restore_truncated).build()


class _Builder:
    def __init__(self, hypothesis: Hypothesis, names: tuple[str, ...], restore_truncated: bool) -> None:
        self.h, self.trace, self.names = hypothesis, hypothesis.trace, names
        self.truncated = {n: expr for expr, n in self.trace.log.truncations if n > 1} if restore_truncated else {}
        self.cut = hypothesis.combined
        self.experts = {name for leaf in hypothesis.region.leaves if not leaf.shared for name in leaf.params}
        self.calls: set[Call] = set()
        self.modules: set[ModuleCall] = set()
        self.visited: set[Value] = set()
        self.graph = fx.Graph()
        self.env: dict[Value, fx.Node] = {}  # by tensor object
        self.routed: fx.Node | None = None
        self.pending = {(str(expr), outcome): (expr, outcome) for expr, outcome in self.trace.log.guards}
        self.guards = 0
        self.results = {m: {v.object for v in values_in(m.result)} for m in self.trace.module_calls}
        self.pure = {m: self._is_pure(m) for m in self.trace.module_calls}
        self.writers: dict[int, list[Call]] = {}
        for call in self.trace.calls:
            for v in call.writes:
                self.writers.setdefault(v.storage, []).append(call)

    # ------------------------------------------------------------------ what stays alive

    def _is_pure(self, module_call: ModuleCall) -> bool:
        """Whether nothing inside belongs to the region, so that the module can stay a module call."""
        calls = self.trace.calls[module_call.start : module_call.stop]
        if any(c is self.cut.producer for c in calls):
            return False
        return not any(v.origin == "param" and v.path in self.experts for c in calls for v in c.reads())

    def _is_cut(self, v: Value) -> bool:
        return v is self.cut or (v.object is self.cut.object and v.version >= self.cut.version)

    def _live(self, v: Value) -> None:
        if v in self.visited:
            return
        self.visited.add(v)
        if self._is_cut(v):
            for needed in (self.h.x, *self.h.routing.values):
                self._live(needed)
        elif v.origin == "unseen":
            raise Decline(UNSEEN)
        elif v.origin == "param" and v.path in self.experts:
            raise Decline(f"something besides the combined output still needs the experts' parameter {v.path}")
        elif v.storage == self.cut.storage and v.version >= self.cut.version > v.object.version:
            raise Decline("the combined output is read through an alias made before it was complete")
        elif v.object.producer is not None:
            self._live_call(v.object.producer, v.object)
        for writer in self.writers.get(v.storage, []):
            for w in writer.writes:
                after_cut = not self._is_cut(v) or w.version > self.cut.version
                if w.storage == v.storage and v.object.version < w.version <= v.version and after_cut:
                    self._live_call(writer, w.object)

    def _live_call(self, call: Call, made: Value) -> None:
        for module_call in call.scope:
            if self.pure[module_call] and made in self.results[module_call]:
                if module_call not in self.modules:
                    self.modules.add(module_call)
                    self._live_all((module_call.args, module_call.kwargs))
                return
        if call not in self.calls:
            self.calls.add(call)
            self._live_all((call.args, call.kwargs))

    def _live_all(self, structure: Any) -> None:
        for v in values_in(structure):
            self._live(v)
        for expr in _exprs(structure, self.truncated):
            for v in _expr_values(expr):
                self._live(self._size_source(v))

    def _size_source(self, v: Value) -> Value:
        """A live tensor whose sizes stand for those of `v` (v itself, unless it belongs to the experts)."""
        if not v.tainted or self._is_cut(v):
            return v
        for other in (v.object, *self.trace.inputs):
            if isinstance(other, Value) and not other.tainted and other.shape == v.shape:
                return other
        raise Decline("a size of an expert's tensor is needed outside of the experts")

    def _all_live(self) -> None:
        """Liveness from the block's results. A module of which inner values are needed too is opened up."""
        while True:
            self.calls, self.modules, self.visited = set(), set(), set()
            for v in self.trace.result[0]:
                if isinstance(v, Value):
                    self._live(v)
            if not any(self._is_cut(v) for v in self.visited):
                raise Decline("the block's results do not depend on the combined output")
            self._live_all(self.trace.result[0])
            for call in self.trace.calls:  # buffers that the block updates keep updating
                if any(v.object.origin == "buffer" for v in call.writes) and not any(v.tainted for v in call.reads()):
                    for v in call.writes:
                        self._live_call(call, v.object)
            opened = [m for m in self.modules for c in self.calls if m.start <= c.index < m.stop]
            if not opened:
                return
            for m in opened:
                self.pure[m] = False

    def _check(self) -> None:
        kept = {m.path for m in self.modules}
        for path, name in self.trace.side_effects:
            if not any(path == k or path.startswith(k + ".") for k in kept):
                what = name.replace("self.", f"self.{path}.", 1) if path else name
                raise Decline(f"the block's forward changes {what}: a Python side effect that a graph cannot keep")
        for v in (x for x in self.trace.result[0] if not isinstance(x, Value)):
            if not isinstance(v, SIMPLE):
                raise Decline(f"the block returns a {type(v).__name__}, whose tensors cannot be followed")
        self._check_unseen()
        self._check_branches()

    def _check_unseen(self) -> None:
        """Tensors that the block holds where nobody sees a change of them may not have gone into the region as numbers."""
        inside = [range(m.start, m.stop) for m in self.modules]
        for call in self.trace.calls:
            if any(v.origin == "unseen" and not v.tainted for v in call.reads()) and not any(call.index in r for r in inside):
                raise Decline(UNSEEN, location=call.location)

    def _check_branches(self) -> None:
        """Python may look at values only to steer the experts: at what descends from the router, not at the tokens."""
        routing = list(self.h.routing.values)
        tokens = self._ancestors([self.h.x])
        steering = (self._ancestors(routing) | set(routing)) - tokens - {self.h.x}
        inside = [range(m.start, m.stop) for m in self.modules]
        for call in self.trace.calls:
            reads = call.reads()
            if call.reads_host:
                fine = any(v in steering or v.tainted for v in reads) or any(call.index in r for r in inside)
                if not fine and reads and not all(v.origin in ("param", "buffer", "attr") for v in reads):
                    raise Decline(
                        f"Python reads values of the tokens ({call.name}) and may branch on them",
                        location=call.location,
                    )
            elif any(v in steering or v.object in steering for v in reads):
                steering.update(call.makes())

    def _ancestors(self, values: list[Value]) -> set[Value]:
        found: set[Value] = set()
        stack = list(values)
        while stack:
            v = stack.pop()
            for u in v.producer.reads() if v.producer is not None else ():
                if u not in found:
                    found.add(u)
                    stack.append(u)
        return found

    # ------------------------------------------------------------------ writing the graph

    def build(self) -> Rewrite:
        self._all_live()
        self._check()
        self.moe = self.graph.placeholder("moe")
        for name, v in zip(self.names, self.trace.inputs):
            node = self.graph.placeholder(name)
            if isinstance(v, Value):
                self.env[v.object] = node
        self._write_guards()
        for _, write in sorted(self._events(), key=lambda e: e[0]):
            write()
            self._write_guards()
        self.graph.output([self._argument(v) for v in self.trace.result[0]])
        self.graph.lint()
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, "<moefx canonical block>", "exec"), namespace)
        kept = tuple(sorted({m.path for m in self.modules}))
        called = {m.path for m in self.trace.module_calls}
        swallowed = tuple(sorted(p for p in called if not any(p == k or p.startswith(k + ".") for k in kept)))
        return Rewrite(
            self.graph, code.src.strip(), namespace["forward"], self.trace.result[1], kept, swallowed, self.guards
        )

    def _events(self) -> Iterator[tuple[tuple[int, int], Callable[[], None]]]:
        for call in self.calls:
            yield (call.index, 1), partial(self._write_call, call)
        for module_call in self.modules:
            yield (module_call.start, 0), partial(self._write_module, module_call)
        producer = self.cut.producer
        yield (producer.index if producer is not None else 0, 2), self._write_region

    def _write_region(self) -> None:
        routing, x = self.h.routing, self._object(self.h.x)
        ids = None if routing.ids is None else self._object(routing.ids)
        w = None if routing.w is None else self._object(routing.w)
        keep = () if routing.keep is None else (self._object(routing.keep),)
        node = self.graph.call_method("routed", (self.moe, x, ids, w, *keep))
        lead, out = tuple(self.h.x.shape[:-1]), self.h.region.d_out
        target = tuple(self.cut.shape)
        if target != (*lead, out):
            node = self.graph.call_method("reshape", (node, *self._leading(target), out))
        if self.cut.tensor.dtype != self.h.x.tensor.dtype:
            node = self.graph.call_method("to", (node, self._literal(self.cut.tensor.dtype)))
        self.env[self.cut.object] = self.routed = node

    def _leading(self, target: tuple[int, ...]) -> list[Any]:
        if len(target) == 2:
            return [-1]
        for v in self.trace.inputs:
            if isinstance(v, Value) and tuple(v.shape[: len(target) - 1]) == target[:-1]:
                return [self.graph.call_method("size", (self.env[v.object], d)) for d in range(len(target) - 1)]
        raise Decline(f"the combined output has shape {target}, which is not explained by the inputs' sizes")

    def _write_call(self, call: Call) -> None:
        args, kwargs = self._argument(call.args), self._argument(call.kwargs)
        kind, target, args = _target(call, args)
        if not call.grad_enabled:
            fn = target if kind == "call_function" else getattr(torch.Tensor, target)
            kind, target = "call_function", without_grad(fn, call.name)
        self._bind(call.result, self.graph.create_node(kind, target, tuple(args), kwargs))

    def _write_module(self, module_call: ModuleCall) -> None:
        args, kwargs = self._argument(module_call.args), self._argument(module_call.kwargs)
        self._bind(module_call.result, self.graph.call_module(module_call.path, args, kwargs))

    def _bind(self, result: Any, node: fx.Node) -> None:
        """Names the Values inside a (nested) result."""
        if isinstance(result, Value):
            self.env.setdefault(result.object, node)
            if result.object is result:
                self.env[result] = node
        elif isinstance(result, dict):
            for k, part in result.items():
                if values_in(part):
                    self._bind(part, self.graph.call_function(operator.getitem, (node, k)))
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                if values_in(part):
                    self._bind(part, self.graph.call_function(operator.getitem, (node, i)))

    def _object(self, v: Value) -> fx.Node:
        if self._is_cut(v) and self.routed is not None:
            return self.routed
        node = self.env.get(v.object)
        if node is None:
            if v.origin not in ("param", "buffer", "attr"):
                raise Decline(f"value {v} is used before it is made")
            node = self.env[v.object] = self.graph.create_node("get_attr", v.path)
        return node

    def _argument(self, structure: Any) -> Any:
        return rebuild(structure, self._literal)

    def _literal(self, x: Any) -> Any:
        if isinstance(x, Value):
            return self._object(x)
        if isinstance(x, (sizes.Size, sizes.Fraction)):
            return self._expression(x.expr) if _expr_values(x.expr) else sizes.plain(x)
        if type(x) is int and x in self.truncated:
            return self._expression(self.truncated[x])
        if x is torch.float64:
            return self._model("dtype")
        if type(x) is float and x in OF_FLOAT64:
            limits = self.graph.call_function(torch.finfo, (self._model("dtype"),))
            return self.graph.call_function(getattr, (limits, OF_FLOAT64[x]))
        if isinstance(x, torch.device) or x == "cpu" and isinstance(x, str):
            return self._model("device")
        if isinstance(x, Tensor):
            raise Decline("a constant tensor is hidden inside an argument")
        return x

    def _model(self, attribute: str) -> fx.Node:
        """The dtype (or device) that the block runs in: the one of its first float input."""
        tensors = [v for v in self.trace.inputs if isinstance(v, Value)]
        floats = [v for v in tensors if v.tensor.is_floating_point()]
        params = [v for v in self.trace.values if v.origin == "param"]
        source = floats[0] if floats else (params[0] if params and attribute == "dtype" else tensors[0])
        return self.graph.call_function(getattr, (self._object(source), attribute))

    def _expression(self, expr: sizes.Expr) -> Any:
        if expr.fn is sizes.size_of:
            v, dim = expr.args
            return self.graph.call_method("size", (self._object(self._size_source(v)), dim))
        if expr.fn is float:
            return expr.args[0]
        args = tuple(self._expression(a) if isinstance(a, sizes.Expr) else a for a in expr.args)
        return self.graph.call_function(expr.fn, args)

    def _write_guards(self) -> None:
        """The guards whose values the graph has by now, each as early as it can be. Sizes of the experts' tensors depend
        on the routing, and what else the graph does not have nobody needs: these are no guards."""
        for key, (expr, outcome) in list(self.pending.items()):
            if all(not v.tainted and v.object in self.env for v in _expr_values(expr)):
                del self.pending[key]
                self.guards += 1
                self.graph.call_function(check_size, (self._expression(expr), outcome))


def _target(call: Call, args: Any) -> tuple[str, Any, Any]:
    """fx's node kind, target and arguments for a recorded call."""
    owner = getattr(call.func, "__self__", None)
    if call.name in ("__getitem__", "__setitem__") and getattr(torch.Tensor, call.name) is call.func:
        return "call_function", getattr(operator, call.name.strip("_")), args
    if owner is not None and type(owner).__name__ == "getset_descriptor":
        return "call_function", getattr, (args[0], owner.__name__)
    if getattr(torch.Tensor, call.name, None) is call.func:
        return "call_method", call.name, args
    return "call_function", call.func, args


def _exprs(structure: Any, truncated: dict[int, sizes.Expr]) -> list[sizes.Expr]:
    found: list[sizes.Expr] = []

    def leaf(x: Any) -> Any:
        if isinstance(x, (sizes.Size, sizes.Fraction)):
            found.append(x.expr)
        elif type(x) is int and x in truncated:
            found.append(truncated[x])
        return x

    rebuild(structure, leaf)
    return found


def _expr_values(expr: sizes.Expr) -> list[Value]:
    return [
        v
        for a in expr.args
        for v in (_expr_values(a) if isinstance(a, sizes.Expr) else [a] if isinstance(a, Value) else [])
    ]


def placeholder_names(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[str]) -> tuple[str, ...]:
    """A readable name for each flattened input: the parameter's name, numbered where one holds several leaves."""
    named = list(zip(parameters, args)) + list(kwargs.items())
    names: list[str] = []
    for i, value in enumerate([*args, *kwargs.values()]):
        name = named[i][0] if i < len(named) else f"arg{i}"
        count = len(pytree.tree_leaves(value))
        names += [name] if count == 1 else [f"{name}_{j}" for j in range(count)]
    return tuple(names)


__all__ = ["GuardFailed", "Rewrite", "Trace", "canonicalise", "placeholder_names"]
