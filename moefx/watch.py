"""Whether a block still is what its rewriting was made for, asked at each call.

A ModuleList of 128 experts has a thousand values and modules to look at. So they stand in flat lists, and each question is one
call into C for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moefx.parametrized import check_value, class_of, value
from moefx.python_state import namespace
from moefx.settings import Setting

_get: Any = dict.get
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Watch:
    """The settings of one block, its submodules `types` (path, class), and where its `parameters` stand.

    Raises KeyError or TypeError where the block was rearranged.
    """

    def __init__(
        self,
        settings: tuple[Setting, ...],
        block: nn.Module,
        types: tuple[tuple[str, type], ...] = (),
        parameters: Iterable[str] = (),
    ) -> None:
        self.block = block
        self._checked: set[tuple[Any, ...]] = set()  # how parameters were computed that may be at any time
        self._way: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}  # the modules and objects that lead to values
        self._values: list[tuple[dict[str, Any], Setting]] = []
        self._of_classes: list[tuple[type, Setting]] = []
        self._modes: list[tuple[dict[str, Any], Setting]] = []
        for setting in settings:
            holder: Any = self._module(setting.root) if isinstance(setting.root, str) else setting.root
            for step in setting.steps:
                holder = self._step(namespace(holder), step)
            if isinstance(holder, type):
                self._of_classes.append((holder, setting))
            elif setting.name == "training" and not setting.steps:
                self._modes.append((namespace(holder), setting))
            else:
                self._values.append((namespace(holder), setting))
        self._spaces = [space for space, _ in self._values]
        self._names = [setting.name for _, setting in self._values]
        self._expected = [setting.value for _, setting in self._values]
        self._mode_spaces = [space for space, _ in self._modes]
        self._modules = [self._module(path) for path, _ in types]
        self._module_spaces = [vars(module) for module in self._modules]
        self._kinds = [type(m) if class_of(m) is kind else kind for m, (_, kind) in zip(self._modules, types)]
        hooks = [(space, name) for space in self._module_spaces for name in _HOOKS]
        self._hook_spaces, self._hook_names = [space for space, _ in hooks], [name for _, name in hooks]
        self._owners = {name: (self._module(path), last) for name in parameters for path, _, last in [name.rpartition(".")]}
        owners = self._owners.values()
        self._parameter_spaces = [o._parameters if last in o._parameters else o._buffers for o, last in owners]
        self._parameter_names = [last for _, last in owners]
        self._way_spaces = [space for space, _, _ in self._way.values()]
        self._way_names = [name for _, name, _ in self._way.values()]
        self._holders = [holder for _, _, holder in self._way.values()]

    def _module(self, path: str) -> nn.Module:
        module = self.block
        for name in filter(None, path.split(".")):
            module = self._step(module._modules, name)
        return module

    def _step(self, space: dict[str, Any], name: str) -> Any:
        self._way[id(space), name] = space, name, space[name]
        return space[name]

    def moved(self) -> bool:
        """Whether another module or object stands where one was: then this one looks at what is not in use any more."""
        return not all(map(is_, map(_get, self._way_spaces, self._way_names), self._holders))

    def changed(self) -> bool:
        """Whether one of the values is another."""
        try:
            other = list(map(_get, self._spaces, self._names)) != self._expected
        except (RuntimeError, ValueError):  # a tensor or an array stands there now, which is not equal or unequal as a whole
            return True
        return other or any(_differs(vars(cls).get(s.name), s.value) for cls, s in self._of_classes) or bool(self._other_modes())

    def _other_modes(self) -> list[Setting]:
        mode = self.block.training
        now = map(_get, self._mode_spaces, repeat("training"))
        return [s for mine, (_, s) in zip(now, self._modes) if (mine == mode) != s.value]

    def untouched(self) -> bool:
        """Whether its submodules are of the same classes and have no hooks and no forward of their own."""
        return (
            [*map(type, self._modules)] == self._kinds
            and not any(map(dict.__contains__, self._module_spaces, repeat("forward")))
            and not any(map(_get, self._hook_spaces, self._hook_names))
        )

    def parameters(self) -> dict[str, Tensor]:
        """Those of the block by name (None, with experts spread over ranks, where another one holds it).

        Raises Decline where one is computed now in a way that was not looked at before, and matters (`check_value`).
        """
        values = [*map(_get, self._parameter_spaces, self._parameter_names)]
        if any(map(is_, values, repeat(None))):
            values = [self._value(name) if value is None else value for name, value in zip(self._owners, values)]
        return dict(zip(self._owners, values))

    def _value(self, name: str) -> Tensor | None:
        """Of what is no parameter or buffer where it was one: computed, maybe."""
        owner, last = self._owners[name]
        if is_parametrized(owner, last):
            steps: Any = owner.parametrizations[last]  # type: ignore[index]
            kinds = (*map(type, steps.children()), steps.training)
            if kinds not in self._checked:
                check_value(owner, last, name, (steps.training,))
                self._checked.add(kinds)
        return value(owner, last)

    def __str__(self) -> str:
        """What is another now."""
        values = [(space.get(setting.name), setting) for space, setting in self._values]
        values += [(vars(cls).get(setting.name), setting) for cls, setting in self._of_classes]
        texts = [f"{setting} is {now!r} and was {setting.value!r}" for now, setting in values if _differs(now, setting.value)]
        return ", ".join(texts + [f"{setting} is another" for setting in self._other_modes()])


def _differs(now: Any, value: Any) -> bool:
    try:
        return now is not value and bool(now != value)
    except (RuntimeError, ValueError):  # see `Watch.changed`
        return True
