"""The scheduler against its yardsticks: every number that docs/scheduler.md gives, in some minutes on one core.

    python benchmarks/scheduler.py               # everything
    python benchmarks/scheduler.py --quick       # a tenth of the cases

1. PipeMoE's regression table, to all printed digits, from the closed form and from the simulator.
2. r* of a grid of configurations per P against enumeration with the simulator.
3. auto, exact, schemoe and fifo against all non-preemptive orders, r <= 4 (tests/brute_orders.py says why all).
4. FSMoE's identity with t_ag = t_rs, and how wrong it is without.
5. Time to decide a layer on up to 4,096 ranks, and against r.
Exit code 1 when a bar is missed. No GPU, no network.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import brute_orders  # noqa: E402
from layers import LAYOUTS, pipeline, random_layer  # noqa: E402
from moefx.passes.partition import expert_parallel  # noqa: E402
from moefx.passes.schedule import fifo, schedule, theorem_gaps  # noqa: E402
from test_closed_forms import REGRESSION, fsmoe_cases, fsmoe_graph, pipemoe_model  # noqa: E402

import moefx  # noqa: E402, F401  # makes moefx.passes importable in a checkout
from moefx.closed_forms import PipeMoE  # noqa: E402
from moefx.errors import PlanError  # noqa: E402
from moefx.profile import from_links  # noqa: E402
from moefx.simulate import lower_bound_s, simulate  # noqa: E402
from moefx.whatif import Cluster, Layer, Scenario, evaluate  # noqa: E402

FAILED: list[str] = []


def bar(holds: bool, text: str) -> None:
    print(f"  {'ok    ' if holds else 'MISSED'} {text}")
    if not holds:
        FAILED.append(text)


def progress(items: Sequence, what: str) -> Sequence:
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, disable=None, leave=False)


def simulated(model: PipeMoE, r: int) -> float:
    a, e = model.alpha_a_s + model.send_s / r, model.alpha_e_s + model.work_s / r
    graph = pipeline(r, ("A1", "link", a), ("E", "compute", e), ("A2", "link", a))
    return simulate(graph, fifo(graph)).makespan_s


def regression() -> None:
    print("1. PipeMoE's regression table (ms)")
    print("  config                  P  t_d(1)  t_e(1)  r*   T(r*)     T(1)     T(2)    T(4)")
    for (config, ranks), printed in REGRESSION.items():
        model = pipemoe_model(config, ranks)
        for time_of in (model.seconds, lambda r, model=model: simulated(model, r)):
            best = model.best_degree(config[0] * config[1])
            values = [model.alpha_a_s + model.send_s, model.alpha_e_s + model.work_s]
            values += [time_of(r) for r in (best, 1, 2, 4)]
            text = [f"{1e3 * v:.2f}" for v in values]
            row = " ".join([*text[:2], str(best), *text[2:]])
            if row != printed:
                FAILED.append(f"regression {config} P={ranks}: {row} is not {printed}")
        cells = row.split()
        name = ",".join(map(str, config))
        rest = " ".join(f"{c:>8}" for c in cells[3:])
        print(f"  {name:22} {ranks:3} {cells[0]:>7} {cells[1]:>7} {cells[2]:>3} {rest}")
    bar(not FAILED, "closed form and simulator give all printed digits")


def degrees(quick: bool) -> None:
    """B, L, M, H, k; chunks up to 64: r* lies below in every one of them, or at the end."""
    print("2. r* against enumeration with the simulator, r = 1 .. 64")
    samples, lengths, widths = (2, 4, 8), (256, 512, 1024, 2048), (512, 1024, 2048, 4096, 8192)
    grid = list(itertools.product(samples, lengths, widths, (1024, 2048, 4096, 8192), (1, 2)))
    grid = grid[:: 10 if quick else 1]
    for ranks in (16, 32, 64):
        wrong, largest, gains = 0, 0, []
        for config in progress(grid, f"P={ranks}"):
            model = pipemoe_model(config, ranks)
            capacity = min(64, config[0] * config[1])
            times = [simulated(model, r) for r in range(1, capacity + 1)]
            best = next(r for r, t in enumerate(times, 1) if t <= min(times) * (1 + 1e-12))
            chosen = model.best_degree(capacity)
            wrong += chosen != best
            largest = max(largest, best)
            gains.append(times[0] / times[best - 1])
        mean = statistics.mean(gains)
        gain = f"r* up to {largest}, mean gain over r=1 {mean:.2f}x"
        bar(wrong == 0, f"P={ranks}: {len(grid)} configurations, {wrong} differ; {gain}")


def orders(quick: bool) -> None:
    count = 200 if quick else 2000
    print(
        f"3. {count} random layers of {len(LAYOUTS)} layouts, both phases, r = 1 .. 4, one in ten with unequal chunks"
    )
    rng = random.Random(0)
    gaps: dict[str, list[float]] = {name: [] for name in ("exact", "auto", "greedy", "fifo", "serial")}
    spent = dict.fromkeys([*gaps, "all orders"], 0.0)
    for _ in progress(range(count), "layers"):
        uneven = rng.random() < 0.1
        graph = random_layer(rng, degree=rng.randint(1, 2) if uneven else None, uneven=uneven)
        began = time.perf_counter()
        best = brute_orders.optimum(graph, equal_chunks=not uneven)
        spent["all orders"] += time.perf_counter() - began
        for policy, found in gaps.items():
            began = time.perf_counter()
            order = schedule(graph, policy)
            spent[policy] += time.perf_counter() - began
            found.append(simulate(graph, order).makespan_s / best - 1 if best else 0.0)
    for policy, found in gaps.items():
        above = sum(g > 0.01 for g in found)
        print(
            f"  {policy:7} largest gap {100 * max(found):8.4f} %, mean {100 * statistics.mean(found):7.4f} %, "
            f"above 1 %: {above:4}, {1e3 * spent[policy] / count:7.2f} ms a layer"
        )
    print(f"  all orders: {1e3 * spent['all orders'] / count:.1f} ms a layer")
    bar(max(gaps["exact"]) < 1e-12, "exact: no gap")
    bar(max(gaps["auto"]) <= 0.01, "auto: within 1 %")
    theorem(rng, 100 if quick else 1000)
    larger(rng, 10 if quick else 40)


def larger(rng: random.Random, count: int) -> None:
    """Hard layers of r = 6 and 8, where `exact` itself is the yardstick: how often it proves, how far auto is off."""
    for r in (6, 8):
        gaps, longest, unproved = [0.0], 0.0, 0
        for _ in progress(range(count), f"r={r}"):
            while True:  # a layer that no lower bound settles
                graph = random_layer(rng, rng.choice(("codec", "pipe_a2a", "fsmoe_codec", "shared")), r)
                quick_s = simulate(graph, schedule(graph, "auto")).makespan_s
                if quick_s > lower_bound_s(graph) * (1 + 1e-9):
                    break
            began = time.perf_counter()
            try:
                best = simulate(graph, schedule(graph, "exact")).makespan_s
            except PlanError:
                unproved += 1
            else:
                gaps.append(quick_s / best - 1)
            longest = max(longest, time.perf_counter() - began)
        text = f"exact proves {count - unproved} of {count} hard layers, each in at most {longest:.1f} s"
        bar(max(gaps) <= 0.01, f"r={r}: {text}; auto at most {100 * max(gaps):.3f} % longer where proved")


def theorem(rng: random.Random, count: int) -> None:
    kinds = ("dispatch_compress", "dispatch_all_to_all", "dispatch_decompress", "experts")
    kinds += ("combine_compress", "combine_all_to_all", "combine_decompress")
    within, without = 0.0, 0.0
    for i in progress(range(2 * count), "theorem"):
        values = [rng.choice((rng.uniform(0, 1), rng.uniform(1, 5))) for _ in kinds]
        if i % 2 == 0:
            values[4:] = values[:3]
        seconds = dict(zip(kinds, values))
        graph = expert_parallel(rng.randint(2, 4), "forward", LAYOUTS["schemoe"]).timed(lambda t: seconds[t.kind])  # noqa: B023
        gap = simulate(graph, schedule(graph, "schemoe")).makespan_s / brute_orders.optimum(graph, True) - 1
        if theorem_gaps(graph):
            without = max(without, gap)
        else:
            within = max(within, gap)
    bar(within < 1e-12, f"schemoe: no gap in {count} layers where the theorem's assumptions hold")
    bar(without > 0.05, f"schemoe: up to {100 * without:.1f} % longer in {count} layers where they do not")


def identity(quick: bool) -> None:
    count = 1000 if quick else 10_000
    print(f"4. FSMoE's four-way maximum, {count} cases each")
    worst = max(
        abs(model.published_seconds(r) / simulate(*fsmoe_graph(model, r)).makespan_s - 1)
        for model, r in progress(fsmoe_cases(count, True, 10), "t_ag = t_rs")
    )
    bar(worst < 1e-12, f"t_ag = t_rs: largest difference from the simulator {worst:.1e}")
    errors, detected, general = [], True, 0.0
    for model, r in progress(fsmoe_cases(count, False, 11), "t_ag != t_rs"):
        truth = simulate(*fsmoe_graph(model, r)).makespan_s
        errors.append(abs(model.four_way_maximum(r) / truth - 1))
        general = max(general, abs(model.seconds(r) / truth - 1))
        detected &= not model.holds()
    wrong = sum(e > 1e-9 for e in errors)
    bar(detected, f"t_ag != t_rs: {wrong} of {count} wrong, by up to {100 * max(errors):.0f} %; all are refused")
    bar(general < 1e-12, f"the general form: largest difference from the simulator {general:.1e}")


def speed() -> None:
    print("5. time to decide")
    sheet = from_links("a cluster", 400, 2000, 25, 200, 10, 40, 1)
    worst = 0.0
    for name, layer in (
        ("mixtral", Layer(4096, 14336, 8, 2)),
        ("qwen3-30b", Layer(2048, 768, 128, 8)),
        ("deepseek-v3", Layer(7168, 2048, 256, 8, 3, 2048)),
    ):
        for ranks, node, tokens, share in itertools.product((64, 4096), (8,), (4096, 65536), (1.0, 0.25)):
            cluster = Cluster(sheet, ranks, node, wire_share=share)
            outcome = evaluate(Scenario(layer, cluster, tokens, gradient_bytes=1e8))
            worst = max(worst, outcome.decided_in_s)
            forward, backward = (choice.degree for choice in outcome.choices.values())
            print(
                f"  {name:12} P={ranks:<5} tokens={tokens:<6} wire share {share:<5} r = {forward:2} / {backward:2}  "
                f"{1e3 * outcome.layer_s:9.3f} ms a layer, {outcome.gain(1):.2f}x over r=1, {outcome.gain(2):.2f}x over r=2, "
                f"decided in {outcome.decided_in_s:.3f} s"
            )
    bar(worst < 1.0, f"forward and backward of a distinct layer in at most {worst:.2f} s (bar: 1 s)")

    hard = random.Random(3)
    kinds = sorted({t.kind for t in expert_parallel(1, "forward", LAYOUTS["fsmoe_codec"]).tasks})
    large = {k: "all" in k or k == "experts" or "reduce" in k for k in kinds}
    times = {k: hard.uniform(0.8, 1.2) if large[k] else hard.uniform(0.05, 0.4) for k in kinds}
    print("  one order of auto against r (three resources, nine tasks a chunk, a case that needs the search):")
    rows = []
    for r in (8, 16, 32, 64, 128):
        graph = expert_parallel(r, "forward", LAYOUTS["fsmoe_codec"]).timed(lambda t: times[t.kind])
        took = _fastest(lambda graph=graph: schedule(graph, "auto"))
        order = fifo(graph)
        simulating = _fastest(lambda graph=graph, order=order: simulate(graph, order))
        rows.append(took / r)
        each, simulated_each = 1e3 * took / r, 1e6 * simulating / r
        print(
            f"    r={r:4}: auto {1e3 * took:8.1f} ms, {each:6.2f} ms a chunk; simulate {simulated_each:6.1f} us a chunk"
        )
    bar(
        max(rows[1:]) < 4 * min(rows[1:]),
        f"auto takes {1e3 * min(rows[1:]):.1f} to {1e3 * max(rows[1:]):.1f} ms a chunk",
    )


def _fastest(work: Callable[[], object]) -> float:
    runs = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        runs.append(time.perf_counter() - began)
    return min(runs)


def main() -> int:
    parser = argparse.ArgumentParser(description="The scheduler's numbers.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the cases")
    quick = parser.parse_args().quick
    began = time.perf_counter()
    regression()
    degrees(quick)
    orders(quick)
    identity(quick)
    speed()
    print(
        f"{time.perf_counter() - began:.0f} s; {'all bars hold' if not FAILED else f'{len(FAILED)} missed: {FAILED}'}"
    )
    return bool(FAILED)


if __name__ == "__main__":
    sys.exit(main())
