"""Plug-ins from outside the package. Each registry is imported when it is first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moefx.codegen.all_to_all import MakeAllToAll
    from moefx.codegen.codecs import Codec
    from moefx.passes.schedule import Policy


def register_codec(name: str, codec: Codec) -> None:
    """Make `codec` known by `name`; `moefx.codegen.codecs.Codec` says what it has to do."""
    from moefx.codegen.codecs import CODECS

    CODECS.register(name, codec)


def register_all_to_all(name: str, make: MakeAllToAll) -> None:
    """Make an all-to-all known by `name`: make(group, topology) -> `moefx.codegen.all_to_all.AllToAll`."""
    from moefx.codegen.all_to_all import ALL_TO_ALLS

    ALL_TO_ALLS.register(name, make)


def register_policy(name: str, policy: Policy) -> None:
    """Make a schedule policy known by `name`, a function `moefx.ir.TaskGraph` -> `moefx.ir.Schedule`.

    Its result is checked each time: every task once, no deadlock. `moefx.simulate` tells what it costs.
    """
    from moefx.passes.schedule import POLICIES

    POLICIES.register(name, policy)
