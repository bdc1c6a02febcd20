"""search: which modules are tried as MoE blocks, and in which order."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from moefx.models import MixtralMoE, TinyMoELM
from torch import Tensor, nn

from moefx.search import candidates, observe, plausible, structure_key

D, E = 16, 4


def seen_by(model: nn.Module, *args: Any) -> list[str]:
    with observe(model) as seen:
        model(*args)
    return candidates(model, seen)


class Experts(nn.Module):
    """Does the routed work: given tokens and the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(E, D, D))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return (x[:, None] @ self.w[ids])[:, 0]


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).argmax(-1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D))
        self.moe = Moe()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.dense(x))


class Sees(nn.Module):
    """Two equal matrices, and what it is told to do with its input."""

    def __init__(self, selects: bool) -> None:
        super().__init__()
        self.a, self.b, self.selects = nn.Linear(D, D), nn.Linear(D, D), selects

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.b(x)
        return y + y.topk(1, -1).values if self.selects else y


def test_the_deepest_sufficient_module_comes_first():
    layer = Layer()
    assert seen_by(layer, torch.randn(5, D)) == ["moe.experts", "moe", ""]


def test_modules_that_select_nothing_are_no_candidates():
    assert seen_by(Sees(True), torch.randn(5, D)) == [""]
    assert seen_by(Sees(False), torch.randn(5, D)) == []


def test_comparisons_count_only_beside_matrices_that_look_alike():
    class Gate(Sees):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, self.a(x), self.b(x))

    assert seen_by(Gate(False), torch.randn(5, D)) == []


def test_a_selection_by_an_operator_counts():
    class Compare(Sees):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0) * self.a(x)

    block = Compare(False)
    block.stack = nn.Parameter(torch.randn(4, D, D))
    assert seen_by(block, torch.randn(5, D)) == [""]


def test_stacks_of_layers_are_skipped():
    stack = nn.Sequential(Layer(), Layer())
    found = seen_by(stack, torch.randn(5, D))
    assert "" not in found
    assert found == ["0.moe.experts", "1.moe.experts", "0.moe", "1.moe", "0", "1"]


def test_a_stack_of_different_layers_is_still_tried():
    assert "" in seen_by(nn.Sequential(Sees(True), Moe()), torch.randn(5, D))


def test_blocks_of_a_language_model():
    model = TinyMoELM(lambda d: MixtralMoE(d, hidden=8, experts=E), vocab=32, d_model=D)
    found = seen_by(model, torch.randint(0, 32, (2, 5)))
    assert found[:2] == ["layers.0.block", "layers.1.block"]
    assert "" not in found and all("attention" not in name and "norm" not in name for name in found)


def test_the_first_call_of_a_module_is_its_example():
    twice = nn.Sequential(moe := Moe(), nn.ReLU(), moe)
    x = torch.randn(5, D)
    with observe(twice) as seen:
        twice(x)
    (kept,) = seen.examples["0"].args
    assert torch.equal(kept, x) and kept is not x


def test_observing_leaves_no_hooks_even_when_the_model_fails():
    layer = Layer()
    with pytest.raises(RuntimeError):
        seen_by(layer, torch.randn(5, D + 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Experts(), True),
        (nn.Linear(D, D), False),
        (nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), True),
        (nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D)), False),
        (nn.Sequential(nn.Linear(D, 4), nn.Linear(4, D), nn.Linear(D, 3)), True),
        (nn.Conv1d(1, D, 3), True),
        (nn.LayerNorm(D), False),
    ],
)
def test_plausible(module, expected):
    assert plausible(module) is expected


def test_equal_layers_have_one_structure():
    assert structure_key(Layer()) == structure_key(Layer())
    layer = Layer()
    key = structure_key(layer)
    assert structure_key(copy.deepcopy(layer)) == key
    layer.register_forward_hook(lambda *_: None)
    assert structure_key(layer) == key
    hash(key)


def other_attribute(layer: Any) -> None:
    layer.moe.top_k = 3


def other_shape(layer: Any) -> None:
    layer.moe.router = nn.Linear(D, E + 1)


def other_class(layer: Any) -> None:
    layer.dense[1] = nn.Identity()


def other_function(layer: Any) -> None:
    layer.moe.activation = torch.relu


def no_bias(layer: Any) -> None:
    layer.moe.router.bias = None


def more_buffers(layer: Any) -> None:
    layer.moe.register_buffer("load", torch.zeros(E))


@pytest.mark.parametrize("change", [other_attribute, other_shape, other_class, other_function, no_bias, more_buffers])
def test_other_layers_have_another(change):
    layer = Layer()
    change(layer)
    assert structure_key(layer) != structure_key(Layer())
