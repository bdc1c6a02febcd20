"""What a model's MoE layers would cost on a cluster that one does not have, and why.

    python -m moefx simulate --model qwen3_moe --ranks 64 --ranks-per-node 8 --tflops 400 --memory-gbps 2000 ...

Every rank holds T tokens whatever P is (weak scaling), routing is balanced. The experts are spread over the largest group
whose size divides both E and P; the groups beyond are replicas, whose expert gradients are summed in the backward pass.
Only the MoE layers are counted: attention and the rest of a step are not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moefx import timeline as draw
from moefx.costs import Sizes, price
from moefx.errors import InputError
from moefx.ir import TaskGraph
from moefx.passes.partition import Layout, expert_parallel
from moefx.passes.schedule import Choice, choose
from moefx.profile import Profile
from moefx.simulate import lower_bound_s

Phase = Literal["forward", "backward"]
PHASES: tuple[Phase, Phase] = ("forward", "backward")


@dataclass(frozen=True)
class Layer:
    """The sizes of one MoE layer: D, F, E, K, matrices an expert, and the width of its shared expert (0: none)."""

    d_model: int
    d_expert: int
    experts: int
    top_k: int
    matrices: int = 3
    shared_width: int = 0


@dataclass(frozen=True)
class Cluster:
    """Where it runs: the lines, ranks P, ranks a node, and what is sent: bytes an element, bytes on the wire per byte."""

    profile: Profile
    ranks: int
    ranks_per_node: int = 1
    bytes_per_element: float = 2
    wire_share: float = 1.0

    def __post_init__(self) -> None:
        if self.ranks < 2:
            raise InputError(f"a cluster has at least 2 ranks; got {self.ranks}")
        if self.ranks_per_node < 1 or (self.ranks_per_node < self.ranks and self.ranks % self.ranks_per_node):
            raise InputError(f"{self.ranks} ranks do not fill nodes of {self.ranks_per_node}")


@dataclass(frozen=True)
class Scenario:
    """One layer on one cluster. gradient_bytes: other gradients that a layer's backward all-reduces, in `slices`."""

    layer: Layer
    cluster: Cluster
    tokens: int
    capacity_factor: float = 1.0
    gradient_bytes: float = 0.0
    slices: int = 8

    @property
    def group(self) -> int:
        """Ranks that share the experts: the greatest common divisor of E and P."""
        return math.gcd(self.layer.experts, self.cluster.ranks)

    @property
    def sizes(self) -> Sizes:
        layer, cluster = self.layer, self.cluster
        replicas = cluster.ranks // self.group
        per_rank = (
            layer.matrices * layer.d_model * layer.d_expert * cluster.bytes_per_element * layer.experts / self.group
        )
        # bytes which, summed over all ranks, cost what the experts' gradients cost summed over their replicas
        expert_gradients = per_rank * (1 - 1 / replicas) / (1 - 1 / cluster.ranks)
        return Sizes(
            tokens=self.tokens,
            top_k=layer.top_k,
            d_model=layer.d_model,
            d_expert=layer.d_expert,
            experts=layer.experts,
            ranks=self.group,
            bytes_per_element=cluster.bytes_per_element,
            capacity_factor=self.capacity_factor,
            matrices=layer.matrices,
            wire_share=cluster.wire_share,
            ranks_per_node=min(math.gcd(cluster.ranks_per_node, self.group), self.group),
            shared_width=layer.shared_width,
            gradient_bytes=self.gradient_bytes + expert_gradients,
            gradient_slices=self.slices,
            gradient_ranks=cluster.ranks,
        )

    @property
    def layout(self) -> Layout:
        sizes, lines = self.sizes, self.cluster.profile.lines
        one_node = self.cluster.ranks_per_node >= self.group > 1 and "all_to_all_intra" in lines
        return Layout(
            permute="permute" in lines,
            codec=self.cluster.wire_share != 1,
            link="intra" if one_node else "inter",
            split_links=not one_node and 1 < sizes.ranks_per_node and "all_to_all_inter" in lines,
            shared=self.layer.shared_width > 0,
            gradient_slices=self.slices if sizes.gradient_bytes and self._prices_gradients else 0,
        )

    @property
    def _prices_gradients(self) -> bool:
        """Whether slices of gradients are simulated; those that the caller asks for need a line, or are an error."""
        return "all_reduce" in self.cluster.profile.lines or self.gradient_bytes > 0

    @property
    def left_out(self) -> list[str]:
        """What the profile has no price for and the simulation therefore lacks."""
        missing = [] if self.layout.permute else ["encode and decode: the profile has no line 'permute'"]
        if self.sizes.gradient_bytes and not self._prices_gradients:
            missing.append("the experts' gradients summed over replicas: the profile has no line 'all_reduce'")
        return missing

    def graph(self, phase: Phase) -> Callable[[int], TaskGraph]:
        """r -> the layer's tasks in r chunks with their times."""
        sizes, layout = self.sizes, self.layout
        return lambda degree: price(expert_parallel(degree, phase, layout), sizes, self.cluster.profile)


@dataclass(frozen=True)
class Outcome:
    """What was chosen for one scenario; seconds of a layer's pass by phase for r = 1, r = 2 and the best r."""

    scenario: Scenario
    choices: dict[Phase, Choice]
    fixed_s: dict[int, float]
    decided_in_s: float

    @property
    def layer_s(self) -> float:
        return sum(choice.makespan_s for choice in self.choices.values())

    def gain(self, degree: int) -> float:
        """How many times as fast as with this degree in both phases."""
        return self.fixed_s[degree] / self.layer_s


def evaluate(scenario: Scenario, policy: str = "auto") -> Outcome:
    """Choose degree and order of both phases of a layer."""
    began = time.perf_counter()
    capacity = scenario.sizes.capacity
    builds = {phase: scenario.graph(phase) for phase in PHASES}
    choices = {phase: choose(build, capacity, policy) for phase, build in builds.items()}
    decided = time.perf_counter() - began
    fixed = {
        degree: sum(choose(b, capacity, policy, [min(degree, capacity)]).makespan_s for b in builds.values())
        for degree in (1, 2)
    }
    return Outcome(scenario, choices, fixed, decided)


def why(scenario: Scenario, phase: Phase, choice: Choice, policy: str = "auto") -> list[str]:
    """What bounds the pass, what r-1 and r+1 would cost, what faster links or a 4x codec would change."""
    r, capacity, best = choice.degree, scenario.sizes.capacity, choice.makespan_s
    bound = lower_bound_s(choice.timeline.graph)
    lines = [
        f"{phase}: r = {r} takes {_ms(best)}; no order of these tasks is below {_ms(bound)}",
        f"  bound: {draw.bound_by(choice.timeline)}",
    ]
    for kind, seconds in choice.timeline.exposed_s.items():
        lines.append(f"  exposed: {_ms(seconds)} of {kind}")
    build = scenario.graph(phase)
    for other in (r - 1, r + 1):
        if 1 <= other <= capacity:
            seconds = choose(build, capacity, policy, [other]).makespan_s
            lines.append(f"  r = {other} would take {_ms(seconds)} ({_change(seconds, best)})")
        elif other > capacity:
            lines.append(f"  r = {other} is above the capacity {capacity}: a chunk would have no rows")
    cluster = scenario.cluster
    faster = replace(scenario, cluster=replace(cluster, profile=faster_links(cluster.profile, 2)))
    lines.append(_variant("a link with 2x the bandwidth", faster, phase, best, policy))
    if cluster.wire_share == 1 and "codec" in cluster.profile.lines:
        coded = replace(scenario, cluster=replace(cluster, wire_share=0.25))
        lines.append(_variant("a 4x codec", coded, phase, best, policy))
    elif cluster.wire_share == 1:
        lines.append(f"  a 4x codec: unknown, {cluster.profile.device} has no line 'codec'")
    return lines


def faster_links(profile: Profile, times: float) -> Profile:
    """Collectives with the same start-up and `times` the bandwidth."""
    ours = ("gemm", "experts", "permute", "codec")
    lines = {
        kind: line if kind in ours else replace(line, beta_s_per_unit=line.beta_s_per_unit / times)
        for kind, line in profile.lines.items()
    }
    return replace(profile, lines=lines)


def _variant(what: str, scenario: Scenario, phase: Phase, best: float, policy: str) -> str:
    choice = choose(scenario.graph(phase), scenario.sizes.capacity, policy)
    return f"  {what}: r = {choice.degree}, {_ms(choice.makespan_s)} ({_change(choice.makespan_s, best)})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def _change(seconds: float, best: float) -> str:
    return f"{100 * (seconds / best - 1):+.1f} %" if best else "no time at all"


# ------------------------------------------------------------------------------------------------ models

_WIDTH = ("hidden_size", "d_model", "n_embd")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "num_selected_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "d_ff", "ffn_dim")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_PLAIN = ("switch_transformers", "nllb-moe")  # experts of two matrices


def from_hugging_face(name: str) -> list[Layer]:
    """The MoE layers of a Hugging Face configuration, at its class's default sizes; nothing is downloaded."""
    from moefx import hf

    config = hf._config_class(name)()
    experts = _field(config, name, _EXPERTS, "experts")
    width = _field(config, name, _EXPERT_WIDTH, "the width of an expert")
    top_k = 1 if config.model_type == "switch_transformers" else _field(config, name, _TOP_K, "experts a token")
    shared = getattr(config, "shared_expert_intermediate_size", None)
    shared = shared or width * (getattr(config, "n_shared_experts", None) or 0)
    matrices = 2 if config.model_type in _PLAIN else 3
    layer = Layer(_field(config, name, _WIDTH, "the model's width"), width, experts, top_k, matrices, int(shared))
    dense = getattr(config, "first_k_dense_replace", None) or 0
    count = _field(config, name, _LAYERS, "layers") - dense
    step = getattr(config, "decoder_sparse_step", None) or 1
    return [layer] * max(1, count // step)


def _field(config: Any, name: str, spellings: Sequence[str], what: str) -> int:
    for spelling in spellings:
        value = getattr(config, spelling, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise InputError(f"the configuration of {name} does not say {what} ({', '.join(spellings)}); give sizes instead")


# ------------------------------------------------------------------------------------------------ tables and plots


def table(outcomes: Sequence[Outcome], layers: int) -> str:
    """One row a cluster size: best degrees, times of one layer and of all, and the gains."""
    rows = [
        ("P", "EP group", "r fwd", "r bwd", "fwd ms", "bwd ms", "layer ms", "step ms", "vs r=1", "vs r=2", "decided in")
    ]
    for outcome in outcomes:
        forward, backward = (outcome.choices[phase] for phase in PHASES)
        rows.append(
            (
                str(outcome.scenario.cluster.ranks),
                str(outcome.scenario.group),
                str(forward.degree),
                str(backward.degree),
                f"{1e3 * forward.makespan_s:.3f}",
                f"{1e3 * backward.makespan_s:.3f}",
                f"{1e3 * outcome.layer_s:.3f}",
                f"{1e3 * layers * outcome.layer_s:.1f}",
                f"{outcome.gain(1):.2f} x",
                f"{outcome.gain(2):.2f} x",
                f"{outcome.decided_in_s:.2f} s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def plot(outcomes: Sequence[Outcome], layers: int, name: str, path: Path) -> Path:
    """The step's MoE time and the best degrees against P."""
    from matplotlib.figure import Figure

    ranks = [o.scenario.cluster.ranks for o in outcomes]
    figure = Figure(figsize=(9, 7), layout="constrained")
    times, degrees = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for label, style, seconds in (
        ("r = 1", "o--", [o.fixed_s[1] for o in outcomes]),
        ("r = 2", "s--", [o.fixed_s[2] for o in outcomes]),
        ("best r, forward and backward apart", "o-", [o.layer_s for o in outcomes]),
    ):
        times.plot(ranks, [1e3 * layers * s for s in seconds], style, label=label, markersize=5)
    times.set_ylabel(f"{layers} MoE layer(s), forward + backward (ms)")
    times.set_ylim(bottom=0)
    times.set_title(
        f"{name}: {outcomes[0].scenario.tokens} tokens a rank, {outcomes[0].scenario.cluster.profile.device}"
    )
    for phase, style in zip(PHASES, ("o-", "s-")):
        degrees.plot(ranks, [o.choices[phase].degree for o in outcomes], style, label=f"best r, {phase}", markersize=5)
    degrees.set_ylabel("degree r")
    degrees.set_ylim(bottom=0)
    degrees.set_xscale("log", base=2)
    degrees.set_xticks(ranks, [str(p) for p in ranks])
    degrees.minorticks_off()
    degrees.set_xlabel("ranks P")
    for axes in (times, degrees):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
