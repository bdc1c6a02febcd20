"""closed_forms: the published formulas follow from the corners of a fifo timeline, and equal the simulator."""

from __future__ import annotations

import random

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from layers import pipeline
from moefx.passes.schedule import fifo, schemoe

from moefx import closed_forms as cf
from moefx.errors import InputError
from moefx.ir import NO_CHUNK, Schedule, Task, TaskGraph
from moefx.simulate import simulate

# systems.md: (B, L, M, H, k), P -> t_d(1), t_e(1), r*, T(r*), T(1), T(2), T(4) in ms
REGRESSION = {
    ((8, 1024, 4096, 4096, 2), 16): "80.03 82.32 3 162.33 242.38 163.22 163.47",
    ((8, 1024, 4096, 4096, 2), 64): "103.86 82.32 2 209.29 290.05 209.29 212.42",
    ((8, 2048, 8192, 8192, 2), 16): "318.40 656.49 43 685.01 1293.28 975.76 817.44",
    ((8, 2048, 8192, 8192, 2), 32): "381.39 656.49 8 765.70 1419.26 1038.38 848.40",
    ((2, 512, 512, 512, 1), 64): "1.59 0.38 1 3.56 3.56 4.74 7.87",
}


def pipemoe_model(config: tuple[int, ...], ranks: int) -> cf.PipeMoE:
    from moefx.profile import preset

    samples, length, width, hidden, top_k = config
    rows = top_k * samples * length
    link, gemm = preset(f"pipemoe-{ranks}").line("all_to_all"), preset(f"pipemoe-{ranks}").line("gemm")
    work_s = gemm.beta_s_per_unit * 2 * 2 * rows * width * hidden  # two products, 2 FLOP a multiply-accumulate
    return cf.PipeMoE(link.alpha_s, link.beta_s_per_unit * 4 * rows * width, 2 * gemm.alpha_s, work_s)


@pytest.mark.parametrize(("config", "ranks"), REGRESSION)
def test_pipemoe_regression(config, ranks):
    model = pipemoe_model(config, ranks)
    r = model.best_degree(config[0] * config[1])
    printed = [model.alpha_a_s + model.send_s, model.alpha_e_s + model.work_s]
    printed += [model.seconds(degree) for degree in (r, 1, 2, 4)]
    times = [f"{1e3 * s:.2f}" for s in printed]
    assert " ".join([*times[:2], str(r), *times[2:]]) == REGRESSION[config, ranks]


def test_pipemoe_symbols():
    assert str(cf.pipemoe_symbolic()) == (
        "Max(2*alpha_a*r + 2*beta_a*n_d, 2*alpha_a + alpha_e*r + 2*beta_a*n_d/r + beta_e*n_e)"
    )
    assert sympy.simplify(cf.pipemoe_free_minimum() - sympy.sqrt(2 * cf.beta_a * cf.n_d / cf.alpha_e)) == 0


def test_pipemoe_terms_follow():
    d = sympy.Symbol("d", nonnegative=True)
    orders = [{cf.e: cf.a + d}, {cf.a: cf.e + d}]
    terms = cf.fifo_terms(cf.pipemoe_stages())
    assert set(cf.pipemoe_terms()) <= set(terms)
    for term in terms:
        assert cf.never_above(term, cf.pipemoe_terms(), orders)
    assert not cf.never_above(3 * cf.r * cf.a, cf.pipemoe_terms(), orders)
    assert {t.subs(cf.r, 1) for t in terms} <= {2 * cf.a, 2 * cf.a + cf.e}  # r = 1


def test_fsmoe_four_terms_follow_where_gather_and_scatter_are_equal():
    """In each order of the three times one of the four is at least the term; r = 1 apart."""
    x, d, d2 = cf.ag, *sympy.symbols("d d2", nonnegative=True)
    four = [t.subs(cf.rs, x) for t in cf.fsmoe_terms()]
    a, e = cf.a, cf.e
    orders = []
    for low, middle, high in ((a, x, e), (a, e, x), (x, a, e), (x, e, a), (e, a, x), (e, x, a)):
        orders.append({middle: low + d, high: low + d + d2})
    for term in (t.subs(cf.rs, x) for t in cf.fifo_terms(cf.fsmoe_stages())):
        assert cf.never_above(term, four, orders), term
    for term in cf.fifo_terms(cf.fsmoe_stages(), 1):  # one chunk
        assert cf.never_above(term.subs(cf.rs, x), [t.subs(cf.r, 1) for t in four], [{}]), term


def fsmoe_graph(model: cf.FSMoE, degree: int) -> tuple[TaskGraph, Schedule]:
    graph = pipeline(
        degree,
        ("A1", "inter", model.all_to_all_s),
        ("AG", "intra", model.all_gather_s),
        ("E", "compute", model.experts_s),
        ("RS", "intra", model.reduce_scatter_s),
        ("A2", "inter", model.all_to_all_s),
    )
    slices = Task("slices", "grad_all_reduce", NO_CHUNK, "inter", (), model.all_reduce_s)
    graph = TaskGraph("forward", degree, (*graph.tasks, slices))
    lanes = dict(fifo(graph).lanes)
    inter = [task for task in lanes["inter"] if task != "slices"]
    lanes["inter"] = (*inter[:degree], "slices", *inter[degree:])
    return graph, Schedule("forward", degree, tuple(lanes.items()))


def fsmoe_cases(count: int, equal: bool, seed: int = 0) -> list[tuple[cf.FSMoE, int]]:
    rng = random.Random(seed)
    cases = []
    for _ in range(count):
        a, ag, e, rs, g = (rng.choice((rng.uniform(0.1, 1), rng.uniform(1, 10))) for _ in range(5))
        gar = rng.choice((0.0, g))
        cases.append((cf.FSMoE(a, ag, e, ag if equal else rs, gar), rng.randint(1, 12)))
    return cases


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fsmoe_identity(count):
    for model, r in fsmoe_cases(count, equal=True):
        simulated = simulate(*fsmoe_graph(model, r)).makespan_s
        assert model.published_seconds(r) == pytest.approx(simulated, rel=1e-12)
        assert model.seconds(r) == pytest.approx(simulated, rel=1e-12)


def test_fsmoe_formula_is_refused_where_it_is_wrong():
    worst = 0.0
    for model, r in fsmoe_cases(500, equal=False, seed=1):
        simulated = simulate(*fsmoe_graph(model, r)).makespan_s
        assert model.seconds(r) == pytest.approx(simulated, rel=1e-12)
        error = abs(model.four_way_maximum(r) / simulated - 1)
        worst = max(worst, error)
        assert not model.holds()
        with pytest.raises(InputError, match="needs t_ag = t_rs"):
            model.published_seconds(r)
    assert worst > 0.2, "the cases show that the formula can be far off"


@given(st.integers(1, 12), st.lists(st.floats(0, 5), min_size=7, max_size=7))
def test_theorems_order_in_closed_form(r, seconds):
    """C1 A1 (D1 E C2) A2 D2: the experts with their codecs are one stage."""
    kinds = ("dispatch_compress", "dispatch_all_to_all", "dispatch_decompress", "experts", "combine_compress")
    kinds += ("combine_all_to_all", "combine_decompress")
    resources = ["link" if kind.endswith("all_to_all") else "compute" for kind in kinds]
    graph = pipeline(r, *zip(kinds, resources, seconds))
    c1, a1, d1, e, c2, a2, d2 = seconds
    stages = [cf.Stage("compute", c1), cf.Stage("link", a1), cf.Stage("compute", d1 + e + c2), cf.Stage("link", a2)]
    closed = cf.fifo_time([*stages, cf.Stage("compute", d2)], r)
    assert simulate(graph, schemoe(graph)).makespan_s == pytest.approx(closed, rel=1e-12, abs=1e-12)


@given(st.floats(0, 2), st.floats(0, 50), st.floats(0, 2), st.floats(0, 50), st.integers(1, 40))
def test_pipemoe_equals_the_simulator_and_its_degree_the_enumeration(alpha_a, send, alpha_e, work, capacity):
    model = cf.PipeMoE(alpha_a, send, alpha_e, work)
    times = []
    for r in range(1, capacity + 1):
        a, e = alpha_a + send / r, alpha_e + work / r
        graph = pipeline(r, ("A1", "link", a), ("E", "compute", e), ("A2", "link", a))
        times.append(simulate(graph, fifo(graph)).makespan_s)
        assert model.seconds(r) == pytest.approx(times[-1], rel=1e-12, abs=1e-12)
    best = model.best_degree(capacity)
    assert 1 <= best <= capacity
    assert model.seconds(best) <= min(times) * (1 + 1e-11)


def test_fifo_time_equals_the_terms():
    rng = random.Random(0)
    for _ in range(20):
        stages = [cf.Stage(rng.choice("ab"), rng.randint(1, 9)) for _ in range(rng.randint(1, 6))]
        r = rng.randint(1, 9)
        assert cf.fifo_time(stages, r) == float(max(cf.fifo_terms(stages, r)))


@pytest.mark.parametrize("bad", [{"alpha_a_s": -1.0}, {"send_s": float("nan")}, {"work_s": float("inf")}])
def test_bad_models(bad):
    good = {"alpha_a_s": 1.0, "send_s": 1.0, "alpha_e_s": 1.0, "work_s": 1.0}
    with pytest.raises(InputError, match=f"PipeMoE.{next(iter(bad))}"):
        cf.PipeMoE(**(good | bad))
    with pytest.raises(InputError, match="capacity"):
        cf.PipeMoE(**good).best_degree(0)
    with pytest.raises(InputError, match="at least 1"):
        cf.PipeMoE(**good).seconds(0)
    with pytest.raises(InputError, match="at least one stage"):
        cf.fifo_time([], 1)
