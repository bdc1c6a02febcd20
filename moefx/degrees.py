"""Into how many chunks a block on several ranks is cut: what its costs say, and which of the degrees near that is fastest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from moefx.build import NOT_WORTH_A_CHUNK, PHASES, ParallelPlans, compile_parallel
from moefx.costs import BlockTimes, Sizes
from moefx.exchange import Wire
from moefx.ir import Region
from moefx.measured import STEP, Runs, block_times, measure
from moefx.options import Options
from moefx.parallel_region import ParallelRegion
from moefx.profile import Profile

Degrees = tuple[int, int]  # of forward and backward
Chosen = TypeVar("Chosen", int, Degrees)


def plans_for(
    region: Region,
    local: Region,
    params: Mapping[str, Tensor],
    tokens: int,
    wire: Wire,
    options: Options,
    profile: Profile | None,
    times: Mapping[str, BlockTimes] | None = None,
) -> ParallelPlans:
    """The plans of a region, of which this rank has the experts `local` with the parameters `params`. All ranks call it.

    Rank 0 decides about degrees and orders, and all follow. tokens: of this rank in a step, at least 1. profile: None where
    `options` leave nothing open. times: what `block_times` gave for this block and so many tokens; None: measured here.
    """
    dtype = next(iter(params.values())).dtype
    shares = {p: codec.wire_bytes(region.d_model, dtype) / (region.d_model * dtype.itemsize) for p, codec in wire.codecs.items()}
    sizes = Sizes(
        tokens, region.top_k, region.d_model, region.d_expert, wire.most * wire.ranks, wire.ranks,
        bytes_per_element=dtype.itemsize, matrices=matrices(region),
    )  # fmt: skip
    if options.capacity is not None:
        sizes = replace(sizes, capacity_factor=options.capacity * sizes.experts / (sizes.top_k * sizes.tokens))
    if times is None:
        times = block_times(region, local, params, tokens, wire, options.kernels) if options.timed else {}

    def plans_of(chosen: Options) -> ParallelPlans:
        given = (region, local, chosen, sizes, profile, shares)
        texts: list[Any] = [None]
        if wire.group.rank() == 0:
            texts = [[str(s) for s in compile_parallel(*given, times=times).schedules]]
        dist.broadcast_object_list(texts, dist.get_global_rank(wire.group, 0), wire.group)
        return compile_parallel(*given, decided=tuple(texts[0]), times=times)

    plans = plans_of(options)
    if not options.measured or "auto" not in options.degrees:
        return plans
    decided = plans.schedules[0].degree, plans.schedules[1].degree
    around = [sorted({r for degree in decided for r in candidates(degree, sizes.capacity)})]  # ranks differ in sizes
    dist.broadcast_object_list(around, dist.get_global_rank(wire.group, 0), wire.group)
    trained = {name for name, p in params.items() if p.requires_grad}

    def measured(degrees: Iterable[Degrees], compared: Collection[str]) -> dict[str, dict[Degrees, Runs]]:
        """Without capacity: all rows travel."""
        made = {(f, b): plans_of(replace(options, degree=f, backward_degree=b, capacity=None)) for f, b in degrees}
        dropless = replace(wire, capacity=None)
        regions = {d: ParallelRegion(region, local, p, options.kernels, dropless) for d, p in made.items()}
        return measure(regions, params, trained, tokens, wire.group, compared)

    open_phases = [phase for phase, given in zip(PHASES, options.degrees) if given == "auto"]
    alone = measured(((r, r) for r in around[0]), open_phases)
    by_degree = {phase: {r: runs for (r, _), runs in alone[phase].items()} for phase in open_phases}
    told = [_told(phase, of) for phase, of in by_degree.items()]
    forward, backward = (fastest(by_degree[p], r) if p in by_degree else r for p, r in zip(PHASES, decided))
    pairs = dict.fromkeys([decided, (forward, backward), (forward, forward), (backward, backward)])
    if len(pairs) > 1 and options.degrees == ("auto", "auto"):  # where they differ, rows are cut anew between the phases
        steps = measured(pairs, [STEP])[STEP]
        forward, backward = fastest(steps, (forward, backward))  # a phase alone scatters less than a step
        told.append(_told(STEP, {f"{f}/{b}": runs for (f, b), runs in steps.items()}))
    return replace(plans_of(replace(options, degree=forward, backward_degree=backward)), measured=tuple(told))


def _told(what: str, runs: Mapping[Any, Runs]) -> str:
    return f"{what} measured: {', '.join(f'r={degree} {1e3 * of.median_s:.3g} ms' for degree, of in runs.items())}"


def candidates(chosen: int, capacity: int) -> list[int]:
    """The degrees to measure: r = 1, 2, 3, 4, 8, the chosen one and those about it, as far as there are rows for them."""
    about = chosen // 2, chosen - 1, chosen, chosen + 1, 2 * chosen
    return sorted({r for r in (1, 2, 3, 4, 8, *about) if 1 <= r <= max(1, capacity)})


def fastest(runs: Mapping[Chosen, Runs], decided: Chosen) -> Chosen:
    """What was decided on before, if nothing ran faster beyond doubt; else the least degree whose runs took no longer than any."""
    best = min(runs.values(), key=lambda r: r.median_s)
    limit = replace(best, median_s=(1 + NOT_WORTH_A_CHUNK) * best.median_s)
    if runs[decided].no_slower(limit):
        return decided
    return min(r for r, of in runs.items() if of.median_s <= limit.median_s)


def matrices(region: Region) -> int:
    """Products of D and F of an expert, as `moefx.costs` counts them: 3 where it is gated, whether gate and up are one product
    or two, else 2."""
    instrs = region.template.instrs
    work = sum(instrs[instr.args[0].index].width * instr.width for instr in instrs if instr.kind == "linear")
    return 3 if 2 * work > 5 * region.d_model * region.d_expert else 2
