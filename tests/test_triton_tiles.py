"""Tiles of grouped products: the rule, what was measured, what is made ready, and how candidates are compared."""

from __future__ import annotations

from triton_here import needs_triton  # first: it chooses Triton's interpreter

# isort: split

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moefx.codegen import triton_grouped, triton_launch, triton_route, triton_workspace
from moefx.codegen import triton_tiles as tiles
from moefx.codegen.triton_tiles import Choice, Measured, Tile

from moefx import calibrate_tiles
from moefx.errors import InputError

pytestmark = needs_triton

OWN = Tile(128, 128, 64, 8, 3, group=2, programs=1)
GPU = torch.device("cuda", 0)
sizes = st.integers(1, 1 << 16)


@pytest.fixture(autouse=True)
def _nothing_stays():
    tiles.forget()
    yield
    tiles.forget()


def measured(*choices: Choice) -> Measured:
    return Measured("a GPU", choices)


def known(monkeypatch: pytest.MonkeyPatch, found: Measured | None) -> None:
    tiles.forget()
    monkeypatch.setattr(tiles, "measured_on", lambda device: found)
    monkeypatch.setattr(tiles, "why_not", lambda device: "")  # no warp-specialised kernels


@given(st.sampled_from(list(tiles.KINDS)), sizes, sizes, sizes)
def test_candidates_begin_with_the_rule(kind: str, rows: int, inner: int, columns: int) -> None:
    compared = tiles.candidates(kind, rows, inner, columns)
    assert compared[0] == tiles.rule(kind, rows, inner, columns)
    assert len(set(compared)) == len(compared)
    assert all(tile.shared_bytes(2) <= 232448 for tile in compared)


def test_the_nearest_product_decides_and_only_if_it_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    far, near = replace(OWN, group=7), OWN
    known(
        monkeypatch, measured(Choice("linear", 64, 2048, 2048, far, 1.1), Choice("linear", 1024, 2048, 2048, near, 1.1))
    )
    assert tiles.tiles_for(GPU, "linear", 900, 2048, 2048) == [near]
    assert tiles.tiles_for(GPU, "linear", 65, 2048, 1024) == [far], "65 rows count as 128, 1024 columns as one more factor of two"
    assert tiles.tiles_for(GPU, "linear", 1024, 2048, 2048 * 8) == [tiles.rule("linear", 1024, 2048, 2048 * 8)]
    assert tiles.tiles_for(GPU, "wgrad", 1024, 2048, 2048) == [tiles.rule("wgrad", 1024, 2048, 2048)]
    assert tiles.tiles_for(torch.device("cpu"), "linear", 1024, 2048, 2048) == [tiles.rule("linear", 1024, 2048, 2048)]


@given(st.lists(st.tuples(sizes, sizes, sizes), max_size=6), sizes, sizes, sizes)
def test_any_number_of_rows_finds_its_kernel_ready(
    products: list[tuple[int, int, int]], rows: int, inner: int, columns: int
) -> None:
    choices = [Choice("linear", *of, replace(OWN, group=n), 1.1) for n, of in enumerate(products)]
    with pytest.MonkeyPatch.context() as patch:
        known(patch, measured(*choices))
        (tile,) = tiles.tiles_for(GPU, "linear", rows, inner, columns)
        patch.setattr(tiles, "compiling_every_size", lambda: True)
        assert tile in tiles.tiles_for(GPU, "linear", 1, inner, columns)


@given(
    st.lists(st.tuples(sizes, sizes, sizes), max_size=6),
    st.integers(1, 1 << 20),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.booleans(),
)
def test_any_number_of_rows_finds_its_pointer_kernel_ready(
    products: list[tuple[int, int, int]], rows: int, dtype: torch.dtype, blocks: bool
) -> None:
    choices = [Choice("pointer", *of, replace(OWN, group=n), 1.1) for n, of in enumerate(products)]
    given_rows, experts, columns = torch.empty(1, 2048, dtype=dtype), 8, 768
    if blocks:  # which serve all others
        rows = 1 + rows % (8 * (triton_grouped.BLOCKS_FROM - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_grouped, "interpreted", lambda: False)
        patch.setattr(triton_grouped, "shared_bytes", lambda device: 232448)
        patch.setattr(tiles, "_choose", lambda device, *of: measured(*choices).nearest(*of) or tiles.rule(*of))
        (tile,) = triton_grouped.pointer_tiles(given_rows, rows, experts, columns)
        patch.setattr(triton_grouped, "compiling_every_size", lambda: True)
        assert tile in triton_grouped.pointer_tiles(given_rows, 1, experts, columns, done=blocks)


@pytest.mark.parametrize("every_size", [True, False])
def test_one_number_of_rows_gets_no_more_than_its_own_kernels(every_size: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, measured(*(Choice("linear", rows, 2048, 1024, replace(OWN, group=rows), 1.1) for rows in (1, 64, 4096))))
    own, routed = tiles.tiles_for(GPU, "linear", 64, 2048, 1024), []
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(triton_route, "launch", lambda kernel, *_, **__: routed.append(kernel))
    with triton_launch.only_compiling(every_size):
        made = tiles.tiles_for(GPU, "linear", 64, 2048, 1024)
        parts = triton_workspace.column_parts(64, 2048, 2)
        triton_route.route(torch.zeros(64, 2, dtype=torch.int64), 8)
        assert triton_grouped.many_rows(64, 64) == every_size
    assert own[0] in made and (len(made) > 1) == every_size
    assert len(parts) == (3 if every_size else 1)
    assert len(routed) == (3 if every_size else 1), "one kernel places few slots, two place many"
    assert not triton_launch.compiling() and not triton_launch.compiling_every_size()


def test_what_is_saved_is_read_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "device_name", lambda device: "a GPU")
    assert tiles.measured_on(GPU) is None
    found = measured(Choice("wgrad", 256, 768, 2048, OWN, 1.25), Choice("pointer", 8, 768, 2048, replace(OWN, rows=16), 1.0))
    path = found.save()
    assert tiles.measured_on(GPU) == found, "saving makes a process read anew"
    assert "wgrad" in str(found) and "1.25x" in str(found)
    assert tiles.tiles_for(GPU, "wgrad", 256, 768, 2048) == [OWN]
    path.write_text(path.read_text().replace('"a GPU"', '"another"'))
    tiles.forget()
    with pytest.raises(InputError, match="tiles of 'another', not of 'a GPU'"):
        tiles.measured_on(GPU)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no tiles"),
        ("{}", "no tiles"),
        ('{"version": 0}', "version 3 is needed; got 0"),
        ('{"version": 3, "choices": [{"kind": "linear"}], "device": "x", "source": ""}', "no tiles"),
        (
            '{"version": 3, "choices": [{"kind": "wide", "rows": 1, "inner": 1, "columns": 1, "gain": 1, "tile": '
            '{"rows": 1, "columns": 1, "inner": 1, "warps": 1, "stages": 1}}], "device": "x", "source": ""}',
            "no choice of a tile",
        ),
    ],
)
def test_a_damaged_file_says_what_to_do(text: str, what: str) -> None:
    with pytest.raises(InputError, match=f"here.*{what}.*calibrate"):
        Measured.loads(text, "here")


def test_only_one_tile_for_a_while() -> None:
    with tiles.only("linear", OWN):
        assert tiles.tiles_for(GPU, "linear", 1, 1, 1) == [OWN]
        assert tiles.pointer_tile(torch.device("cpu"), torch.bfloat16, "ieee", 1, 64, 64, 1 << 20) != OWN
    with tiles.only("pointer", OWN):
        assert tiles.pointer_tile(torch.device("cpu"), torch.bfloat16, "ieee", 1, 64, 64, 1 << 20) == OWN
    assert not tiles._forced


def test_candidates_are_compared_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that grows slower all the time the faster tile is found all the same."""
    compared = tiles.candidates("linear", 256, 2048, 2048)
    calls: list[Tile] = []

    def seconds(work: object, device: str, repeat: int) -> float:
        (tile,) = tiles.tiles_for(GPU, "linear", 256, 2048, 2048)
        calls.append(tile)
        return (1e-3 if tile == compared[-1] else 1.1e-3) * (1 + 0.01 * len(calls))

    monkeypatch.setattr(calibrate_tiles, "seconds_of", seconds)
    times = calibrate_tiles.compare(calibrate_tiles.Problem("linear", 256, 2048, 2048, lambda: None), compared)
    assert min(times, key=times.__getitem__) == compared[-1]
    assert calls[: 2 * len(compared)] == [*compared, *compared]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tiles_need_a_gpu() -> None:
    with pytest.raises(InputError, match="there is none"):
        calibrate_tiles.calibrate_tiles()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tiles_of_this_gpu() -> None:
    found = calibrate_tiles.calibrate_tiles(layers=((256, 384),), rows=(64,), few=(1,), experts=4)
    assert found.device == torch.cuda.get_device_name()
    assert {c.kind for c in found.choices} >= {"pointer"}
    for c in found.choices:
        assert c.gain >= 1 and c.tile in tiles.candidates(c.kind, c.rows, c.inner, c.columns)
