"""profile: files that read back, presets, and everything that is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moefx.errors import InputError
from moefx.profile import PRESETS, VERSION, Line, Profile, cache_path, device_name, from_links, preset

LINE = Line(1e-5, 1e-12, "flops", 0.999, 0.02, 1e6, 1e9)
PROFILE = Profile("a GPU", {"gemm": LINE, "all_to_all": Line(1e-4, 1e-10, "wire_bytes")}, 8, "a test", ("a note",))


def test_text_reads_back():
    assert Profile.loads(PROFILE.dumps()) == PROFILE
    assert '"alpha_s": 1e-05' in PROFILE.dumps()


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = replace(PROFILE, device=device_name("cpu"), ranks=1)
    path = mine.save()
    assert path == cache_path(mine.device) and path.parent == tmp_path / "moefx"
    assert Profile.load(device=mine.device) == mine
    assert Profile.load(path) == mine
    assert PROFILE.save(tmp_path / "deep" / "p.json").is_file()
    with pytest.raises(InputError, match="this is a profile of 'a GPU', not of 'another': calibrate there"):
        Profile.load(tmp_path / "deep" / "p.json", device="another")
    with pytest.raises(InputError, match="no profile at .*calibrate --ranks 4"):
        Profile.load(device="nothing", ranks=4)


def test_without_xdg_the_cache_is_in_home(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_path("A GPU (80 GB)", 2) == Path("/somewhere/.cache/moefx/profile-a-gpu--80-gb-2.json")


def test_shown():
    shown = str(PROFILE)
    assert "profile of a GPU, 8 rank(s), from a test" in shown
    assert "1000 GFLOP/s" in shown and "10 GB/s of wire bytes" in shown and "2.0 %" in shown and "note: a note" in shown
    assert "free" in str(Profile("x", {"gemm": Line(1.0, 0.0, "flops")}))


def broken(**changes: object) -> str:
    data = json.loads(PROFILE.dumps())
    data.update(changes)
    return json.dumps(data)


LACKING = {"gemm": {"alpha_s": 1.0, "unit": "flops"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", f"version {VERSION} is needed; got None"),
        (broken(version=99), "got 99. Calibrate again"),
        (broken(lines=[]), "lines are an object"),
        (broken(lines=LACKING), r"line 'gemm' lacks \['beta_s_per_unit'\]"),
        (broken(lines={"gemm": {**LACKING["gemm"], "beta_s_per_unit": -1e-12}}), "beta_s_per_unit of gemm is a finite"),
        (broken(lines={"gemm": {**LACKING["gemm"], "beta_s_per_unit": None}}), "beta_s_per_unit of gemm is a finite"),
        (broken(lines={"sort": {**LACKING["gemm"], "beta_s_per_unit": 1}}), "unknown kind of work 'sort'"),
        (
            broken(lines={"gemm": {"alpha_s": 1, "beta_s_per_unit": 1, "unit": "bytes"}}),
            "gemm counts flops; got 'bytes'",
        ),
        (broken(lines={"gemm": {"alpha_s": 1, "beta_s_per_unit": 1, "unit": "flops", "x": 1}}), r"unknown: \['x'\]"),
        (broken(ranks=0), "ranks is a whole number"),
        (broken(device=""), "names its device"),
        (broken(device=None), "a device and lines are needed"),
        (broken(speed=3), r"unknown entries: \['speed'\]"),
    ],
)
def test_bad_files(text, message):
    with pytest.raises(InputError, match=message):
        Profile.loads(text)


@pytest.mark.parametrize("value", [-1e-6, float("nan"), float("inf"), "fast", True, None])
def test_a_bad_alpha(value):
    with pytest.raises(InputError, match="alpha_s of gemm is a finite number >= 0"):
        Profile("x", {"gemm": replace(LINE, alpha_s=value)})


def test_lines_are_never_invented():
    with pytest.raises(InputError, match=r"has no line for 'codec' \(it has gemm, all_to_all\); calibrate it"):
        PROFILE.line("codec")
    with pytest.raises(InputError, match="unknown kind of work 'sort'"):
        PROFILE.line("sort")


def test_presets():
    assert sorted(PRESETS) == ["fsmoe-32", "pipemoe-16", "pipemoe-32", "pipemoe-64"]
    line = preset("pipemoe-32").line("all_to_all")
    assert (line.alpha_s, line.beta_s_per_unit, line.unit) == (2.09e-4, 3.55e-10, "message_bytes")
    with pytest.raises(InputError, match="no preset 'fsmoe'; known: pipemoe-16"):
        preset("fsmoe")
    assert preset("fsmoe-32").line("experts") == preset("pipemoe-32").line("experts")
    assert preset("fsmoe-32").line("all_to_all_inter").seconds(3.125e9) == pytest.approx(1 + 2.09e-4)


def test_a_data_sheet():
    sheet = {
        "tflops": 400,
        "memory_gbps": 2000,
        "inter_gbps": 25,
        "intra_gbps": 200,
        "launch_us": 10,
        "collective_us": 40,
    }
    profile = from_links("a cluster", ranks=8, **sheet)
    assert profile.line("all_to_all").seconds(25e9) == pytest.approx(1 + 40e-6)
    assert profile.line("experts").seconds(4e14) == pytest.approx(1 + 10e-6)
    for name in sheet:
        with pytest.raises(InputError, match=f"{name} is a finite positive number"):
            from_links("a cluster", ranks=8, **{**sheet, name: -1.0})
