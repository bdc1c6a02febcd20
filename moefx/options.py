"""What a user may choose. Everything else is decided by the passes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moefx.errors import InputError


@dataclass(frozen=True)
class Options:
    """Options of `optimize` and `explain`.

    degree: pipeline degree r >= 1, into how many token chunks a region is cut; "auto": 1 on one rank, and with several
    (`mesh`) what the costs of this machine say. kernels: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton".
    seed: seed of the probe values; results do not depend on it, failures can be reproduced with it.

    With several ranks: backward_degree: that of the backward pass (None: as `degree`). policy: the order of tasks,
    `moefx.passes.schedule.POLICIES`; "auto" needs a profile, which is made at the first use, and "fifo" none. all_to_all,
    codec, backward_codec: plug-ins by name. profile: a file of `moefx calibrate` (None: the one in the user's cache).
    measured: whether a degree that is "auto" is also timed on the ranks against its neighbours, which the model may misjudge.
    capacity: the most rows that an expert gets from one rank's batch in any call: sizes are then static, and the host waits for
    nothing. A call with more is an error, never a wrong number. None: dropless, rows are counted.
    """

    degree: int | Literal["auto"] = "auto"
    kernels: str = "auto"
    seed: int = 0
    backward_degree: int | Literal["auto"] | None = None
    policy: str = "auto"
    all_to_all: str = "direct"
    codec: str = "none"
    backward_codec: str = "none"
    profile: str | Path | None = None
    capacity: int | None = None
    measured: bool = True

    def __post_init__(self) -> None:
        for name, value in (("degree", self.degree), ("backward_degree", self.backward_degree)):
            given = value == "auto" or (name == "backward_degree" and value is None)
            if not given and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"Options.{name} is the number of chunks, an integer >= 1, or 'auto'; got {value!r}")
        if self.capacity is not None and (type(self.capacity) is not int or self.capacity < 1):
            raise InputError(f"Options.capacity is a number of rows >= 1, or None; got {self.capacity!r}")
        if not isinstance(self.measured, bool):
            raise InputError(f"Options.measured is True or False; got {self.measured!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InputError(f"Options.seed is an integer; got {self.seed!r}")
        if self.kernels not in ("auto", "torch", "triton"):
            raise InputError(f"Options.kernels must be 'auto', 'torch' or 'triton'; got {self.kernels!r}")
        for name in ("policy", "all_to_all", "codec", "backward_codec"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"Options.{name} is the name of a plug-in; got {getattr(self, name)!r}")

    @property
    def chunks(self) -> int:
        """The degree on one rank."""
        return 1 if self.degree == "auto" else self.degree

    @property
    def degrees(self) -> tuple[int | Literal["auto"], int | Literal["auto"]]:
        """Forward and backward, on several ranks."""
        return self.degree, self.degree if self.backward_degree is None else self.backward_degree

    @property
    def timed(self) -> bool:
        """Whether a schedule needs times of its tasks."""
        return "auto" in self.degrees or self.policy not in UNTIMED


# Policies that look at the graph alone.
UNTIMED = ("serial", "fifo", "schemoe")
