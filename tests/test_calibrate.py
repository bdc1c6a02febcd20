"""calibrate: the fit on data with a known answer, outliers included, and real measurements, small ones."""

from __future__ import annotations

import random

import pytest
import torch

from moefx import cli
from moefx.calibrate import COLLECTIVES, Probe, Sample, calibrate, fit, line_of, local_probes, measure
from moefx.errors import InputError
from moefx.profile import Profile


def samples(alpha: float, beta: float, outliers: bool = False, noise: float = 0.02) -> list[Sample]:
    rng = random.Random(0)
    result = []
    for i in range(12):
        units = 1e3 * 2.5**i
        runs = [(alpha + beta * units) * rng.uniform(1 - noise, 1 + noise) for _ in range(5)]
        if outliers:
            runs[rng.randrange(5)] *= rng.choice((3, 10))
        result.append(Sample(units, tuple(runs)))
    return result


@pytest.mark.parametrize("outliers", [False, True])
def test_a_known_line_is_found(outliers):
    alpha, beta = fit(samples(2e-4, 3e-10, outliers))
    assert alpha == pytest.approx(2e-4, rel=0.05)
    assert beta == pytest.approx(3e-10, rel=0.05)


def test_neither_is_negative():
    assert fit([Sample(1, (1e-3,)), Sample(2, (3e-3,)), Sample(4, (8e-3,))])[0] == 0.0
    alpha, beta = fit([Sample(1, (3e-3,)), Sample(2, (2e-3,)), Sample(4, (1e-3,))])
    assert beta == 0.0 and alpha > 0


@pytest.mark.parametrize("bad", [[Sample(1, (1.0, 1.1))], [Sample(1, (0.0,)), Sample(2, (1.0,))], []])
def test_data_without_a_line(bad):
    with pytest.raises(InputError, match="at least two sizes"):
        fit(bad)


def test_half_of_the_sizes_are_held_out():
    good = samples(1e-4, 1e-9)
    line = line_of(good, "flops")
    assert line.r2 > 0.999 and line.held_out_error < 0.03
    assert (line.low, line.high) == (good[0].units, good[-1].units)
    wrong = [s if i % 2 == 0 else Sample(s.units, tuple(2 * t for t in s.seconds)) for i, s in enumerate(good)]
    assert line_of(wrong, "flops").alpha_s == line.alpha_s, "what is held out does not enter the fit"
    assert line_of(wrong, "flops").held_out_error > 0.4


def test_sizes_grow_by_a_factor():
    scales = Probe("gemm", "flops", lambda n: (lambda: None, n), 10, 10_000).scales(4)
    assert scales == [10, 100, 1000, 10_000]


def test_five_runs_a_size():
    calls = []
    probe = Probe("gemm", "flops", lambda n: (lambda: calls.append(n), float(n)), 1, 512)
    measured = list(measure(probe, "cpu"))
    assert [s.units for s in measured] == [float(n) for n in probe.scales()]
    assert all(len(s.seconds) == 5 and min(s.seconds) > 0 for s in measured)


def test_units_of_the_probes():
    by_kind = {probe.kind: probe for probe in local_probes("cpu")}
    for kind in ("gemm", "experts"):
        assert by_kind[kind].make(64)[1] == 2 * 64 * 256 * 256
    assert by_kind["permute"].make(64)[1] == 2 * 64 * 256 * 4
    assert by_kind["codec"].make(64)[1] == 64 * 256 * 6
    for probe in by_kind.values():
        probe.make(16)[0]()


def test_this_machine(tmp_path, capsys):
    file = tmp_path / "profile.json"
    assert cli.main(["calibrate", "--device", "cpu", "--scale", "0.1", "--out", str(file)]) == 0
    printed = capsys.readouterr()
    assert "held-out error" in printed.out and f"saved to {file}" in printed.out
    assert not printed.err, "no progress bar where the output is no terminal"
    profile = Profile.load(file)
    assert sorted(kind for kind in profile.lines if ":" not in kind) == ["codec", "experts", "gemm", "permute"]
    assert "codec:int8" in profile.lines
    assert all(line.r2 is not None and line.held_out_error is not None for line in profile.lines.values())


def test_collectives_of_two_processes():
    profile = calibrate("cpu", ranks=2, scale=0.05)
    assert profile.ranks == 2
    missing = [kind for kind in COLLECTIVES if kind not in profile.lines]
    assert "all_to_all" in profile.lines and "all_reduce" in profile.lines
    assert bool(missing) == any("not measured" in note for note in profile.notes)


def test_what_cannot_be_measured():
    with pytest.raises(InputError, match="device is 'cpu', or 'cuda'"):
        calibrate("tpu")
    with pytest.raises(InputError, match="ranks is the size"):
        calibrate("cpu", ranks=0)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="where there is one"):
            calibrate("cuda")


def test_every_codec_is_measured():
    from moefx.codegen.codecs import CODECS

    from moefx.calibrate import codec_probes

    probes = {probe.kind: probe for probe in codec_probes("cpu", 0.05)}
    assert sorted(probes) == sorted(f"codec:{name}" for name in CODECS if name != "none")
    for probe in probes.values():
        work, units = probe.make(16)
        assert work().shape == (16, 256)
        assert units > 2 * 16 * 256 * 4
