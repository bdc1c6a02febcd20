"""The parameters of a graph of Dynamo's: those that it holds, and those that it computes (`torch.nn.utils.parametrize`).

What computes parameters stays in the graph as it is. To the parts that use them they are parameters like others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from moefx.graph_nodes import above
from moefx.passes.splice import value_of


class GraphParameters:
    """Of a graph and the inputs that it is compiled for (None where these are not known).

    held: nodes that are parameters, placeholders or attributes of the graph's module. computing: the nodes that compute
    parameters from those and from buffers. computed: those of them whose values others use.
    """

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        self._gm = gm
        self._given = dict(zip((n for n in gm.graph.nodes if n.op == "placeholder"), inputs))
        self.held = {n: x for n, x in self._given.items() if isinstance(x, nn.Parameter)}
        computing: set[fx.Node] = set()
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(value := attribute(gm, node), nn.Parameter):
                self.held[node] = value
            elif _of_parametrization(node) and all(
                source in computing or source.op in ("placeholder", "get_attr") for source in node.all_input_nodes
            ):
                computing.add(node)
        self.computing = frozenset(computing)
        self.computed = frozenset(
            n for n in computing if isinstance(value_of(n), Tensor) and any(user not in computing for user in n.users)
        )

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.held or node in self.computed

    def value(self, node: fx.Node) -> nn.Parameter:
        """The parameter itself; of one that is computed, what it is now."""
        if node in self.held:
            return self.held[node]
        runner, nodes = fx.Interpreter(self._gm), self._gm.graph.nodes
        runner.env.update(self._given)
        needed = set(above([node], len(nodes)))
        with torch.no_grad():
            for n in nodes:
                if n in needed and n not in runner.env:
                    runner.env[n] = runner.run_node(n)
        kind = value_of(node)
        return nn.Parameter(runner.env[node].detach().to(kind.dtype), requires_grad=kind.requires_grad)

    def like(self, node: fx.Node) -> nn.Parameter:
        """The parameter; of one that is computed, one without values of that shape and dtype."""
        if node in self.held:
            return self.held[node]
        kind = value_of(node)
        return nn.Parameter(torch.empty(tuple(kind.shape), dtype=kind.dtype, device="meta"), requires_grad=False)

    def kind(self, node: fx.Node) -> tuple[torch.device, bool]:
        """Where it is, and whether it is trained."""
        of = self.held.get(node, value_of(node))
        return of.device, of.requires_grad


def attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What a get_attr node names; None where there is nothing."""
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _of_parametrization(node: fx.Node) -> bool:
    """Whether a call of a parametrization left it in the graph."""
    scopes = node.meta.get("nn_module_stack", {}).values()
    called = node.op in ("call_function", "call_method") and bool(node.all_input_nodes)
    return called and any(isinstance(entry, tuple) and entry[1] is ParametrizationList for entry in scopes)
