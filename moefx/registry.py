"""Plug-ins by name: schedule policies, all-to-alls and codecs are looked up here, so that nothing else knows their names."""

from __future__ import annotations

from typing import TypeVar

from moefx.errors import InputError, MoefxError

Thing = TypeVar("Thing")


class Registry(dict[str, Thing]):
    """name -> plug-in. It is a dict: assigning replaces, deleting forgets. Looking up an unknown name lists the known ones.

    kind: what the plug-ins are, for messages. requires: attributes that each must have. error: raised by a lookup.
    """

    def __init__(self, kind: str, requires: tuple[str, ...] = (), error: type[MoefxError] = InputError) -> None:
        super().__init__()
        self.kind, self.requires, self.error = kind, requires, error

    def register(self, name: str, thing: Thing) -> None:
        """Make `thing` known by a name that is free; InputError for one that is taken, or a thing that does not fit."""
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of a {self.kind} is a string; got {name!r}")
        if name in self:
            raise InputError(f"a {self.kind} {name!r} exists; choose another name, or assign to replace it")
        if missing := [attribute for attribute in self.requires if not hasattr(thing, attribute)]:
            raise InputError(f"{thing!r} is no {self.kind}: it lacks {', '.join(missing)}")
        self[name] = thing

    def __missing__(self, name: str) -> Thing:
        raise self.error(f"no {self.kind} {name!r}; known: {', '.join(self) or 'none'}")
