"""The Python state that a module's code can change without returning it: attributes, and the globals that it names.

A rewritten block replays tensors, not Python. What a run left behind in such places would be lost, so capture compares
pictures of them from before and after.
"""

from __future__ import annotations

import copy
import enum
import logging
import types
from collections.abc import Hashable, Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

_HIDDEN = ("_moefx", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, enum.Enum)  # values that say all by themselves
HELD_DEPTH = 2  # of objects and dicts inside each other, from what a module holds
_DEPTH = 3  # of containers and objects inside each other that a picture follows
_NO_FORWARD = ("__init__", "__repr__", "__setstate__", "extra_repr", "reset_parameters")  # no part of a call
# Libraries whose functions are followed within one file only: their caches and registries are not the block's doing.
_LIBRARIES = ("torch", "transformers")


def picture(value: Any, depth: int = 0) -> Any:
    """A comparable stand-in for a value: equal pictures mean that nothing in it was changed, as far as it looks."""
    if isinstance(value, Tensor):
        return (id(value), value._version)
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if isinstance(value, (list, tuple, set, dict)) and depth < _DEPTH:
        items = value.items() if isinstance(value, dict) else value
        return (len(value), *(picture(v, depth + 1) for v in items))
    if holds_data(value) and depth < _DEPTH:
        return (id(value), picture({k: v for k, v in vars(value).items() if not k.startswith("__")}, depth + 1))
    return id(value)


def holds_data(value: Any) -> bool:
    """Whether it is an object with attributes that are looked at: a config, say."""
    opaque = isinstance(value, (Tensor, nn.Module, types.ModuleType, logging.Logger)) or callable(value)
    return hasattr(value, "__dict__") and not opaque


def has_namespace(value: Any) -> bool:
    """Whether it is a dict, or an object that holds data."""
    return type(value) is dict or holds_data(value)


def namespace(holder: Any) -> dict[str, Any]:
    """A dict itself, the attributes of anything else."""
    return holder if type(holder) is dict else vars(holder)


def attributes(module: nn.Module) -> dict[str, Any]:
    """Pictures of a module's own attributes (parameters, contents of buffers and hooks aside)."""
    own = {
        k: picture(v)
        for k, v in vars(module).items()
        if not (k.startswith(_HIDDEN) or k.endswith(("_with_kwargs", "_always_called")))
    }
    own.update({k: id(v) for k, v in module._buffers.items()})
    return own


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names whose pictures differ."""
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


class Place:
    """A name in a namespace outside of the module: a global of a file, or an attribute of a class."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __str__(self) -> str:
        if isinstance(self.owner, type):
            return f"{self.owner.__qualname__}.{self.name}"
        return f"the global {self.name} of {self.owner.get('__name__', '?')}"

    def get(self) -> Any:
        space = vars(self.owner) if isinstance(self.owner, type) else self.owner
        return space.get(self.name, None)

    def put(self, value: Any) -> None:
        if isinstance(self.owner, type):
            setattr(self.owner, self.name, value)
        else:
            self.owner[self.name] = value


def places(module: nn.Module) -> tuple[Place, ...]:
    """Where the code of a module's class, and what it calls by name in its own package, can leave something behind."""
    return _reached(cast(Hashable, type(module)))[0]


def functions(module: nn.Module) -> tuple[types.FunctionType, ...]:
    """Those of a module's class, and what they call by name in its own package."""
    return _reached(cast(Hashable, type(module)))[1]


def names(module: nn.Module) -> frozenset[str]:
    """What the code of a module's class, and what it calls, may name: attributes, globals, keys of dicts. Constructors aside."""
    return _names(cast(Hashable, type(module)))


@cache
def _names(cls: Hashable) -> frozenset[str]:
    return _named(f for f in _reached(cls)[1] if f.__name__ != "__init__")


def names_of_layer(module: nn.Module) -> frozenset[str] | None:
    """As `names`, of a layer of torch.nn; None for all other classes."""
    return _names_of_layer(cast(Hashable, type(module)))


@cache
def _names_of_layer(cls: Hashable) -> frozenset[str] | None:
    owners = [owner for owner in cast(type, cls).__mro__ if owner not in (nn.Module, object)]
    if not all(owner.__module__.startswith("torch.nn.") for owner in owners):
        return None
    return _named(f for owner in owners for f in _functions(owner) if f.__name__ not in _NO_FORWARD)


def _named(functions: Iterable[types.FunctionType]) -> frozenset[str]:
    codes = [code for f in functions for code in _codes(f.__code__)]
    texts = {constant for code in codes for constant in code.co_consts if isinstance(constant, str)}
    return frozenset(texts.union(*(code.co_names for code in codes)))


@cache
def _reached(cls: Hashable) -> tuple[tuple[Place, ...], tuple[types.FunctionType, ...]]:
    found: dict[tuple[int, str], Place] = {}
    followed: dict[tuple[str, types.FunctionType], None] = {}  # by the package that they were followed in
    for owner in cast(type, cls).__mro__:
        package = owner.__module__.partition(".")[0]
        if package in ("torch", "builtins", "abc", "typing"):
            continue
        for function in _functions(owner):
            _follow(function, package, followed, found)
        for name in _plain(owner):
            found[id(owner), name] = Place(owner, name)
    return tuple(found.values()), tuple(dict.fromkeys(function for _, function in followed))


def _functions(owner: type) -> Iterator[types.FunctionType]:
    for member in vars(owner).values():
        while isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        member = member.fget if isinstance(member, property) else member
        while member is not None:  # decorators that keep what they wrap
            if isinstance(member, types.FunctionType):
                yield member
            member = getattr(member, "__wrapped__", None)


def _follow(
    function: types.FunctionType,
    package: str,
    followed: dict[tuple[str, types.FunctionType], None],
    found: dict[tuple[int, str], Place],
) -> None:
    """Add a function, the places that it names, and those of the functions and classes of the same package it names."""
    if (package, function) in followed:
        return
    followed[package, function] = None
    space = function.__globals__
    for code in _codes(function.__code__):
        for name in code.co_names:
            if name not in space or name.startswith("__"):
                continue
            value = space[name]
            if isinstance(value, type):
                if _near(value, package, space):
                    found.update({(id(value), n): Place(value, n) for n in _plain(value)})
            elif isinstance(value, types.FunctionType):
                if _near(value, package, space):
                    _follow(value, package, followed, found)
            elif not callable(value) and not isinstance(value, types.ModuleType):
                found[id(space), name] = Place(space, name)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _near(value: Any, package: str, space: dict[str, Any]) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module.partition(".")[0] == package and (package not in _LIBRARIES or module == space.get("__name__"))


def _plain(owner: type) -> list[str]:
    """Attributes of a class that hold data."""
    return [n for n, v in vars(owner).items() if isinstance(v, (int, float, str, list, dict, set)) and n[:2] != "__"]


class Kept:
    """The contents of places, to be put back: bindings, and the items of lists, sets and dicts."""

    def __init__(self, where: list[Place]) -> None:
        self.held = [
            (p, v, copy.copy(v) if type(v) in (list, set, dict) else None) for p, v in ((p, p.get()) for p in where)
        ]

    def put_back(self) -> None:
        for place, value, content in self.held:
            if place.get() is not value:
                place.put(value)
            if content is not None and value != content:
                restore_items(value, content)


def restore_items(value: Any, content: Any) -> None:
    """Give a list, set or dict the items of `content` again."""
    if type(value) is list:
        value[:] = content
    else:
        value.clear()
        value.update(content)
