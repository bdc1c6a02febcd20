"""Results taken apart and put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moefx.structure import taken_apart


@dataclass
class Plain:
    hidden: Tensor
    loss: Any = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """Whose construction is not to be repeated."""

    inner: Any
    halves: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "halves", self.inner.hidden / 2)


class Named(NamedTuple):
    y: Tensor
    extra: Any


X, Y = torch.arange(3.0), torch.ones(2)


@pytest.mark.parametrize(
    "result",
    [
        X,
        None,
        (X, None, 3),
        {"y": X, "more": [Y, "text"]},
        Named(X, Plain(Y)),
        Plain(X, {"loss": Y}),
        [Frozen(Plain(X)), Plain(Plain(Y), 2)],
        Plain,
    ],
)
def test_there_and_back(result: Any) -> None:
    leaves, structure = taken_apart(result)
    assert not any(isinstance(leaf, (Plain, Frozen)) for leaf in leaves)
    again = structure.put_together(leaves)
    assert type(again) is type(result) and str(again) == str(result)
    assert all(a is b for a, b in zip(taken_apart(again)[0], leaves))


def test_attributes_beside_the_fields_are_not_lost() -> None:
    """What cannot be put together again is a leaf, and a block that returns it is declined."""
    result = Plain(X)
    result.more = Y  # type: ignore[attr-defined]
    leaves, structure = taken_apart((result, Plain(Y)))
    assert leaves[0] is result and structure.put_together(leaves)[0] is result


def test_other_leaves_take_their_places() -> None:
    leaves, structure = taken_apart((Frozen(Plain(X)), Y))
    assert [leaf is None for leaf in leaves] == [False, True, False, False]
    made, last = structure.put_together([leaf if leaf is None else leaf + 1 for leaf in leaves])
    assert torch.equal(made.inner.hidden, X + 1) and torch.equal(made.halves, X / 2 + 1) and torch.equal(last, Y + 1)
