"""splice: Hypothesis + the nodes of a graph that Dynamo made --> what must change in that graph.

The other entrance of the pipeline: not a module, but a part of an fx graph is analysed. The part runs as a module, `Block`,
so that capture and find see what they always see; what they found is then linked to nodes by the identity of probe values,
and only there the graph is changed. Everything else stays as Dynamo recorded it: autograd, symbolic sizes, in-place nodes.

    before:  router nodes -> any spelling of dispatch, experts, combine -> the rest
    after:   router nodes -> one call                                   -> the rest
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from moefx.errors import Decline
from moefx.routing import Hypothesis
from moefx.trace import Value

CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


# ------------------------------------------------------------------------------------------------ a part of a graph


@dataclass(frozen=True)
class Part:
    """Some nodes of a graph, in order, and what enters and leaves them.

    inputs: tensors; params: the user's parameters; sizes: integers, which follow from the sizes of the inputs; others:
    numbers and objects of any other kind. outputs: nodes that something outside of the part reads.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    params: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def all_nodes(self) -> tuple[fx.Node, ...]:
        """Entering nodes first: equal positions in parts of equal structure correspond."""
        return (*self.inputs, *self.params, *self.sizes, *self.others, *self.nodes)

    @cached_property
    def structure(self) -> Any:
        """Equal for parts that compute the same function of what enters them. As it was when it was first asked for: changes of
        other parts may replace nodes that enter this one."""
        place = {n: i for i, n in enumerate(self.all_nodes)}

        def show(x: Any) -> Any:
            if isinstance(x, fx.Node):
                return f"%{place[x]}"
            if isinstance(x, (tuple, list)):
                return (type(x).__name__, *map(show, x))
            if isinstance(x, dict):
                return tuple((k, show(v)) for k, v in x.items())
            if isinstance(x, slice):
                return ("slice", show(x.start), show(x.stop), show(x.step))
            return repr(x)

        entering = tuple(_meta_text(n) for n in (*self.inputs, *self.params, *self.sizes, *self.others))
        program = tuple(
            (n.op, n.target if n.op != "get_attr" else id(n), show(n.args), show(n.kwargs)) for n in self.nodes
        )
        counts = tuple(map(len, (self.inputs, self.params, self.sizes, self.others)))
        return (counts, entering, program, tuple(place[n] for n in self.outputs))


@dataclass(frozen=True)
class FixedSizes:
    """The token sizes of a part that Dynamo recorded with plain numbers, so that it can run on other sizes all the same.

    A number in the part's nodes that is a token size, or all tokens times one of `slots` (slots per token), stands for
    what it would be. sizes: token sizes, each with an input and a dimension that has it, in `places`.
    """

    sizes: tuple[int, ...]
    places: tuple[tuple[int, int], ...]
    slots: tuple[int, ...]

    FEW = 256  # tokens: running them as they are costs nothing
    SMALL = 8  # numbers up to this one are dimensions, signs and counts; token sizes among them only beside a larger one

    @staticmethod
    def of(part: Part) -> FixedSizes | None:
        """None where no size needs it, or where a number in the part may mean something else: a capacity, a width."""
        inputs = [value_of(n) for n in part.inputs]
        if part.sizes or any(isinstance(n, torch.SymInt) for t in inputs for n in t.shape):
            return None
        floats = [(i, t) for i, t in enumerate(inputs) if t.is_floating_point() and t.dim() >= 2]
        places = {n: (i, d) for i, t in reversed(floats) for d, n in enumerate(t.shape[:-1])}
        if not places or math.prod(places) <= FixedSizes.FEW or any(len({*t.shape[:-1]}) < t.dim() - 1 for _, t in floats):
            return None
        made = [t for t in map(value_of, (*part.inputs, *part.nodes)) if isinstance(t, Tensor) and t.dim() >= 2]
        slots = {1, *(t.shape[-1] for t in made if not t.is_floating_point() and isinstance(t.shape[-1], int))}
        fixed = FixedSizes(tuple(places), tuple(places.values()), tuple(sorted(slots)))
        widths = {n for node in part.params for n in value_of(node).shape} | {t.shape[-1] for t in inputs if t.dim()}
        known = {n + by for n in widths for by in (-1, 0, 1)}
        numbers = {abs(n) for node in part.nodes for n in _numbers(node)}
        meant = fixed._meant(fixed.sizes).keys()
        ambiguous = {n for n in meant & known & numbers if n > FixedSizes.SMALL}
        explained = all(n in meant or n in known or n <= FixedSizes.SMALL for n in numbers)
        return fixed if explained and not ambiguous else None

    def _meant(self, sizes: Sequence[int]) -> dict[int, int]:
        now, then = math.prod(self.sizes), math.prod(sizes)
        return {**dict(zip(self.sizes, sizes)), **{now * k: then * k for k in self.slots}}

    def of_inputs(self, inputs: Sequence[Tensor]) -> list[int]:
        """The token sizes of other inputs."""
        return [inputs[i].shape[d] for i, d in self.places]

    def replacing(self, node: fx.Node, sizes: Sequence[int]) -> dict[int, int]:
        """What to put in place of the numbers of a node when the token sizes are these."""
        meant = self._meant(sizes)
        large = {n: m for n, m in meant.items() if n > self.SMALL}
        return meant if large.keys() & set(_numbers(node)) else large


def _numbers(node: fx.Node) -> list[int]:
    """The integers among the arguments of a node."""
    found: list[int] = []
    fx.node.map_aggregate(
        (node.args, dict(node.kwargs)), lambda x: found.append(x) if isinstance(x, int) and not isinstance(x, bool) else None
    )
    return found


def value_of(node: fx.Node) -> Any:
    """What Dynamo knows of a node's value: a fake tensor, a number that may be symbolic."""
    return node.meta.get("example_value", node.meta.get("val"))


def _meta_text(node: fx.Node) -> str:
    value = value_of(node)
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(str(s) for s in value.shape)}"
    return f"{type(value).__name__} {value}"


def part_of(name: str, nodes: Iterable[fx.Node], is_param: Callable[[fx.Node], bool]) -> Part:
    """The part made of `nodes`, with the nodes that compute something from parameters alone for it.

    Raises Decline when something that enters depends on the part itself.
    """
    inside = dict.fromkeys(n for n in nodes if not _of_sizes(n))
    if not inside:
        raise Decline("nothing but sizes")
    graph = next(iter(inside)).graph
    order = {n: i for i, n in enumerate(graph.nodes)}
    entering: dict[fx.Node, None] = {}
    pending = list(inside)
    constant: dict[fx.Node, bool] = {}
    while pending:
        node = pending.pop()
        for source in node.all_input_nodes:
            if source in inside:
                continue
            if source.op != "placeholder" and not is_param(source) and _constant(source, is_param, constant):
                inside[source] = None
                pending.append(source)
            else:
                entering[source] = None
    members = tuple(sorted(inside, key=order.__getitem__))
    first, after = order[members[0]], set(members)
    for node in list(graph.nodes)[first:]:
        if node not in after and any(source in after for source in node.all_input_nodes):
            after.add(node)
    if any(n in after and not _of_sizes(n) for n in entering):
        raise Decline("what enters this part of the graph depends on the part itself")
    used = dict.fromkeys(source for n in members for source in n.all_input_nodes if source in entering)
    entered = list(used)  # in the order of their first use, which equal structures share
    params = tuple(n for n in entered if is_param(n))
    tensors = tuple(n for n in entered if isinstance(value_of(n), Tensor) and n not in params)
    sizes = tuple(filter(_of_sizes, entered))
    others = tuple(n for n in entered if n not in params and n not in tensors and n not in sizes)
    outputs = tuple(n for n in members if any(user not in inside for user in n.users))
    return Part(name, members, tensors, params, sizes, others, outputs)


def _of_sizes(node: fx.Node) -> bool:
    """Whether a node is a size that is known before the graph runs: it enters a part, however many parts share it."""
    value = value_of(node)
    number = isinstance(value, (int, torch.SymInt, torch.Size)) and not isinstance(value, bool)
    return number and not free_unbacked_symbols(value)


def _constant(node: fx.Node, is_param: Callable[[fx.Node], bool], known: dict[fx.Node, bool]) -> bool:
    """Whether a node is made of parameters and constants alone."""
    if node not in known:
        known[node] = (
            is_param(node)
            or node.op == "get_attr"
            or node.op in ("call_function", "call_method")
            and bool(node.all_input_nodes)
            and isinstance(value_of(node), (Tensor, tuple, list))
            and all(_constant(source, is_param, known) for source in node.all_input_nodes)
        )
    return known[node]


# ------------------------------------------------------------------------------------------------ a part that runs


@dataclass
class Made:
    """A tensor that a node made or wrote, as it was then."""

    node: fx.Node
    tensor: Tensor
    storage: int
    version: int
    snapshot: Tensor
    written: bool


@dataclass
class Record:
    """What one run of a part made, node by node. weights: the storages of its parameters, views of which are not copied."""

    inputs: tuple[Tensor, ...] = ()
    weights: frozenset[int] = frozenset()
    made: list[Made] = field(default_factory=list)

    def note(self, node: fx.Node, result: Any, operands: Sequence[tuple[Tensor, int]]) -> None:
        """operands: the node's tensors with their versions before it ran."""
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.no_grad():
            written = [t for t, version in operands if t._version != version]
            results = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and not any(t is w for w in written)]
            for tensor, is_write in [*((t, True) for t in written), *((t, False) for t in results)]:
                storage = tensor.untyped_storage()._cdata
                snapshot = tensor.detach() if storage in self.weights and not is_write else tensor.detach().clone()
                self.made.append(Made(node, tensor, storage, tensor._version, snapshot, is_write))


class Block(nn.Module):
    """A part of a graph as a module: `block(*inputs) -> outputs`. Parameters are called p0, p1, ... in the part's order.

    attributes: what get_attr nodes name; dtypes: what to put in place of a dtype that the graph names; device: in place of
    any device; others: values of what enters beside tensors and sizes; sizes: numbers that follow the inputs' sizes.
    """

    def __init__(
        self,
        part: Part,
        params: Sequence[Tensor],
        attributes: nn.Module,
        others: dict[fx.Node, Any],
        dtypes: dict[torch.dtype, torch.dtype] | None = None,
        device: torch.device | None = None,
        sizes: FixedSizes | None = None,
    ) -> None:
        super().__init__()
        for i, p in enumerate(params):
            self.register_parameter(f"p{i}", p if isinstance(p, nn.Parameter) else nn.Parameter(p, requires_grad=False))
        self._part, self._attributes, self._others = part, (attributes,), others
        self._dtypes, self._device, self._fixed = dtypes or {}, device, sizes
        self.listener: Callable[[Record], None] | None = None  # is given the record of each run

    def forward(self, *inputs: Tensor) -> Any:
        if self.listener is None:
            return self.run(inputs)
        record = Record(inputs, frozenset(p.untyped_storage()._cdata for p in self.parameters()))
        self.listener(record)
        return self.run(inputs, record=record)

    def run(self, inputs: Sequence[Tensor], change: Change | None = None, record: Record | None = None) -> Any:
        """The part's outputs; with the change made; with everything made noted in `record`."""
        part = self._part
        env: dict[fx.Node, Any] = dict(zip(part.inputs, inputs))
        env.update((n, getattr(self, f"p{i}")) for i, n in enumerate(part.params))
        with torch._C.DisableTorchFunction():  # nothing here belongs to what is recorded
            env.update(_sizes(part, inputs))
            sizes = self._fixed.of_inputs(inputs) if self._fixed else []
        env.update(self._others)
        enabled = torch.is_grad_enabled()
        try:
            for node in part.nodes:
                if change is None or node not in change.dead:
                    env[node] = self._execute(node, env, sizes, record)
                if change is not None and node is change.after:
                    y = change.call(*(None if n is None else env[n] for n in change.arguments))
                    env.update((n, y) for n in change.replaced)
        finally:
            torch.set_grad_enabled(enabled)
        return tuple(env[n] for n in part.outputs)

    def _execute(self, node: fx.Node, env: dict[fx.Node, Any], sizes: list[int], record: Record | None) -> Any:
        """sizes: the token sizes of this run, where the part's own are plain numbers."""
        if node.op == "get_attr":
            result: Any = self._attributes[0]
            for name in str(node.target).split("."):
                result = getattr(result, name)
            if isinstance(result, Tensor) and self._device is not None:
                result = result.to(self._device, self._dtypes.get(result.dtype, result.dtype))
            return result
        given: Any = (node.args, dict(node.kwargs))
        if self._fixed is not None and (numbers := self._fixed.replacing(node, sizes)):
            given = fx.node.map_aggregate(given, lambda x: numbers.get(x, x) if type(x) is int else x)
        args, kwargs = fx.node.map_arg(given, env.__getitem__)
        if (self._dtypes or self._device) and not _asks(node):
            args, kwargs = fx.node.map_aggregate((args, dict(kwargs)), self._constant)
        function = self._function(node, record is not None)
        operands: list[tuple[Tensor, int]] = []
        if record is not None:
            with torch._C.DisableTorchFunction():
                operands = [(t, t._version) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = function(*args, **kwargs)
        if record is not None:
            record.note(node, result, operands)
        return result

    def _function(self, node: fx.Node, opened: bool) -> Callable[..., Any]:
        if node.op == "call_method":
            name = str(node.target)
            dtype = CASTS.get(name)
            if dtype is not None and dtype in self._dtypes:
                return lambda t: t.to(self._dtypes[dtype])
            if name in ("cuda", "cpu") and self._device is not None:
                return lambda t, *_a, **_k: t.to(self._device)
            return lambda t, *a, **k: getattr(t, name)(*a, **k)
        if node.op != "call_function":
            raise Decline(f"a node of kind {node.op} ({node.target}) cannot be followed")
        return opened_operator(node.target) if opened else node.target  # type: ignore[return-value, arg-type]

    def _constant(self, x: Any) -> Any:
        if isinstance(x, torch.dtype):
            return self._dtypes.get(x, x)
        if self._device is not None and (isinstance(x, torch.device) or isinstance(x, str) and x.startswith("cuda")):
            return self._device
        return x


def _asks(node: fx.Node) -> bool:
    """Whether a node asks about the machine that the graph is for, as `torch.cuda.get_device_capability(device)` does."""
    value = value_of(node)
    return not node.all_input_nodes and value is not None and not any(isinstance(v, Tensor) for v in pytree.tree_leaves(value))


def opened_operator(target: Any) -> Any:
    """For an operator that somebody wrote in Python (`torch.library.custom_op`) its function: what it does can be seen."""
    packet = getattr(target, "overloadpacket", target)
    name = getattr(packet, "_qualified_op_name", "")
    known = torch._library.custom_ops.OPDEFS.get(name)
    return target if known is None else known._init_fn


def _sizes(part: Part, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """The sizes that enter a part, from the sizes of the tensors that do. Raises Decline where they do not follow."""
    if not part.sizes:
        return {}
    known: dict[sympy.Symbol, int] = {}
    equations = [
        (size.node.expr, tensor.shape[d])
        for node, tensor in zip(part.inputs, inputs)
        for d, size in enumerate(value_of(node).shape)
        if isinstance(size, torch.SymInt)
    ]
    for expr, actual in sorted(equations, key=lambda e: len(e[0].free_symbols)):
        *free, last = sorted(expr.subs(known).free_symbols, key=str) or [None]
        if last is not None:  # only their combination is seen: one of them stands for it
            known.update(dict.fromkeys(free, 1))
            roots = [r for r in sympy.solve(expr.subs(known) - int(actual), last) if r.is_Integer and r >= 0]
            if len(roots) == 1:
                known[last] = int(roots[0])

    def number(size: Any) -> int:
        known_size = sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size).subs(known)
        if not known_size.is_Integer:
            raise Decline(f"the size {size} does not follow from the tensors that enter")
        return int(known_size)

    values = {node: value_of(node) for node in part.sizes}
    return {n: torch.Size(map(number, v)) if isinstance(v, torch.Size) else number(v) for n, v in values.items()}


# ------------------------------------------------------------------------------------------------ the change


@dataclass(frozen=True)
class Change:
    """Behind the node `after` stands y = call(*arguments); y takes the place of the nodes `replaced`; `dead` go.

    arguments: nodes, or None where the call takes nothing.
    """

    after: fx.Node
    replaced: tuple[fx.Node, ...]
    arguments: tuple[fx.Node | None, ...]
    call: Callable[..., Tensor]
    dead: frozenset[fx.Node]

    def placed(self, part: Part) -> Placed:
        """The change by the positions of its nodes in the part."""
        place = {n: i for i, n in enumerate(part.all_nodes)}
        return Placed(
            place[self.after],
            tuple(place[n] for n in self.replaced),
            tuple(None if n is None else place[n] for n in self.arguments),
            self.call,
            frozenset(place[n] for n in self.dead),
        )


@dataclass(frozen=True)
class Placed:
    """A change of every part of one structure: positions in `Part.all_nodes` in place of a `Change`'s nodes."""

    after: int
    replaced: tuple[int, ...]
    arguments: tuple[int | None, ...]
    call: Callable[..., Tensor]
    dead: frozenset[int]

    def in_part(self, part: Part) -> Change:
        """The change of this part, which is of the structure that the change was made for."""
        nodes = part.all_nodes
        return Change(
            nodes[self.after],
            tuple(nodes[i] for i in self.replaced),
            tuple(None if i is None else nodes[i] for i in self.arguments),
            self.call,
            frozenset(nodes[i] for i in self.dead),
        )


@dataclass(frozen=True)
class Roles:
    """The nodes that play the roles of a hypothesis. after: the one that completed the combined output."""

    x: fx.Node
    ids: fx.Node | None
    w: fx.Node | None
    keep: fx.Node | None
    combined: tuple[fx.Node, ...]
    after: fx.Node


def link(hypothesis: Hypothesis, part: Part, record: Record) -> Roles:
    """Finds the nodes that hold the values of a hypothesis: the same storage at the same version, and bit for bit equal.

    record: of the run that the hypothesis was found in. Raises Decline when a value has no node of its own.
    """
    entering = [
        Made(n, t, t.untyped_storage()._cdata, t._version, t.detach(), False) for n, t in zip(part.inputs, record.inputs)
    ]
    known = [*entering, *record.made]
    order = {n: i for i, n in enumerate(part.all_nodes)}

    def equal(m: Made, v: Value) -> bool:
        same = m.snapshot.dtype == v.tensor.dtype and m.snapshot.numel() == v.tensor.numel()
        return same and torch.equal(m.snapshot.reshape(-1), v.tensor.reshape(-1))

    def holder(v: Value) -> Made:
        found = [m for m in known if (m.storage, m.version) == (v.storage, v.version) and m.snapshot.shape == v.shape]
        found = [m for m in found if equal(m, v)] or [m for m in known if m.snapshot.shape == v.shape and equal(m, v)]
        if not found:
            raise Decline(f"no node of the graph holds the value {v!r} that the region needs")
        return found[0]

    def of_object(m: Made) -> list[fx.Node]:
        """Nodes whose result is this very tensor, whatever was written into it later."""
        place = _place(m.tensor)
        return [n.node for n in known if _is_result(n) and n.storage == m.storage and _place(n.tensor) == place]

    combined = holder(hypothesis.combined)
    objects = tuple(dict.fromkeys(n for n in of_object(combined) if order[n] <= order[combined.node]))
    if not objects:
        raise Decline("no node of the graph is the combined output")

    def before(v: Value | None) -> fx.Node | None:
        if v is None:
            return None
        m = holder(v)
        nodes = [n for n in of_object(m) if order[n] <= order[combined.node]]
        later = [n for n in record.made if n.written and n.storage == m.storage and n.version > m.version]
        if not nodes or any(order[n.node] < order[combined.node] for n in later):
            raise Decline("a router value is overwritten before the experts have run")
        return nodes[0]

    routing = hypothesis.routing
    x = before(hypothesis.x)
    assert x is not None
    return Roles(x, before(routing.ids), before(routing.w), before(routing.keep), objects, combined.node)


def _is_result(m: Made) -> bool:
    """Whether the node's result is this tensor itself (not a tuple that holds it, not None as for an assignment)."""
    return isinstance(value_of(m.node), Tensor) and m.node.target is not operator.setitem


def _place(t: Tensor) -> tuple[Any, ...]:
    with torch._C.DisableTorchFunction():
        return (t.storage_offset(), tuple(t.shape), t.stride(), t.dtype)


def dead_nodes(part: Part, record: Record, roles: Roles, needed: Iterable[fx.Node | None]) -> frozenset[fx.Node]:
    """Nodes that only served the region: what neither leaves the part nor is needed, nor writes into what is.

    Writes are those that the recorded run made. Checks of sizes that only the region had go with it; other nodes without
    users (assertions, changes of a global state) stay.
    """
    order = {n: i for i, n in enumerate(part.nodes)}
    writes: dict[fx.Node, set[int]] = {}
    holds: dict[fx.Node, set[int]] = {}
    for m in record.made:
        (writes if m.written else holds).setdefault(m.node, set()).add(m.storage)
    cut, after = set(roles.combined), order[roles.after]
    cut_storages = {s for n in cut for s in holds.get(n, ())}

    def sources(node: fx.Node) -> Iterator[fx.Node]:
        """What a live node needs; a reading of the combined output behind `after` reads y instead."""
        return (s for s in node.all_input_nodes if not (s in cut and order[node] > after))

    def stays(writer: fx.Node) -> bool:
        """Whether somebody reads what it writes; behind `after`, the combined output is y, which somebody does."""
        if order[writer] > after and writes[writer] & cut_storages:
            return True
        readers = {s for n in live if order[n] <= after or order[writer] > after for s in holds.get(n, ())}
        return bool(writes[writer] & readers)

    live: set[fx.Node] = set()
    pending = [n for n in (*part.outputs, *needed) if n in order and n not in cut]
    pending += [n for n in part.nodes if not n.users and n not in writes and not _size_check(n)]
    while pending:
        while pending:
            node = pending.pop()
            if node in order and node not in live:
                live.add(node)
                pending += sources(node)
        pending = [n for n in writes if n in order and n not in live and stays(n)]
    return frozenset(n for n in part.nodes if n not in live)


def _size_check(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", str(node.target))
    return node.op == "call_function" and ("_check" in name or "sym_constrain" in name or "_assert_scalar" in name)


def apply(change: Change) -> fx.Node:
    """Makes the change in the graph itself; returns the new node."""
    graph = change.after.graph
    with graph.inserting_after(change.after):
        new = graph.call_function(change.call, change.arguments)
    order = {n: i for i, n in enumerate(graph.nodes)}
    keys = ("example_value", "val", "nn_module_stack", "stack_trace")
    if "custom" in change.after.meta:  # what the user's code annotated, a stream say
        new.meta["custom"] = change.after.meta["custom"]
    for node in change.replaced:
        new.meta.update({k: node.meta[k] for k in keys if k in node.meta})
        node.replace_all_uses_with(new, delete_user_cb=lambda user: order[user] > order[new])
    for node in reversed(list(graph.nodes)):
        if node in change.dead:
            if node.users:
                raise Decline(f"{node} is still needed by {next(iter(node.users))}")
            graph.erase_node(node)
    return new
