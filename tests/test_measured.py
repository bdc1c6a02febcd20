"""measured: which degrees run, which of them wins, and that all ranks take the same."""

from __future__ import annotations

import copy
import random
import statistics

import pytest
import regions
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from moefx.codegen.all_to_all import make_all_to_all
from moefx.codegen.codecs import Int8
from moefx.passes.simplify import simplify
from ranks import run_ranks
from test_parallel import EXACT, _profile_file, batch, differences, language_model

import moefx
from moefx.degrees import candidates, fastest, matrices
from moefx.errors import InputError
from moefx.measured import AtOnce, Runs, _left, _random_experts, at_one_pace


def test_the_degrees_around_the_chosen_one():
    assert candidates(1, 64) == [1, 2, 3, 4, 8]
    assert candidates(4, 64) == [1, 2, 3, 4, 5, 8]
    assert candidates(6, 64) == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert candidates(3, 3) == [1, 2, 3]
    assert candidates(1, 0) == [1]


def test_gate_and_up_count_twice_in_one_product_or_two():
    by_style = {style: matrices(simplify(regions.region(style))) for style in regions.STYLES}
    gated = {"swiglu_fused", "narrow", "swiglu_separate", "interleaved_bias", "listed", "narrow_listed", "read_twice"}
    assert {style for style, count in by_style.items() if count == 3} == gated
    assert matrices(regions.region("swiglu_fused")) == 3, "also before its leaves are joined"


def test_a_chunk_more_has_to_be_worth_it():
    """With times that are certain, and then with some that are not: what the costs decided on stays while in doubt."""
    certain = {r: Runs(s) for r, s in ((1, 1.0), (2, 0.995), (4, 2.0))}
    assert [fastest(certain, r) for r in (1, 2, 4)] == [1, 2, 1]
    assert fastest({r: Runs(s) for r, s in ((1, 1.0), (2, 0.5), (4, 0.497))}, 1) == 2
    assert fastest({(1, 1): Runs(1.0), (2, 1): Runs(0.9), (2, 2): Runs(0.9)}, (1, 1)) == (2, 1)
    doubtful = {r: Runs(s, 0.05) for r, s in ((1, 1.0), (2, 0.9), (4, 0.5), (8, 0.57))}
    assert [fastest(doubtful, r) for r in (1, 2, 4, 8)] == [4, 4, 4, 8]
    scattered = {2: Runs(1.0, 0.3), 6: Runs(0.5, 0.01), 32: Runs(0.9, 0.01)}
    assert fastest(scattered, 32) == 6  # doubt speaks for what was decided on alone


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=15), st.floats(0, 5))
def test_runs(seconds: list[float], later: float) -> None:
    """All runs later by as much: the same scatter; runs beside each other that are equal: none."""
    runs, moved = Runs.of(seconds), Runs.of([s + later for s in seconds])
    assert moved.median_s == pytest.approx(runs.median_s + later)
    assert moved.error_s == pytest.approx(runs.error_s, abs=1e-9)
    assert runs.no_slower(moved) and runs.close_to(moved) and runs.error_s >= 0
    assert Runs.of([seconds[0]] * 5) == Runs(seconds[0], 0.0)


def test_those_that_may_be_the_fastest_have_more_rounds():
    """In either phase; and what is slower by a hair, however certain that seems."""
    runs = {
        "forward": {1: Runs(1.0), 2: Runs(1.015), 3: Runs(1.3, 0.2), 4: Runs(1.3, 0.1), 8: Runs(1.3, 0.1), 9: Runs(0.5)},
        "backward": {1: Runs(3.0), 2: Runs(2.0), 3: Runs(2.1), 4: Runs(2.1), 8: Runs(1.9), 9: Runs(0.5)},
    }
    names = [1, 2, 3, 4, 8]  # what has left does not come back
    assert _left(runs, names, ["forward"]) == [1, 2, 3]
    assert _left(runs, names, ["backward"]) == [8]
    assert _left(runs, names, ["forward", "backward"]) == [1, 2, 3, 8]


@given(
    st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
    st.lists(st.floats(0.1, 10), min_size=1, max_size=30),
    st.integers(2, 6), st.integers(1, 30),
)  # fmt: skip
def test_the_pace_of_rounds_is_taken_out(seconds: list[float], paces: list[float], left: int, rounds: int) -> None:
    """Where it is all that differs, no scatter is left, and the names keep their ratios, whoever leaves after some rounds."""
    ran = [{i: s * pace for i, s in enumerate(seconds[: left if j > rounds else None])} for j, pace in enumerate(paces)]
    found = at_one_pace(ran)
    assert [len(found[i]) for i in found] == [sum(i in times for times in ran) for i in found]
    for i, of_name in found.items():
        assert of_name == pytest.approx([of_name[0]] * len(of_name))
        assert of_name[0] / found[0][0] == pytest.approx(seconds[i] / seconds[0])


def test_runs_at_one_pace_say_how_uncertain_they_are() -> None:
    """The pace of a round is the mean of what runs in it, and so hides a part of the scatter, which the error has again."""
    rng = random.Random(0)
    for beside in (1, 2, 5):
        errors, far = [], []
        for _ in range(200):
            paces = [rng.uniform(0.5, 2.0) for _ in range(25)]
            ran = [{i: pace * rng.gauss(1.0, 0.05) for i in range(beside + 1)} for pace in paces]
            first, second = (Runs.of(of_name, beside) for of_name in list(at_one_pace(ran).values())[:2])
            far.append(first.median_s / second.median_s - 1)
            errors.append((first.error_s**2 + second.error_s**2) ** 0.5 / first.median_s)
        assert 0.7 < statistics.median(errors) / statistics.stdev(far) < 1.3, beside
    alone = at_one_pace([{1: s} for s in (1.0, 2.0, 4.0)])
    assert alone == {1: [1.0, 2.0, 4.0]}  # with nothing beside it, nobody knows what the pace was


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(64, 8, 2), (1, 4, 4), (5, 2, 3)])
def test_tokens_choose_different_experts_at_random(tokens: int, experts: int, top_k: int) -> None:
    ids = _random_experts(tokens, experts, top_k, torch.Generator().manual_seed(0))
    assert ids.shape == (tokens, top_k)
    assert 0 <= ids.min() <= ids.max() < experts
    assert all(len(row.unique()) == min(experts, top_k) for row in ids)
    assert tokens < 64 or len(ids.flatten().bincount().unique()) > 1  # not evenly


def test_the_option_is_a_switch():
    with pytest.raises(InputError, match="measured"):
        moefx.Options(measured="yes")  # type: ignore[arg-type]


def optimised(options: dict, experts: int) -> tuple[list[str], tuple[int, int], dict[str, float]]:
    """The notes, the degrees, and the errors against the original."""
    original = language_model("mixtral", layers=1, experts=experts)
    model = copy.deepcopy(original)
    given = moefx.Options(profile=_profile_file(), **options)
    moefx.optimize(model, (batch(dist.get_rank()),), given, mesh=dist.group.WORLD)
    found = moefx.explain(model).found[0]
    degrees = tuple(int(line.split("r=")[1].split()[0]) for line in found.schedule.splitlines() if " r=" in line)
    errors = differences(original, model, batch(dist.get_rank() + 7, 12))
    return [note for note in found.notes if "measured" in note], degrees, errors


def times_of(note: str) -> dict[str, float]:
    return {part.split()[0]: float(part.split()[1]) for part in note.split(": ")[1].split(", ")}


@pytest.mark.parametrize(("options", "experts"), [({}, 8), ({}, 4), ({"capacity": 64}, 8)])
def test_all_ranks_take_the_degrees_that_were_fastest(options: dict, experts: int) -> None:
    """A rank without experts takes part; places of a capacity are measured as rows that are counted."""
    results = run_ranks(3, optimised, options, experts)
    assert all(result[:2] == results[0][:2] for result in results)
    notes, degrees, _ = results[0]
    times = {what: times_of(note) for what, note in ((note.split()[0], note) for note in notes)}
    assert list(times)[:2] == ["forward", "backward"]
    assert min(map(len, times.values())) >= 2
    if "step" in times:  # the favourites of the phases and of the costs differ: they were measured together
        assert f"r={degrees[0]}/{degrees[1]}" in times["step"]
    else:
        assert all(f"r={degree}" in times[what] for what, degree in zip(("forward", "backward"), degrees))
    assert max(max(errors.values()) for *_, errors in results) < EXACT


def encodings(options: dict) -> int:
    """How often int8 encodes rows while a model is optimised: its equivalence is checked without codecs."""
    calls, encode = [], Int8.encode
    Int8.encode = lambda self, rows: (calls.append(rows), encode(self, rows))[1]  # type: ignore[method-assign]
    given = moefx.Options(profile=_profile_file(), measured=False, **options)
    moefx.optimize(language_model("mixtral", layers=1, experts=4), (batch(dist.get_rank()),), given, mesh=dist.group.WORLD)
    return len(calls)


def test_codecs_are_part_of_what_a_layer_computes() -> None:
    assert min(run_ranks(2, encodings, {"codec": "int8"})) > 0
    assert max(run_ranks(2, encodings, {})) == 0


def exchanges(options: dict) -> list[tuple[float, float]]:
    """By phase, an exchange of next to nothing and of all rows, as `optimize` measured them."""
    found, measured = [], moefx.degrees.block_times
    moefx.degrees.block_times = lambda *args: (found.append(measured(*args)), found[-1])[1]  # type: ignore[assignment]
    given = moefx.Options(profile=_profile_file(), measured=False, **options)
    moefx.optimize(language_model("mixtral", layers=1, experts=4), (batch(dist.get_rank(), 64),), given, mesh=dist.group.WORLD)
    return [(times.exchange_s, times.whole_exchange_s) for of_phase in found for times in of_phase.values()]


def test_an_exchange_of_all_rows_is_measured_too() -> None:
    """But with a capacity, whose places travel."""
    for options in ({}, {"codec": "int8"}):
        for of_rank in run_ranks(2, exchanges, options):
            assert len(of_rank) == 2
            assert all(0 < least and 0 < whole for least, whole in of_rank)
    assert [whole for _, whole in run_ranks(2, exchanges, {"capacity": 64})[0]] == [0.0, 0.0]


def test_a_given_degree_stays() -> None:
    (notes, degrees, errors), *_ = run_ranks(2, optimised, {"degree": 3}, 4)
    assert (notes, degrees) == ([], (3, 3))
    notes, degrees, _ = run_ranks(2, optimised, {"degree": 3, "backward_degree": "auto"}, 4)[0]
    assert degrees[0] == 3
    assert [note.split()[0] for note in notes] == ["backward"]
    notes, degrees, _ = run_ranks(2, optimised, {"backward_degree": 3}, 4)[0]
    assert degrees[1] == 3
    assert [note.split()[0] for note in notes] == ["forward"]
    assert max(errors.values()) < EXACT
    assert not run_ranks(2, optimised, {"measured": False}, 4)[0][0]


def at_once() -> list[bool]:
    """The rows that leave are those that arrive, or as many of them as arrive, while one of each rank really travels. Where more
    arrive, they lie in memory that stays."""
    exchange, travelled = make_all_to_all("direct", dist.group.WORLD), []
    start = exchange.start
    exchange.start = lambda send, *rows: (travelled.append((len(send), *rows)), start(send, *rows))[1]  # type: ignore[method-assign]
    send = torch.randn(5, 3)
    equal, at_once = [], AtOnce(exchange, 2)
    for coming in ([2, 3], [1, 1], [4, 4]):
        rows = at_once.start(send, [2, 3], coming).wait()
        equal.append(len(rows) == sum(coming) and torch.equal(rows[:5], send[: sum(coming)]) and not rows[5:].any())
    again = at_once.start(send, [2, 3], [4, 2]).wait()
    equal.append(len(again) == 6 and again.data_ptr() == rows.data_ptr())
    return [*equal, travelled == [(2, [1, 1], [1, 1], [[1, 1], [1, 1]])] * 4]


def test_an_exchange_that_takes_no_time() -> None:
    assert run_ranks(2, at_once) == [[True] * 5] * 2
