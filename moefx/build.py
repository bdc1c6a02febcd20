"""From a region to something that runs: the stages after `find`, named once each."""

from __future__ import annotations

import hashlib
import linecache
from types import CodeType
from typing import Any

from moefx.codegen.emit import emit
from moefx.compiled import CompiledRegion, Emitted
from moefx.ir import Region
from moefx.passes.lower import lower
from moefx.passes.partition import partition
from moefx.passes.schedule import schedule
from moefx.passes.simplify import simplify
from moefx.region_op import register


def compile_region(region: Region, degree: int = 1, kernels: str = "auto", policy: str = "fifo") -> CompiledRegion:
    """simplify -> partition -> schedule -> lower -> emit -> load, for both phases of a region in `degree` chunks."""
    region = simplify(region)
    graphs = (partition(region, degree, "forward"), partition(region, degree, "backward"))
    schedules = (schedule(graphs[0], policy), schedule(graphs[1], policy))
    plans = (lower(region, graphs[0], schedules[0]), lower(region, graphs[1], schedules[1]))
    emitted = load(emit(region, *plans, name="region"))
    return register(CompiledRegion(region, graphs, schedules, plans, emitted, kernels))


def load(source: str) -> Emitted:
    """Runs an emitted file. Equal sources share one entry in `linecache`, so tracebacks show its lines."""
    filename = f"<moefx {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    code: CodeType = compile(source, filename, "exec")
    namespace: dict[str, Any] = {"__name__": filename}
    exec(code, namespace)
    return Emitted(source, namespace["forward"], namespace["backward"])
