"""A router's choice by `moefx::topk`: the kernel, the operator, the mode, and the pass over graphs."""

from __future__ import annotations

from triton_here import DEVICE, DTYPES, needs_triton  # first: it chooses Triton's interpreter

# isort: split

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from moefx.codegen.triton_ops import OPS
from moefx.models.mixtral import MixtralMoE
from moefx.passes.select import select
from torch import Tensor, fx, nn

import moefx
from moefx import ops, selection
from moefx.block import SelectingForward, rewritten
from moefx.errors import InputError
from moefx.ops import topk_serves
from moefx.options import Options
from moefx.selection import TOPK, Selecting, paying, selecting

INF, NAN = float("inf"), float("nan")


def scores(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


# ------------------------------------------------------------------------------------------------ the kernel


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(1, 1, 1), (1, 8, 2), (17, 100, 8), (255, 5, 3), (3, 130, 10), (2, 300, 5), (5, 1024, 32), (0, 8, 2), (7, 6, 6)],
)
def test_kernel_is_torchs_topk(tokens: int, experts: int, k: int, dtype: torch.dtype) -> None:
    x = scores(tokens, experts, dtype=dtype)
    values, ids = OPS["topk"](x, k)
    expected, _ = ops.topk(x, k)
    assert torch.equal(values, expected)
    assert torch.equal(x.gather(-1, ids), expected)
    assert ids.dtype is torch.int64
    assert all(len(set(row)) == k for row in ids.tolist())


@needs_triton
def test_kernel_takes_the_first_of_equal_scores_and_not_a_number_first() -> None:
    x = torch.tensor([[1.0, 1, 2, 2, NAN, -INF, 0.0, -0.0, -INF]], device=DEVICE)
    values, ids = OPS["topk"](x, 9)
    assert ids.tolist() == [[4, 2, 3, 0, 1, 6, 7, 5, 8]]
    assert values[0, 0].isnan()
    assert values[0, 1:].tolist() == [2, 2, 1, 1, 0, 0, -INF, -INF]


@needs_triton
def test_kernel_takes_any_strides_and_leading_axes() -> None:
    wide = torch.full((4, 6, 40), NAN, device=DEVICE)
    x = wide[:, 1:4, 3:20]
    x.copy_(scores(4, 3, 17))
    for view in (x, x.transpose(0, 1), scores(17, 5).t(), scores(17)):
        for got, expected in zip(OPS["topk"](view, 4), torch.topk(view, 4)):
            assert torch.equal(got, expected)


@needs_triton
@pytest.mark.parametrize(("experts", "k"), [(8, 9), (8, 0), (1025, 2), (64, 33)])
def test_kernel_says_what_it_does_not_take(experts: int, k: int) -> None:
    with pytest.raises(InputError, match=f"topk: {k} of {experts} scores"):
        OPS["topk"](scores(2, experts), k)


# ------------------------------------------------------------------------------------------------ the operator


def test_operator_is_well_formed() -> None:
    for x in (torch.randn(5, 9), torch.randn(2, 3, 9, requires_grad=True)):
        torch.library.opcheck(torch.ops.moefx.topk.default, (x, 4))


def test_gradient_is_torchs() -> None:
    x, twin = (torch.linspace(-1, 1, 45, dtype=torch.float64).view(5, 9).sin().requires_grad_() for _ in range(2))
    values, ids = torch.ops.moefx.topk(x, 4)
    expected, places = twin.topk(4)
    assert torch.equal(ids, places)
    (values * torch.arange(4)).sum().backward()
    (expected * torch.arange(4)).sum().backward()
    assert torch.equal(x.grad, twin.grad)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ the mode


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The k of each call of the kernel."""
    calls: list[int] = []

    def counting(device: str, kernels: str) -> Any:
        def topk(x: Tensor, k: int) -> Any:
            calls.append(k)
            return tuple(torch.topk(x, k))

        return {"topk": topk}

    monkeypatch.setattr(selection, "ops_for", counting)
    return calls


def test_mode_takes_calls_that_the_operator_serves(chosen: list[int]) -> None:
    x = scores(5, 9).requires_grad_()
    with Selecting("triton"):
        values, ids = torch.topk(x, 3, dim=-1)
        again = x.detach().topk(2, sorted=False)
    assert chosen == [3, 2]
    assert torch.equal(values, x.topk(3).values)
    assert torch.equal(again.indices, x.topk(2).indices)
    values.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x).scatter(-1, ids, 1.0))  # type: ignore[arg-type]


class Wrapped(Tensor):
    """A tensor whose numbers lie elsewhere, as those of a DTensor."""


def test_mode_leaves_what_is_no_plain_tensor_to_torch(chosen: list[int]) -> None:
    x = scores(5, 9)
    with Selecting("triton"):
        torch.topk(x.as_subclass(Wrapped), 2)
        torch.func.vmap(lambda row: torch.topk(row, 2)[0])(x)
        gradient = torch.func.grad(lambda t: torch.topk(t, 2)[0].sum())(x)
        with fwAD.dual_level():
            tangent = fwAD.unpack_dual(torch.topk(fwAD.make_dual(x, torch.ones_like(x)), 2)[0]).tangent
    assert not chosen
    assert gradient.sum() == 10
    assert torch.equal(tangent, torch.ones(5, 2, device=x.device))


def test_router_whose_kernel_cannot_be_made_keeps_torchs(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("moefx.api.prepare", fail)
    model = Apart()
    moefx.optimize(model, (torch.randn(9, 16),))
    assert rewritten(model.experts) and "forward" not in vars(model.router)
    assert "router keeps torch.topk: RuntimeError: no compiler" in caplog.text


def test_mode_leaves_other_calls_to_torch(chosen: list[int]) -> None:
    x = scores(5, 9)
    out = (x.new_empty(5, 2), x.new_empty(5, 2, dtype=torch.int64))
    with Selecting("triton"):
        torch.topk(x, 2, dim=0)
        torch.topk(x, 2, largest=False)
        torch.topk(x, 2, out=out)
        torch.topk(x.double(), 2)
        torch.topk((x * 10).int(), 2)
        torch.topk(scores(2, 2000), 2)
        with pytest.raises(RuntimeError, match="k"):
            torch.topk(x, 10)
    assert not chosen
    assert torch.equal(out[0], x.topk(2).values)


def test_serves_needs_sizes_that_are_known() -> None:
    assert topk_serves(torch.empty(2, 64), 8)
    assert not topk_serves(torch.empty(()), 1)
    assert not topk_serves(torch.empty(2, 64), 0)
    assert not topk_serves(torch.empty(2, 64), "8")


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamo_follows_the_mode(dynamic: bool) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    def route(x: Tensor) -> Tensor:
        with Selecting("triton"):
            values, ids = x.softmax(-1).topk(2)
        return values * ids

    x = scores(7, 6)
    assert torch.equal(torch.compile(route, backend=backend, fullgraph=True, dynamic=dynamic)(x), route(x))
    assert "topk" in [getattr(n.target, "__name__", "") for n in graphs[0].graph.nodes]


@needs_triton
def test_block_selects_where_it_pays(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    block = MixtralMoE(16, 32, 4, 2)
    x = torch.randn(2, 5, 16)
    expected = block(x)
    moefx.optimize(block, (x,))
    variants = list(rewritten(block).variants.values())  # type: ignore[union-attr]
    with paying():
        block(x)
    assert not chosen, "not on a CPU"
    for variant in variants:
        monkeypatch.setattr(variant.compiled, "kernels", "triton")  # type: ignore[union-attr]
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    assert not chosen, "too few scores"
    with paying():
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)
    assert chosen == [2]
    for variant in variants:
        monkeypatch.setattr(variant.compiled, "kernels", "torch")  # type: ignore[union-attr]
    with paying():
        block(x)
    assert chosen == [2]


def test_it_pays_for_many_scores_and_for_large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SCORES", 64)
    monkeypatch.setattr(selection, "FEATURES", 256)

    def on(tokens: int, width: int, kernels: str = "triton") -> bool:
        mode = selecting(kernels, (None, torch.zeros(tokens, width)), width, 4)
        return isinstance(mode, Selecting)

    assert [on(4, 8), on(16, 8), on(4, 64), on(0, 8)] == [False, True, True, False]
    assert not on(16, 64, "torch") and not on(16, 64, "auto"), "not on a CPU"


def test_no_graph_depends_on_whether_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for any number of tokens, in which the kernel is always there."""
    monkeypatch.setattr(selection, "SCORES", 64)
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    def route(x: Tensor) -> Tensor:
        with selecting("triton", (x,), 8, 8):
            return torch.topk(x, 2).values

    torch._dynamo.reset()
    compiled = torch.compile(route, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (5, 100):
        x = torch.randn(tokens, 8)
        assert torch.equal(compiled(x), torch.topk(x, 2).values)
    assert [sum("topk" in str(n.target) for n in gm.graph.nodes) for gm in graphs] == [1]


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w, ids = torch.topk(torch.softmax(x @ self.weight.t(), -1), 2, dim=-1)
        return w / w.sum(-1, keepdim=True), ids


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 24) / 4), nn.Parameter(torch.randn(4, 24, 16) / 5)

    def forward(self, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(4):
            t, k = torch.where(ids == e)
            y.index_add_(0, t, torch.relu(x[t] @ self.up[e]) @ self.down[e] * w[t, k, None])
        return y


class Apart(nn.Module):
    """Router and experts are modules of their own, as in Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(16), Router(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        w, ids = self.router(x)
        return self.experts(x, ids, w)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Apart:
    model = Apart()
    moefx.optimize(model, (torch.randn(9, 16),))
    assert [name for name, m in model.named_modules() if isinstance(m.__dict__.get("forward"), SelectingForward)] == ["router"]
    monkeypatch.setattr(model.router.forward, "kernels", "triton")
    return model


def test_each_block_has_the_router_that_chose_for_it() -> None:
    """One token, for which all layers choose the same experts."""
    model = nn.Sequential(*(Apart() for _ in range(3)))
    for layer in model:
        nn.init.zeros_(layer.router.weight)
    moefx.optimize(model, (torch.randn(1, 16),))
    selected = [name for name, m in model.named_modules() if isinstance(m.__dict__.get("forward"), SelectingForward)]
    assert selected == ["0.router", "1.router", "2.router"]
    assert "torch.topk of 2.router runs as moefx::topk on a GPU" in str(moefx.explain(model))


def test_torch_kernels_leave_the_router_alone() -> None:
    model = Apart()
    moefx.optimize(model, (torch.randn(9, 16),), Options(kernels="torch"))
    assert rewritten(model.experts) and "forward" not in vars(model.router)


def test_router_outside_of_the_block_selects_where_it_pays(apart: Apart, chosen: list[int]) -> None:
    x = torch.randn(7, 16)
    expected = apart(x)
    assert not chosen, "too few scores"
    with paying():
        assert torch.equal(apart(x), expected)
    assert chosen == [2]


def test_routers_hooks_fire_and_its_gradients_are_the_same(apart: Apart, chosen: list[int]) -> None:
    seen: list[tuple[int, ...]] = []
    apart.router.register_forward_hook(lambda m, args, out: seen.append(tuple(out[1].shape)))
    x = torch.randn(7, 16)
    gradients = []
    for on in (False, True):
        with paying() if on else contextlib.nullcontext():
            apart(x).square().sum().backward()
        gradients.append(apart.router.weight.grad)
        apart.zero_grad()
    assert seen == [(7, 2)] * 2
    assert chosen == [2]
    assert torch.equal(*gradients)


def test_restored_copied_and_pickled_models(apart: Apart) -> None:
    twin = copy.deepcopy(apart)
    assert twin.router.forward.module is twin.router
    loaded = pickle.loads(pickle.dumps(apart))
    assert not isinstance(loaded.router.forward, SelectingForward)
    moefx.restore(apart)
    assert "forward" not in vars(apart.router)
    x = torch.randn(5, 16)
    torch.testing.assert_close(twin(x), apart(x))
    torch.testing.assert_close(loaded(x), apart(x))


def test_compiled_model_chooses_by_the_operator(apart: Apart) -> None:
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm

    x = torch.randn(7, 16)
    expected = apart(x)
    torch.testing.assert_close(torch.compile(apart, backend=backend, fullgraph=True)(x), expected)
    called = [getattr(n.target, "__name__", "") for n in graphs[0].graph.nodes]
    assert torch.ops.moefx.topk in [n.target for n in graphs[0].graph.nodes], called


@pytest.mark.gpu
@needs_triton
def test_captured_choice_follows_its_scores() -> None:
    x = scores(64, 128)
    graph = torch.cuda.CUDAGraph()
    with Selecting(), torch.no_grad():
        x.topk(8)
        with torch.cuda.graph(graph):
            values, ids = x.topk(8)
    x.copy_(scores(64, 128))
    graph.replay()
    expected = x.topk(8)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices)


# ------------------------------------------------------------------------------------------------ the pass


class Routers(nn.Module):
    def forward(self, x: Tensor) -> list[Any]:
        a = torch.topk(x, 2, dim=-1, sorted=False)
        b = x.topk(3)
        groups = x.view(-1, 2, 4).topk(2, dim=-1)[0].sum(-1)
        return [a.values, b[1], groups.topk(1)[1], x.topk(1, dim=0)[0], torch.topk(x, 2, -1, False)[0]]


def text_of(graph: fx.Graph) -> str:
    lines = []
    for n in graph.nodes:
        called = getattr(n.target, "__name__", None) or str(n.target)
        lines.append(f"{n.name} = {n.op} {called}({', '.join(map(str, n.args))}{', ' * bool(n.kwargs)}{n.kwargs or ''})")
    return "\n".join(lines) + "\n"


def test_pass_replaces_what_the_operator_serves(golden: Callable[[str, str], None]) -> None:
    texts: list[str] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        texts.append(text_of(gm.graph))
        assert not select(gm.graph.nodes, TOPK, lambda device: device.type == "cuda")
        assert text_of(gm.graph) == texts[0]
        made = select(list(gm.graph.nodes), TOPK, lambda device: True)
        assert len(made) == 4
        gm.graph.lint()
        gm.recompile()
        texts.append(text_of(gm.graph))
        return gm

    x = torch.randn(6, 8)
    expected = Routers()(x)
    for got, want in zip(torch.compile(Routers(), backend=backend, fullgraph=True)(x), expected):
        assert torch.equal(got, want)
    golden("select", "before\n\n" + texts[0] + "\nafter\n\n" + texts[1])
