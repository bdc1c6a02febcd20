"""torch.compile(model, backend="moefx"), and torch.compile(moefx.optimize(model)): the regions of compiled graphs.

As a script it compiles the tiny families of Transformers and prints one line each:

    python tests/test_backend.py [--entrance backend|optimize|none] [--impl NAME] [--inner NAME] [family ...]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hf_families import FAMILIES, build, has_implementation
from styles_positive import POSITIVE
from test_families import DOUBLE, EXPECTED_DECLINED, gradient_error, relative_error
from test_styles import call, cast, compare, example_of, module_of, state_of, trials
from test_styles import expected as expected_verdict
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__":  # from a checkout: tests/ is on the path, the folder above it is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moefx.passes import splice
from moefx.passes.select import select

import moefx.backend
from moefx import graph_analysis, graph_nodes
from moefx.errors import Decline, InputError
from moefx.region_op import REGIONS
from moefx.report import GRAPHS

if "moefx" not in torch._dynamo.list_backends(exclude_tags=()):  # a checkout that is not installed
    torch._dynamo.register_backend(moefx.backend.moefx, name="moefx")

INNER = {"inner": "aot_eager"}  # Inductor takes half a minute for its first C++ file
D, E, K, H = 16, 4, 2, 8
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    GRAPHS.clear()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------ kinds of graphs


class Moe(nn.Module):
    """A router and stacked experts w1 [E, D, H], w2 [E, H, D]; what `experts` does with them is one kind of graph."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1 = nn.Parameter(torch.randn(E, D, H) / D**0.5)
        self.w2 = nn.Parameter(torch.randn(E, H, D) / H**0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        return self.experts(tokens, weights, chosen).reshape(x.shape)


class DenseBmm(Moe):
    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        gates = torch.zeros(tokens.shape[0], E, dtype=weights.dtype).scatter(1, chosen, weights)
        every = torch.bmm(F.silu(torch.bmm(tokens.expand(E, -1, -1), self.w1)), self.w2)  # [E, T, D]
        return (every * gates.t().unsqueeze(-1)).sum(0)


class Einsum(Moe):
    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        combine = torch.einsum("tk,tke->te", weights, F.one_hot(chosen, E).to(weights.dtype))
        hidden = F.silu(torch.einsum("td,edh->teh", tokens, self.w1))
        return torch.einsum("te,ted->td", combine, torch.einsum("teh,ehd->ted", hidden, self.w2))


class Gathered(Moe):
    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,tkdh->tkh", tokens, self.w1[chosen]))
        return torch.einsum("tkd,tk->td", torch.einsum("tkh,tkhd->tkd", hidden, self.w2[chosen]), weights)


class GatheredAtOnce(Moe):
    """Where opt_einsum is installed, torch specialises an einsum of three on all sizes, and may sum k and h at once."""

    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,tkdh->tkh", tokens, self.w1[chosen]))
        return torch.einsum("tkh,tkhd,tk->td", hidden, self.w2[chosen], weights)


class Sorted(Moe):
    """As the experts of Transformers: rows sorted by expert, torch's grouped_mm (for the compiler, bfloat16 only)."""

    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids, order = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(ids.float(), bins=E, min=0, max=E - 1), 0, dtype=torch.int32)
        rows = F.silu(F.grouped_mm(tokens[order // K], self.w1, offs=ends))
        rows = F.grouped_mm(rows, self.w2, offs=ends) * weights.reshape(-1)[order].unsqueeze(-1)
        place = torch.empty_like(order)
        place[order] = torch.arange(order.numel())
        return rows[place].view(-1, K, D).sum(1)


class Batched(Moe):
    """As the `batched_mm` experts of Transformers: a product of its own for every row."""

    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        ids = chosen.reshape(-1)
        rows = tokens[torch.arange(tokens.shape[0]).repeat_interleave(K)].unsqueeze(1)
        rows = torch.bmm(F.silu(torch.bmm(rows, self.w1[ids])), self.w2[ids]).squeeze(1)
        return (rows * weights.reshape(-1, 1)).view(-1, K, D).sum(1)


class Listed(nn.Module):
    """A router and a ModuleList of experts, in a loop that Dynamo unrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, D)) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        out = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            self.add(out, tokens, weights, chosen, e, expert)
        return out.reshape(x.shape)


class Masks(Listed):
    def add(self, out: Tensor, tokens: Tensor, weights: Tensor, chosen: Tensor, e: int, expert: nn.Module) -> None:
        out += expert(tokens) * (weights * (chosen == e)).sum(1, keepdim=True)


class Nonzero(Listed):
    def add(self, out: Tensor, tokens: Tensor, weights: Tensor, chosen: Tensor, e: int, expert: nn.Module) -> None:
        token, slot = torch.where(chosen == e)  # a size that depends on data
        out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])


class AssignedMasks(Listed):
    def add(self, out: Tensor, tokens: Tensor, weights: Tensor, chosen: Tensor, e: int, expert: nn.Module) -> None:
        token, slot = torch.where(chosen == e)
        out[token] += expert(tokens[token]) * weights[token, slot, None]


KINDS: dict[str, tuple[type[nn.Module], torch.dtype]] = {
    "dense_bmm": (DenseBmm, torch.float32),
    "einsum": (Einsum, torch.float32),
    "gathered": (Gathered, torch.float32),
    "batched_mm": (Batched, torch.float32),
    "grouped_mm": (Sorted, torch.bfloat16),
    "masks": (Masks, torch.float32),
    "nonzero": (Nonzero, torch.float32),
    "assigned": (AssignedMasks, torch.float32),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


class Layers(nn.Module):
    """Two layers of one kind between others."""

    def __init__(self, kind: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        block, usual = KINDS[kind]
        self.first, self.second, self.head = block(), block(), nn.Linear(D, D)
        self.to(dtype or usual)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x.tanh())
        return self.head(x + self.second(x.tanh()))


def text_of(graph: fx.Graph) -> str:
    """A graph as text without what differs from run to run."""
    lines = []
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else fx.node._get_qualified_name(node.target)
        name = re.sub(r"\W(?:0x)?[0-9a-f]{8,}", "", name)
        arguments = re.sub(r"'[0-9a-f]{16}'", "'<region>'", ", ".join([*map(repr, node.args), *map(str, node.kwargs.items())]))
        lines.append(f"{node.name} = {node.op} {name}({arguments})")
    return "\n".join(lines)


class Spy:
    """An inner backend that keeps the graphs it is given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs: list[fx.Graph] = []
        self.backend = torch._dynamo.backends.registry.lookup_backend(backend)

    def __call__(self, gm: fx.GraphModule, inputs: Any, **_: Any) -> Any:
        self.graphs.append(copy.copy(gm).graph)
        return self.backend(gm, inputs)


@pytest.fixture
def spy() -> Iterator[Spy]:
    """Registered as the inner backend "spy"."""
    made = Spy()
    torch._dynamo.register_backend(made, name="spy")
    yield made
    del torch._dynamo.backends.registry._BACKENDS["spy"]
    torch._dynamo.backends.registry._COMPILER_FNS.pop("spy", None)


def outcome(model: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = model(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    found = torch.autograd.grad(y, [x, *module.parameters()], weight)
    return [y.detach(), *found]


def assert_same(mine: list[Tensor], reference: list[Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(mine, reference):
        assert relative_error(b.float(), a.float(), 1e-6) <= TOLERANCE[dtype]


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


dynamic_outputs = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)


@pytest.mark.parametrize("kind", KINDS)
@dynamic_outputs
def test_every_kind_of_graph(kind: str) -> None:
    """One graph, both regions in it, outputs and gradients as in eager mode at every number of tokens."""
    model = Layers(kind)
    dtype = KINDS[kind][1]
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=INNER)
    for shape in ((3, 11), (2, 7), (5, 33)):
        x = tokens(*shape, dtype=dtype)
        assert_same(outcome(compiled, model, x), outcome(reference, reference, x), dtype)
    (graph,) = GRAPHS
    assert len(graph.found) == 2, graph
    assert not graph.declined


@pytest.mark.parametrize("kind", KINDS)
@dynamic_outputs
def test_static_graphs(kind: str) -> None:
    """Of a square of tokens, where sizes cannot be told apart by their numbers."""
    model = Layers(kind)
    dtype = KINDS[kind][1]
    reference = copy.deepcopy(model)
    x = tokens(4, 4, dtype=dtype)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=False, options=INNER)
    assert_same(outcome(compiled, model, x), outcome(reference, reference, x), dtype)
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]


def test_an_einsum_of_three_is_followed() -> None:
    model = GatheredAtOnce()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)
    assert_same(outcome(compiled, model, tokens(3, 11)), outcome(reference, reference, tokens(3, 11)), torch.float32)
    assert len(GRAPHS[0].found) == 1, GRAPHS[0]


@pytest.fixture
def fixed_sizes(monkeypatch: pytest.MonkeyPatch) -> list[splice.FixedSizes | None]:
    """What was decided about the numbers of each part that was analysed."""
    decided: list[splice.FixedSizes | None] = []
    of = splice.FixedSizes.of
    monkeypatch.setattr(splice.FixedSizes, "of", staticmethod(lambda part: (decided.append(of(part)), decided[-1])[1]))
    return decided


@pytest.mark.parametrize("kind", KINDS)
@dynamic_outputs
def test_static_graphs_of_many_tokens(kind: str, fixed_sizes: list[splice.FixedSizes | None]) -> None:
    """Which are analysed with few: the numbers of tokens in the graph follow."""
    model = Layers(kind)
    dtype = KINDS[kind][1]
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=False, options=INNER)
    x = tokens(3, 97, dtype=dtype)
    assert_same(outcome(compiled, model, x), outcome(reference, reference, x), dtype)
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]
    assert any(fixed_sizes)


def capability(device: torch.device) -> tuple[int, int]:
    """As `torch.cuda.get_device_capability`, which Transformers asks and Dynamo records."""
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return 9, 0


def test_a_question_about_the_device_keeps_its_answer() -> None:
    """Probes run on the CPU, whatever the graph is for."""

    def asking(gm: fx.GraphModule, inputs: Any) -> Any:
        for node in [n for n in gm.graph.nodes if n.target == "topk" or getattr(n.target, "__name__", "") == "topk"]:
            with gm.graph.inserting_before(node):
                question = gm.graph.call_function(capability, (torch.device("cuda"),))
            question.meta = {**node.meta, "example_value": (9, 0)}
        gm.recompile()
        return moefx.backend.moefx(gm, inputs, options=INNER)

    model = Layers("gathered")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend=asking, fullgraph=True)
    x = tokens(4, 16)
    assert_same(outcome(compiled, model, x), outcome(reference, reference, x), torch.float32)
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]


class Limited(Moe):
    """Each expert takes so many tokens, the first ones: a number that Dynamo computes from the sizes."""

    def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        most = int(1.5 * tokens.shape[0] * K / E)
        marks = F.one_hot(chosen.reshape(-1), E).cumsum(0)
        place = marks.gather(1, chosen.reshape(-1, 1)).reshape(chosen.shape)
        weights = weights * (place <= most)
        return Einsum.experts(self, tokens, weights, chosen)  # type: ignore[arg-type]


def test_a_number_that_follows_from_the_sizes_is_kept(fixed_sizes: list[splice.FixedSizes | None]) -> None:
    """A capacity is no number of tokens: the part is run on its own sizes, and is right when an expert overflows."""
    torch.manual_seed(0)
    model = Limited()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=False, options=INNER)
    for x in (tokens(3, 97), tokens(1, 1).expand(3, 97, D) + 0.01 * tokens(3, 97)):
        torch.testing.assert_close(compiled(x), reference(x))
    assert fixed_sizes
    assert not any(fixed_sizes)


def test_a_graph_fixed_to_very_many_tokens_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its numbers are not clear: probing it on all of them would take minutes."""
    monkeypatch.setattr(graph_analysis, "MOST_TOKENS", 256)
    model = Limited()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=False, options=INNER)
    torch.testing.assert_close(compiled(tokens(3, 97)), model(tokens(3, 97)))
    assert "dynamic=True" in GRAPHS[0].declined[0].reason


def test_what_an_earlier_graph_taught_is_not_learnt_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's graph for inference has the parts of that for training."""
    analysed: list[str] = []
    analyse = moefx.backend._analyse
    monkeypatch.setattr(moefx.backend, "_analyse", lambda gm, part, *a: (analysed.append(part.name), analyse(gm, part, *a))[1])
    model = Layers("grouped_mm")
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)
    x = tokens(3, 11, dtype=torch.bfloat16)
    compiled(x)
    count = len(analysed)
    with torch.no_grad():
        y = compiled(x)
    assert relative_error(y.float(), model(x).float(), 1e-6) <= TOLERANCE[torch.bfloat16]
    assert [len(graph.found) for graph in GRAPHS] == [2, 2]
    assert len(analysed) == count
    assert GRAPHS[1].found[1].same_as == GRAPHS[1].found[0].name
    torch._dynamo.reset()
    compiled(x)
    assert len(analysed) == 2 * count


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_one_token(family: str) -> None:
    """Dynamo makes a graph of its own for one token, as a step of decoding is: its region is found from that token."""
    tiny = build(family, "grouped_mm")
    inputs = tiny.inputs(1, 1)
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
        actual = torch.compile(tiny.model, backend="moefx", fullgraph=True, options=INNER)(**inputs).logits
    torch.testing.assert_close(actual, expected)
    assert len(GRAPHS[0].found) == len(tiny.blocks), GRAPHS[0]


@pytest.mark.parametrize("kind", KINDS)
@dynamic_outputs
def test_golden_graphs(kind: str, golden: Callable[[str, str], None], spy: Spy) -> None:
    """What Dynamo recorded, and what the inner backend gets."""
    model = KINDS[kind][0]().to(KINDS[kind][1])
    before: list[str] = []

    def recording(gm: fx.GraphModule, inputs: Any) -> Any:
        before.append(text_of(gm.graph))
        return moefx.backend.moefx(gm, inputs, options={"inner": "spy"})

    torch.compile(model, backend=recording, fullgraph=True, dynamic=True)(tokens(3, 11, dtype=KINDS[kind][1]))
    golden(f"backend_{kind}_before", before[0])
    golden(f"backend_{kind}_after", text_of(spy.graphs[0]))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_routers_choice_is_made_by_moefx_on_a_gpu(
    kernels: str, device: str, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the graph is one of a CPU's, and only the pass is told so."""
    told = lambda nodes, topk, on: select(nodes, topk, lambda _: on(torch.device(device)))  # noqa: E731
    monkeypatch.setattr(moefx.backend, "select", told)
    model, x = DenseBmm(), tokens(3, 11)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": "spy", "kernels": kernels})
    torch.testing.assert_close(compiled(x), model(x))
    called = [str(node.target) for node in spy.graphs[0].nodes]
    assert ("moefx.topk.default" in called) == (kernels == "auto" and device == "cuda")
    assert sum("topk" in name for name in called) == 1


def test_unused_experts_leave_nothing_behind(spy: Spy) -> None:
    """The experts' own nodes are gone, in-place ones too."""
    with dynamic_outputs:
        torch.compile(Nonzero(), backend="moefx", fullgraph=True, dynamic=True, options={"inner": "spy"})(tokens(3, 11))
    names = {str(node.target) for node in spy.graphs[0].nodes}
    assert "moefx.routed.default" in names or "moefx.routed" in names
    assert not names & {"index_add_", "<built-in method where of type object>"}
    assert not any("linear" in name for name in list(names)[1:] if "router" in name)
    assert sum("linear" in name for name in (str(n.target) for n in spy.graphs[0].nodes)) == 1  # the router's


class InPlaceBeside(Moe):
    """Users write into buffers of their own beside the experts: those writes have to stay."""

    experts = DenseBmm.experts

    def forward(self, x: Tensor) -> Tensor:
        padded = x.new_empty(*x.shape[:-1], D + 1)
        padded[..., :D] = x
        padded[..., D:] = 1.0
        y = super().forward(x)
        y.mul_(2.0)
        return y + padded[..., :D] * padded[..., D:]


class Relabelled(Listed):
    """The router counts the experts in another order than the list: a constant of the region's inputs."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        out = torch.zeros_like(tokens)
        for label, expert in zip((2, 0, 3, 1), self.experts):
            out = out + expert(tokens) * (weights * (chosen == label)).sum(1, keepdim=True)
        return out.reshape(x.shape)


def test_constants_of_a_region(spy: Spy) -> None:
    model = Relabelled()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options={"inner": "spy"})
    assert_same(outcome(compiled, model, tokens(3, 11)), outcome(reference, reference, tokens(3, 11)), torch.float32)
    assert len(GRAPHS[0].found) == 1
    assert any(node.target is torch.tensor for node in spy.graphs[0].nodes)


def test_in_place_nodes_stay() -> None:
    model = InPlaceBeside()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=INNER)
    reference = copy.deepcopy(model)
    for shape in ((3, 11), (2, 7)):
        assert_same(outcome(compiled, model, tokens(*shape)), outcome(reference, reference, tokens(*shape)), torch.float32)
    assert len(GRAPHS[0].found) == 1


# ------------------------------------------------------------------------------------------------ token counts


@pytest.mark.parametrize("entrance", ["backend", "optimize"])
def test_one_dynamic_graph_for_all_token_counts(entrance: str) -> None:
    """T = 1 (static), 7 (dynamic), then none more: 64, 333, and back."""
    model = Layers("gathered")
    reference = copy.deepcopy(model)
    if entrance == "optimize":
        moefx.optimize(model, (tokens(1, 29),))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.register_backend(counter, name="counted")
    backend, options = ("moefx", {"inner": "counted"}) if entrance == "backend" else (counter, None)
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
    for count in (1, 7):
        assert_same(outcome(compiled, model, tokens(1, count)), outcome(reference, reference, tokens(1, count)), torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (64, 333, 7, 1, 2):
            x = tokens(1, count)
            assert_same(outcome(compiled, model, x), outcome(reference, reference, x), torch.float32)
    assert counter.frame_count == 2
    del torch._dynamo.backends.registry._BACKENDS["counted"]
    torch._dynamo.backends.registry._COMPILER_FNS.pop("counted", None)


# ------------------------------------------------------------------------------------------------ the other entrance


def test_optimised_model_without_example_compiles_whole() -> None:
    """The model is rewritten at the first call, before Dynamo traces."""
    tiny = build("mixtral")
    reference = copy.deepcopy(tiny.model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moefx.optimize(tiny.model), backend=counter, fullgraph=True)
    inputs = tiny.inputs(2, 9)
    torch.testing.assert_close(compiled(**inputs).logits, reference(**inputs).logits)
    assert len(moefx.explain(compiled).found) == len(tiny.blocks)
    assert sum("moefx.routed" in str(n.target) for n in counter.graphs[0].graph.nodes) == len(tiny.blocks)
    assert "_infer_parameters" not in vars(tiny.model)


def test_an_optimised_block_that_returns_a_dataclass_compiles_whole() -> None:
    style = POSITIVE["returns_dataclass"]()
    model, inputs = module_of(style).eval(), example_of(style)
    expected = vars(model(*inputs))
    made = vars(torch.compile(moefx.optimize(model, inputs), backend="aot_eager", fullgraph=True)(*inputs))
    assert made.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(made[name], value)


def test_a_changed_setting_is_noticed_by_the_compiled_model() -> None:
    """What the analysis took for a constant is a guard: the original runs again when it changes."""

    class Scaled(Moe):
        scale = 1.0
        experts = Gathered.experts

        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    model = Scaled()
    moefx.optimize(model, (tokens(3, 11),))
    assert moefx.explain(model).found
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = compiled(tokens(3, 11))
    model.scale = 3.0
    torch.testing.assert_close(compiled(tokens(3, 11)), first * 1.5)


def test_export_holds_the_operator() -> None:
    model = moefx.optimize(Layers("gathered").eval(), (tokens(3, 11),))
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(model, (tokens(3, 11),), dynamic_shapes=(sizes,))
    assert sum("moefx.routed" in str(node.target) for node in program.graph.nodes) == 2
    for shape in ((3, 11), (4, 5)):
        torch.testing.assert_close(program.module()(tokens(*shape)), model(tokens(*shape)))


def test_export_saves_and_loads(tmp_path: Path) -> None:
    model = moefx.optimize(Layers("gathered").eval(), (tokens(3, 11),))
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (tokens(3, 11),)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    torch.testing.assert_close(program.module()(tokens(3, 11)), model(tokens(3, 11)))


@pytest.mark.parametrize("entrance", ["backend", "optimize"])
def test_functional_call(entrance: str) -> None:
    """Other parameters than the module's own, differentiated."""
    model = Layers("gathered")
    reference = copy.deepcopy(model)
    if entrance == "optimize":
        moefx.optimize(model, (tokens(3, 11),))
    others = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()}

    def run(module: nn.Module, x: Tensor) -> Tensor:
        return torch.func.functional_call(module, others, (x,))

    options: Any = {"backend": "moefx", "options": INNER} if entrance == "backend" else {"backend": "aot_eager"}
    compiled = torch.compile(lambda x: run(model, x), fullgraph=True, **options)
    found = torch.autograd.grad(compiled(tokens(3, 11)).square().sum(), list(others.values()))
    expected = torch.autograd.grad(run(reference, tokens(3, 11)).square().sum(), list(others.values()))
    assert_same(list(found), list(expected), torch.float32)


# ------------------------------------------------------------------------------------------------ dtypes, modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Layers("gathered", dtype)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=INNER)
    x = tokens(3, 11, dtype=dtype)
    assert_same(outcome(compiled, model, x), outcome(reference, reference, x), dtype)
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where: str) -> None:
    """The region's products run in the dtype of autocast, entered in the graph or around it."""
    model = Layers("gathered")
    reference = copy.deepcopy(model)

    def run(module: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    call = run if where == "inside" else lambda module, x: module(x)
    compiled = torch.compile(lambda x: call(model, x), backend="moefx", fullgraph=True, options=INNER)
    x = tokens(3, 11)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "around"):
        y, expected = outcome(compiled, model, x), outcome(lambda x: call(reference, x), reference, x)
    assert y[0].dtype is expected[0].dtype is torch.bfloat16
    assert_same(y, expected, torch.bfloat16)
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]


def test_the_observed_run_ends_where_all_is_seen() -> None:
    """And leaves the autocast that it has entered."""

    def fails(_: Tensor) -> Tensor:
        raise RuntimeError("the rest of the graph runs")

    graph = fx.Graph()
    x = graph.placeholder("x")
    entered = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, False))
    seen = graph.call_function(torch.mm, (x, x))
    last = graph.call_function(fails, (seen,))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (entered,))
    graph.output(last)
    gm = fx.GraphModule(nn.Module(), graph)
    values = graph_analysis.observe(gm, [torch.eye(3)], [], {seen})
    assert list(values) == [seen] and values[seen].dtype is torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(Decline, match="the rest of the graph runs"):
        graph_analysis.observe(gm, [torch.eye(3)], [], {seen, last})
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_no_probe_copy_outlives_its_analysis(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large experts it takes gigabytes, which no collector of garbage knows of."""
    copies: list[weakref.ref[Any]] = []

    class Analysis(graph_analysis.Analysis):
        def _twin(self) -> splice.Block:
            twin = super()._twin()
            copies.extend(weakref.ref(p) for p in twin.parameters())
            return twin

    monkeypatch.setattr(moefx.backend, "Analysis", Analysis)
    analyse, alive = moefx.backend._analyse, []

    def watched(*args: Any) -> Any:
        found = analyse(*args)
        alive.append(sum(copy() is not None for copy in copies))
        return found

    monkeypatch.setattr(moefx.backend, "_analyse", watched)
    gc.disable()
    try:
        torch.compile(Layers(kind), backend="moefx", fullgraph=True, options=INNER)(tokens(3, 11).to(KINDS[kind][1]))
    finally:
        gc.enable()
    assert GRAPHS[0].found and copies and not any(alive), alive


def test_layers_of_one_structure_are_observed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    observed: list[list[str]] = []

    def observe(gm: fx.GraphModule, inputs: Any, parts: Any, also: Any) -> Any:
        observed.append([part.name for part in parts])
        return graph_analysis.observe(gm, inputs, parts, also)

    monkeypatch.setattr(moefx.backend, "observe", observe)
    model = Layers("gathered")
    torch.compile(model, backend="moefx", fullgraph=True, options=INNER)(tokens(3, 11))
    found = [block.name for block in GRAPHS[0].found]
    assert len(found) == 2 and len(observed) == 1
    assert found[0] in observed[0] and found[1] not in observed[0]


def test_a_part_that_the_first_run_did_not_see_is_observed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the first part of its structure has become part of another region: here the first run sees nothing."""
    observed: list[list[str]] = []

    def observe(gm: fx.GraphModule, inputs: Any, parts: Any, also: Any) -> Any:
        observed.append([part.name for part in parts])
        return graph_analysis.observe(gm, inputs, parts, also) if len(observed) > 1 else {}

    monkeypatch.setattr(moefx.backend, "observe", observe)
    model = Layers("gathered")
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)
    assert_same(outcome(compiled, model, tokens(3, 11)), outcome(reference, reference, tokens(3, 11)), torch.float32)
    assert len(GRAPHS[0].found) == 2 and len(observed) == 2 and len(observed[1]) == 1


@pytest.mark.parametrize("entrance", ["backend", "optimize"])
def test_activation_checkpointing(entrance: str) -> None:
    """The region stands in a graph of its own, which the backend looks into."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers("gathered")

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layers, x, use_reentrant=False)

    model = Checkpointed()
    reference = copy.deepcopy(model)
    if entrance == "optimize":
        compiled = torch.compile(moefx.optimize(model), backend="aot_eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)
    assert_same(outcome(compiled, model, tokens(3, 11)), outcome(reference, reference, tokens(3, 11)), torch.float32)
    report = moefx.explain(compiled)
    assert len(report.found) + sum(len(graph.found) for graph in report.graphs) == 2, report


def test_inference_mode() -> None:
    model = Layers("gathered")
    with torch.inference_mode():
        y = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)(tokens(3, 11))
    torch.testing.assert_close(y, model(tokens(3, 11)))
    assert len(GRAPHS[0].found) == 2


def test_no_grad_saves_nothing(spy: Spy) -> None:
    """The operator leaves nothing for a backward that does not come."""
    with torch.no_grad():
        torch.compile(Gathered(), backend="moefx", fullgraph=True, options={"inner": "spy"})(tokens(3, 11))
    (call,) = (node for node in spy.graphs[0].nodes if "moefx.routed" in str(node.target))
    assert call.args[-1] is False


def test_frozen_experts() -> None:
    """Gradients flow to what asks for them alone."""
    model = Gathered()
    model.w1.requires_grad_(False)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=INNER)
    compiled(tokens(3, 11)).square().sum().backward()
    reference = copy.deepcopy(model)
    reference.zero_grad()
    reference(tokens(3, 11)).square().sum().backward()
    assert model.w1.grad is None
    torch.testing.assert_close(model.w2.grad, reference.w2.grad)
    torch.testing.assert_close(model.router.weight.grad, reference.router.weight.grad)


def test_parameters_stay_and_are_packed_once() -> None:
    """A ModuleList of experts is packed behind the compiler's back: same objects, no second compilation."""
    model = Masks()
    objects = [id(p) for p in model.parameters()]
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=INNER)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            compiled(tokens(3, 11, seed=seed)).sum().backward()
    assert [id(p) for p in model.parameters()] == objects
    weights = [expert[0].weight for expert in model.experts]
    steps = {b.data_ptr() - a.data_ptr() for a, b in zip(weights, weights[1:])}
    assert steps == {weights[0].numel() * weights[0].element_size()}
    torch.optim.SGD(model.parameters(), 0.1).step()
    torch.testing.assert_close(compiled(tokens(3, 11)), copy.deepcopy(model)(tokens(3, 11)))


def test_float32_trains_where_grouped_mm_cannot_be_compiled() -> None:
    """For a compiler torch has grouped_mm in bfloat16 only: Dynamo stops there before any backend; `optimize` comes first."""
    model = Sorted()
    x = tokens(3, 11)
    reference = outcome(model, model, x)
    with pytest.raises(Exception, match="grouped|bf16|BFloat16"):
        torch.compile(model, backend="moefx", fullgraph=True, options=INNER)(x)
    torch._dynamo.reset()
    compiled = torch.compile(moefx.optimize(model, (x,)), backend="aot_eager", fullgraph=True)
    assert_same(outcome(compiled, model, x), reference, torch.float32)


IN_A_PROCESS = """
import json, sys
sys.path[:0] = {path!r}
import torch
import test_backend as tests
torch.manual_seed(0)
model = tests.Gathered()
reference = tests.copy.deepcopy(model)
if {entrance!r} == "optimize":
    compiled = torch.compile(tests.moefx.optimize(model), fullgraph=True, dynamic=True)
else:
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True)
for shape in ((3, 11), (2, 7)):
    x = tests.tokens(*shape)
    tests.assert_same(tests.outcome(compiled, model, x), tests.outcome(reference, reference, x), torch.float32)
print(json.dumps({{name: dict(torch._dynamo.utils.counters[name]) for name in ("aot_autograd", "inductor")}}))
"""


def in_a_process(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, cwd=HERE.parent)


@pytest.mark.slow  # Inductor takes half a minute for its first C++ file
@pytest.mark.parametrize("entrance", ["backend", "optimize"])
def test_a_second_process_hits_the_caches(entrance: str, tmp_path: Path) -> None:
    """Compiled by Inductor's C++ backend: what one process compiled, the next one finds, at AOTAutograd's level already."""
    program = IN_A_PROCESS.format(path=[str(HERE), str(HERE.parent)], entrance=entrance)
    first, second = (
        json.loads(in_a_process(program, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).stdout.splitlines()[-1]) for _ in range(2)
    )
    assert first["aot_autograd"]["autograd_cache_miss"] == 1
    assert second["aot_autograd"]["autograd_cache_hit"] == 1
    assert second["inductor"]["fxgraph_cache_hit"] == 2, "forward and backward"
    for counters in (first, second):
        assert not counters["aot_autograd"].get("autograd_cache_bypass")
        assert not counters["inductor"].get("fxgraph_cache_bypass")
    assert not second["aot_autograd"].get("autograd_cache_miss")
    assert not second["inductor"].get("fxgraph_cache_miss")


@pytest.mark.gpu
@pytest.mark.parametrize("entrance", ["backend", "optimize"])
def test_cuda_graphs(entrance: str) -> None:
    """A step that is recorded once and replayed while the routing changes: outputs and gradients as in eager mode."""
    model = Layers("gathered").cuda()
    reference = copy.deepcopy(model)
    if entrance == "optimize":
        compiled = torch.compile(moefx.optimize(model, (tokens(4, 16).cuda(),)), mode="reduce-overhead", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="moefx", mode="reduce-overhead", fullgraph=True)
    chosen = set()
    for seed in range(8):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        x = tokens(4, 16, seed=seed).cuda()
        assert_same([t.clone() for t in outcome(compiled, model, x)], outcome(reference, reference, x), torch.float32)
        chosen.add(tuple(reference.first.router(x.tanh()).topk(K).indices.flatten().tolist()))
    assert len(chosen) == 8
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    if entrance == "backend":
        assert len(GRAPHS[0].found) == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_inductors_processes_start_beside_the_analysis(device: str, inner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, with Inductor behind."""
    from torch._inductor.async_compile import AsyncCompile

    order: list[str] = []

    def noted(run: Callable[..., Any], what: str) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            order.append(what)
            return run(*args, **kwargs)

        return note

    monkeypatch.setattr(AsyncCompile, "use_process_pool", staticmethod(noted(AsyncCompile.use_process_pool, "processes")))
    monkeypatch.setattr(graph_analysis.Analysis, "found", noted(graph_analysis.Analysis.found, "analysis"))
    model = Layers("gathered").to(device)
    torch.compile(model, backend="moefx", options={"inner": inner})(tokens(4, 16).to(device))
    expected = ["processes", "analysis"] if (device, inner) == ("cuda", "inductor") else ["analysis"]
    assert order[: order.index("analysis") + 1] == expected


@pytest.mark.parametrize("beside", [True, False])
def test_kernels_of_choices_are_ready_with_the_graph(beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the inner backend or behind it; what fails there is not raised, since the first call raises it."""
    prepared = threading.Event()

    def prepare(*choice: Any) -> None:
        assert choice == ("auto", torch.device("cpu"), torch.float32, 8, 2)
        prepared.set()
        raise RuntimeError("no compiler")

    def inner(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        assert prepared.wait(20 if beside else 0) == beside
        return gm.forward

    graph = fx.Graph()
    scores = graph.placeholder("scores")
    scores.meta["example_value"] = torch.zeros(3, 8)
    graph.output(graph.call_function(moefx.backend.TOPK, (scores, 2)))
    gm = fx.GraphModule({}, graph)
    monkeypatch.setattr(moefx.backend, "prepare", prepare)
    assert moefx.backend._compiled(gm, [], inner, moefx.backend.BackendOptions(), beside) == gm.forward
    assert prepared.is_set()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("shape", [(2, 9), (3, 97)])
def test_families_on_the_gpu(family: str, shape: tuple[int, int]) -> None:
    """Transformers records other operators there than on the CPU that probes run on."""
    tiny = build(family, "grouped_mm")
    tiny.model.cuda()
    reference = copy.deepcopy(tiny.model)
    reference.set_experts_implementation("eager")
    compiled = torch.compile(tiny.model, backend="moefx", options=INNER)
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in tiny.inputs(*shape).items()}
    expected, actual = _train(reference, reference, inputs), _train(compiled, tiny.model, inputs)
    assert [len(graph.found) for graph in GRAPHS] == [len(tiny.blocks)], GRAPHS
    assert max(relative_error(a, b, 1e-30) for a, b in zip(expected[0], actual[0])) <= 1e-4
    assert gradient_error(expected[1], actual[1])[0] <= 1e-3


@pytest.mark.gpu
def test_lanes_inside_of_a_compiled_graph() -> None:
    """The region's own streams: chunks on several lanes, delayed at random, between the kernels of Inductor."""
    model = Layers("gathered").cuda()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options={"degree": 3})
    generator = torch.Generator().manual_seed(0)
    before = set(REGIONS)
    for turn in range(6):
        x = tokens(4, 16, seed=turn).cuda()
        assert_same(outcome(compiled, model, x), outcome(reference, reference, x), torch.float32)
        for handle in set(REGIONS) - before:
            REGIONS[handle].delays = lambda _: torch.cuda._sleep(int(torch.randint(1, 1_000_000, (1,), generator=generator)))
    assert set(REGIONS) - before


def test_annotations_of_the_user_stay(spy: Spy) -> None:
    """What the user's code says about its nodes, as Dynamo says on which stream a node runs, is true of the region's."""

    class Annotated(Layers):
        def forward(self, x: Tensor) -> Tensor:
            with torch.fx.traceback.annotate({"lane": 7}):
                y = self.first(x.tanh())
            return self.head(x + y)

    torch.compile(Annotated("gathered"), backend="moefx", fullgraph=True, options={"inner": "spy"})(tokens(3, 11))
    (call,) = (node for node in spy.graphs[0].nodes if "moefx.routed" in str(node.target))
    assert call.meta["custom"] == {"lane": 7}


# ------------------------------------------------------------------------------------------------ bad input


def test_a_graph_without_experts_goes_on_unchanged(spy: Spy) -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    seen: list[str] = []

    def recording(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(text_of(gm.graph))
        return moefx.backend.moefx(gm, inputs, options={"inner": "spy"})

    x = tokens(3, 11)
    torch.testing.assert_close(torch.compile(model, backend=recording)(x), model(x))
    assert text_of(spy.graphs[0]) == seen[0]
    assert not GRAPHS[0].found


def test_an_unsupported_region_is_left_with_a_reason(spy: Spy, caplog: pytest.LogCaptureFixture) -> None:
    """Every expert weighs every token: nothing is routed."""

    class Mixture(Moe):
        def forward(self, x: Tensor) -> Tensor:
            gates, _ = self.router(x).softmax(-1).sort(-1)
            every = torch.einsum("btd,edh->bteh", x, self.w1).relu()
            return torch.einsum("bte,bteh,ehd->btd", gates, every, self.w2)

    model = Mixture()
    with caplog.at_level(logging.INFO, "moefx.passes.find"):
        y = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": "spy"})(tokens(3, 11))
    torch.testing.assert_close(y, model(tokens(3, 11)))
    assert not any("moefx" in str(node.target) for node in spy.graphs[0].nodes)
    assert GRAPHS[0].declined
    assert "declined" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"iner": "inductor"}}, "unknown option 'iner'.*chunks|unknown option 'iner'.*inner"),
        ({"options": {"inner": "inductr"}}, "inner"),
        ({"options": {"codec": "int8"}}, "unknown option 'codec'"),  # of several ranks
        ({"options": {"inner": "moefx"}}, "not itself"),
        ({"options": {"inner": "aot_eager"}, "mode": "max-autotune"}, "Inductor's"),
    ],
)
def test_wrong_options(arguments: dict[str, Any], message: str) -> None:
    graph = fx.symbolic_trace(nn.Linear(D, D))
    with pytest.raises(InputError, match=message):
        moefx.backend.moefx(graph, [tokens(3)], **arguments)


def test_an_unknown_option_lists_the_options() -> None:
    with pytest.raises(Exception, match="it has .*inner"):
        torch.compile(Gathered(), backend="moefx", options={"degre": 2})(tokens(3, 11))


def test_fragments_of_a_broken_loop_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    tiny = build("mixtral")  # Transformers' eager loop
    moefx.backend._warned.clear()
    with caplog.at_level(logging.WARNING, "moefx.backend"):
        torch.compile(tiny.model, backend="moefx", options=INNER)(**tiny.inputs(2, 9))
    said = [r for r in caplog.records if "torch.compile(moefx.optimize(model))" in r.getMessage()]
    assert len(said) == 1
    assert any("torch.compile(moefx.optimize(model))" in d.reason for g in GRAPHS for d in g.declined)


def test_a_graph_of_an_unknown_region_says_so() -> None:
    with pytest.raises(InputError, match="no moefx region '0123'"):
        torch.ops.moefx.routed("0123", torch.ones(2, D), torch.zeros(2, K, dtype=torch.long), torch.ones(2, K), [], None, False)


# ------------------------------------------------------------------------------------------------ reports


def test_explain_tells_of_graphs(caplog: pytest.LogCaptureFixture) -> None:
    model = Layers("gathered")
    compiled = torch.compile(model, backend="moefx", options=INNER)
    with pytest.raises(InputError, match="example_inputs"):
        moefx.explain(compiled)
    with caplog.at_level(logging.DEBUG, "moefx"):
        compiled(tokens(3, 11))
    for asked in (compiled, model):
        report = moefx.explain(asked)
        assert [len(graph.found) for graph in report.graphs] == [2]
        assert "graphs of torch.compile" in str(report)
        assert "aot_eager" in str(report)
    assert report.graphs[0].found[1].same_as == report.graphs[0].found[0].name
    assert "test_backend.py" in report.graphs[0].found[0].location
    assert {r.name for r in caplog.records} >= {"moefx.passes.find", "moefx.codegen.emit"}
    assert not moefx.report.graphs_of(Layers("gathered").parameters())


def test_logs_and_dumps_by_environment() -> None:
    """TORCH_LOGS names a stage, as for any part of torch."""
    program = IN_A_PROCESS.replace("dynamic=True)", "dynamic=True, options=tests.INNER)")
    done = in_a_process(
        program.format(path=[str(HERE), str(HERE.parent)], entrance="backend"),
        TORCH_LOGS="+moefx.passes.find,+moefx.passes.schedule,+moefx.codegen.emit",
    )
    assert "found L['self']" in done.stderr or "found the graph" in done.stderr, done.stderr
    assert "def backward(rt, saved" in done.stderr  # emit
    assert "forward r=1" in done.stderr  # schedule


def test_equal_regions_have_equal_handles() -> None:
    """In another process too: the handle is made of what is computed."""
    handles = []
    for chunks in (1, 1, 2):
        model = Gathered()
        moefx.optimize(model, (tokens(3, 11),), moefx.Options(degree=chunks))
        handles.append(next(iter(vars(model)["forward"].variants.values())).compiled.handle)
    assert handles[0] == handles[1] != handles[2]


def test_transforms_of_torch_func_are_left_alone(spy: Spy) -> None:
    class Mapped(Moe):
        def experts(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
            def one(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
                return torch.einsum("k,kh,khd->d", w, F.silu(x @ self.w1[c]), self.w2[c])

            return torch.func.vmap(one)(tokens, weights, chosen)

    model = Mapped()
    y = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": "spy"})(tokens(3, 11))
    torch.testing.assert_close(y, model(tokens(3, 11)))
    assert "torch.func" in GRAPHS[0].declined[0].reason
    assert not GRAPHS[0].found


def test_beside_transforms_of_torch_func_regions_are_found(spy: Spy) -> None:
    class Masked(Layers):
        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            mask = torch.func.vmap(torch.func.vmap(lambda i, j: i <= j, (None, 0)), (0, None))(place, place)
            return super().forward(torch.einsum("btd,ts->bsd", x, mask.to(x.dtype)))

    model = Masked("gathered")
    y = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": "spy"})(tokens(3, 11))
    torch.testing.assert_close(y, model(tokens(3, 11)))
    assert len(GRAPHS[0].found) == 2, GRAPHS[0]


def test_a_run_that_stops_inside_of_a_transform_leaves_it() -> None:
    from torch._functorch.predispatch import _vmap_increment_nesting

    with pytest.raises(ValueError, match="stop"), graph_nodes.transforms_left():
        _vmap_increment_nesting(3, "error")
        raise ValueError("stop")
    assert not torch._C._functorch.get_interpreter_stack()


# ------------------------------------------------------------------------------------------------ styles

# Positive styles that Dynamo captures and the backend leaves alone; what `optimize` does with them is in test_styles.py.
NOT_IN_GRAPHS = frozenset(
    "vmap_experts vmap_tokens flat_vector_weights grouped_convolutions weight_norm_experts equalised_weights "
    "shared_first_layer split_head_experts conditioned_experts weight_in_hidden_layer_bias table_routing centroid_routing".split()
)


@pytest.mark.slow
@pytest.mark.parametrize("name", POSITIVE)
@dynamic_outputs
def test_style(name: str) -> None:
    """Where Dynamo captures a style in one graph, the compiled block is the block, and its region is found."""
    try:
        style = POSITIVE[name]()
    except ImportError as missing:
        pytest.skip(str(missing))
    model = module_of(style).eval()
    try:
        torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True, dynamic=True)(*example_of(style))
    except (torch._dynamo.exc.TorchDynamoException, GuardOnDataDependentSymNode) as error:
        pytest.skip(f"Dynamo does not capture it: {str(error).splitlines()[0]}")
    torch._dynamo.reset()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=INNER)
    for _, given in [("example", example_of(style)), *(t for t in trials(style) if t[0] in ("another shape", "skewed"))]:
        expected, before = call(reference, cast(given, style.dtype), 3), state_of(model)
        actual = call(compiled, cast(given, style.dtype), 3)
        actual.gradients = {n.replace("_orig_mod.", ""): g for n, g in actual.gradients.items()}
        actual.state = state_of(model)
        assert not (why := compare(actual, expected, before, 1e-5)), why
    if name not in NOT_IN_GRAPHS and expected_verdict(name, style, False) == ["found"]:
        assert any(graph.found for graph in GRAPHS), GRAPHS[0]


# ------------------------------------------------------------------------------------------------ families

NO_FULL_GRAPH = {  # with or without moefx
    "longcat_flash": "its loop over experts that compute nothing stays, with sizes that depend on data",
    "ernie4_5_vl_moe": "branches on its input's token types",
    "switch_transformers": "its encoder indexes a cache that is None, under Dynamo",
}
# Along the sequence Transformers alone is compiled anew too (`--entrance none`), since its attention compares the length with a
# number. There the batch grows, of sequences of one token, without NNPACK and oneDNN, for which the batch is compared with 16.
ALONG_BATCH = {
    **dict.fromkeys(("bailing_hybrid", "glm5_next", "kimi_linear", "lara_mini"), "chunks of linear attention"),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_next", "qwen4_exp", "minimax"), "chunks of linear attention"),
    "jamba": "an associative scan halves the sequence",
    **dict.fromkeys(("diffusion_gemma", "openai_privacy_filter"), "a sliding window"),
    "deepseek_v4": "attention over compressed pieces of the sequence",
}
# The graph that Dynamo makes for one token alone: from one token too little can be told apart, and the graph is left as it is.
NOT_FROM_ONE_TOKEN = frozenset({"deepseek_v4", "inkling2", "inkling2_loop", "zaya"})
FAMILY_SAMPLE = {("qwen3_moe", "grouped_mm", "backend"), ("gpt_oss", "batched_mm", "backend"), ("dbrx", "eager", "optimize")}


def _family_cases() -> Iterator[Any]:
    for entrance, implementations in (("backend", ("grouped_mm", "batched_mm")), ("optimize", ("eager",))):
        for implementation in implementations:
            for family in FAMILIES:
                if family in EXPECTED_DECLINED or family in NO_FULL_GRAPH:
                    continue
                case = (family, implementation, entrance)
                if entrance == "optimize" or has_implementation(family):
                    marks = () if case in FAMILY_SAMPLE else (pytest.mark.slow,)
                    yield pytest.param(*case, marks=marks, id="-".join(case))
    yield pytest.param("llama4", "eager", "backend", marks=pytest.mark.slow, id="llama4-eager-backend")  # bmm over all experts


@pytest.mark.parametrize(("family", "implementation", "entrance"), list(_family_cases()))
def test_family(family: str, implementation: str, entrance: str) -> None:
    """One dynamic graph with every block, outputs and gradients as in eager mode."""
    assert not (problems := check_family(family, implementation, entrance)[0]), "\n".join(problems)


COUNTS = (1, 7, 64, 333)  # of tokens: a graph of its own for one, then one for all others


def check_family(family: str, implementation: str, entrance: str, inner: str = "aot_eager") -> tuple[list[str], str]:
    """Compile the tiny model in training mode and compare it with an eager copy at all COUNTS; (problems, one line).

    entrance: "backend", "optimize", or "none" for Transformers and the inner backend alone, in bfloat16 for grouped_mm,
    where torch has no other for a compiler; then only errors and recompilations are problems.
    """
    tiny = build(family, implementation)
    tiny.model.train()
    if entrance == "none" and implementation == "grouped_mm":
        tiny.model.bfloat16()
    reference = copy.deepcopy(tiny.model)
    if implementation == "grouped_mm":
        reference.set_experts_implementation("eager")
    counter = torch._dynamo.testing.CompileCounterWithBackend(inner)
    torch._dynamo.register_backend(counter, name="counted")
    options: dict[str, Any] = {"backend": counter}
    if entrance == "optimize":
        moefx.optimize(tiny.model, tiny.inputs(2, 29))
    elif entrance == "backend":
        options = {"backend": "moefx", "options": {"inner": "counted"}}
    try:
        plain = family not in ALONG_BATCH
        with torch.backends.nnpack.flags(enabled=plain), torch.backends.mkldnn.flags(enabled=plain):
            return _compared(tiny, reference, torch.compile(tiny.model, fullgraph=True, **options), counter, entrance)
    finally:
        del torch._dynamo.backends.registry._BACKENDS["counted"]
        torch._dynamo.backends.registry._COMPILER_FNS.pop("counted", None)


def _compared(tiny: Any, reference: nn.Module, compiled: Any, counter: Any, entrance: str) -> tuple[list[str], str]:
    problems, worst, regions = [], [0.0, 0.0], []
    tolerance = 1e-4 if tiny.family in DOUBLE else 2e-5
    for count in COUNTS:
        inputs = tiny.inputs(*((count, 1) if tiny.family in ALONG_BATCH else (1, count)), seed=1)
        expected = _train(reference, reference, inputs)
        with torch._dynamo.config.patch(error_on_recompile=count > 7):
            actual = _train(compiled, tiny.model, inputs)
        regions.append(sum("moefx.routed" in str(n.target) for n in counter.graphs[-1].graph.nodes))
        if entrance == "none":
            continue
        output = max(relative_error(a, b, 1e-30) for a, b in zip(expected[0], actual[0]))
        gradient, name = gradient_error(expected[1], actual[1])
        worst = [max(worst[0], output), max(worst[1], gradient)]
        if not output <= 1e-5 or len(expected[0]) != len(actual[0]):
            problems.append(f"{count} tokens: an output differs by {output:.1e}")
        if not gradient <= tolerance:
            problems.append(f"{count} tokens: the gradient of {name} differs by {gradient:.1e}")
    expected_regions = [0 if entrance == "none" else len(tiny.blocks)] * len(COUNTS)
    if entrance == "backend" and tiny.family in NOT_FROM_ONE_TOKEN:
        expected_regions[0] = 0
    if regions != expected_regions:
        declined = [f"{d.name}: {d.reason}" for graph in GRAPHS for d in graph.declined]
        problems.append(f"{regions} regions instead of {len(tiny.blocks)}: {declined}")
    return problems, f"regions {regions[-1]}  graphs {counter.frame_count}  out {worst[0]:.0e}  grad {worst[1]:.0e}"


def _train(call: Any, model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)
    result = call(**inputs)
    outputs = [t for t in (result.values() if isinstance(result, dict) else result) if isinstance(t, Tensor)]
    roots = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(3)
    torch.autograd.backward(roots, [torch.randn(t.shape, generator=generator).to(t.device) for t in roots])
    return [t.detach() for t in outputs], {name: p.grad for name, p in model.named_parameters()}


def main() -> int:
    """Print one line per family and a total."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--entrance", choices=("backend", "optimize", "none"), default="backend")
    parser.add_argument("--impl", default="grouped_mm")
    parser.add_argument("--inner", default="aot_eager")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = [f for f in arguments.families if arguments.impl == "eager" or has_implementation(f)]
    right = 0
    for family in families:
        torch._dynamo.reset()
        GRAPHS.clear()
        start = time.perf_counter()
        try:
            problems, line = check_family(family, arguments.impl, arguments.entrance, arguments.inner)
        except Exception as error:  # noqa: BLE001 - the next families must run
            problems, line = [f"{type(error).__name__}: {str(error)[:600]}"], ""
        right += not problems
        seconds = time.perf_counter() - start
        print(f"{'FAIL' if problems else 'OK':4} {family:22} {line}  {seconds:5.1f} s", *problems, sep="\n       ", flush=True)
    print(f"{right} of {len(families)} right ({arguments.entrance}, {arguments.impl}, {arguments.inner})")
    return int(right != len(families))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
