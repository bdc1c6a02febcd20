"""What a user may choose. Everything else is decided by the passes."""

from __future__ import annotations

from dataclasses import dataclass

from moefx.errors import InputError


@dataclass(frozen=True)
class Options:
    """Options of `optimize` and `explain`.

    degree: pipeline degree r >= 1: into how many token chunks a region is cut.
    kernels: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton".
    seed: seed of the probe values; results do not depend on it, failures can be reproduced with it.
    """

    degree: int = 1
    kernels: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.degree, int) or isinstance(self.degree, bool) or self.degree < 1:
            raise InputError(f"Options.degree is the number of chunks, an integer >= 1; got {self.degree!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InputError(f"Options.seed is an integer; got {self.seed!r}")
        if self.kernels not in ("auto", "torch", "triton"):
            raise InputError(f"Options.kernels must be 'auto', 'torch' or 'triton'; got {self.kernels!r}")
