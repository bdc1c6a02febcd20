"""timeline: what the charts say. How they look was looked at."""

from __future__ import annotations

import json
import random
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given, settings
from layers import layers, pipeline, random_layer
from moefx.passes.schedule import fifo, schedule

from moefx.ir import Schedule, TaskGraph
from moefx.simulate import Timeline, simulate
from moefx.timeline import bound_by, chrome_trace, gantt, html, png, svg, ticks_ms


def small() -> Timeline:
    graph = pipeline(2, ("A1", "link", 2e-3), ("E", "compute", 3e-3), ("A2", "link", 2e-3))
    return simulate(graph, fifo(graph))


def test_gantt():
    assert gantt(small(), 50).splitlines() == [
        "forward, r = 2: 10 ms",
        "compute │          ██████E_0██████▓▓▓▓▓▓E_1▓▓▓▓▓▓          │  60 % busy",
        "   link │███A1_0███▓▓▓A1_1▓▓▓     ███A2_0███     ▓▓▓A2_1▓▓▓│  80 % busy",
        "        └┴────────────────────────┴───────────────────────┴┘",
        "     ms  0                        5                       10",
    ]


@settings(max_examples=30)
@given(layers())
def test_every_chart_of_every_layer(graph):
    timeline = simulate(graph, schedule(graph, "fifo"))
    lines = gantt(timeline, 80).splitlines()
    lanes = {t.resource for t in graph.tasks}
    assert all(any(line.lstrip().startswith(f"{lane} │") for line in lines) for lane in lanes)
    bars = [line for line in lines if "│" in line]
    assert all(len(line.split("│")[1]) == 80 for line in bars)
    picture = ElementTree.fromstring(svg(timeline))
    titles = [title.text for title in picture.iter("title")]
    assert len(titles) == len(graph.tasks)
    events = json.loads(chrome_trace(timeline))["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} == set(graph.by_name)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == lanes


def test_a_trace_is_in_microseconds():
    (event,) = (e for e in json.loads(chrome_trace(small()))["traceEvents"] if e["name"] == "E_1")
    assert (event["ts"], event["dur"]) == (pytest.approx(5000), pytest.approx(3000))
    assert event["args"] == {"kind": "E", "chunk": 1, "after": ["A1_1"]}


def test_html_needs_nothing_else():
    page = html([small()], "a <layer>", ["why & how"])
    assert "a &lt;layer&gt;" in page and "why &amp; how" in page
    assert "http" not in page and "<script" not in page and "time (ms)" in page
    assert str(small().schedule) in page


def test_png(tmp_path: Path):
    pytest.importorskip("matplotlib")
    graph = random_layer(random.Random(0), "fsmoe_codec", 3)
    file = png(simulate(graph, fifo(graph)), tmp_path / "new" / "chart.png")
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("end", "expected"), [(10.0, [0, 2, 4, 6, 8, 10]), (0.37, [0, 0.1, 0.2, 0.3]), (0.0, [0.0]), (7.0, [0, 2, 4, 6])]
)
def test_ticks_are_round_numbers(end, expected):
    assert ticks_ms(end, 5) == pytest.approx(expected)


def test_what_bounds():
    assert bound_by(small()) == "link is busy 80 % of the time; the critical path is E 6 ms, A1 2 ms, A2 2 ms"


def test_nothing_to_draw():
    empty = simulate(TaskGraph("forward", 1, ()), Schedule("forward", 1, ()))
    assert gantt(empty).startswith("forward, r = 1: 0 ms")
    assert svg(empty) and html([empty], "x") and bound_by(empty) == "nothing to do"
