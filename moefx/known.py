"""Verified changes of graphs, kept from one process to the next: a part that was found and verified once is not analysed again.

    text = text_of(key)                       # None where another process could mean something else by it
    found = load(text)  ...  save(text, found)

A file holds the whole text of its key: what the part computes, on which shapes, dtypes and devices, with which options, and
which moefx, torch and Triton verified it. Only functions of torch and Python are trusted to stay what they are. Files lie in
$XDG_CACHE_HOME/moefx (or ~/.cache/moefx) beside what was calibrated, and are pickles: as with Triton's and Inductor's own
caches, who can write there can run code. MOEFX_NO_CACHE=1 turns all of it off, as does torch's `force_disable_caches`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.compiler import config as compiler_config
from torch.overrides import resolve_name

from moefx.build import compile_region
from moefx.graph_analysis import Found, Routed
from moefx.passes.splice import Placed
from moefx.profile import cache_folder

log = logging.getLogger(__name__)

EARLIER = "an earlier process"  # the name of what was found there
MOST = 512  # files; the oldest go
STABLE = ("torch", "_operator", "operator", "math", "builtins")  # modules whose functions a version of torch or Python names
STABLE_OPERATORS = ("aten", "prims")
PACKAGES = ("transformers",)  # whose operators their version names


class _Unstable(Exception):
    """Something that another process may mean otherwise."""


def text_of(key: Any) -> str | None:
    """A key of parts as text that means the same in every process; None where there is none."""
    try:
        return "\n".join((_versions(), _text(key)))
    except _Unstable as reason:
        log.debug("not kept: %s", reason)
        return None


def load(text: str) -> Found | None:
    """What an earlier process found for a key."""
    if not _enabled() or not (file := _file(text)).is_file():
        return None
    try:
        kept_text, kept = pickle.loads(file.read_bytes())
        return _restored(kept) if kept_text == text else None
    except Exception:  # whatever a broken file does: it is as if there were none
        log.warning("%s cannot be read and is removed", file, exc_info=True)
        file.unlink(missing_ok=True)
        return None


def save(text: str, found: Found) -> None:
    """Keeps what was found for a key; where it cannot be written, says so and goes on."""
    if not _enabled():
        return
    file = _file(text)
    new = file.with_suffix(f".{os.getpid()}")
    try:
        content = pickle.dumps((text, _kept(found)))
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        os.replace(new, file)  # other processes see all of it or nothing
        for old in sorted(file.parent.glob("*.pickle"), key=lambda f: f.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)
    except Exception as reason:  # noqa: BLE001 - compiling does not depend on it
        log.warning("what was found is not kept for other processes: %s: %s", type(reason).__name__, reason)


def _enabled() -> bool:
    return os.environ.get("MOEFX_NO_CACHE", "0") in ("", "0") and not compiler_config.force_disable_caches


def _file(text: str) -> Path:
    return cache_folder() / "found" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.pickle"


# ------------------------------------------------------------------------------------------------ what is kept


def _kept(found: Found) -> dict[str, Any]:
    call: Routed = found.change.call  # type: ignore[assignment]
    place = {name: getattr(found.change, name) for name in ("after", "replaced", "arguments", "dead")}
    region = found.compiled.region, found.compiled.plans[0].degree, found.compiled.kernels
    routed = call.routing, call.leading, call.dtype
    return {"place": place, "region": region, "routed": routed, "top_k": found.top_k, "errors": found.errors}


def _restored(kept: Mapping[str, Any]) -> Found:
    compiled = compile_region(*kept["region"])
    change = Placed(call=Routed(compiled, *kept["routed"]), **kept["place"])
    return Found(EARLIER, change, compiled, kept["top_k"], kept["errors"])


# ------------------------------------------------------------------------------------------------ keys as text


@cache
def _versions() -> str:
    """Of all that takes part in finding and verifying, and of the devices."""
    here = Path(__file__).resolve().parent.parent
    sources = hashlib.sha256()
    for folder in ("moefx", "passes", "codegen"):
        for file in sorted((here / folder).glob("*.py")):
            sources.update(file.read_bytes())
    versions = [f"moefx {sources.hexdigest()}", f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        versions += [f"{torch.cuda.get_device_name(d)} {torch.cuda.get_device_capability(d)}" for d in devices]
    return "\n".join(versions)


def _text(x: Any) -> str:
    if isinstance(x, (tuple, list)):
        return f"({', '.join(map(_text, x))})"
    if x is None or isinstance(x, (str, int, float, torch.dtype, torch.device)):
        return _checked(repr(x))
    if callable(x):
        return _function(x)
    return _checked(f"{type(x).__name__} {x!r}")


def _checked(text: str) -> str:
    if " at 0x" in text:
        raise _Unstable(text)
    return text


def _function(function: Any) -> str:
    """The name of a function that this version of torch, Python or a known package defines."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        if str(function).partition(".")[0] in (*STABLE_OPERATORS, *PACKAGES):
            return str(function)
    elif name := resolve_name(function):
        return str(name)
    else:
        module, name = str(getattr(function, "__module__", "")), str(getattr(function, "__qualname__", "<"))
        if module.partition(".")[0] in STABLE and "<" not in name:
            return f"{module}.{name}"
    raise _Unstable(f"{function} may be another function in another process")
