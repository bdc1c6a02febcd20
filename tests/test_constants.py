"""Floats that a module's code names remember what is computed from them and a size; everything is put back."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefx import sizes
from moefx.constants import remembered

FACTOR = 1.5


@dataclasses.dataclass
class Config:
    factor: float = 1.5


class Shared:
    factor = 1.5


def scaled(size: float, by: float = 1.5, *, again: float = 1.0) -> float:
    return again * (by * size)


def closing(factor: float) -> Callable[[float], float]:
    return lambda size: factor * size


closed = closing(1.5)


class Block(nn.Module):
    of_class = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.own = self._private = 1.5
        self.config = SimpleNamespace(factor=1.5, moe=Config())
        self.settings = {"factor": 1.5, "moe": {"factor": 1.5}}
        self.inner = nn.Module()
        self.inner.factor = 1.5  # type: ignore[assignment]

    def made(self, kind: str, size: int) -> float:
        def inside() -> float:
            return 1.5 * size

        makers: dict[str, Any] = {
            "own": lambda: self.own * size,
            "private": lambda: self._private * size,
            "submodule": lambda: self.inner.factor * size,
            "class": lambda: self.of_class * size,
            "object": lambda: self.config.factor * size,
            "object of an object": lambda: self.config.moe.factor * size,
            "dict": lambda: self.settings["factor"] * size,
            "dict of a dict": lambda: self.settings["moe"]["factor"] * size,  # type: ignore[index]
            "global": lambda: FACTOR * size,
            "another class": lambda: Shared.factor * size,
            "literal": lambda: 1.5 * size,
            "negative literal": lambda: -(-1.5 * size),
            "inner function": inside,
            "default": lambda: scaled(size),
            "keyword default": lambda: scaled(size, 1.5),
            "surrounding function": lambda: closed(size),
        }
        return makers[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x


KINDS = (
    "own", "private", "submodule", "class", "object", "object of an object", "dict", "dict of a dict", "global", "another class",
    "literal", "negative literal", "inner function", "default", "keyword default",
    "surrounding function",
)  # fmt: skip


def state(block: Block) -> list[Any]:
    functions = [Block.made, scaled]
    codes = [(f.__code__, f.__defaults__, f.__kwdefaults__) for f in functions]
    held = [dict(vars(block)), vars(block.config), block.config.moe, block.settings]
    return [*held, FACTOR, Shared.factor, Block.of_class, closed(1), *codes]


@pytest.mark.parametrize("kind", KINDS)
def test_it_remembers_and_is_put_back(kind: str) -> None:
    block, log, x = Block(), sizes.Log([], []), torch.zeros(7)
    before = repr(state(block))
    size = sizes.make(7, sizes.Expr(sizes.size_of, (x, 0)), log)
    assert not isinstance(block.made(kind, size), sizes.Fraction), "without it, Python forgets"
    with remembered(block, log):
        made = block.made(kind, size)
    assert isinstance(made, sizes.Fraction) and made == 10.5 and "size_of" in str(made.expr)
    assert repr(state(block)) == before
    assert type(block.made(kind, 7)) is float and type(block.own) is type(FACTOR) is type(Block.of_class) is float


def test_what_the_code_sets_stays() -> None:
    block, log = Block(), sizes.Log([], [])
    with remembered(block, log):
        block.own = block.own * 2.0
        block.config.factor = 3.0
        del block.settings["factor"]
    assert (block.own, type(block.own), block.config.factor) == (3.0, float, 3.0)
    assert block.settings == {"moe": {"factor": 1.5}}


def test_after_an_error_all_is_put_back() -> None:
    block = Block()
    before = repr(state(block))
    with pytest.raises(ZeroDivisionError), remembered(block, sizes.Log([], [])):
        1 / 0  # noqa: B018
    assert repr(state(block)) == before
