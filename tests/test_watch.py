"""Whether a block still is what it was rewritten for, asked at each call: no change is missed, and the host does little."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx.settings import Setting, settings_of
from moefx.watch import Watch

ASKED = [Path(moefx.__file__).parent / f"{name}.py" for name in ("block", "watch", "leaves", "compiled")]  # in every call


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu()))  # type: ignore[no-any-return]


class Moe(nn.Module):
    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(16, experts, bias=False), nn.ModuleList(Expert() for _ in range(experts))
        self.scale: Any = 1.0

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(x[token]) * gates[token, slot, None])
        return out * self.scale


def watched(moe: Moe) -> Watch:
    types = tuple((f"experts.{e}{part}", kind) for e in range(4) for part, kind in (("", Expert), (".up", nn.Linear)))
    return Watch(settings_of(moe, ("router",)), moe, types, ("experts.0.up.weight", "experts.3.up.bias"))


def test_nothing_changed() -> None:
    moe = Moe()
    watch = watched(moe)
    assert not watch.moved() and not watch.changed() and watch.untouched() and str(watch) == ""
    assert list(watch.parameters()) == ["experts.0.up.weight", "experts.3.up.bias"]
    assert watch.parameters()["experts.3.up.bias"] is moe.experts[3].up.bias
    moe.experts[3].up.bias = nn.Parameter(torch.zeros(24))  # type: ignore[union-attr]
    assert watch.parameters()["experts.3.up.bias"] is moe.experts[3].up.bias and not watch.moved()
    moe.eval()
    assert not watch.changed()  # the mode of all its submodules is its own


VALUES: dict[str, Callable[[Moe], Any]] = {
    "self.scale is 2.0 and was 1.0": lambda m: setattr(m, "scale", 2.0),
    "self.scale is tensor([1., 1.]) and was 1.0": lambda m: setattr(m, "scale", torch.ones(2)),
    "self.experts.2.drop.p is 0.5 and was 0.0": lambda m: setattr(m.experts[2].drop, "p", 0.5),
    "self.experts.1.training is another": lambda m: m.experts[1].train(False),
    "self.experts.1.drop.training is another": lambda m: m.experts[1].drop.eval(),
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    moe = Moe()
    watch = watched(moe)
    VALUES[text](moe)
    assert watch.changed() and not watch.moved() and watch.untouched()
    assert text in str(watch)


def test_a_value_of_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = watched(Moe())
    monkeypatch.setattr(Expert, "forward", lambda self, x: x)
    assert watch.changed() and str(watch).startswith("Expert.forward is ")


TOUCHED: dict[str, Callable[[Moe], Any]] = {
    "hook": lambda m: m.experts[3].up.register_forward_hook(lambda *_: None),
    "pre-hook": lambda m: m.experts[3].register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.experts[0].up.register_full_backward_hook(lambda *_: None),
    "hooks in another dict": lambda m: m.experts[0].up.__dict__.update(_forward_hooks={0: lambda *_: None}),
    "forward": lambda m: setattr(m.experts[1], "forward", lambda x: x),
    "class": lambda m: setattr(m.experts[1], "__class__", type("Other", (Expert,), {})),
}


@pytest.mark.parametrize("what", TOUCHED)
def test_submodules_that_only_the_original_can_honour(what: str) -> None:
    moe = Moe()
    watch = watched(moe)
    TOUCHED[what](moe)
    assert not watch.untouched() and not watch.moved()


def test_another_module_in_place_of_one() -> None:
    moe = Moe()
    watch = watched(moe)
    moe.experts[2] = Expert()
    assert watch.moved()


def test_layers_of_torch_are_looked_at_for_what_they_read() -> None:
    of = lambda path: [s.name for s in settings_of(Moe(), ()) if s.root == path]  # noqa: E731
    assert of("experts.0.up") == [] and of("experts") == []
    assert sorted(of("experts.0.drop")) == ["inplace", "p", "training"]
    assert of("experts.0") == ["training"]


def test_a_setting_on_its_own() -> None:
    moe = Moe()
    scale = Setting("", (), "scale", 1.0)
    assert Watch((scale,), moe).changed() is False
    for gone in (Setting("", ("gone",), "scale", 1.0), Setting("experts.gone", (), "scale", 1.0)):
        with pytest.raises(KeyError):
            Watch((gone,), moe)


def test_the_host_does_as_much_for_many_experts_as_for_few() -> None:
    """Calls of Python functions in a call of the block: it looks at all experts, but not one by one."""

    def calls(experts: int) -> int:
        torch.manual_seed(0)
        x = torch.randn(40, 16)
        moe = moefx.optimize(Moe(experts), (x,)).eval()
        assert moefx.explain(moe).found
        count = 0

        def seen(frame: FrameType, event: str, _: Any) -> None:
            nonlocal count
            count += event == "call" and Path(frame.f_code.co_filename) in ASKED

        with torch.no_grad():
            moe(x), moe(x)
            sys.setprofile(seen)
            try:
                moe(x)
            finally:
                sys.setprofile(None)
        return count

    assert calls(4) == calls(32) > 0
