"""Plain values that a rewritten block was made for: where they stand, and that a change of one is noticed."""

import copy
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.settings import Setting, settings_of
from moefx.watch import Watch

GLOBAL = 1.0
UNREAD_GLOBAL = 1.0


class Shared:
    scale = 1.0


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.slope = 0.5
        self.act = nn.functional.leaky_relu

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x), self.slope))  # type: ignore[no-any-return]


PLAIN_FORWARD = Expert.forward


class Moe(nn.Module):
    of_class = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.scale = self._private = 1.0
        self.scales = [1.0, 1.0]
        self.config: Any = SimpleNamespace(scale=1.0, unread=1.0, moe=SimpleNamespace(top_k=2))
        self.options = {"scale": 1.0, "unread": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 16)
        gates, chosen = self.router(tokens).softmax(-1).topk(self.config.moe.top_k)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(tokens[token]) * gates[token, slot, None])
        scale = self.scale * self._private * self.scales[1] * self.config.scale * self.options["scale"]
        return (out * (scale * GLOBAL * Shared.scale * self.of_class)).view_as(x)


def _replace_config(m: Moe) -> None:
    m.config = SimpleNamespace(scale=3.0, moe=m.config.moe)


def _replace_expert(m: Moe) -> None:
    expert = copy.deepcopy(m.experts[3])
    expert.slope = 0.0  # type: ignore[assignment]
    m.experts[3] = expert


def _patch(m: Moe) -> None:
    Expert.forward = lambda self, x: 3.0 * PLAIN_FORWARD(self, x)  # type: ignore[method-assign]


HERE = sys.modules[__name__]
CHANGES: dict[str, Callable[[Moe], None]] = {
    "self.scale": lambda m: setattr(m, "scale", 3.0),
    "self._private": lambda m: setattr(m, "_private", 3.0),
    "self.scales": lambda m: m.scales.__setitem__(1, 3.0),
    "self.config.scale": lambda m: setattr(m.config, "scale", 3.0),
    "self.config.moe.top_k": lambda m: setattr(m.config.moe, "top_k", 3),
    "self.config.scale is 3.0": _replace_config,
    "self.experts.3.slope": _replace_expert,
    "self.experts.0.act": lambda m: setattr(m.experts[0], "act", nn.functional.elu),
    "Expert.forward": _patch,
    "self.options.scale": lambda m: m.options.update(scale=3.0),
    "self.experts.2.slope": lambda m: setattr(m.experts[2], "slope", 0.0),
    "test_settings.GLOBAL": lambda m: setattr(HERE, "GLOBAL", 3.0),
    "Shared.scale": lambda m: setattr(Shared, "scale", 3.0),
    "Moe.of_class": lambda m: setattr(Moe, "of_class", 3.0),
    "self.experts.1.training": lambda m: setattr(m.experts[1], "training", False),
}


@pytest.fixture(autouse=True)
def _put_back() -> Any:
    yield
    HERE.GLOBAL, Shared.scale, Moe.of_class = 1.0, 1.0, 1.0  # type: ignore[attr-defined]
    Expert.forward = PLAIN_FORWARD  # type: ignore[method-assign]


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_noticed(what: str, caplog: pytest.LogCaptureFixture) -> None:
    """The block then runs its own code, says so once, and comes back with the value."""
    torch.manual_seed(0)
    original, x = Moe(), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    assert moefx.explain(mine).found
    before = mine(x)
    with caplog.at_level(logging.WARNING, "moefx.block"):
        mine(x)
        assert not caplog.messages
        for module in (original, mine):
            CHANGES[what](module)
        torch.testing.assert_close(mine(x), original(x))
        mine(x)
    (message,) = caplog.messages
    assert what in message and "runs the original Moe" in message
    assert "training" in what or not torch.allclose(mine(x), before), "it does change the result"


GUARDED = ("self.config.moe.top_k", "self.options.scale", "test_settings.GLOBAL", "Moe.of_class", "self.experts.0.act")


@pytest.mark.parametrize("what", GUARDED)
def test_a_change_is_noticed_by_the_compiled_model(what: str) -> None:
    """Dynamo guards on each of them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    original, x = Moe(), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    compiled = torch.compile(mine, backend="aot_eager")
    torch.testing.assert_close(compiled(x), original(x))
    for module in (original, mine):
        CHANGES[what](module)
    torch.testing.assert_close(compiled(x), original(x))


def test_what_is_as_good_may_take_its_place(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    original, x = Moe(), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    mine(x)
    for module in (original, mine):
        torch.manual_seed(1)
        module.config, module.experts[1] = copy.deepcopy(module.config), Expert()
    torch.testing.assert_close(mine(x), original(x))
    assert not caplog.messages
    mine.config.scale = original.config.scale = 3.0  # which is now looked at
    torch.testing.assert_close(mine(x), original(x))


def test_what_is_not_a_number_is_the_same() -> None:
    """NaN differs from itself, but not here."""
    moe = Moe()
    moe.scale, moe.scales = float("nan"), [float("nan"), 1.0]
    watch = Watch(settings_of(moe, ()), moe)
    assert not watch.changed() and str(watch) == ""
    assert all(setting.same(dict(moe.named_modules())) for setting in settings_of(moe, ()))
    moe.scale = 1.0
    assert watch.changed() and str(watch) == "self.scale is 1.0 and was nan"


def test_hooks_are_said_too(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16)
    mine = moefx.optimize(Moe(), (x,))
    mine.experts[1].register_forward_hook(lambda m, a, out: None)  # type: ignore[union-attr]
    mine(x)
    assert "experts.1 has hooks" in caplog.text


def test_what_the_code_does_not_name_may_change(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 16)
    mine = moefx.optimize(Moe(), (x,))
    mine.config.unread = mine.options["unread"] = HERE.UNREAD_GLOBAL = 3.0  # type: ignore[index, attr-defined, union-attr]
    mine(x)
    assert moefx.explain(mine).found and not caplog.messages


def test_a_copy_watches_its_own() -> None:
    torch.manual_seed(0)
    original, x = Moe(), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    mine(x)
    twin = copy.deepcopy(mine)
    original.config.scale = twin.config.scale = 3.0
    torch.testing.assert_close(twin(x), original(x))
    torch.testing.assert_close(mine(x) * 3.0, twin(x))


def test_what_is_found() -> None:
    """Not the attributes of submodules that are still called, and nothing that the code does not name of what a module holds."""
    texts = {str(s) for s in settings_of(Moe(), ("router",))}
    assert texts.issuperset(set(CHANGES) - {"self.config.scale is 3.0"})
    assert not any("unread" in text.lower() or "router" in text for text in texts)


# ------------------------------------------------------------------------------------------------ what is not a plain value


HELD = torch.tensor(2.0)


def _closing(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda out: out * factor


CLOSED = _closing(HELD)


class Holding(Moe):
    """A tensor that is no buffer scales the result: a region could take it for a number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.options["tensor"], self.config.tensor, self.listed = HELD.clone(), HELD.clone(), [HELD.clone()]  # type: ignore[assignment]
        self.attribute = HELD.clone()

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.kind == "surrounding function":
            return CLOSED(out)
        kinds: dict[str, Callable[[], Any]] = {
            "global": lambda: HELD,
            "dict": lambda: self.options["tensor"],
            "object": lambda: self.config.tensor,
            "list": lambda: self.listed[0],
            "attribute": lambda: self.attribute,
        }
        return out * kinds[self.kind]()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["global", "dict", "object", "list", "surrounding function"])
def test_a_tensor_that_is_no_buffer_is_no_number(kind: str) -> None:
    torch.manual_seed(0)
    report = moefx.explain(moefx.optimize(Holding(kind), (torch.randn(3, 7, 16),)))
    (declined,) = report.declined
    assert not report.found and "make it a buffer" in declined.reason


def test_an_attribute_that_is_a_tensor_is_read_in_each_call() -> None:
    torch.manual_seed(0)
    original, x = Holding("attribute"), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    assert moefx.explain(mine).found
    for module in (original, mine):
        module.attribute.fill_(5.0)
    torch.testing.assert_close(mine(x), original(x))


class Branching(Moe):
    """As code that clamps in one dtype alone, or does something else in a mode of torch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.kind == "dtype" and x.dtype == torch.bfloat16:
            out = out * 3
        if self.kind == "inference" and torch.is_inference_mode_enabled():
            out = out * 3
        if self.kind == "autocast" and torch.is_autocast_enabled("cpu"):
            out = out * 3
        return out


def _in_bfloat16(module: nn.Module, x: Tensor) -> Tensor:
    return module.bfloat16()(x.bfloat16()).float()  # type: ignore[no-any-return]


@torch.inference_mode()
def _in_inference_mode(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)  # type: ignore[no-any-return]


def _in_autocast(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return module(x)  # type: ignore[no-any-return]


BRANCHES = {"dtype": _in_bfloat16, "inference": _in_inference_mode, "autocast": _in_autocast}


class Casting(Branching):
    """One that runs in autocast: the sum is in the dtype of what it adds up."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 16)
        gates, chosen = self.router(tokens).softmax(-1).topk(2)
        out = sum(
            expert(tokens) * (gates * (chosen == i)).sum(-1, keepdim=True).to(tokens.dtype) for i, expert in enumerate(self.experts)
        )
        return (out * 3 if torch.is_autocast_enabled("cpu") else out).view_as(x)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("compiles", [False, True])
def test_code_that_may_branch_on_more_than_values(kind: str, compiles: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    original, x = (Casting if kind == "autocast" else Branching)(kind), torch.randn(3, 7, 16)
    mine = moefx.optimize(copy.deepcopy(original), (x,))
    assert moefx.explain(mine).found
    call = torch.compile(mine, backend="aot_eager") if compiles else mine
    torch.testing.assert_close(call(x), original(x))
    said = lambda: [m for m in caplog.messages if m.startswith("moefx")]  # noqa: E731
    assert not said()
    expected, actual = BRANCHES[kind](original, x), BRANCHES[kind](mine, x)
    if compiles:
        actual = _in_bfloat16_compiled(call, x) if kind == "dtype" else BRANCHES[kind](call, x)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)
    assert len(said()) == 1 and "its code" in said()[0]


def _in_bfloat16_compiled(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return call(x.bfloat16()).float()


def test_a_setting_on_its_own() -> None:
    moe = Moe()
    scale = Setting("", ("config",), "scale", 1.0)
    assert scale.same({"": moe}) and Watch((scale,), moe).changed() is False
    moe.config.scale = 2.0
    assert not scale.same({"": moe})
    assert str(Watch((scale,), moe)) == "self.config.scale is 2.0 and was 1.0"
