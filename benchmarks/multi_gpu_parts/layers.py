"""Calibration, and the step time of routed layers: every degree, `auto`, no wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any

import torch

import moefx
from moefx import calibrate
from moefx.errors import InputError
from moefx.measured import AtOnce
from moefx.profile import Line, Profile, device_name, rate
from multi_gpu_parts.plans import Layer, Spread, compile_kernels, own_weights, random_batch, step
from multi_gpu_parts.worker import Bench


def profile_of(bench: Bench) -> Any:
    """The costs of this group: measured once, then from the user's cache, where `moefx.optimize` finds them too."""
    text = ""
    if bench.rank == 0 and not (bench.options.recalibrate and "calibrate" in bench.options.only):
        try:
            text = Profile.load(device=device_name(bench.device), ranks=bench.world).dumps()
        except InputError:
            pass
    text = bench.share(text)
    if not text:
        profile = calibrate.calibrate(bench.device.type, bench.world, 0.05 if bench.toy else 1.0)
        if bench.rank == 0:
            profile.save()
        text = bench.share(profile.dumps())
        bench.options.recalibrate = False
    if bench.cuda:
        torch.cuda.empty_cache()
    return Profile.loads(text)


def calibration(bench: Bench) -> None:
    def make() -> dict[str, Any]:
        profile = profile_of(bench)
        bench.log(f"\n{profile}")
        if bench.rank == 0:
            bench.options.out.mkdir(parents=True, exist_ok=True)
            (bench.options.out / "profile.json").write_text(profile.dumps(), encoding="utf-8")
        return {kind: f"{1e6 * line.alpha_s:.0f} us + {rate(line)}" for kind, line in profile.lines.items()}

    bench.row("calibrate", "alpha + beta", make, reserve_s=20)


# ------------------------------------------------------------------------------------------------ layers

LAYERS = {
    "mixtral": Layer(4096, 14336, 8, 2),
    "qwen3-30b-a3b": Layer(2048, 768, 128, 8),
    "deepseek-v3, 64 experts": Layer(7168, 2048, 64, 8),
}
TOKENS = (4096, 8192, 16384, 32768)
TOY_LAYERS, TOY_TOKENS = {"toy": Layer(64, 48, 8, 2)}, (128, 256)


class Shape:
    """A layer of real width, made when it is first needed."""

    def __init__(self, bench: Bench, layer: Layer, lines: Mapping[str, Line] = MappingProxyType({}), topology: Any = None) -> None:
        self.bench, self.layer, self.lines, self.topology = bench, layer, lines, topology

    @cached_property
    def spread(self) -> Spread:
        dtype, profile = torch.float32 if self.bench.toy else torch.bfloat16, profile_of(self.bench)
        profile = replace(profile, lines={**profile.lines, **self.lines})
        return Spread(self.bench, self.layer, own_weights(self.bench, self.layer, dtype), profile, self.topology)


def layer_row(bench: Bench, shape: Shape, tokens: int, all_to_all: str = "direct") -> dict[str, Any]:
    """Times of one layer at one size: every degree, `auto` as `optimize` has it, what the costs alone choose, and no wire."""
    spread, reserve = shape.spread, bench.options.reserve
    degrees, rounds = ((1, 2), 2) if bench.toy else (bench.options.degrees, bench.options.rounds)
    batch = random_batch(bench, spread.layer, tokens, spread.dtype, routings=2 + rounds)  # two calls prepare
    variants = {f"r={r}": moefx.Options(degree=r, all_to_all=all_to_all) for r in degrees}
    variants |= {"auto": moefx.Options(all_to_all=all_to_all), "costs": moefx.Options(all_to_all=all_to_all, measured=False)}
    plans = {name: spread.plan(options, tokens) for name, options in variants.items()}
    alone, _ = spread.plan(variants["r=1"], tokens)
    alone.wire = replace(alone.wire, all_to_all=AtOnce())
    same = {n: next(m for m, (other, _) in plans.items() if other.schedules == mine.schedules) for n, (mine, _) in plans.items()}
    distinct = {name: plans[name][0] for name in same.values()}  # in one order on all ranks: they exchange rows
    compile_kernels(distinct.values(), spread.params, batch, reserve)
    works = {name: step(region, spread.params, batch, reserve) for name, region in distinct.items()}
    timed = bench.in_turns({**works, "no wire": step(alone, spread.params, batch)}, rounds)
    compute, seconds = timed["no wire"], {name: timed[as_name] for name, as_name in same.items()}
    predicted = {n: sum(t.makespan_s for t in timelines) for n, (_, timelines) in plans.items() if all(timelines)}
    best = min(seconds, key=lambda n: seconds[n])
    regret = {name: seconds[name] / seconds[best] - 1 for name in ("auto", "costs")}
    gain, could = seconds["r=1"] - seconds["auto"], min(seconds["r=1"] - compute, compute)
    chunk = sum(t.compute_s(4) - t.compute_s(1) for t in spread.times[tokens].values()) / 3
    return {
        "no wire ms": f"{1e3 * compute:.2f}", "a chunk more ms": f"{1e3 * chunk:.2f}",
        **{f"{n} ms": f"{1e3 * s:.2f}" for n, s in seconds.items() if n != "costs"},
        "chosen": "/".join(map(str, plans["auto"][0].degrees)), "best": best, "regret": f"{100 * regret['auto']:.1f} %",
        "r=1 / auto": f"{seconds['r=1'] / seconds['auto']:.2f}", "hidden": f"{100 * gain / could:.0f} %" if could > 0 else "-",
        "predicted": f"{1e3 * predicted['auto']:.2f} ({100 * (predicted['auto'] / seconds['auto'] - 1):+.0f} %)",
        "costs alone": f"{'/'.join(map(str, plans['costs'][0].degrees))}, regret {100 * regret['costs']:.1f} %",
        "_seconds": seconds, "_compute": compute, "_predicted": predicted, "_regret": regret["auto"],
        "_measured": plans["auto"][0].measured,
        "_times": {phase: asdict(t) for phase, t in spread.times[tokens].items()},
    }  # fmt: skip


def layers(bench: Bench) -> None:
    shapes, sizes = (TOY_LAYERS, TOY_TOKENS) if bench.toy else (LAYERS, TOKENS)
    for name, layer in shapes.items():
        shape = Shape(bench, layer)
        for tokens in sizes:
            bench.row("layers", f"{name} ({layer}) T={tokens}", partial(layer_row, bench, shape, tokens), reserve_s=10)
