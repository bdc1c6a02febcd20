"""Layers with experts on ranks, in a netbox (tests/netbox.py): is the chosen degree the best one, and what is hidden?

    python benchmarks/degrees.py sweep      chosen degree against every degree 1 .. 16, and the predicted time
    python benchmarks/degrees.py gain       forward + backward: auto against r = 1, and the share of communication hidden
    python benchmarks/degrees.py ablation   naive -> codec -> pipe -> schedule, and the schedule alone

Two hosts joined by a link of a given rate, one thread a rank; costs are calibrated in the box first. What is compared is
measured in turns within one run; times are medians of the slowest rank, those of `sweep` without what slowed whole rounds
(`moefx.measured.at_one_pace`). Tables are Markdown, for docs/parallel.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from moefx.codegen.all_to_all import make_all_to_all  # noqa: E402
from moefx.codegen.codecs import CODECS  # noqa: E402
from multi_gpu_parts.plans import Layer as Experts  # noqa: E402
from netbox import netbox, why_not  # noqa: E402
from overlap import table  # noqa: E402

import moefx  # noqa: E402
from moefx import calibrate  # noqa: E402
from moefx.build import ParallelPlans  # noqa: E402
from moefx.costs import BlockTimes, Sizes  # noqa: E402
from moefx.degrees import plans_for  # noqa: E402
from moefx.exchange import Wire  # noqa: E402
from moefx.holding import holding  # noqa: E402
from moefx.ir import Region  # noqa: E402
from moefx.measured import AtOnce, at_one_pace, block_times  # noqa: E402
from moefx.parallel_region import ParallelRegion  # noqa: E402
from moefx.profile import Profile  # noqa: E402

DEGREES = 16
CLOSE = 0.05  # within this of the best counts as a hit
FAR, FAR_AFTER = 0.25, 8  # degrees that are slower than the best by so much, after so many rounds, run no more
RUN_S = 0.06  # what takes less is repeated: one forward of 10 ms scatters by a fifth on cores that also carry the packets


@dataclass(frozen=True)
class Layer:
    """T tokens a rank, D model width, F expert width, E experts, K experts a token; SwiGLU, float32."""

    tokens: int
    d_model: int
    d_expert: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"T={self.tokens} D={self.d_model} F={self.d_expert} E={self.experts} K={self.top_k}"

    def region(self) -> Region:
        return Experts(self.d_model, self.d_expert, self.experts, self.top_k).region()

    def sizes(self, ranks: int) -> Sizes:
        return Sizes(self.tokens, self.top_k, self.d_model, self.d_expert, self.experts, ranks, bytes_per_element=4)


class Rank:
    """This rank's part of a layer, its inputs, and plans of it."""

    def __init__(self, layer: Layer, profile: Profile | None) -> None:
        self.layer, self.profile = layer, profile
        self.times: dict[tuple[str, str], dict[str, BlockTimes]] = {}  # by codecs
        self.group = dist.distributed_c10d._get_default_group()
        generator = torch.Generator().manual_seed(dist.get_rank())
        d, f, e = layer.d_model, layer.d_expert, layer.experts
        whole = {"gate_up": torch.empty(e, 2 * f, d), "down": torch.empty(e, d, f)}
        self.held = holding(layer.region(), whole, self.group.size(), self.group.rank())
        own = self.held.region.experts
        self.params = {
            n: (torch.randn(own, *w.shape[1:], generator=generator) * w.shape[-1] ** -0.5).requires_grad_()
            for n, w in whole.items()
        }
        self.x = torch.randn(layer.tokens, d, generator=generator).requires_grad_()
        self.gy = torch.randn(layer.tokens, d, generator=generator)
        self.generator = generator
        self.draw()

    def draw(self) -> None:
        """Experts for the tokens, and weights: new ones, as in every step of a model."""
        scores = torch.rand(self.layer.tokens, self.layer.experts, generator=self.generator)
        self.w, self.ids = scores.topk(self.layer.top_k)

    def plan(self, options: moefx.Options) -> tuple[ParallelRegion, ParallelPlans]:
        """As `optimize` has them: a degree that is "auto" is measured, unless the options say no."""
        coded = options.codec, options.backward_codec
        codecs = {phase: CODECS[name] for phase, name in zip(("forward", "backward"), coded) if name != "none"}
        wire = Wire(self.group, self.layer.experts, exchange_of(options.all_to_all), exchange_of("direct"), codecs)
        region, held, tokens = self.layer.region(), self.held.region, self.layer.tokens
        if coded not in self.times and self.profile is not None:
            self.times[coded] = block_times(region, held, self.params, tokens, wire, "torch")
        times = self.times.get(coded, {})
        plans = plans_for(region, held, self.params, tokens, wire, replace(options, kernels="torch"), self.profile, times)
        return ParallelRegion(region, held, plans, "torch", wire), plans

    def forward(self, region: ParallelRegion) -> Callable[[], Any]:
        tensors = [self.params[n] for n in region.binder.names]
        return lambda: region.run_forward(self.x.detach(), self.ids, self.w, tensors, None)

    def exchanges(self, times: int, exchange: Any) -> Callable[[], Any]:
        """All rows of the layer to their experts' ranks, so many times one after the other, and nothing else."""
        ranks, rows = self.group.size(), self.layer.tokens * self.layer.top_k
        counts = [rows // ranks] * ranks
        send = torch.randn(sum(counts), self.layer.d_model)
        return lambda: [exchange.start(send, counts, counts).wait() for _ in range(times)]

    def step(self, region: ParallelRegion) -> Callable[[], Any]:
        return lambda: region(self.x, self.ids, self.w, self.params).backward(self.gy)

    def step_beside(self, region: ParallelRegion, beside: Callable[[], Any]) -> Callable[[], Any]:
        """The same with `beside` at once with the forward, and again with the backward."""

        def run() -> None:
            y = at_once(lambda: region(self.x, self.ids, self.w, self.params), beside)
            at_once(lambda: y.backward(self.gy), beside)

        return run


_exchanges: dict[str, Any] = {}


def exchange_of(name: str) -> Any:
    """One all-to-all of each kind for the life of the process group."""
    if name not in _exchanges:
        _exchanges[name] = make_all_to_all(name, dist.distributed_c10d._get_default_group())
    return _exchanges[name]


def at_once(work: Callable[[], Any], beside: Callable[[], Any]) -> Any:
    """What `work` gives, with `beside` in another thread: neither waits for what the other makes. What fails in either is
    raised."""
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(beside)
        result = work()
        other.result()
    return result


def in_turns(rank: Rank, works: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each on the slowest rank; one run of each a round, in one order and the other, after one that does not
    count, short ones repeated. Each round has a routing of its own: of one alone, what is fastest is also a matter of how that one
    falls into chunks."""
    return [statistics.median(times) for times in all_turns(rank, works, rounds)]


def all_turns(
    rank: Rank, works: Sequence[Callable[[], Any]], rounds: int, far: float | None = None
) -> list[list[float]]:
    """The same, round by round. far: after FAR_AFTER rounds, what is slower than the fastest by more than this share has no
    more."""
    seconds: list[list[float]] = [[] for _ in works]
    repeats = [1] * len(works)
    running = list(range(len(works)))
    for turn in range(rounds + 1):
        if far is not None and turn == FAR_AFTER + 1:
            found = medians(seconds)
            running = [i for i in running if found[i] <= (1 + far) * min(found)]
        rank.draw()
        for i in running[:: -1 if turn % 2 else 1]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(repeats[i]):
                works[i]()
            took = torch.tensor((time.perf_counter() - began) / repeats[i], dtype=torch.float64)
            dist.all_reduce(took, dist.ReduceOp.MAX)  # so all ranks repeat alike
            if turn:
                seconds[i].append(float(took))
            else:
                repeats[i] = max(1, round(RUN_S / float(took)))
    return seconds


def medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """Of the seconds of each work, round by round from the first on, as if all rounds had been equally fast."""
    rounds = range(max(map(len, turns)))
    found = at_one_pace([{i: of_work[j] for i, of_work in enumerate(turns) if j < len(of_work)} for j in rounds])
    return [statistics.median(found[i]) for i in range(len(turns))]


def profile_here(scale: float) -> Profile:
    """Calibrated in this group; rank 0's for all."""
    made = [calibrate.calibrate("cpu", dist.get_world_size(), scale).dumps()]
    dist.broadcast_object_list(made)
    return Profile.loads(made[0])


# ------------------------------------------------------------------------------------------------ sweep


def layers(count: int, rate_mbit: float, seed: int) -> list[Layer]:
    """Layers whose exchange takes some ms to a tenth of a second on such a link."""
    rng, result = random.Random(seed), list[Layer]()
    while len(result) < count:
        experts = rng.choice((2, 4, 8))
        layer = Layer(
            rng.choice((256, 512, 1024, 2048)), rng.choice((64, 128, 256, 512)), rng.choice((64, 128, 256, 512, 1024)),
            experts, rng.choice((1, 2) if experts > 2 else (1,)),
        )  # fmt: skip
        exchange_s = layer.tokens * layer.top_k * layer.d_model * 4 / 2 * 8 / (1e6 * rate_mbit)
        experts_s = 6 * layer.tokens * layer.top_k * layer.d_model * layer.d_expert / 4e10
        if 2e-3 < exchange_s < 6e-2 and 2e-3 < experts_s < 8e-2 and layer not in result:
            result.append(layer)
    return result


def sweep_rank(chosen: Sequence[Layer], rounds: int, scale: float) -> tuple[str, list[dict[str, Any]]]:
    profile = profile_here(scale)
    rows = []
    for layer in chosen:
        rank = Rank(layer, profile)
        of_forward = moefx.Options(backward_degree=1)  # each phase has a degree of its own
        auto, costs = (
            rank.plan(replace(of_forward, measured=measured))[1].schedules[0].degree for measured in (True, False)
        )
        degrees = [r for r in range(1, DEGREES + 1) if r <= layer.sizes(dist.get_world_size()).capacity]
        made = [rank.plan(moefx.Options(degree=r)) for r in degrees]
        turns = all_turns(rank, [rank.forward(region) for region, _ in made], rounds, FAR)
        timelines = [plans.timelines[0] for _, plans in made]
        rows.append({
            "layer": asdict(layer), "costs": costs, "chosen": auto, "degrees": degrees, "turns": turns,
            "seconds": medians(turns),
            "predicted": [t.makespan_s if t else None for t in timelines],
            "times": {phase: asdict(t) for phase, t in rank.times["none", "none"].items()},
        })  # fmt: skip
    return str(profile), rows


def sweep(options: argparse.Namespace) -> None:
    results: dict[str, list[dict[str, Any]]] = {}
    for i, rate in enumerate(options.rates):
        chosen = layers(options.layers // len(options.rates), float(rate.removesuffix("mbit")), i)
        with netbox(2, 1, rate) as box:
            profile, rows = box.run(sweep_rank, chosen, options.rounds, options.scale, timeout_s=1800)[0]
        print(f"{rate}: {profile}\n", file=sys.stderr, flush=True)
        results[rate] = rows
    if options.out:
        options.out.write_text(json.dumps(results), encoding="utf-8")
    rows = []
    for rate, found in [*results.items(), ("all", [row for rows_ in results.values() for row in rows_])]:
        regret = {name: [_regret(row, pick) for row in found] for name, pick in PICKS.items()}
        errors = [abs(row["predicted"][d] / row["seconds"][d] - 1) for row in found for d in (_at(row, row["chosen"]),)]
        best = [row["seconds"][0] / min(row["seconds"]) for row in found]
        for name, values in regret.items():
            cells = [_share(values), f"{100 * statistics.mean(values):.1f} %", f"{100 * max(values):.1f} %"]
            apart = [_regret_apart(row, PICKS[name]) for row in found]
            cells += [_share(apart), f"{100 * statistics.mean(apart):.1f} %", f"{100 * max(apart):.1f} %"]
            more = [f"{100 * statistics.median(errors):.1f} %", f"{statistics.mean(best):.2f}"] if name == "auto" else ["", ""]
            rows.append([rate, str(len(values)), name, *cells, *more])
        values = [_regret_again(row) for row in found]
        cells = [_share(values), f"{100 * statistics.mean(values):.1f} %", f"{100 * max(values):.1f} %"]
        rows.append([rate, str(len(values)), "half the sweep", *cells, *[""] * 5])
    against = ["within 5 %", "mean regret", "worst"]
    head = ["link", "layers", "degree", *against, *(f"{name}, apart" for name in against), "error of the prediction", "best / r=1"]
    table(head, rows)


def _share(regrets: Sequence[float]) -> str:
    return f"{100 * sum(r <= CLOSE for r in regrets) / len(regrets):.0f} %"


def _at(row: dict[str, Any], degree: int) -> int:
    return row["degrees"].index(min(degree, row["degrees"][-1]))


def _regret(row: dict[str, Any], pick: Callable[[dict[str, Any]], int]) -> float:
    return row["seconds"][_at(row, pick(row))] / min(row["seconds"]) - 1


def _halves(row: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
    """The degrees' medians in one half of the rounds and in the other, both ways round. Rounds of either order are in both."""
    halves = [medians([[s for j, s in enumerate(times) if j // 2 % 2 == h] for times in row["turns"]]) for h in (0, 1)]
    return [(halves[0], halves[1]), (halves[1], halves[0])]


def _regret_again(row: dict[str, Any]) -> float:
    """Of a choice that tries every degree: the best one of one half of the rounds against the best one of the other, by the
    times of the other. So it says how well half of the rounds tell degrees apart; a choice that knows more may regret less."""
    return statistics.mean(there[here.index(min(here))] / min(there) - 1 for here, there in _halves(row))


def _regret_apart(row: dict[str, Any], pick: Callable[[dict[str, Any]], int]) -> float:
    """The regret against the degree that is best in one half of the rounds, by their times in the other half: the best of
    sixteen medians is also the luckiest, and here luck does not count. The mean of both ways round."""
    return statistics.mean(there[_at(row, pick(row))] / there[here.index(min(here))] - 1 for here, there in _halves(row))


PICKS: dict[str, Callable[[dict[str, Any]], int]] = {
    "auto": lambda row: row["chosen"], "costs alone": lambda row: row["costs"],
    "r=1": lambda row: 1, "r=2": lambda row: 2, "r=4": lambda row: 4,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ gain


def gain_rank(chosen: Sequence[Layer], rounds: int, scale: float) -> list[dict[str, Any]]:
    profile = profile_here(scale)
    apart = make_all_to_all("direct", dist.new_group())  # for messages beside those of a step
    rows = []
    for layer in chosen:
        rank = Rank(layer, profile)
        one, _ = rank.plan(moefx.Options(degree=1))
        best, plans = rank.plan(moefx.Options())
        forward, backward = best.degrees
        # What cannot overlap: the same chunks without any wire, and the exchanges of both phases, there and back, alone. What no
        # schedule can pass: in each phase both at once, as if nothing that is computed had to arrive first.
        alone = rank.plan(moefx.Options(degree=forward, backward_degree=backward))[0]
        alone.wire = replace(alone.wire, all_to_all=AtOnce())
        compute, wire = rank.step(alone), rank.exchanges(4, exchange_of("direct"))
        free = rank.step_beside(alone, rank.exchanges(2, apart))
        works = {"one": rank.step(one), "auto": rank.step(best), "compute": compute, "wire": wire, "free": free}
        works["compute forward"] = rank.forward(alone)
        rows.append({
            "layer": asdict(layer), **dict(zip(works, in_turns(rank, list(works.values()), rounds))),
            "degrees": best.degrees, "predicted": sum(t.makespan_s for t in plans.timelines if t),
        })  # fmt: skip
    return rows


def gain(options: argparse.Namespace) -> None:
    rows = []
    for rate in options.rates:
        chosen = [Layer(options.tokens, 256, f, 4, 2) for f in (64, 256, 512, 1024, 2048)]
        with netbox(2, 1, rate) as box:
            found = box.run(gain_rank, chosen, options.rounds, options.scale, timeout_s=1800)[0]
        for row in found:
            alone_s = row["compute"], row["wire"]
            saved_s = sum(alone_s) - row["auto"]
            of_phases = row["compute forward"], row["compute"] - row["compute forward"]
            could_s = sum(min(seconds, row["wire"] / 2) for seconds in of_phases)  # nothing of one phase beside the other
            rows.append([
                rate, str(Layer(**row["layer"])), *(f"{1e3 * s:.0f}" for s in (*alone_s, row["free"], row["one"], row["auto"])),
                f"{row['degrees'][0]}, {row['degrees'][1]}", f"{row['one'] / row['auto']:.2f}",
                f"{100 * saved_s / could_s:.0f} %", f"{100 * saved_s / (sum(alone_s) - row['free']):.0f} %",
                f"{100 * (row['predicted'] / row['auto'] - 1):+.0f} %",
            ])  # fmt: skip
    head = ["link", "layer", "compute ms", "wire ms", "both at once ms", "r=1 ms", "auto ms", "r forward, backward", "gain"]
    table([*head, "hidden", "of what at once hides", "prediction"], rows)


# ------------------------------------------------------------------------------------------------ ablation


def ablation_rank(layer: Layer, rounds: int, scale: float) -> dict[str, float]:
    rank = Rank(layer, profile_here(scale))
    coded = {"codec": "int8", "backward_codec": "int8"}
    steps: dict[str, dict[str, Any]] = {
        "naive (r=1, direct)": {"degree": 1},
        "+ codec int8": {"degree": 1, **coded},
        "+ pipe": {"degree": 1, "all_to_all": "pipe", **coded},
        "+ schedule (auto)": {"all_to_all": "pipe", **coded},
        "schedule alone": {},
        "schedule alone, r=2 fifo": {"degree": 2, "policy": "fifo"},
    }
    works = [rank.step(rank.plan(moefx.Options(**o))[0]) for o in steps.values()]
    return dict(zip(steps, in_turns(rank, works, rounds)))


def ablation(options: argparse.Namespace) -> None:
    rows = []
    for rate in options.rates:
        with netbox(2, 2, rate) as box:
            found = box.run(ablation_rank, Layer(1024, 256, 256, 4, 2), options.rounds, options.scale, timeout_s=1800)[0]
        naive = next(iter(found.values()))
        rows += [[rate, name, f"{1e3 * s:.0f}", f"{naive / s:.2f}"] for name, s in found.items()]
    table(["link", "step", "ms", "naive / this"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    for run, rates, rounds in (
        (sweep, ["100mbit", "200mbit", "400mbit", "800mbit"], 3), (gain, ["200mbit", "400mbit"], 5), (ablation, ["200mbit"], 5),
    ):  # fmt: skip
        sub = commands.add_parser(run.__name__)
        sub.set_defaults(run=run)
        sub.add_argument("--rates", nargs="+", default=rates, help="out of each host, as tc writes it")
        sub.add_argument("--rounds", type=int, default=rounds)
        sub.add_argument("--scale", type=float, default=0.5, help="of the sizes that are calibrated")
        if run is gain:
            sub.add_argument("--tokens", type=int, default=4096, help="of each rank")
        if run is sweep:
            sub.add_argument("--layers", type=int, default=104)
            sub.add_argument("--out", type=Path, help="raw measurements, JSON")
    if reason := why_not():
        sys.exit(reason)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
