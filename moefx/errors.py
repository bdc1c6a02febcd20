"""Every error that moefx raises on purpose. Each message says what, where, and what to try."""

from __future__ import annotations

from collections.abc import Sequence


class MoefxError(Exception):
    """Base of all errors raised by moefx."""


class InputError(MoefxError, ValueError):
    """The caller's arguments do not fit: names the argument and what was expected."""


class Decline(MoefxError):
    """A candidate block stays as it is. `reason` is for people; `nearest` tells how far the proof got."""

    def __init__(self, reason: str, nearest: str = "", location: str = "") -> None:
        super().__init__(reason)
        self.reason, self.nearest, self.location = reason, nearest, location

    def alone(self) -> Decline:
        """A copy to keep: without what ran when it was raised, which holds the probe copy's parameters."""
        return Decline(self.reason, self.nearest, self.location)


class PlanError(MoefxError):
    """A stage received or made an invalid task graph, schedule or plan: names the task and the lane."""


class CapacityError(MoefxError, ValueError):
    """A rank has more rows for an expert than `Options(capacity=...)` says; nothing was dropped, there is no result."""


class CommunicationError(MoefxError, RuntimeError):
    """An exchange between ranks failed or took too long. `peers` are the ranks of the group that did not do their part."""

    def __init__(self, message: str, peers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.peers = tuple(peers)
