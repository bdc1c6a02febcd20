"""Parameters that are computed at each call (`torch.nn.utils.parametrize`): adapters of stacked experts, weight norm."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import moefx
from moefx.block import Variant
from moefx.errors import Decline
from moefx.parametrized import check, class_of, computed_in, value

EXPERTS, D, H = 6, 16, 24


class Adapter(nn.Module):
    """W + scale * B A, of E experts."""

    def __init__(self, experts: int, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(experts, 2, columns)), nn.Parameter(torch.randn(experts, rows, 2))
        self.scale = 0.1

    def forward(self, w: Tensor) -> Tensor:
        return w + self.scale * (self.b @ self.a)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(0.3 * torch.randn(EXPERTS, *shape)) for shape in ((H, D), (D, H)))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = nn.functional.linear(nn.functional.linear(x[token], self.up[e]).relu(), self.down[e])
            out = out.index_add(0, token, y * gates[token, slot, None])
        return out


class Dense(Experts):
    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        h = torch.einsum("td,ehd->teh", x, self.up).relu()
        y = torch.einsum("teh,edh->ted", h, self.down)
        return (y.gather(1, chosen[..., None].expand(-1, -1, D)) * gates[..., None]).sum(1)


class Moe(nn.Module):
    def __init__(self, experts: type[Experts] = Experts) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, EXPERTS, bias=False), experts()

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        return self.experts(x, chosen, gates)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


class ListMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, EXPERTS, bias=False), nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x[token]) * gates[token, slot, None])
        return out


class DenseList(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        dense = torch.zeros(x.shape[0], EXPERTS).scatter(1, chosen, gates)
        return sum(dense[:, e, None] * expert(x) for e, expert in enumerate(self.experts))  # type: ignore[no-any-return]


def adapted(experts: type[Experts] = Experts) -> Moe:
    moe = Moe(experts)
    for name in ("up", "down"):
        w = getattr(moe.experts, name).requires_grad_(False)
        parametrize.register_parametrization(moe.experts, name, Adapter(*w.shape))
    return moe


def normed(kind: type[ListMoe] = ListMoe) -> ListMoe:
    moe = kind()
    for expert in moe.experts:
        parametrizations.weight_norm(expert.up)  # type: ignore[attr-defined]
    return moe


def stepped(model: Any, x: Tensor, *rest: Tensor) -> list[Tensor]:
    """Outputs before and after a training step, and that step's gradients."""
    x = x.clone().requires_grad_()
    y = model(x, *rest)
    y.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad.clone() for p in trained if p.grad is not None]
    assert x.grad is not None and len(grads) == len(trained)
    torch.optim.SGD(trained, 1e-2).step()
    model.zero_grad()
    with torch.no_grad():
        return [y.detach(), x.grad, *grads, model(x, *rest)]


@pytest.fixture
def rewritten_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One entry for each call of a block that its rewritten form serves."""
    calls: list[str] = []
    run = Variant.run

    def counted(self: Variant, module: nn.Module, *args: Any) -> Any:
        result = run(self, module, *args)
        calls.append(type(module).__name__)
        return result

    monkeypatch.setattr(Variant, "run", counted)
    yield calls


@pytest.mark.parametrize("make", [adapted, normed])
def test_outputs_and_gradients(make: Any, rewritten_calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    original, x = make(), torch.randn(37, D)
    mine = copy.deepcopy(original)
    names = [n for n, _ in original.named_parameters()]
    moefx.optimize(mine, (x,))
    assert len(moefx.explain(mine).found) == 1
    assert [n for n, _ in mine.named_parameters()] == names and mine.state_dict().keys() == original.state_dict().keys()
    rewritten_calls.clear()
    for tokens in (37, 1, 0):
        expected, actual = stepped(original, x[:tokens]), stepped(mine, x[:tokens])
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert len(rewritten_calls) == 6 and not caplog.messages
    moefx.restore(mine)
    torch.testing.assert_close(mine(x), original(x))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [adapted, normed])
def test_on_a_gpu(make: Any) -> None:
    """Launches come from tapes from the third step of a size on, while what is computed lies elsewhere each time."""
    steps_come_out_the_same(make, "cuda", tolerance=1e-3)


def test_step_after_step() -> None:
    steps_come_out_the_same(adapted, "cpu", tolerance=1e-4)


def steps_come_out_the_same(make: Any, device: str, tolerance: float) -> None:
    torch.manual_seed(0)
    original, x = make().to(device), torch.randn(37, D, device=device)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    assert moefx.explain(mine).found
    for _ in range(5):
        expected, actual = stepped(original, x), stepped(mine, x)
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_two_blocks_share_an_analysis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(adapted(), nn.LayerNorm(D), adapted())
    original, x = copy.deepcopy(model), torch.randn(37, D)
    report = moefx.explain(moefx.optimize(model, (x,)))
    assert [block.same_as for block in report.found] == ["", report.found[0].name]
    torch.testing.assert_close(model(x), original(x))


def test_what_computes_them_may_change(rewritten_calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    original, x = adapted(), torch.randn(37, D)
    torch.manual_seed(0)
    mine = moefx.optimize(adapted(), (x,))  # copies share a class, which removing takes the property from
    for model in (original, mine):
        model.experts.parametrizations.up[0].scale = 0.7  # type: ignore[union-attr, index]
    rewritten_calls.clear()
    torch.testing.assert_close(mine(x), original(x))
    for model in (original, mine):
        parametrize.remove_parametrizations(model.experts, "down")  # type: ignore[arg-type]
    torch.testing.assert_close(mine(x), original(x))
    for model in (original, mine):
        parametrize.remove_parametrizations(model.experts, "up", leave_parametrized=False)  # type: ignore[arg-type]
    torch.testing.assert_close(mine(x), original(x))
    assert len(rewritten_calls) == 3 and not caplog.messages


class Around(nn.Module):
    """As the adapters of stacked experts of a well-known library: parametrized during each call alone."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base = experts
        self.adapters = nn.ModuleDict({n: Adapter(*p.shape) for n, p in experts.named_parameters()})

    def forward(self, *args: Tensor) -> Any:
        for name, adapter in self.adapters.items():
            parametrize.register_parametrization(self.base, name, adapter)
        result = self.base(*args)
        for name in self.adapters:
            parametrize.remove_parametrizations(self.base, name, leave_parametrized=False)
        return result


@pytest.mark.parametrize("late", [False, True])
def test_parametrized_during_each_call(late: bool, rewritten_calls: list[str], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    original, x = Moe(), torch.randn(37, D)
    around = Around(original.experts)
    if not late:
        original.experts = around  # type: ignore[assignment]
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    if late:
        original.experts, mine.experts = around, copy.deepcopy(around)
    rewritten_calls.clear()
    expected, actual = stepped(original, x), stepped(mine, x)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    if not late:
        assert len(rewritten_calls) == 2 and not caplog.messages


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen = 0, list[tuple[int, ...]]()

    def forward(self, w: Tensor) -> Tensor:
        return nn.functional.dropout(w, 0.5, self.training)


class Counting(Masked):
    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w * 1.5


class Listing(Masked):
    def forward(self, w: Tensor) -> Tensor:
        self.seen.append(tuple(w.shape))
        return w * 1.5


def spectral(moe: ListMoe) -> None:
    for expert in moe.experts:
        parametrizations.spectral_norm(expert.up)  # type: ignore[attr-defined]


IMPURE: dict[str, Any] = {
    "_SpectralNorm": spectral,
    "Masked": lambda moe: [parametrize.register_parametrization(e.up, "weight", Masked()) for e in moe.experts],
    "Listing": lambda moe: [parametrize.register_parametrization(e.up, "weight", Listing()) for e in moe.experts],
    "Counting": lambda moe: [parametrize.register_parametrization(e.up, "weight", Counting()) for e in moe.experts],
}


@pytest.mark.parametrize("kind", IMPURE)
@pytest.mark.parametrize("late", [False, True])
def test_computing_that_leaves_something_behind(kind: str, late: bool, caplog: pytest.LogCaptureFixture) -> None:
    """How often the model's own code computes such a parameter is part of what it does."""
    torch.manual_seed(0)
    original, x = ListMoe(), torch.randn(37, D)
    mine = copy.deepcopy(original)
    if late:
        moefx.optimize(mine, (x,))
        assert moefx.explain(mine).found
    for model in (original, mine):
        torch.manual_seed(1)
        IMPURE[kind](model)
    if not late:
        moefx.optimize(mine, (x,))
        assert not moefx.explain(mine).found
        assert any(kind in d.reason and "another number of times" in d.reason for d in moefx.explain(mine).declined)
    for _ in range(2):
        torch.manual_seed(2)
        expected = original(x)
        torch.manual_seed(2)
        torch.testing.assert_close(mine(x), expected)
    for (name, theirs), ours in zip(original.named_buffers(), mine.buffers()):
        torch.testing.assert_close(ours, theirs, msg=name)
    if late:
        assert len(caplog.messages) == 1 and "runs the original ListMoe" in caplog.messages[0]


@pytest.mark.parametrize("entrance", ["optimize", "backend"])
def test_compiled(entrance: str) -> None:
    torch.manual_seed(0)
    original, x = adapted(), torch.randn(37, D)
    mine = copy.deepcopy(original)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if entrance == "optimize":
            call = torch.compile(moefx.optimize(mine, (x,)), backend="aot_eager", fullgraph=True)
        else:
            call = torch.compile(mine, backend="moefx", options={"inner": "aot_eager"})
        expected, actual = stepped(original, x), stepped(call, x)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


MADE: dict[str, Any] = {
    "stacked": lambda: adapted(Dense),
    "experts alone": lambda: adapted(Dense).experts,
    "listed": lambda: normed(DenseList),
}


@pytest.mark.parametrize("what", MADE)
def test_found_by_the_backend(what: str) -> None:
    """What computes parameters stays in the graph, and is differentiated there."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    original = MADE[what]()
    mine, x = copy.deepcopy(original), torch.randn(37, D)
    call = torch.compile(mine, backend="moefx", options={"inner": "aot_eager"}, fullgraph=True)
    rest = () if hasattr(original, "router") else (torch.randint(EXPERTS, (37, 2)), torch.rand(37, 2))
    expected, actual = stepped(original, x, *rest), stepped(call, x, *rest)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert all(len(graph.found) == 1 for graph in moefx.explain(call).graphs)


def test_what_is_parametrized_later_runs_its_own_code_when_compiled() -> None:
    """Dynamo cannot look at whether it matters how often a parameter is computed."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    original, x = Moe(Dense), torch.randn(37, D)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    graphs: list[str] = []

    def backend(gm: Any, _: Any) -> Any:
        graphs.append(str(gm.graph))
        return gm

    call = torch.compile(mine, backend=backend, fullgraph=True)
    torch.testing.assert_close(call(x), original(x))
    for model in (original, mine):
        torch.manual_seed(1)
        parametrize.register_parametrization(model.experts, "up", Adapter(EXPERTS, H, D))
    torch.testing.assert_close(call(x), original(x))
    assert ["routed" in graph for graph in graphs] == [True, False]


def test_one_at_a_time() -> None:
    moe = adapted()
    assert class_of(moe.experts) is Experts and class_of(moe) is Moe
    w = value(moe.experts, "up")
    assert w is not None and w.requires_grad and w.shape == (EXPERTS, H, D)
    assert value(moe.router, "weight") is moe.router.weight and value(moe.router, "bias") is None
    check(moe)
    assert computed_in(moe) == {"experts.up", "experts.down"}
    parametrize.register_parametrization(moe.router, "weight", Masked())
    with pytest.raises(Decline, match="router.weight is computed at each call, by Masked, .* in training"):
        check(moe)
