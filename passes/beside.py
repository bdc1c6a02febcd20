"""beside: a canonical graph in which the routed part is one call --> one in which other work runs during its exchanges.

    z = self.shared_expert(x)              ids, w = self.router(x)
    ids, w = self.router(x)                begun = moe.begin(x, ids, w)
    y = moe.routed(x, ids, w)        -->   z = self.shared_expert(x)
    y = y.view(...)                        y = moe.end(begun)
    return y + z                           y = y.view(...)
                                           return y + z

What the call needs comes first, then what neither needs it nor is needed by it, then the rest, each in the block's own order.
Where the block draws random numbers or changes tensors in place that order may be a part of what it computes. Then nothing that
comes before the call's inputs moves behind them, and what follows the call moves before its end only past views of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

# What the result may be looked at through before it is needed.
VIEWS = frozenset("view view_as reshape reshape_as to type_as unsqueeze squeeze flatten unflatten size getattr getitem".split())
# Besides calls of submodules, what is worth waiting with the end of the call.
WORK = frozenset("linear matmul __matmul__ mm bmm addmm baddbmm einsum conv1d".split())


def beside(graph: fx.Graph, ordered: bool) -> tuple[str, Callable[..., Any]] | None:
    """The source and the function of the new graph; None where nothing can run beside the call.

    ordered: the block draws random numbers, or a submodule changes the block's inputs in place.
    """
    nodes = list(graph.nodes)
    routed = next(n for n in nodes if n.op == "call_method" and n.target == "routed")
    at = nodes.index(routed)
    ordered = ordered or any(_in_place(n) for n in nodes[:at])
    guards = [n for n in nodes[:at] if not n.users and not _in_place(n)]
    needed = set(guards).union(*map(_with_inputs, [routed, *guards]))
    last = max(nodes.index(n) for n in routed.all_input_nodes)
    first = [n for n in nodes[:at] if n in needed or n.op == "placeholder" or ordered and nodes.index(n) <= last]
    between = [n for n in nodes[:at] if n not in first]
    if any(_in_place(n) for n in between):
        first, between = nodes[:at], []
    between += _independent(nodes[at + 1 :], routed)
    if not any(n.op == "call_module" or _name(n) in WORK for n in between):
        return None
    rest = [n for n in nodes[at + 1 :] if n not in between]

    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()

    def copy(some: list[fx.Node]) -> None:
        for node in some:
            copies[node] = new.node_copy(node, copies.__getitem__)

    copy(first)
    moe, *inputs = (copies[n] if isinstance(n, fx.Node) else n for n in routed.args)
    begun = new.call_method("begin", (moe, *inputs))
    copy(between)
    copies[routed] = new.call_method("end", (moe, begun))
    copy(rest)
    new.lint()
    code = new.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<moefx block beside its region>", "exec"), namespace)
    return code.src.strip(), namespace["forward"]


def _with_inputs(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node depends on."""
    found, stack = set[fx.Node](), [node]
    while stack:
        more = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(more)
        stack += more
    return found


def _independent(after: list[fx.Node], routed: fx.Node) -> list[fx.Node]:
    """What comes before the first use of the result that is more than a view, and does not depend on it."""
    depends, found = {routed}, list[fx.Node]()
    for node in after:
        if node.op == "output" or _in_place(node):
            break
        if depends.isdisjoint(node.all_input_nodes):
            found.append(node)
        elif _name(node) in VIEWS:
            depends.add(node)
        else:
            break
    return found


def _in_place(node: fx.Node) -> bool:
    name = _name(node)
    return node.op in ("call_function", "call_method") and (name == "setitem" or name.endswith("_") and not name.endswith("__"))


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
