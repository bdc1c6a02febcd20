"""Results of blocks, taken apart into their leaves and put together: what torch's pytree knows, and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Fields:
    """In place of an instance of a dataclass that pytree takes for a leaf."""

    of: type
    names: tuple[str, ...]
    values: tuple[Any, ...]

    def made(self) -> Any:
        """An instance without what `__post_init__` would do to the values a second time."""
        values = {name: _closed(value) for name, value in zip(self.names, self.values)}
        of: Any = self.of
        if of.__dataclass_params__.init and not hasattr(of, "__post_init__") and all(f.init for f in dataclasses.fields(of)):
            return of(**values)  # Dynamo follows that
        instance: Any = object.__new__(self.of)
        for name, value in values.items():
            object.__setattr__(instance, name, value)
        return instance


def _again(values: Iterable[Any], context: Any) -> _Fields:
    of, names = context
    return _Fields(of, names, tuple(values))


pytree.register_pytree_node(_Fields, lambda x: (list(x.values), (x.of, x.names)), _again)


def _opened(result: Any) -> Any:
    def open_leaf(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        names = tuple(f.name for f in dataclasses.fields(leaf))
        if not set(getattr(leaf, "__dict__", names)) <= set(names):  # more than its fields would be lost
            return leaf
        return _Fields(type(leaf), names, tuple(_opened(getattr(leaf, name)) for name in names))

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
