"""A timeline for people: bars in the terminal, PNG, HTML, and a trace for Chrome or Perfetto. Time axes are in ms."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from moefx.ir import NO_CHUNK
from moefx.simulate import COMPUTE, Span, Timeline

# Distinct in light and dark; the kinds of a layer in the order of their first start.
COLOURS = (
    *("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#bab0ac"),
    *("#1f4e79", "#b35900", "#2e6b2e", "#8c2d2f", "#3b7f7a", "#a08a1a"),
)
SHADES = "█▓"  # neighbours on a lane differ
DARK = frozenset({"#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#9c755f", *COLOURS[10:]})


def lanes(timeline: Timeline) -> list[tuple[str, list[Span]]]:
    """(lane, its spans in order), compute first, then as the schedule has them; lanes without a task left out."""
    rows = [
        (lane, sorted((timeline[t] for t in tasks), key=lambda s: s.start_s)) for lane, tasks in timeline.schedule.lanes
    ]
    return sorted(((lane, spans) for lane, spans in rows if spans), key=lambda row: row[0] != COMPUTE)


def title(timeline: Timeline) -> str:
    graph = timeline.graph
    return f"{graph.phase}, r = {graph.degree}: {1e3 * timeline.makespan_s:.4g} ms"


def ticks_ms(end_ms: float, count: int) -> list[float]:
    """About `count` round numbers from 0 up to end_ms: steps of 1, 2 or 5 times a power of ten."""
    if end_ms <= 0:
        return [0.0]
    raw = end_ms / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    return [i * step for i in range(int(end_ms / step * (1 + 1e-9)) + 1)]


def colours(timeline: Timeline) -> dict[str, str]:
    kinds = list(dict.fromkeys(span.task.kind for span in timeline.spans))
    return {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}


# ------------------------------------------------------------------------------------------------ terminal


def gantt(timeline: Timeline, width: int = 100) -> str:
    """One line of `width` characters a lane, a time axis in ms, and what each lane is busy with.

    A name stands in its bar where it fits. A task shorter than one character is drawn as a thin bar where there is room.
    """
    rows = lanes(timeline)
    total = timeline.makespan_s
    label = max([len(lane) for lane, _ in rows] + [len("ms")])
    scale = width / total if total > 0 else 0.0
    lines = [title(timeline)]
    for lane, spans in rows:
        cells = [" "] * width
        shade = 1
        for span in spans:
            start, end = round(span.start_s * scale), round(span.end_s * scale)
            if end <= start:
                if start < width and cells[start] == " ":
                    cells[start] = "▏"
                continue
            shade = 1 - shade
            cells[start:end] = SHADES[shade] * (end - start)
            if end - start >= len(span.task.name) + 2:
                at = start + (end - start - len(span.task.name)) // 2
                cells[at : at + len(span.task.name)] = span.task.name
        share = sum(s.end_s - s.start_s for s in spans) / total if total else 0.0
        lines.append(f"{lane:>{label}} │{''.join(cells)}│ {100 * share:3.0f} % busy")
    marks, numbers = ["─"] * width, [" "] * (width + 12)
    for tick in ticks_ms(1e3 * total, max(2, width // 12)):
        at = min(width - 1, round(1e-3 * tick * scale))
        marks[at] = "┴"
        numbers[at : at + len(f"{tick:g}")] = f"{tick:g}"
    lines += [f"{'':>{label}} └{''.join(marks)}┘", f"{'ms':>{label}}  {''.join(numbers).rstrip()}"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ pictures


def png(timeline: Timeline, path: Path) -> Path:
    """Draw the Gantt chart with matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, colour = lanes(timeline), colours(timeline)
    figure = Figure(figsize=(14, 1.9 + 0.8 * len(rows)), layout="constrained")
    axes = figure.subplots()
    end_ms = 1e3 * timeline.makespan_s or 1.0
    for y, (_, spans) in enumerate(rows):
        for span in spans:
            start_ms, took_ms = 1e3 * span.start_s, 1e3 * (span.end_s - span.start_s)
            fill = colour[span.task.kind]
            edge = "white" if took_ms > 4e-3 * end_ms else fill  # an edge would hide a thin bar
            axes.broken_barh([(start_ms, took_ms)], (y - 0.4, 0.8), facecolors=fill, edgecolors=edge, linewidth=0.6)
            size = min(9.0, 1250 * took_ms / end_ms / max(1, len(span.task.name)))
            if size >= 5:
                ink = "white" if fill in DARK else "black"
                middle = start_ms + took_ms / 2
                axes.text(middle, y, span.task.name, ha="center", va="center", fontsize=size, color=ink)
    axes.set_yticks(range(len(rows)), [lane for lane, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, end_ms)
    axes.set_xlabel("time (ms)")
    axes.set_title(title(timeline))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    handles = [Patch(facecolor=fill, label=kind) for kind, fill in colour.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def svg(timeline: Timeline, width: int = 1100) -> str:
    """The Gantt chart as inline SVG; every bar tells its task, lane and times when pointed at."""
    rows, colour = lanes(timeline), colours(timeline)
    left, row, gap, top = 110, 34, 12, 10
    bottom = top + len(rows) * (row + gap)
    legend_rows = math.ceil(len(colour) / 5)
    height = bottom + 56 + 22 * legend_rows
    total_ms = 1e3 * timeline.makespan_s or 1.0
    scale = (width - left - 20) / total_ms
    out = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" font-family="sans-serif">'
    ]
    for tick in ticks_ms(total_ms, 12):
        x = left + tick * scale
        out.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{top}" y2="{bottom}" stroke="#d8d8d8"/>')
        out.append(
            f'<text x="{x:.2f}" y="{bottom + 16}" font-size="12" text-anchor="middle" fill="#333">{tick:g}</text>'
        )
    middle = left + (width - left - 20) / 2
    out.append(f'<text x="{middle}" y="{bottom + 36}" font-size="13" text-anchor="middle" fill="#333">time (ms)</text>')
    for i, (lane, spans) in enumerate(rows):
        y = top + i * (row + gap)
        text_y = y + row / 2 + 5
        out.append(
            f'<text x="{left - 10}" y="{text_y}" font-size="14" text-anchor="end" fill="#111">{escape(lane)}</text>'
        )
        for span in spans:
            x, w = left + 1e3 * span.start_s * scale, 1e3 * (span.end_s - span.start_s) * scale
            fill, name = colour[span.task.kind], escape(span.task.name)
            tip = f"{escape(str(span))} ({escape(span.task.kind)}, {1e3 * (span.end_s - span.start_s):.6g} ms)"
            edge = ' stroke="#fff"' if w >= 4 else ""  # an edge would hide a thin bar
            bar = f'<rect x="{x:.2f}" y="{y}" width="{max(w, 0.8):.2f}" height="{row}" fill="{fill}"{edge}/>'
            label = ""
            if w >= 7 * len(span.task.name) + 4:
                ink = "#fff" if fill in DARK else "#111"
                label = f'<text x="{x + w / 2:.2f}" y="{text_y}" font-size="11" text-anchor="middle" fill="{ink}">{name}</text>'
            out.append(f"<g><title>{tip}</title>{bar}{label}</g>")
    for i, (kind, fill) in enumerate(colour.items()):
        x, y = left + (i % 5) * ((width - left) / 5), bottom + 48 + 22 * (i // 5)
        out.append(f'<rect x="{x:.0f}" y="{y}" width="14" height="14" fill="{fill}"/>')
        out.append(f'<text x="{x + 20:.0f}" y="{y + 12}" font-size="12" fill="#333">{escape(kind)}</text>')
    return "\n".join([*out, "</svg>"])


def html(timelines: Sequence[Timeline], heading: str, lines: Sequence[str] = ()) -> str:
    """One page that needs nothing else: a chart, the exposed communication and the schedule's text of each timeline."""
    style = (
        "body{font-family:sans-serif;margin:2em;color:#111;background:#fff}pre{background:#f4f4f4;padding:1em;"
        "overflow-x:auto}table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left}"
    )
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(heading)}</title>',
        f"<style>{style}</style></head><body><h1>{escape(heading)}</h1>",
        *([f"<pre>{escape(chr(10).join(lines))}</pre>"] if lines else []),
    ]
    for timeline in timelines:
        exposed = "".join(
            f"<tr><td>{escape(kind)}</td><td>{1e3 * seconds:.4g} ms</td></tr>"
            for kind, seconds in timeline.exposed_s.items()
        )
        parts += [f"<h2>{escape(title(timeline))}</h2>", svg(timeline)]
        parts += [f"<h3>exposed communication</h3><table>{exposed}</table>"] if exposed else []
        parts.append(f"<h3>schedule</h3><pre>{escape(str(timeline.schedule))}</pre>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


def chrome_trace(timeline: Timeline) -> str:
    """JSON for chrome://tracing and ui.perfetto.dev: one thread a lane, times in microseconds."""
    events: list[dict[str, object]] = []
    for number, (lane, spans) in enumerate(lanes(timeline)):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": lane}})
        for span in spans:
            chunk = {} if span.task.chunk == NO_CHUNK else {"chunk": span.task.chunk}
            args = {"kind": span.task.kind, **chunk, "after": list(span.task.deps)}
            times = {"ts": 1e6 * span.start_s, "dur": 1e6 * (span.end_s - span.start_s)}
            event = {"name": span.task.name, "cat": span.task.kind, "ph": "X", "pid": 0, "tid": number, "args": args}
            events.append({**event, **times})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": title(timeline)}})


# ------------------------------------------------------------------------------------------------ words


def bound_by(timeline: Timeline) -> str:
    """What the makespan consists of: the kinds of the critical path, and the resource that is busy longest."""
    by_kind: dict[str, float] = {}
    for name in timeline.critical_path:
        span = timeline[name]
        by_kind[span.task.kind] = by_kind.get(span.task.kind, 0.0) + span.end_s - span.start_s
    if not by_kind:
        return "nothing to do"
    resource, busy = max(timeline.busy_s.items(), key=lambda item: item[1])
    share = 100 * busy / timeline.makespan_s if timeline.makespan_s else 0.0
    path = ", ".join(
        f"{kind} {1e3 * seconds:.4g} ms" for kind, seconds in sorted(by_kind.items(), key=lambda item: -item[1])
    )
    return f"{resource} is busy {share:.0f} % of the time; the critical path is {path}"
