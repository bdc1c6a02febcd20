"""The parameters of a graph of Dynamo's: held ones, and those that parametrizations compute."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from moefx.graph_parameters import GraphParameters, attribute


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("offset", torch.tensor(0.5))

    def forward(self, w: Tensor) -> Tensor:
        return w * self.gain + self.offset


class Gated(nn.Module):
    """Depends on the tokens, through the module that it is told about."""

    def __init__(self, told: list[Tensor]) -> None:
        super().__init__()
        self.told = told

    def forward(self, w: Tensor) -> Tensor:
        return w * self.told[0].mean()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.plain, self.told = nn.Linear(3, 4, bias=False), nn.Linear(4, 2), list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.told[:] = [x]
        return self.plain(self.linear(x))  # type: ignore[no-any-return]


def graph_of(module: nn.Module, x: Tensor) -> tuple[fx.GraphModule, GraphParameters]:
    found: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append((gm, GraphParameters(gm, inputs)))
        return gm

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    return found[0]  # type: ignore[no-any-return]


def test_what_is_computed_is_one_too() -> None:
    torch.manual_seed(0)
    layer = Layer()
    parametrize.register_parametrization(layer.linear, "weight", Scaled())
    layer.linear.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
    _, params = graph_of(layer, torch.randn(5, 3))
    assert {id(p) for p in params.held.values()} == {id(p) for p in layer.parameters()}
    (computed,) = params.computed
    assert len(params.computing) == 2 and computed in params and computed not in params.held
    value = params.value(computed)
    assert type(value) is nn.Parameter and value.requires_grad  # the gain is trained
    torch.testing.assert_close(value.detach(), layer.linear.weight.detach())
    assert params.kind(computed) == (torch.device("cpu"), True)
    assert params.like(computed).shape == (4, 3) and params.like(computed).is_meta
    for node, held in params.held.items():
        assert params.value(node) is params.like(node) is held and params.kind(node) == (held.device, held.requires_grad)


def test_what_depends_on_the_tokens_too_is_one() -> None:
    """It stays in the graph, so that nothing is taken for a constant."""
    layer, x = Layer(), torch.randn(5, 3)
    layer.told[:] = [x]
    parametrize.register_parametrization(layer.linear, "weight", Gated(layer.told))
    _, params = graph_of(layer, x)
    (computed,) = params.computed
    torch.testing.assert_close(params.value(computed).detach(), layer.linear.weight.detach())


def test_what_is_computed_from_other_nodes_is_none() -> None:
    layer, x = Layer(), torch.randn(5, 3)
    layer.told[:] = [x]
    parametrize.register_parametrization(layer.linear, "weight", Gated(layer.told))
    model = nn.Sequential(nn.Tanh(), layer)
    _, params = graph_of(model, x)
    assert not params.computed and len(params.held) == 3


def test_an_attribute_by_its_path() -> None:
    gm, graph = fx.GraphModule(nn.Module(), fx.Graph()), fx.Graph()
    gm.add_module("layer", nn.Linear(2, 2))
    assert attribute(gm, graph.get_attr("layer.weight")) is gm.get_parameter("layer.weight")
    assert attribute(gm, graph.get_attr("layer.gone.further")) is None
