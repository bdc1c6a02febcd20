"""Nodes of a graph of Dynamo's: what they call and from where, the state they run in, and a call as nodes of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from moefx.errors import Decline
from moefx.passes.splice import (
    value_of,
)


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").split(".")[0]


def above(nodes: Iterable[fx.Node], most: int) -> list[fx.Node]:
    """The nodes and those that they are made from, nearest first, `most` of them."""
    found = dict.fromkeys(nodes)
    for node in (queue := list(found)):
        for source in node.all_input_nodes:
            if source not in found and len(found) < most:
                found[source] = None
                queue.append(source)
    return queue


def line_of(node: fx.Node) -> str:
    """file:line of the user's code that made a node."""
    places = [x for x in str(node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File ")]
    if not places:
        return "?"
    file, line = places[-1].strip().split(",")[:2]
    return f"{file[6:-1]}:{line.split()[-1]}"


@contextlib.contextmanager
def transforms_left() -> Iterator[None]:
    """A run that stops inside of a transform of torch.func does not leave the program there."""
    depth = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        yield
    finally:
        while len(torch._C._functorch.get_interpreter_stack() or ()) > depth:
            torch._C._functorch.pop_dynamic_layer_stack()


def inline(gm: fx.GraphModule, node: fx.Node) -> None:
    """Puts the operators that a call is made of in its place, so that the graph holds nothing but operators of torch."""
    arguments = [n for n in node.args if isinstance(n, fx.Node)]
    present = [isinstance(n, fx.Node) for n in node.args]

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return node.target(*(next(rest) if p else None for p in present))  # type: ignore[operator, no-any-return]

    with state_at(node), contextlib.ExitStack() as stack:
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
def in_autocast(autocast: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    """In the autocast of the caller."""
    with contextlib.ExitStack() as stack:
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield


def autocasts(node: fx.Node) -> dict[fx.Node, tuple[Any, ...]]:
    """The nodes that entered an autocast which has not been left where the node stands, with their arguments."""
    entered: dict[fx.Node, tuple[Any, ...]] = {}
    for other in itertools.takewhile(lambda n: n is not node, node.graph.nodes):
        if other.target is torch.amp.autocast_mode._enter_autocast:
            entered[other] = other.args
        elif other.target is torch.amp.autocast_mode._exit_autocast:
            entered.pop(other.args[0], None)  # type: ignore[arg-type]
    return entered


@contextlib.contextmanager
def state_at(node: fx.Node) -> Iterator[None]:
    """Grad mode and autocast as they are where the node stands: nodes before it may have changed the caller's."""
    grad = torch.is_grad_enabled()
    for other in itertools.takewhile(lambda n: n is not node, node.graph.nodes):
        if other.target is torch._C._set_grad_enabled:
            grad = bool(other.args[0])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype, enabled, cache in autocasts(node).values():
            stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield
