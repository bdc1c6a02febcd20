"""A rewritten block stays the user's module: parameters, gradients, dtypes, copies, hooks, odd inputs, ways of calling.

Each test builds a block twice from one seed, optimises one of the two and compares.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moefx.models import BLOCKS, GptOssMoE, MixtralMoE, SwitchMoE
from styles_positive import softmax_top_k
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import moefx
from moefx.block import OwnForward, rewritten

D, E, K, H = 16, 4, 2, 16
CLOSE = 1e-5  # relative, in float32
ROUNDED = {torch.float16: 5e-3, torch.bfloat16: 4e-2}


# ------------------------------------------------------------------------------------------------ blocks


class Expert(nn.Module):
    def __init__(self, dim: int = D, hidden: int = H) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Router(nn.Module):
    def __init__(self, dim: int = D, experts: int = E, top_k: int = K) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, experts)
        self.top_k = top_k

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.proj(tokens), self.top_k)


def run_experts(experts: Iterable[nn.Module], tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """A loop over the experts: tokens [T, D], weights and chosen [T, K]."""
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(experts):
        token, slot = torch.where(chosen == index)
        out.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(out.dtype))
    return out


class ListBlock(nn.Module):
    """x [..., D]: a router module and a ModuleList of experts, in a loop over all experts."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.router = Router(experts=experts)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens)
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "list": ListBlock,
    "stacked": lambda: MixtralMoE(D, hidden=H, experts=E, top_k=K),
    "biases": lambda: GptOssMoE(D, hidden=H, experts=E, top_k=K),
}
both_layouts = pytest.mark.parametrize("make", [BUILDERS["list"], BUILDERS["stacked"]], ids=["list", "stacked"])


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (3, 11)), D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def is_rewritten(module: nn.Module) -> bool:
    return rewritten(module) is not None


def pair(
    make: Callable[[], nn.Module], *example: Any, train: bool = False, options: moefx.Options | None = None
) -> tuple[nn.Module, nn.Module]:
    """Return the original and an optimised block with the same parameters."""
    torch.manual_seed(0)
    original = make().train(train)
    mine = moefx.optimize(copy.deepcopy(original), example or (tokens(2, 9),), options)
    report = moefx.explain(mine)
    assert [block.name for block in report.found] == [""], str(report)
    assert is_rewritten(mine)
    return original, mine


def relative(a: Tensor, b: Tensor) -> float:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-3)) if b.numel() else 0.0


def gradients(module: nn.Module, x: Tensor, **how: Any) -> dict[str, Tensor | None]:
    """The gradients of parameters and input, for a fixed random cotangent."""
    module.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf, **how)
    if y.requires_grad or y.numel():  # an original without tokens may have nothing to differentiate
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return {"input": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same_gradients(
    actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = CLOSE
) -> None:
    """Compare gradients by name; where the original has none (an expert without tokens), zero is right too."""
    assert actual.keys() == expected.keys()
    floor = max([float(g.abs().max()) for g in expected.values() if g is not None and g.numel()], default=0.0)
    for name, reference in expected.items():
        mine = actual[name]
        if reference is None or mine is None:
            for g in (mine, reference):
                assert g is None or not g.any(), name
            continue
        assert mine.dtype == reference.dtype, name
        error = float((mine - reference).abs().max()) if mine.numel() else 0.0
        assert error <= tolerance * floor, f"{name}: {error / (floor + 1e-30):.1e}"


def assert_same(original: nn.Module, mine: nn.Module, x: Tensor, tolerance: float = CLOSE) -> None:
    """Compare outputs and gradients on one input."""
    with torch.no_grad():
        assert relative(mine(x), original(x)) <= tolerance
    assert_same_gradients(gradients(mine, x), gradients(original, x), 10 * tolerance)


class Spy:
    """Counts calls of which a rewritten block runs its own forward: zero says that the rewritten form ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cls: type[nn.Module]) -> None:
        self.calls = 0
        original = OwnForward.original

        def counted(forward: OwnForward, *args: Any, **kwargs: Any) -> Any:
            self.calls += isinstance(forward.module, cls)
            return original(forward, *args, **kwargs)

        monkeypatch.setattr(OwnForward, "original", counted)


# ------------------------------------------------------------------------------------------------ identity


@both_layouts
def test_parameters_stay_the_same_objects(make: Callable[[], nn.Module]) -> None:
    block = make()
    parameters, keys = list(block.named_parameters()), list(block.state_dict())
    children = [(name, id(module)) for name, module in block.named_modules()]
    kind = type(block)
    assert moefx.optimize(block, (tokens(),)) is block
    assert type(block) is kind
    assert all(a == c and b is d for (a, b), (c, d) in zip(parameters, block.named_parameters(), strict=True))
    assert list(block.state_dict()) == keys
    assert [(name, id(module)) for name, module in block.named_modules()] == children


@both_layouts
def test_state_dict_round_trip(make: Callable[[], nn.Module]) -> None:
    """Both directions, strict, through a file; what was loaded is what the rewritten block uses."""
    _, mine = pair(make)
    other = make()  # other parameters: the seed has moved on
    mine.load_state_dict(other.state_dict(), strict=True)
    assert_same(other, mine, tokens())
    file = io.BytesIO()
    torch.save(mine.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same(fresh, mine, tokens())


@both_layouts
def test_assigned_state_dict(make: Callable[[], nn.Module]) -> None:
    """load_state_dict(assign=True) replaces the Parameter objects: the block must not hold on to the old ones."""
    _, mine = pair(make)
    other = make()
    mine.load_state_dict(copy.deepcopy(other.state_dict()), strict=True, assign=True)
    assert_same(other, mine, tokens())


@both_layouts
def test_functional_call(make: Callable[[], nn.Module]) -> None:
    """torch.func.functional_call swaps the parameters for one call."""
    _, mine = pair(make)
    other, x = make(), tokens()
    result = torch.func.functional_call(mine, dict(other.named_parameters()), (x,))
    assert relative(result, other(x)) <= CLOSE
    result.sum().backward()
    assert all(p.grad is None for p in mine.parameters())
    assert all(p.grad is not None for p in other.parameters())


# ------------------------------------------------------------------------------------------------ copies


@both_layouts
def test_deepcopy_is_independent(make: Callable[[], nn.Module]) -> None:
    original, mine = pair(make)
    twin = copy.deepcopy(mine)
    assert is_rewritten(twin) and is_rewritten(mine)
    x = tokens()
    grads = gradients(twin, x)
    assert all(p.grad is None for p in mine.parameters())
    assert_same_gradients(grads, gradients(original, x))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert relative(mine(x), original(x)) <= CLOSE
    assert relative(twin(x), mine(x)) > 0.01
    restored = moefx.restore(copy.deepcopy(twin))
    assert not is_rewritten(restored) and is_rewritten(twin)
    assert relative(twin(x), restored(x)) <= CLOSE


def test_deepcopy_of_a_pending_model() -> None:
    """The copy waits for its own first call; the original goes on waiting for its own."""
    waiting = moefx.optimize(ListBlock())
    twin, x = copy.deepcopy(waiting), tokens()
    expected = moefx.restore(copy.deepcopy(waiting))(x)
    torch.testing.assert_close(twin(x), expected)
    assert not is_rewritten(waiting)
    assert moefx.explain(waiting).pending
    torch.testing.assert_close(waiting(x), expected)
    assert is_rewritten(waiting)
    assert [block.name for block in moefx.explain(waiting).found] == [""]
    assert relative(twin(x), expected) <= CLOSE  # rewritten or not


@both_layouts
def test_pickle(make: Callable[[], nn.Module]) -> None:
    """A pickled block comes back, right and with its own parameters; it can be optimised and restored."""
    original, mine = pair(make)
    loaded, x = pickle.loads(pickle.dumps(mine)), tokens()
    assert_same(original, loaded, x)
    with torch.no_grad():
        for p in loaded.parameters():
            p.zero_()
    assert not loaded(x).any()
    assert relative(mine(x), original(x)) <= CLOSE
    again = moefx.optimize(pickle.loads(pickle.dumps(mine)), (x,))
    assert len(moefx.explain(again).found) == 1
    assert type(again.__dict__["forward"]) is type(mine.__dict__["forward"]), "found, but not rewritten"
    moefx.restore(again)
    moefx.restore(loaded)
    assert "forward" not in again.__dict__
    assert "forward" not in loaded.__dict__


# ------------------------------------------------------------------------------------------------ training


@both_layouts
def test_frozen_parameters_get_no_gradient(make: Callable[[], nn.Module]) -> None:
    """All but the router frozen, then half of the experts' parameters; never a gradient for what is frozen."""
    original, mine = pair(make)
    for keep in ("router", "0", "up", "down"):
        for module in (original, mine):
            for name, p in module.named_parameters():
                p.requires_grad_(keep in name.replace("_", ".").split("."))
        if not any(p.requires_grad for p in mine.parameters()):
            continue
        actual, expected = gradients(mine, tokens()), gradients(original, tokens())
        assert_same_gradients(actual, expected)
        for name, p in mine.named_parameters():
            assert p.requires_grad or actual[name] is None, name


@both_layouts
def test_frozen_parameters_and_a_differentiable_input(make: Callable[[], nn.Module]) -> None:
    original, mine = pair(make)
    for module in (original, mine):
        module.requires_grad_(False)
    actual, expected = gradients(mine, tokens()), gradients(original, tokens())
    assert relative(actual["input"], expected["input"]) <= CLOSE  # type: ignore[arg-type]
    assert [name for name, g in actual.items() if g is not None] == ["input"]


@both_layouts
def test_nothing_requires_grad(make: Callable[[], nn.Module]) -> None:
    _, mine = pair(make)
    assert not mine.requires_grad_(False)(tokens()).requires_grad
    assert mine.requires_grad_(True)(tokens()).requires_grad


@both_layouts
def test_requires_grad_survives(make: Callable[[], nn.Module]) -> None:
    block = make()
    for i, p in enumerate(block.parameters()):
        p.requires_grad_(i % 2 == 0)
    before = {name: p.requires_grad for name, p in block.named_parameters()}
    moefx.optimize(block, (tokens(),))
    assert is_rewritten(block)
    assert {name: p.requires_grad for name, p in block.named_parameters()} == before
    assert all(p.grad is None for p in block.parameters())


@both_layouts
def test_optimizer_steps(make: Callable[[], nn.Module]) -> None:
    """Five steps of Adam, its state made before the rewrite: the rewritten block sees every update."""
    torch.manual_seed(0)
    original = make().train()
    mine = copy.deepcopy(original)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.02) for module in (original, mine)]
    moefx.optimize(mine, (tokens(),))
    assert is_rewritten(mine)
    losses: list[list[float]] = [[], []]
    for step in range(5):
        x = tokens(seed=step)
        for module, optimizer, curve in zip((original, mine), optimizers, losses):
            loss = (module(x) - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@both_layouts
def test_gradients_accumulate_and_graphs_are_kept(make: Callable[[], nn.Module]) -> None:
    """Two backward passes over one graph, and one over another, add up."""
    totals = []
    for module in pair(make):
        y = module(tokens())
        y.square().sum().backward(retain_graph=True)
        y.sum().backward()
        module(tokens(seed=2)).sum().backward()
        totals.append({name: p.grad for name, p in module.named_parameters()})
    assert_same_gradients(totals[1], totals[0])


@both_layouts
def test_second_derivatives(make: Callable[[], nn.Module]) -> None:
    """A gradient penalty is as in the original, or it is refused: never silently wrong."""
    original, mine = pair(make)
    penalties = []
    for module in (original, mine):
        x = tokens().requires_grad_()
        try:
            (slope,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
        except NotImplementedError as error:
            assert "restore" in str(error)
            break
        penalties.append({name: p.grad for name, p in module.named_parameters()})
    assert penalties, "the original has second derivatives"
    if len(penalties) == 2:
        assert_same_gradients(penalties[1], penalties[0], 1e-4)


@both_layouts
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(make: Callable[[], nn.Module], reentrant: bool) -> None:
    original, mine = pair(make)
    expected = gradients(original, tokens())
    mine.zero_grad(set_to_none=True)
    leaf = tokens().requires_grad_()
    y = checkpoint(mine, leaf, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    assert_same_gradients({"input": leaf.grad, **{name: p.grad for name, p in mine.named_parameters()}}, expected)


@both_layouts
def test_same_bits_from_run_to_run(make: Callable[[], nn.Module]) -> None:
    _, mine = pair(make)
    x = tokens(4, 50)
    assert torch.equal(mine(x), mine(x))
    first = {name: g.clone() for name, g in gradients(mine, x).items() if g is not None}
    second = gradients(mine, x)
    for name, g in first.items():
        assert torch.equal(g, second[name]), name  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ modes and dtypes


@both_layouts
def test_train_and_eval(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both modes are rewritten at once, whichever the block was in."""
    for train in (False, True):
        original, mine = pair(make, train=train)
        for mode in (True, False):
            assert_same(original.train(mode), mine.train(mode), tokens())
    spy = Spy(monkeypatch, type(mine))
    mine.train()(tokens()), mine.eval()(tokens())
    assert spy.calls == 0


class Dropping(ListBlock):
    """Dropout on the block's output: there is nothing random in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


def test_modes_that_differ() -> None:
    original, mine = pair(Dropping)
    for mode in (False, True, False):
        results = []
        for module in (original, mine):
            torch.manual_seed(5)
            results.append(module.train(mode)(tokens()))
        assert relative(results[1], results[0]) <= CLOSE
    assert bool((mine.train()(tokens()) == 0).float().mean() > 0.3)


DTYPE_BLOCKS = {**BUILDERS, "deepseek": lambda: BLOCKS["deepseek"](D), "qwen": lambda: BLOCKS["qwen"](D)}


@pytest.mark.parametrize("name", DTYPE_BLOCKS)
def test_dtype_moves_after_the_rewrite(name: str) -> None:
    """float64 gives more digits than float32; half precision is as close to the truth as the original is."""
    torch.manual_seed(0)
    original = DTYPE_BLOCKS[name]().eval()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(2, 9),))
    if not is_rewritten(mine):
        pytest.skip("declined: " + moefx.explain(mine).declined[0].reason)
    exact = copy.deepcopy(original).double()
    x = tokens(4, 16)
    assert_same(exact, mine.double(), x.double(), 1e-11)
    mine.load_state_dict(original.state_dict())
    mine.float()
    assert_same(original, mine, x)
    for dtype, tolerance in ROUNDED.items():
        rounded, moved = copy.deepcopy(original).to(dtype), copy.deepcopy(mine).to(dtype)
        a, b = moved(x.to(dtype)), rounded(x.to(dtype))
        truth = copy.deepcopy(rounded).double()(x.to(dtype).double()).detach()
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        # a tie in the router may fall the other way in the truth: rows, and the middle one of them
        error = [float((y.detach().double() - truth).abs().amax(-1).median() / truth.abs().max()) for y in (a, b)]
        assert error[0] <= max(1.5 * error[1], 1e-4), f"{dtype}: {error}"
        assert relative(a, b) <= tolerance * 2, dtype
        assert_same_gradients(gradients(moved, x.to(dtype)), gradients(rounded, x.to(dtype)), 4 * tolerance)


class CastsToWeights(ListBlock):
    """Casts to the dtype that the weights have at the time of the call."""

    def forward(self, x: Tensor) -> Tensor:
        inside = x.to(self.experts[0].up.weight.dtype)  # type: ignore[union-attr]
        return super().forward(inside).to(x.dtype)


def test_casts_to_the_dtype_of_the_weights() -> None:
    torch.manual_seed(0)
    original = CastsToWeights().eval()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    for dtype, tolerance in ((torch.float32, CLOSE), (torch.float64, 1e-11), (torch.bfloat16, 0.05)):
        x = tokens(dtype=dtype)
        a, b = mine.to(dtype)(x), original.to(dtype)(x)
        assert relative(a, b) <= tolerance
    a, b = mine.to(torch.bfloat16)(tokens()), original(tokens())
    assert relative(a, b) <= 0.05


class MixedDtypes(nn.Module):
    """A float32 router, registered first, beside experts in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(Expert() for _ in range(E)).to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(flat.float()), K)
        return run_experts(self.experts, flat, weights.to(x.dtype), chosen).view_as(x)


def test_router_in_another_dtype_than_the_experts() -> None:
    x = tokens(dtype=torch.bfloat16)
    original, mine = pair(MixedDtypes, x)
    assert is_rewritten(mine)
    assert relative(mine(x), original(x)) <= ROUNDED[torch.bfloat16]
    assert_same_gradients(gradients(mine, x), gradients(original, x), 0.05)


@pytest.mark.parametrize("name", BUILDERS)
def test_autocast(name: str) -> None:
    original, mine = pair(BUILDERS[name])
    x = tokens(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = mine(x), original(x)
        grads = [gradients(module, x) for module in (mine, original)]
    assert a.dtype == b.dtype
    assert relative(a, b) <= ROUNDED[torch.bfloat16]
    assert_same_gradients(grads[0], grads[1], 0.05)


@both_layouts
def test_grad_modes(make: Callable[[], nn.Module]) -> None:
    original, mine = pair(make)
    x = tokens()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = mine(x)
            assert not y.requires_grad
            assert relative(y, original(x)) <= CLOSE
            assert torch.is_grad_enabled() is False
    with torch.no_grad():
        moefx.restore(mine)
        moefx.optimize(mine, (x,))
    assert is_rewritten(mine)
    assert_same(original, mine, x)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("wait", [False, True])
def test_rewritten_inside_a_mode(mode: str, wait: bool) -> None:
    """The mode that is on while optimize works, or during the first call, decides nothing."""
    torch.manual_seed(0)
    original = ListBlock()
    mine, x = copy.deepcopy(original), tokens()
    context = {
        "no_grad": torch.no_grad, "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[mode]  # fmt: skip
    with context():
        moefx.optimize(mine, None if wait else (x,))
        if wait:
            assert relative(mine(x), original(x)) <= (0.0 if mode != "autocast" else 1e-2)
    assert is_rewritten(mine), str(moefx.explain(mine))
    assert_same(original, mine, x)


def test_new_ways_of_calling_inside_a_mode() -> None:
    """A call of a new kind is analysed when it comes, in whatever mode that is."""
    original, mine = pair(ListBlock)
    for context in (torch.inference_mode, torch.no_grad, functools.partial(torch.autocast, "cpu", torch.bfloat16)):
        twin = copy.deepcopy(mine)
        with context():
            assert relative(twin(tokens(7)), original(tokens(7))) <= 1e-2  # [T, D] instead of [B, S, D]
        assert_same(original, twin, tokens(7))


# ------------------------------------------------------------------------------------------------ hooks


def fired(module: nn.Module, x: Tensor, paths: list[str]) -> dict[str, list[Any]]:
    """What forward hooks, pre-hooks and backward hooks at the paths see."""
    seen: dict[str, list[Any]] = {}

    def note(what: str, value: Any) -> None:
        seen.setdefault(what, []).append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), value))

    handles = []
    for path in paths:
        child = module.get_submodule(path)
        handles += [
            child.register_forward_hook(lambda m, a, out, p=path: note(f"{p} out", out)),
            child.register_forward_pre_hook(lambda m, a, p=path: note(f"{p} in", a)),
            child.register_full_backward_hook(lambda m, a, g, p=path: note(f"{p} grad", g)),
        ]
    module(x.clone().requires_grad_()).square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("paths", [["router"], ["router.proj"], ["router", "router.proj"], [""]], ids=str)
def test_hooks_on_the_router_and_the_block(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    original, mine = pair(ListBlock)
    expected = fired(original, tokens(), paths)
    spy = Spy(monkeypatch, ListBlock)
    actual = fired(mine, tokens(), paths)
    assert actual.keys() == expected.keys() and expected
    torch.testing.assert_close(actual, expected)
    assert spy.calls == 0, "hooks on the router cost the rewriting"


@pytest.mark.parametrize("path", ["experts.1", "experts.0.up", "experts.3.down"])
def test_hooks_on_experts(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original runs while they are there, and the rewritten form once they are gone."""
    original, mine = pair(ListBlock)
    expected = fired(original, tokens(), [path])
    torch.testing.assert_close(fired(mine, tokens(), [path]), expected)
    assert expected
    spy = Spy(monkeypatch, ListBlock)
    assert relative(mine(tokens()), original(tokens())) <= CLOSE
    assert spy.calls == 0, "the hook is gone"


@pytest.mark.parametrize("path", ["router", "router.proj", "experts.2", ""])
def test_hooks_that_change_values(path: str) -> None:
    """A hook may replace what a module returns."""
    original, mine = pair(ListBlock)
    plain = original(tokens())
    for module in (original, mine):
        module.get_submodule(path).register_forward_hook(
            lambda m, a, out: (out[0] * 2, out[1]) if isinstance(out, tuple) else out * 2 + 1
        )
    assert relative(original(tokens()), plain) > 0.01 or path == "router.proj"
    assert_same(original, mine, tokens())


def test_hooks_that_were_there_before() -> None:
    """Hooks on an expert at the time of optimize: they fire in later calls, or the block is declined."""
    torch.manual_seed(0)
    block, calls = ListBlock(), []
    block.experts[1].register_forward_hook(lambda m, a, out: calls.append(len(out)))
    moefx.optimize(block, (tokens(),))
    calls.clear()
    block(tokens())
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ changed by the user


class Lora(nn.Module):
    """What an adapter library puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("path", ["experts.1.up", "router.proj"])
def test_replaced_submodule(path: str) -> None:
    """An adapter put into the block after the rewrite takes part."""
    original, mine = pair(ListBlock)
    plain = original(tokens())
    owner, _, leaf = path.rpartition(".")
    torch.manual_seed(1)
    adapter = Lora(original.get_submodule(path))  # type: ignore[arg-type]
    for module in (original, mine):
        twin = copy.deepcopy(adapter)
        setattr(module.get_submodule(owner), leaf, twin)
    assert relative(original(tokens()), plain) > 1e-3
    assert_same(original, mine, tokens())


def test_replaced_parameter() -> None:
    _, mine = pair(ListBlock)
    other = ListBlock()
    for name, p in other.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(mine.get_submodule(owner), leaf, nn.Parameter(p.detach().clone()))
    assert_same(other, mine, tokens())


def test_forward_of_the_instance() -> None:
    """A forward that somebody else put on the block (accelerate does) is not lost."""
    torch.manual_seed(0)
    block = ListBlock()
    plain, own = block(tokens()), block.forward
    block.forward = lambda x: own(x) * 3  # type: ignore[method-assign]
    moefx.optimize(block, (tokens(),))
    assert relative(block(tokens()), plain * 3) <= CLOSE
    moefx.restore(block)
    assert relative(block(tokens()), plain * 3) <= CLOSE


def test_changed_top_k() -> None:
    """A plain attribute that the block reads in every call, changed after the rewrite."""
    original, mine = pair(ListBlock)
    for module in (original, mine):
        module.router.top_k = 3  # type: ignore[union-attr, assignment]
    assert relative(mine(tokens()), original(tokens())) <= CLOSE


class Scaled(ListBlock):
    scale: float = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_changed_scale() -> None:
    """Like a schedule that turns a knob of the block itself."""
    original, mine = pair(Scaled)
    for module in (original, mine):
        module.scale = 3.0  # type: ignore[assignment]
    assert relative(mine(tokens()), original(tokens())) <= CLOSE


# ------------------------------------------------------------------------------------------------ shared parameters


class TiedExperts(ListBlock):
    """Experts 0 and 2 are one module."""

    def __init__(self) -> None:
        super().__init__()
        self.experts[2] = self.experts[0]


class TiedLayers(ListBlock):
    """All experts share their second layer."""

    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.down = self.experts[0].down  # type: ignore[union-attr]


@pytest.mark.parametrize("make", [TiedExperts, TiedLayers])
def test_tied_inside_a_block(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    original = make()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    assert len(list(mine.parameters())) == len(list(original.parameters()))
    assert_same(original, mine, tokens())


class Layers(nn.Module):
    """Two residual layers; `tie` says what they share."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ListBlock() for _ in range(2))
        first, second = self.layers
        if tie == "block":
            self.layers[1] = first
        elif tie == "experts":
            second.experts = first.experts  # type: ignore[assignment]
        elif tie == "parameter":
            for a, b in zip(first.experts, second.experts):  # type: ignore[arg-type]
                b.up.weight = a.up.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("tie", ["block", "experts", "parameter"])
def test_tied_across_layers(tie: str) -> None:
    torch.manual_seed(0)
    original = Layers(tie)
    mine = moefx.optimize(copy.deepcopy(original), (tokens(),))
    assert all(is_rewritten(layer) for layer in mine.layers)  # type: ignore[union-attr]
    assert len(list(mine.parameters())) == len(list(original.parameters()))
    assert_same(original, mine, tokens())
    twin = copy.deepcopy(mine)
    assert len(list(twin.parameters())) == len(list(original.parameters()))
    assert_same(original, twin, tokens())


# ------------------------------------------------------------------------------------------------ odd inputs


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (1, 1), (1, 2), (1, 257)], ids=str)
def test_token_counts(name: str, shape: tuple[int, int]) -> None:
    original, mine = _shared_pair(name)
    assert_same(original, mine, tokens(*shape))


@functools.cache
def _shared_pair(name: str) -> tuple[nn.Module, nn.Module]:
    return pair(BUILDERS[name])


@pytest.mark.parametrize("name", BUILDERS)
def test_all_tokens_on_one_expert(name: str) -> None:
    """The rest of the experts get no tokens, and gradients of zero or none."""
    original, mine = _shared_pair(name)
    assert_same(original, mine, tokens(1).expand(40, D).clone())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite(name: str, value: float) -> None:
    """It spoils its own row as in the original, and no other row, in the output and in the input's gradient."""
    original, mine = _shared_pair(name)
    x = tokens(23)
    x[7] = value
    x[11, 3] = value
    y, reference = mine(x), original(x)
    assert not reference[[7, 11]].isfinite().all()
    assert reference[[i for i in range(23) if i not in (7, 11)]].isfinite().all()
    torch.testing.assert_close(y, reference, equal_nan=True)
    actual, expected = gradients(mine, x), gradients(original, x)
    torch.testing.assert_close(actual["input"], expected["input"], equal_nan=True)
    for name_, g in expected.items():
        if g is not None and actual[name_] is not None:
            assert torch.equal(actual[name_].isfinite(), g.isfinite()), name_  # type: ignore[union-attr]


@both_layouts
def test_inputs_that_are_not_contiguous(make: Callable[[], nn.Module]) -> None:
    original, mine = pair(make)
    wide = tokens(3, 22)
    for x in (wide[:, ::2], wide.transpose(0, 1), wide[0].expand(4, 22, D), wide.flip(-1)):
        assert_same(original, mine, x)
    kept = wide.clone()
    mine(wide)
    assert torch.equal(wide, kept)


@pytest.mark.parametrize("degree", [2, 3, 7])
@both_layouts
def test_degree(make: Callable[[], nn.Module], degree: int) -> None:
    """Chunks, uneven ones included, and more of them than tokens."""
    original, mine = pair(make, options=moefx.Options(degree=degree))
    for shape in ((3, 11), (1, 1), (1, 4), (0, 3)):
        assert_same(original, mine, tokens(*shape))


@pytest.mark.parametrize("degree", [1, 3])
def test_capacity_that_the_example_does_not_reach(degree: int) -> None:
    """Switch with much room: every token of the example is served, but a skewed batch overflows."""
    make = functools.partial(SwitchMoE, D, hidden=H, experts=E, capacity_factor=2.5)
    torch.manual_seed(0)
    original = make()
    with torch.no_grad():
        original.router.weight.copy_(torch.eye(E, D) * 4)
    spread = torch.eye(E, D).repeat(6, 1)[None] + 0.1 * tokens(1, 6 * E)
    assert bool(original(spread).abs().sum(-1).all()), "the example already drops a token"
    mine = moefx.optimize(copy.deepcopy(original), (spread,), moefx.Options(degree=degree))
    skewed = torch.eye(E, D)[0].expand(1, 24, D) + 0.1 * tokens(1, 24)
    dropped = original(skewed).abs().sum(-1) == 0
    assert dropped.any() and not dropped.all()
    assert_same(original, mine, skewed)
    for shape in ((1, 24), (2, 9), (1, 1), (5, 31)):
        assert_same(original, mine, tokens(*shape))


# ------------------------------------------------------------------------------------------------ ways of calling


class ManyArguments(ListBlock):
    """Arguments of several kinds, each of which changes the result."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, mode: str = "sum", twice: bool = False
    ) -> Any:
        y = super().forward(x)
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        y = y * scale
        y = y + y if twice else y
        return (y, y.mean()) if mode == "both" else y


CALLS: dict[str, dict[str, Any]] = {
    "default": {},
    "positional": {"positional": True},
    "a float": {"scale": 0.5},
    "another float": {"scale": 0.25},
    "an int for a float": {"scale": 2},
    "a tensor for a float": {"scale": torch.tensor(3.0)},
    "a flag": {"twice": True},
    "a mask": {"mask": torch.tensor([[1.0, 0.0, 1.0]])},
    "another mask": {"mask": torch.tensor([[0.0, 1.0, 1.0]])},
    "a bool mask": {"mask": torch.tensor([[True, False, True]])},
    "two results": {"mode": "both"},
    "all": {"mode": "both", "twice": True, "scale": 3.0, "mask": torch.tensor([[0.0, 1.0, 1.0]])},
}


def test_ways_of_calling() -> None:
    original, mine = pair(ManyArguments)
    x = tokens(1, 3)
    for _ in range(2):
        for name, arguments in CALLS.items():
            kwargs = {key: value for key, value in arguments.items() if key != "positional"}
            args = (x, None) if "positional" in arguments else ()
            kwargs |= {} if args else {"x": x}
            actual, expected = mine(*args, **kwargs), original(*args, **kwargs)
            torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")
            assert type(actual) is type(expected), name
    for shape in ((7,), (2, 2, 3)):
        assert_same(original, mine, tokens(*shape))


def test_signature() -> None:
    """Libraries ask `forward` for its arguments."""
    original, mine = pair(ManyArguments)
    assert inspect.signature(mine.forward) == inspect.signature(original.forward)
    waiting = moefx.optimize(ManyArguments())
    assert inspect.signature(waiting.forward) == inspect.signature(original.forward)


def test_an_argument_that_is_new_in_every_call() -> None:
    """A schedule must not cost an analysis a step, nor memory without end."""
    original, mine = pair(ManyArguments)
    forward = rewritten(mine)
    assert forward is not None
    analyses, analyse = [], forward.analyse
    forward.analyse = lambda *call: (analyses.append(call), analyse(*call))[1]  # type: ignore[func-returns-value]
    for step in range(20):
        scale = 1.0 + step / 32
        assert relative(mine(tokens(1, 3), scale=scale), original(tokens(1, 3), scale=scale)) <= CLOSE
    assert len(analyses) <= 10
    assert len(forward.variants) <= 30


def test_wrong_calls_raise_what_the_original_raises() -> None:
    original, mine = pair(ManyArguments)
    bad: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((tokens(), None, 1.0), {}),
        ((tokens(),), {"colour": "red"}),
        ((tokens()[..., :7],), {}),
        (("text",), {}),
        ((None,), {}),
        ((tokens().double(),), {}),
    ]
    for args, kwargs in bad:
        with pytest.raises(Exception) as expected:  # whatever the original raises
            original(*args, **kwargs)
        with pytest.raises(expected.type):
            mine(*args, **kwargs)
    assert_same(original, mine, tokens())


class Settings:
    """A plain object of the user: no pytree, no tensors."""

    def __init__(self, scale: float) -> None:
        self.scale = scale


class TakesSettings(ListBlock):
    def forward(self, x: Tensor, settings: Settings) -> Tensor:
        return super().forward(x) * settings.scale


def test_arguments_that_are_objects() -> None:
    """What an object holds is not known to stay the same: each one counts."""
    torch.manual_seed(0)
    original = TakesSettings()
    mine = moefx.optimize(copy.deepcopy(original), (tokens(), Settings(1.0)))
    for scale in (1.0, 2.0, 3.0):
        expected = original(tokens(), Settings(scale))
        assert relative(mine(tokens(), Settings(scale)), expected) <= CLOSE


class Untouchable(Settings):
    """An object that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("one of a kind")


@pytest.mark.parametrize("wait", [False, True])
def test_arguments_that_cannot_be_copied(wait: bool) -> None:
    torch.manual_seed(0)
    original = TakesSettings()
    call = (tokens(), Untouchable(2.0))
    mine = moefx.optimize(copy.deepcopy(original), None if wait else call)
    for _ in range(2):
        assert relative(mine(*call), original(*call)) <= CLOSE
    assert not is_rewritten(mine)


class TakesList(ListBlock):
    def forward(self, parts: list[Tensor]) -> dict[str, Tensor]:
        return {"y": super().forward(torch.cat(parts))}


def test_nested_arguments_and_results() -> None:
    original, mine = pair(TakesList, [tokens(5), tokens(6)])
    for parts in ([tokens(5), tokens(6)], [tokens(4)], [tokens(2), tokens(3), tokens(4)]):
        torch.testing.assert_close(mine(parts), original(parts))


class LoadBuffer(ListBlock):
    """Counts tokens by expert in a buffer, and shifts the router by another one."""

    def __init__(self) -> None:
        super().__init__()
        self.load: Tensor
        self.shift: Tensor
        self.register_buffer("load", torch.zeros(E))
        self.register_buffer("shift", torch.linspace(0.5, 1.5, E))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router.proj(flat) * self.shift, K)  # type: ignore[operator, union-attr]
        if self.training:
            with torch.no_grad():
                self.load += F.one_hot(chosen, E).sum((0, 1))
        return run_experts(self.experts, flat, weights, chosen).view_as(x)


def test_buffers() -> None:
    """They are as before after optimize, go on counting, and a change of one is seen."""
    original, mine = pair(LoadBuffer, train=True)
    assert torch.equal(mine.load, original.load)  # type: ignore[arg-type]
    for module in (original, mine):
        module.train()(tokens())
        module.eval()(tokens())
        module.shift.mul_(-1)  # type: ignore[operator, union-attr]
    assert original.load.sum() == 33 * K  # type: ignore[union-attr, operator]
    assert torch.equal(mine.load, original.load)  # type: ignore[arg-type]
    assert_same(original, mine, tokens())
    assert torch.equal(mine.train(False).load, original.load)  # type: ignore[arg-type]


def test_backward_of_the_first_call() -> None:
    """What the first call saved for its backward is not touched by the rewriting that follows it."""
    torch.manual_seed(0)
    original = LoadBuffer().train()
    mine = moefx.optimize(copy.deepcopy(original))
    assert_same_gradients(gradients(mine, tokens()), gradients(original, tokens()))
    assert is_rewritten(mine)
    assert torch.equal(mine.load, original.load)
