"""beside: what of a block runs between the two halves of its routed part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moefx.passes.beside import beside
from torch import Tensor, fx, nn


class Block(nn.Module):
    """`forward` is traced with `moe` in place of the routed part."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.router, self.shared, self.code = nn.Linear(4, 4), nn.Linear(4, 4), forward

    def forward(self, moe: Any, x: Tensor) -> Any:
        return self.code(self, moe, x)


class Moe:
    """Its own order of events; the routed part is a sum."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def routed(self, x: Tensor, w: Tensor) -> Tensor:
        return x + w

    def begin(self, x: Tensor, w: Tensor) -> Any:
        self.events.append("begin")
        return x.clone(), w.clone()

    def end(self, begun: Any) -> Tensor:
        self.events.append("end")
        return self.routed(*begun)


def shared_last(block: Any, moe: Any, x: Tensor) -> Tensor:
    y = moe.routed(x, block.router(x)).view(-1, 4)
    return y + block.shared(x)


def shared_first(block: Any, moe: Any, x: Tensor) -> Tensor:
    z = block.shared(x)
    return moe.routed(x, block.router(x)) + z


def shared_in_the_middle(block: Any, moe: Any, x: Tensor) -> Tensor:
    w = block.router(x)
    z = block.shared(x)
    return z.add_(moe.routed(x, w))


def scaled_before(block: Any, moe: Any, x: Tensor) -> Tensor:
    z = block.shared(x)
    return moe.routed(x.mul_(2), block.router(x)) + z


def scaled_between(block: Any, moe: Any, x: Tensor) -> Tensor:
    w = block.router(x)
    z = block.shared(x)
    w.mul_(2)
    return moe.routed(x, w) + z


def scaled_after(block: Any, moe: Any, x: Tensor) -> Tensor:
    y = moe.routed(x, block.router(x))
    x.mul_(2)
    return y + block.shared(x)


def nothing_else(block: Any, moe: Any, x: Tensor) -> Tensor:
    return moe.routed(x, block.router(x)) * 2


def two_uses(block: Any, moe: Any, x: Tensor) -> Tensor:
    y = moe.routed(x, block.router(x))
    return block.shared(y) + block.shared(x)


@pytest.mark.parametrize(
    ("code", "free", "ordered"),
    [
        (shared_last, True, True),
        (shared_first, True, False),  # ordered: the router may not come before it
        (shared_in_the_middle, True, True),
        (scaled_before, False, False),
        (scaled_between, False, False),
        (scaled_after, False, False),
        (nothing_else, False, False),
        (two_uses, False, False),
    ],
)
def test_what_runs_between(code: Any, free: bool, ordered: bool) -> None:
    block = Block(code)
    graph = fx.Tracer().trace(block)
    for given, found in ((False, free), (True, ordered)):
        changed = beside(graph, ordered=given)
        assert (changed is not None) == found, changed
        if changed is None:
            continue
        moe, x = Moe(), torch.randn(3, 4)
        handle = block.shared.register_forward_hook(lambda *_, events=moe.events: events.append("shared"))
        y = changed[1](block, moe, x.clone())
        handle.remove()
        assert torch.equal(y, block(Moe(), x.clone()))
        assert moe.events == ["begin", "shared", "end"]
