"""Results of blocks, taken apart into their leaves and put together: what torch's pytree knows, and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Fields:
    """In place of an instance of a dataclass that pytree takes for a leaf. called: whether calling the class with the values makes
    the instance (Dynamo follows that), and does nothing to them a second time."""

    of: type
    names: tuple[str, ...]
    called: bool
    values: tuple[Any, ...]

    def made(self) -> Any:
        values = {name: _closed(value) for name, value in zip(self.names, self.values)}
        if self.called:
            return self.of(**values)
        instance: Any = object.__new__(self.of)
        for name, value in values.items():
            object.__setattr__(instance, name, value)
        return instance


def _again(values: Iterable[Any], context: Any) -> _Fields:
    of, names, called = context
    return _Fields(of, names, called, tuple(values))


pytree.register_pytree_node(_Fields, lambda x: (list(x.values), (x.of, x.names, x.called)), _again)


def _opened(result: Any) -> Any:
    def open_leaf(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        of: Any = type(leaf)
        fields = dataclasses.fields(leaf)
        names = tuple(f.name for f in fields)
        if not set(getattr(leaf, "__dict__", names)) <= set(names):  # more than its fields would be lost
            return leaf
        called = of.__dataclass_params__.init and not hasattr(of, "__post_init__") and all(f.init for f in fields)
        return _Fields(of, names, called, tuple(_opened(getattr(leaf, name)) for name in names))

    return pytree.tree_map(open_leaf, result)


def _closed(value: Any) -> Any:
    return pytree.tree_map(
        lambda x: x.made() if isinstance(x, _Fields) else x, value, is_leaf=lambda x: isinstance(x, _Fields)
    )


@dataclass(frozen=True)
class Structure:
    """How leaves are put together. dataclasses: whether any of them pytree does not know."""

    spec: Any
    dataclasses: bool

    def put_together(self, leaves: Sequence[Any]) -> Any:
        result = pytree.tree_unflatten(leaves, self.spec)
        return _closed(result) if self.dataclasses else result


def taken_apart(result: Any) -> tuple[list[Any], Structure]:
    """The leaves of a block's result, and what puts others like them together."""
    leaves, spec = pytree.tree_flatten(result)
    if not any(dataclasses.is_dataclass(leaf) for leaf in leaves):
        return leaves, Structure(spec, False)
    leaves, spec = pytree.tree_flatten(_opened(result))
    return leaves, Structure(spec, True)
