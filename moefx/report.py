"""The report: what was found, what was declined and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FoundBlock:
    """A rewritten block. Letters as everywhere: E experts, K slots per token, D model width, F expert width.

    errors: worst relative errors against the original: "forward" and "gradient" on the float64 probe, "device" with the
    block's own weights, dtype and device.
    """

    name: str
    experts: int
    top_k: int
    d_model: int
    d_expert: int
    layout: str
    routing: str
    location: str
    errors: dict[str, float]
    partition: str
    schedule: str
    source: str
    canonical: str = ""
    region: str = ""
    same_as: str = ""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = (
            f"{self.name or '(the model itself)'}: E={self.experts} K={self.top_k} D={self.d_model} F={self.d_expert}"
        )
        lines = [
            head,
            f"  routing    {self.routing}",
            f"  layout     {self.layout}",
            f"  stands at  {self.location}",
            "  verified   " + ", ".join(f"{k} {v:.1e}" for k, v in self.errors.items()),
            *(f"  note       {n}" for n in self.notes),
        ]
        if self.same_as:
            return "\n".join([*lines, f"  same structure as {self.same_as}"])
        for title, text in (
            ("block", self.canonical),
            ("region", self.region),
            ("partition", self.partition),
            ("schedule", self.schedule),
            ("source", self.source),
        ):
            lines += [f"  {title}", *("    " + line for line in text.splitlines())]
        return "\n".join(lines)


@dataclass(frozen=True)
class DeclinedBlock:
    """A candidate that stays as it was."""

    name: str
    reason: str
    nearest: str = ""
    location: str = ""

    def __str__(self) -> str:
        lines = [f"{self.name or '(the model itself)'}: {self.reason}"]
        if self.nearest:
            lines.append(f"  nearest miss: {self.nearest}")
        if self.location:
            lines.append(f"  at {self.location}")
        return "\n".join(lines)


@dataclass
class GraphReport:
    """What the backend of torch.compile did to one graph. parameters: those that the graph reads, held weakly. analysed: how many
    parts had to be, since no graph before, here or in an earlier process, had one of their structure."""

    nodes: int
    inner: str
    found: list[FoundBlock] = field(default_factory=list)
    declined: list[DeclinedBlock] = field(default_factory=list)
    seconds: float = 0.0
    parameters: list[Any] = field(default_factory=list)
    analysed: int = 0

    def __str__(self) -> str:
        head = f"graph of {self.nodes} nodes for {self.inner}: {len(self.found)} region(s), {len(self.declined)} declined"
        return "\n".join([f"{head}, {self.seconds:.1f} s", *_indented(self.found), *_indented(self.declined)])


GRAPHS: list[GraphReport] = []  # of this process, in the order of compilation


@dataclass
class Report:
    """What moefx did, or would do, to a model."""

    found: list[FoundBlock] = field(default_factory=list)
    declined: list[DeclinedBlock] = field(default_factory=list)
    seconds: float = 0.0
    pending: bool = False
    graphs: list[GraphReport] = field(default_factory=list)

    def __str__(self) -> str:
        if self.pending:
            return "moefx waits for the model's first call to see its inputs."
        found = len(self.found) + sum(len(graph.found) for graph in self.graphs)
        declined = len(self.declined) + sum(len(graph.declined) for graph in self.graphs)
        seconds = self.seconds + sum(graph.seconds for graph in self.graphs)
        parts = [f"moefx: {found} MoE block(s) found, {declined} candidate(s) declined, {seconds:.1f} s"]
        if not found:
            parts.append("no MoE block was rewritten; the model is unchanged")
        if self.found:
            parts += ["", "found", *_indented(self.found)]
        if self.declined:
            parts += ["", "declined", *_indented(self.declined)]
        if self.graphs:
            parts += ["", "graphs of torch.compile", *_indented(self.graphs)]
        return "\n".join(parts)


def graphs_of(parameters: Iterable[object]) -> list[GraphReport]:
    """The graphs of this process that read any of the parameters. Those whose parameters are all gone are forgotten."""
    wanted = {id(p) for p in parameters}
    alive = [(graph, {id(p) for ref in graph.parameters if (p := ref()) is not None}) for graph in GRAPHS]
    GRAPHS[:] = [graph for graph, own in alive if own or not graph.parameters]
    return [graph for graph, own in alive if own & wanted]


def _indented(items: Iterable[object]) -> list[str]:
    return ["\n".join("  " + line for line in str(item).splitlines()) for item in items]
