"""Plain values that a rewritten block was made for, and whether they are still what they were.

A block's code takes numbers, names and flags from attributes, from objects and dicts that its modules hold (a config), from
globals and classes. A rewritten block has them as constants, so it steps aside when one of them is another; and so it does in
other modes of torch, and for other dtypes, where the code names those: a branch on them is not seen by a probe in float64.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from moefx.python_state import HELD_DEPTH, PLAIN, has_namespace, names, names_of_layer, namespace, places

_SCALARS = (*PLAIN, types.FunctionType, types.BuiltinFunctionType, type)
_LONGEST = 32  # a list or tuple of plain values
_OF_TENSORS = frozenset(dir(Tensor))  # code that names `dtype` or `shape` mostly means a tensor's, not a config's
_DTYPES = frozenset(("float16", "bfloat16", "half", "finfo"))  # names in code that may branch on them
_MODES: dict[str, Callable[[], bool]] = {  # by the name in code that may branch on them; off in every analysis
    "is_inference_mode_enabled": torch.is_inference_mode_enabled,
    "is_autocast_enabled": lambda: torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"),
}


@dataclass(frozen=True)
class Setting:
    """A plain value and where it stands: `name` of what `steps` lead to from a submodule (its path), a file or a class.

    Of `training`, whether it is that of the block.
    """

    root: str | types.ModuleType | type
    steps: tuple[str, ...]
    name: str
    value: Any

    def __str__(self) -> str:
        if isinstance(self.root, str):
            return ".".join(("self", *filter(None, self.root.split(".")), *self.steps, self.name))
        return f"{self.root.__qualname__ if isinstance(self.root, type) else self.root.__name__}.{self.name}"

    def same(self, modules: dict[str, nn.Module]) -> bool:
        """Whether it is still the same, in code that Dynamo follows. modules: those of the block by path."""
        holder: Any = modules[self.root] if isinstance(self.root, str) else self.root
        for step in self.steps:
            holder = holder[step] if type(holder) is dict else getattr(holder, step)
        if self.name == "training" and not self.steps:
            return bool((holder.training == modules[""].training) == self.value)
        now = holder.get(self.name) if type(holder) is dict else getattr(holder, self.name, None)
        return now is self.value or bool(now == self.value)


Way = tuple[str, str, str]  # a submodule's path, that of the module that holds it, its name there


def ways(paths: Iterable[str]) -> tuple[Way, ...]:
    """To these submodules of a block and to all that hold them, those first: what `submodules` follows."""
    found: dict[str, Way] = {}
    for path in paths:
        parts = path.split(".") if path else []
        for end in range(1, len(parts) + 1):
            here, above = ".".join(parts[:end]), ".".join(parts[: end - 1])
            found.setdefault(here, (here, above, parts[end - 1]))
    return tuple(found.values())


def submodules(block: nn.Module, along: tuple[Way, ...]) -> dict[str, nn.Module]:
    """The submodules by path, each looked up once and without calls: Dynamo traces this. Raises KeyError."""
    found: dict[str, Any] = {"": block}
    for path, above, name in along:
        found[path] = found[above]._modules[name]
    return found


def settings_of(block: nn.Module, kept: tuple[str, ...]) -> tuple[Setting, ...]:
    """Those of a block whose submodules `kept` are still called: they are not constants in those."""
    named = named_by(block, kept)
    found: list[Setting] = []
    for path, module in _live(block, kept).items():
        layer = names_of_layer(module)
        if layer is None or "training" in layer:
            found.append(Setting(path, (), "training", module.training == block.training))
        if layer is None:
            found += _held(path, (), vars(module), named)
        else:
            own = {name: value for name, value in vars(module).items() if name in layer}
            found += _held(path, (), own, layer)
        found += _global(module)
        owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        if not owner.__module__.startswith("torch."):
            found.append(Setting(owner, (), "forward", vars(owner)["forward"]))  # which libraries patch
    return tuple({(s.root, s.steps, s.name): s for s in found}.values())


def _live(block: nn.Module, kept: tuple[str, ...]) -> dict[str, nn.Module]:
    """Those that are not still called, as what computes parameters is. What torch.compile made of one has nothing of its own."""
    called = (*kept, *(f"{p}.parametrizations".lstrip(".") for p, m in block.named_modules() if is_parametrized(m)))
    modules = ((p, m) for p, m in block.named_modules() if not hasattr(m, "_orig_mod"))
    return {p: m for p, m in modules if not any(p == k or p.startswith(f"{k}.") for k in called)}


def _held(root: str, steps: tuple[str, ...], space: dict[str, Any], named: frozenset[str]) -> Iterator[Setting]:
    """Of a module: its own public attributes, and what its code names; of what it holds only the latter."""
    for name, value in space.items():
        wanted = name in named and not (steps and name in _OF_TENSORS) or not steps and not str(name).startswith("_")
        if not isinstance(name, str) or not wanted or name == "training":
            continue
        if _plain(value):
            yield Setting(root, steps, name, list(value) if type(value) is list else value)
        elif len(steps) < HELD_DEPTH and has_namespace(value):
            yield from _held(root, (*steps, name), namespace(value), named)


def _global(module: nn.Module) -> Iterator[Setting]:
    """Globals and attributes of classes that a module's code names."""
    for place in places(module):
        value = place.get()
        root = place.owner if isinstance(place.owner, type) else sys.modules.get(place.owner.get("__name__", ""))
        if _plain(value) and root is not None and vars(root).get(place.name) is value:
            yield Setting(root, (), place.name, list(value) if type(value) is list else value)


def _plain(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (
        type(value) in (list, tuple) and len(value) <= _LONGEST and all(isinstance(v, _SCALARS) for v in value)
    )


def named_by(block: nn.Module, kept: tuple[str, ...]) -> frozenset[str]:
    """What the code of a block names that is not still called."""
    return frozenset().union(*(names(m) for m in _live(block, kept).values()))


def modes_of(block: nn.Module, kept: tuple[str, ...]) -> tuple[str, ...]:
    """The modes of torch that the code of a block asks for."""
    named = named_by(block, kept)
    return tuple(mode for mode in _MODES if mode in named)


def mode_on(modes: tuple[str, ...]) -> str:
    """One of these modes of torch that is on; nothing where none is."""
    return next((mode for mode in modes if _MODES[mode]()), "")


def dtypes_of(block: nn.Module, kept: tuple[str, ...], args: Any, kwargs: Any) -> tuple[torch.dtype, ...]:
    """Those of a call and of its weights, where the code of a block may branch on them; nothing where it does not."""
    return dtypes(block, args, kwargs) if _DTYPES & named_by(block, kept) else ()


def dtypes(block: nn.Module, args: Any, kwargs: Any) -> tuple[torch.dtype, ...]:
    """Of the floats among the arguments, and of the first parameter."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    return tuple(t.dtype for t in (*given, next(block.parameters())) if t.is_floating_point())
