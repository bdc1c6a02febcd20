"""What work costs on a device: one line `seconds = alpha_s + beta_s_per_unit * units` per kind of work.

`python -m moefx calibrate` measures a profile; `preset` has published ones; `from_links` takes a cluster's data sheet.
Files are JSON with a version. Nothing is filled in: a line that a profile lacks is an error when it is asked for.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moefx.errors import InputError

VERSION = 1

# Kinds of work, and in which of a task's amounts (`moefx.costs.Work`) their lines may count.
LINES: dict[str, tuple[str, ...]] = {
    "gemm": ("flops",),
    "experts": ("flops",),
    "permute": ("hbm_bytes",),
    "codec": ("hbm_bytes",),
    **dict.fromkeys(
        ("all_to_all", "all_to_all_inter", "all_to_all_intra", "all_gather", "reduce_scatter", "all_reduce"),
        ("wire_bytes", "message_bytes"),
    ),
}


# Plug-ins have lines of their own, "codec:int8" or "all_to_all:pipe"; without one, the line of their kind serves.
PLUG_INS = ("codec", "all_to_all")


def kind_of(line: str) -> str:
    """The kind of work of a line by its name: "codec" of "codec:int8"."""
    kind, _, plug_in = line.partition(":")
    return kind if kind in PLUG_INS and plug_in else line


def units_of(line: str) -> tuple[str, ...] | None:
    """What a line of this name may count; None for an unknown kind of work."""
    return LINES.get(kind_of(line))


@dataclass(frozen=True)
class Line:
    """seconds = alpha_s + beta_s_per_unit * units, and how well it was measured.

    unit: what is counted, an amount of `moefx.costs.Work`. r2 and held_out_error (median relative error on sizes that the
    fit did not see) are None where the source gives none. low, high: the range of units that was measured.
    """

    alpha_s: float
    beta_s_per_unit: float
    unit: str
    r2: float | None = None
    held_out_error: float | None = None
    low: float | None = None
    high: float | None = None

    def seconds(self, units: float) -> float:
        return self.alpha_s + self.beta_s_per_unit * units


@dataclass(frozen=True)
class Profile:
    """Lines of one device (or cluster), by kind of work. ranks: of the collectives' group, 1 for none."""

    device: str
    lines: Mapping[str, Line]
    ranks: int = 1
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.device:
            raise InputError("a profile names its device")
        if not isinstance(self.ranks, int) or self.ranks < 1:
            raise InputError(f"Profile.ranks is a whole number >= 1; got {self.ranks!r}")
        for kind, line in self.lines.items():
            units = units_of(kind)
            if units is None:
                raise InputError(f"profile of {self.device}: unknown kind of work {kind!r}; known: {', '.join(LINES)}")
            if line.unit not in units:
                raise InputError(f"profile of {self.device}: {kind} counts {' or '.join(units)}; got {line.unit!r}")
            for name in ("alpha_s", "beta_s_per_unit"):
                value = getattr(line, name)
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                    raise InputError(
                        f"profile of {self.device}: {name} of {kind} is a finite number >= 0; got {value!r}"
                    )

    def line(self, kind: str) -> Line:
        """The line of a kind of work, for a plug-in without one of its own that of its kind; InputError where there is none."""
        if kind not in self.lines and kind_of(kind) in self.lines:
            return self.lines[kind_of(kind)]
        if units_of(kind) is None:
            raise InputError(f"unknown kind of work {kind!r}; known: {', '.join(LINES)}")
        if kind not in self.lines:
            known = ", ".join(self.lines) or "nothing"
            raise InputError(f"the profile of {self.device} has no line for {kind!r} (it has {known}); calibrate it")
        return self.lines[kind]

    def require_device(self, device: str) -> Profile:
        """Itself, if it is a profile of `device`; otherwise InputError."""
        if self.device != device:
            raise InputError(f"this is a profile of {self.device!r}, not of {device!r}: calibrate there")
        return self

    def dumps(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"

    @staticmethod
    def loads(text: str, where: str = "profile") -> Profile:
        """Read what `dumps` writes. InputError says what is wrong with the text."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            version = data.get("version") if isinstance(data, dict) else None
            raise InputError(f"{where}: version {VERSION} is needed; got {version!r}. Calibrate again")
        data = {key: value for key, value in data.items() if key != "version"}
        lines = {kind: _line(kind, raw, where) for kind, raw in _object(data.pop("lines", None), where).items()}
        unknown = set(data) - {"device", "ranks", "source", "notes"}
        if unknown or not isinstance(data.get("device"), str):
            raise InputError(f"{where}: a device and lines are needed; unknown entries: {sorted(unknown) or 'none'}")
        return Profile(lines=lines, **{**data, "notes": tuple(data.get("notes", ()))})

    def save(self, path: Path | None = None) -> Path:
        """Write JSON to `path`, or to `cache_path(device, ranks)`; return where."""
        path = path or cache_path(self.device, self.ranks)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.dumps(), encoding="utf-8")
        return path

    @staticmethod
    def load(path: Path | None = None, device: str | None = None, ranks: int = 1) -> Profile:
        """The profile in a file, or the one calibrated for this machine. `device`: refuse a profile of any other."""
        wanted = device or (device_name() if path is None else None)
        path = path or cache_path(wanted or "", ranks)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            hint = f"python -m moefx calibrate{f' --ranks {ranks}' if ranks > 1 else ''}"
            raise InputError(f"no profile at {path} ({error.strerror}); make one: {hint}") from None
        profile = Profile.loads(text, str(path))
        return profile.require_device(wanted) if wanted else profile

    def __str__(self) -> str:
        head = f"profile of {self.device}, {self.ranks} rank(s)" + (f", from {self.source}" if self.source else "")
        rows = [("work", "alpha (us)", "per unit", "r2", "held-out error")]
        for kind, line in self.lines.items():
            r2 = "-" if line.r2 is None else f"{line.r2:.5f}"
            error = "-" if line.held_out_error is None else f"{100 * line.held_out_error:.1f} %"
            rows.append((kind, f"{1e6 * line.alpha_s:.4g}", rate(line), r2, error))
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([head, *("  " + line for line in table), *(f"  note: {note}" for note in self.notes)])


def rate(line: Line) -> str:
    """The slope as people say it: GFLOP/s or GB/s (1e9 a second)."""
    if line.beta_s_per_unit == 0:
        return "free"
    unit = "GFLOP/s" if line.unit == "flops" else f"GB/s of {line.unit.replace('_', ' ')}"
    return f"{1e-9 / line.beta_s_per_unit:.4g} {unit}"


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: lines are an object of kind: line")
    return value


def _line(kind: str, raw: Any, where: str) -> Line:
    raw = _object(raw, where)
    names = set(Line.__dataclass_fields__)
    missing = {"alpha_s", "beta_s_per_unit", "unit"} - set(raw)
    if missing or set(raw) - names:
        raise InputError(f"{where}: line {kind!r} lacks {sorted(missing)}; unknown: {sorted(set(raw) - names)}")
    return Line(**raw)


def device_name(device: torch.device | str | None = None) -> str:
    """What a profile of this machine is called: the GPU's name, or the processor and the number of its threads."""
    kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU {_processor()} x{torch.get_num_threads()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_path(device: str, ranks: int = 1) -> Path:
    """In `cache_folder`, one file for a device and a number of ranks."""
    return cache_folder() / f"profile-{file_name(device)}-{ranks}.json"


def file_name(device: str) -> str:
    """The name of a device as a part of a file's."""
    return "".join(ch if ch.isalnum() else "-" for ch in device).strip("-").lower()


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/moefx (or ~/.cache/moefx)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")) / "moefx"


# ------------------------------------------------------------------------------------------------ published constants

# PipeMoE (INFOCOM 2023), the authors' public code. An all-to-all's n counts the whole message in bytes, a rank's own
# share included; a product's beta is per 4 x multiply-accumulate = per 2 FLOP.
_PIPEMOE_ALL_TO_ALL = {16: (5.70e-4, 2.96e-10), 32: (2.09e-4, 3.55e-10), 64: (7.83e-4, 3.84e-10)}
_PIPEMOE_GEMM = Line(1.5e-4, 2 * 3.73e-14, "flops")


def _pipemoe(ranks: int) -> Profile:
    lines = {
        "gemm": _PIPEMOE_GEMM,
        "experts": _PIPEMOE_GEMM,
        "all_to_all": Line(*_PIPEMOE_ALL_TO_ALL[ranks], "message_bytes"),
    }
    notes = ("no line for permute, codec or any other collective was published",)
    return Profile(f"PipeMoE's cluster, P={ranks}", lines, ranks, "PipeMoE's public code", notes)


def from_links(
    device: str,
    tflops: float,
    memory_gbps: float,
    inter_gbps: float,
    intra_gbps: float,
    launch_us: float,
    collective_us: float,
    ranks: int,
) -> Profile:
    """A profile from a data sheet: the caller's assumptions, in 1e12 FLOP/s, 1e9 bytes/s a rank, and microseconds.

    launch_us is alpha of a kernel, collective_us of a collective. An unsplit all-to-all, and gradients, take the link
    between nodes; shards of experts take the link within a node.
    """
    given = {"tflops": tflops, "memory_gbps": memory_gbps, "inter_gbps": inter_gbps, "intra_gbps": intra_gbps}
    for name, value in {**given, "launch_us": launch_us, "collective_us": collective_us}.items():
        if not (0 < value < math.inf or (value == 0 and name.endswith("us"))):
            raise InputError(f"{name} is a finite positive number; got {value}")
    launch, start = 1e-6 * launch_us, 1e-6 * collective_us
    product, memory = Line(launch, 1e-12 / tflops, "flops"), Line(launch, 1e-9 / memory_gbps, "hbm_bytes")
    inter, intra = Line(start, 1e-9 / inter_gbps, "wire_bytes"), Line(start, 1e-9 / intra_gbps, "wire_bytes")
    lines = {"gemm": product, "experts": product, "permute": memory, "codec": memory}
    lines |= dict.fromkeys(("all_to_all", "all_to_all_inter", "all_reduce"), inter)
    lines |= dict.fromkeys(("all_to_all_intra", "all_gather", "reduce_scatter"), intra)
    return Profile(device, lines, ranks, "the caller's data sheet")


# ------------------------------------------------------------------------------------------------ clusters by name


def _fsmoe() -> Profile:
    """FSMoE's smaller cluster: its constants are not published, but its hardware is, and PipeMoE measured the same cards."""
    sheet = from_links(
        "FSMoE's cluster of 8 x 4 RTX 2080 Ti", tflops=13.45, memory_gbps=616, inter_gbps=12.5 / 4, intra_gbps=15.75,
        launch_us=0, collective_us=1e6 * _PIPEMOE_ALL_TO_ALL[32][0], ranks=32,
    )  # fmt: skip
    notes = (
        "links and memory at the peak of their data sheets: 100 Gbit/s a node for 4 ranks, PCIe 3.0 x16, 616 GB/s",
        "products and the start-up of collectives as PipeMoE measured them on 32 of the same cards",
        "no start-up of a kernel that only moves memory was published: it is counted as none",
    )
    lines = {**sheet.lines, "gemm": _PIPEMOE_GEMM, "experts": _PIPEMOE_GEMM}
    return Profile(sheet.device, lines, 32, "the hardware that FSMoE (ASPLOS 2025) names, its data sheets, and PipeMoE", notes)


PRESETS: dict[str, Profile] = {f"pipemoe-{ranks}": _pipemoe(ranks) for ranks in _PIPEMOE_ALL_TO_ALL}
PRESETS["fsmoe-32"] = _fsmoe()


def preset(name: str) -> Profile:
    """A cluster from the papers by name; its notes say what was published and what is from data sheets."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
