"""Floats that remember, in place of those that a module's code names, while it is recorded.

Python gives `1.25 * size` to float, which forgets the size: a capacity would be a mere number. Inside of `remembered` such a
float is a `sizes.constant`, wherever the code takes it from: an attribute, an object or a dict that a module holds (its
config), a global, a class, a literal, a default, a variable of a surrounding function.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn

from moefx import sizes
from moefx.python_state import HELD_DEPTH, functions, has_namespace, namespace, places


@contextlib.contextmanager
def remembered(module: nn.Module, log: sizes.Log) -> Iterator[None]:
    """Inside, the floats that the code of `module` names are constants of `log`. What the code sets itself stays, as a float."""
    make = partial(sizes.constant, log=log)
    with contextlib.ExitStack() as undo:
        seen: set[int] = set()
        for child in module.modules():
            for space in _spaces(child, seen):
                _replace(undo, space, make)
        classes = {type(child): child for child in module.modules()}.values()
        for place in {(id(p.owner), p.name): p for child in classes for p in places(child)}.values():
            if type(value := place.get()) is float:
                place.put(made := make(value))
                undo.callback(_put_back, place.get, place.put, made, value)
        for function in {f for child in classes for f in functions(child)}:
            _replace_in(undo, function, make)
        yield


def _spaces(holder: Any, seen: set[int], depth: int = HELD_DEPTH) -> Iterator[dict[str, Any]]:
    """The namespace of an object, or a dict, and of what it holds."""
    space = namespace(holder)
    if id(space) not in seen:
        seen.add(id(space))
        yield space
        for value in list(space.values()) if depth else ():
            if has_namespace(value):
                yield from _spaces(value, seen, depth - 1)


def _replace(undo: contextlib.ExitStack, space: dict[str, Any], make: Callable[[float], Any]) -> None:
    for name, value in space.items():
        if type(value) is float:
            space[name] = made = make(value)
            undo.callback(_put_back, partial(space.get, name), partial(space.__setitem__, name), made, value)


def _put_back(get: Callable[[], Any], put: Callable[[Any], Any], made: Any, value: float) -> None:
    now = get()
    if now is made:
        put(value)
    elif isinstance(now, sizes.Fraction):
        put(sizes.plain(now))


def _replace_in(undo: contextlib.ExitStack, function: types.FunctionType, make: Callable[[float], Any]) -> None:
    code = function.__code__
    if (remembering := _remembering(code, make)) is not code:
        function.__code__ = remembering
        undo.callback(setattr, function, "__code__", code)
    if any(type(value) is float for value in function.__defaults__ or ()):
        undo.callback(setattr, function, "__defaults__", function.__defaults__)
        function.__defaults__ = tuple(make(v) if type(v) is float else v for v in function.__defaults__ or ())
    _replace(undo, function.__kwdefaults__ or {}, make)
    for cell in function.__closure__ or ():
        if type(value := _content(cell)) is float:
            cell.cell_contents = made = make(value)
            undo.callback(_put_back, partial(_content, cell), partial(setattr, cell, "cell_contents"), made, value)


def _content(cell: types.CellType) -> float | None:
    """The float in a variable of a surrounding function; None where it is something else, or nothing yet."""
    try:
        return cell.cell_contents if isinstance(cell.cell_contents, float) else None
    except ValueError:
        return None


def _remembering(code: types.CodeType, make: Callable[[float], Any]) -> types.CodeType:
    """The code with constants for its literals, and for those of the functions inside it; itself where it has none."""
    constants = tuple(
        make(c) if type(c) is float else _remembering(c, make) if isinstance(c, types.CodeType) else c for c in code.co_consts
    )
    return code if all(a is b for a, b in zip(constants, code.co_consts)) else code.replace(co_consts=constants)
