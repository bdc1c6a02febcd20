"""find: what the routed part computes, and why look-alikes have none."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from moefx.models import ExpertChoiceMoE, GptOssMoE, MixtralMoE, SwitchMoE
from moefx.passes import find
from moefx.passes._gates import GateSystem
from moefx.passes._lift import Lifter
from moefx.passes.capture import capture
from torch import Tensor, nn

from moefx import probe
from moefx.errors import Decline
from moefx.routing import Hypothesis, region_inputs
from moefx.trace import Trace, Value

D, H, E, K = 16, 8, 4, 2
SMALL = {"hidden": H, "experts": E}


def hypotheses(module: nn.Module, near: list[str]) -> Iterator[Hypothesis]:
    """What a block may compute, likeliest first: the stages as moefx.api drives them."""
    example = probe.Example.of(*probe.bind(module, (torch.randn(2, 29, D),), {}))
    twin = probe.probe_copy(module)
    args, kwargs = probe.draw(example, (3, 17), 1, probe.guess_experts(module))
    first = Lifter(twin)
    with probe.state_kept(twin):
        find.side_effects(capture(twin, *copy.deepcopy((args, kwargs)), first))
    for group in find.expert_groups(first):
        lifter = Lifter(twin, group)
        with probe.state_kept(twin):
            trace = capture(twin, *copy.deepcopy((args, kwargs)), lifter)
        yield from find.hypotheses(trace, lifter, redrawn(twin, group, args), near)
        near += lifter.notes


def redrawn(twin: nn.Module, group: frozenset[str], args: tuple[Any, ...]) -> Callable[[int], Trace | None]:
    """The same run with other expert parameters; seed 0 puts the first ones back."""
    parameters = {name: p for name, p in twin.named_parameters() if name in group}
    kept = {name: p.detach().clone() for name, p in parameters.items()}

    def run(seed: int) -> Trace | None:
        generator = torch.Generator().manual_seed(seed)
        for name, p in parameters.items():
            p.detach().copy_(probe.random_like(p, p.dtype, generator) if seed else kept[name])
        return capture(twin, copy.deepcopy(args), {}) if seed else None

    return run


def best(module: nn.Module) -> Hypothesis:
    return next(hypotheses(module, []))


def search(module: nn.Module) -> tuple[list[Hypothesis], list[str]]:
    """All hypotheses, and why candidates failed."""
    near: list[str] = []
    return list(hypotheses(module, near)), list(dict.fromkeys(near))


@functools.cache
def best_of_style(style: str) -> Hypothesis:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return best(STYLES[style]())


# ------------------------------------------------------------------------------------------------ blocks

STYLES: dict[str, Callable[[], nn.Module]] = {
    "mixtral": lambda: MixtralMoE(D, **SMALL),
    "gpt_oss": lambda: GptOssMoE(D, **SMALL),
    "switch": lambda: SwitchMoE(D, **SMALL),
    "expert_choice": lambda: ExpertChoiceMoE(D, **SMALL),
}


@pytest.mark.parametrize("style", STYLES)
def test_region_and_routing(style, golden):
    hypothesis = best_of_style(style)
    routing = hypothesis.routing
    parts = {"ids": routing.ids, "w": routing.w, "keep": routing.keep}
    lines = [
        f"{name}: {v.tensor.dtype} {list(v.shape)} of {v.producer.name}"
        for name, v in parts.items()
        if v and v.producer
    ]
    lines += [f"x: {hypothesis.x}", f"combined: {list(hypothesis.combined.shape)}", f"kind: {routing.kind}"]
    golden(f"find_{style}", "\n".join([str(hypothesis.region), *lines]))
    assert hypothesis.residual < 1e-12


@pytest.mark.parametrize("style", STYLES)
def test_the_region_computes_the_combined_output(style):
    """y[t] = sum_e G[t, e] f_e(x_t), recomputed from nothing but the hypothesis and the experts' parameters."""
    h = best_of_style(style)
    twin = h.trace.module
    parameters = dict(twin.named_parameters())
    x = h.x.tensor.reshape(-1, D)
    tensors = [None if v is None else v.tensor for v in (h.routing.ids, h.routing.w, h.routing.keep)]
    ids, w = region_inputs(h.routing, E, len(x), *tensors)
    y = torch.zeros(len(x), D, dtype=torch.float64)
    for e in range(E):
        rows = evaluate(h, e, x, parameters)
        for k in range(ids.shape[1]):
            weight = torch.ones(len(x), dtype=torch.float64) if w is None else w[:, k]
            y += torch.where(ids[:, k] == e, weight, 0.0)[:, None] * rows
    torch.testing.assert_close(y, h.combined.tensor.reshape(-1, D))


def evaluate(h: Hypothesis, e: int, x: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    """The template, instruction by instruction."""
    leaves = [
        parameters[f.params[e]].detach().flatten().as_strided(f.shape, f.strides, f.offsets[e]) for f in h.region.leaves
    ]
    values: list[Any] = []
    for instr in h.region.template.instrs:
        args = [
            values[a.index] if type(a).__name__ == "Ref" else leaves[a.index] if type(a).__name__ == "LeafRef" else a
            for a in instr.args
        ]
        if instr.kind == "x":
            values.append(x)
        elif instr.kind == "linear":
            values.append(args[0] @ args[1])
        elif instr.kind == "columns":
            values.append(args[0][:, args[1] : args[2] : args[3]])
        else:
            _, name, overload = instr.target.split(".")
            values.append(getattr(getattr(torch.ops.aten, name), overload)(*args, **dict(instr.kwargs)))
    return values[-1]


# ------------------------------------------------------------------------------------------------ gates

sizes = st.tuples(st.integers(2, 9), st.integers(2, 8), st.integers(2, 12))


def gate_system(
    tokens: int, experts: int, width: int, draws: int, seed: int, identity: bool
) -> tuple[Tensor, GateSystem, Tensor]:
    """A random sparse G, the system that should recover it, and the identity part."""
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    gates = torch.where(torch.rand(tokens, experts, generator=g) > 0.5, random(tokens, experts), 0.0)
    gates[0, 0] = 1.0  # at least one
    passed = random(tokens) if identity else torch.zeros(tokens, dtype=torch.float64)
    x = random(tokens, width)
    outputs = [random(tokens, experts, width) for _ in range(draws)]
    sums = [torch.einsum("te,tew->tw", gates, f) + passed[:, None] * x for f in outputs]
    system = GateSystem([(f, lambda _v, y=y: y) for f, y in zip(outputs, sums)], x, identity)
    return gates, system, passed


ANY = Value(0, torch.zeros(1, dtype=torch.float64), 0, 0, "call")


@given(sizes, st.integers(0, 2**20), st.booleans())
def test_sparse_gates_are_recovered(shape, seed, identity):
    tokens, experts, width = shape
    gates, system, passed = gate_system(tokens, experts, max(width, experts + 3), 1, seed, identity)
    solution = system.solve(ANY)
    assert solution is not None and solution.residual < 1e-8
    torch.testing.assert_close(solution.gates.matrix, gates, rtol=1e-6, atol=1e-6)
    assert solution.gates.identity is None if not identity else torch.allclose(solution.gates.identity, passed, atol=1e-6)


@given(st.integers(2, 9), st.integers(4, 12), st.integers(0, 2**20))
def test_more_experts_than_outputs_need_two_draws(tokens, experts, seed):
    width = experts // 2 + 2
    gates, system, _ = gate_system(tokens, experts, width, 2, seed, False)
    solution = system.solve(ANY)
    assert solution is not None and solution.residual < 1e-8
    torch.testing.assert_close(solution.gates.matrix, gates, rtol=1e-6, atol=1e-6)


@given(sizes, st.integers(0, 2**20))
def test_what_is_no_sum_of_experts_has_no_gates(shape, seed):
    tokens, experts, width = shape
    _, system, _ = gate_system(tokens, experts, width + experts + 3, 1, seed, False)
    noise = torch.randn(
        tokens, width + experts + 3, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64
    )
    system.draws = [(system.draws[0][0], lambda _v: noise)]
    assert system.solve(ANY) is None


def test_the_first_tokens_alone():
    gates, system, _ = gate_system(9, 4, 12, 1, 0, False)
    solution = system.first(3).solve(ANY)
    assert solution is not None
    torch.testing.assert_close(solution.gates.matrix, gates[:3])


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_zero_and_nan_are_no_sums(bad):
    _, system, _ = gate_system(3, 2, 8, 1, 0, False)
    system.draws = [(system.draws[0][0], lambda _v: torch.full((3, 8), bad))]
    assert system.solve(ANY) is None


def test_many_experts_of_few_outputs():
    """16 experts, 4 outputs: the routing shows only over several draws of the experts."""

    class Narrow(ListMoe):
        def __init__(self) -> None:
            super().__init__(16, 4)

    h = best(Narrow())
    assert (h.region.experts, h.region.d_out, h.region.top_k) == (16, 4, K) and h.routing.kind == "slots"


# ------------------------------------------------------------------------------------------------ near misses


class ListMoe(nn.Module):
    """Two-layer experts in a list; `combine` is what the near misses change."""

    def __init__(self, experts: int = E, out: int = D) -> None:
        super().__init__()
        self.out = out
        self.router = nn.Linear(D, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, out)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        return self.combine(tokens, self.router(tokens).softmax(-1)).view(*x.shape[:-1], -1)

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = torch.zeros(len(x), self.out, dtype=x.dtype)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class DenseMixture(ListMoe):
    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        return sum(probs[:, e, None] * expert(x) for e, expert in enumerate(self.experts))


class RouterIgnored(ListMoe):
    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        y = sum(expert(x) for expert in self.experts) / E
        return y + 0 * probs.topk(K, -1).indices.sum()


class HiddenRouter(ListMoe):
    """Which experts are used depends on Python's own random numbers: nothing recorded explains it."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        choice = [torch.tensor([(7 * t + 3 * e) % 5 < 2 for t in range(len(x))]) for e in range(E)]
        weights = [[((5 * t + e) % 11) / 3 + 0.1 for t in range(len(x))] for e in range(E)]
        y = torch.zeros_like(x)
        for mask, weight, expert in zip(choice, weights, self.experts):
            for t in mask.nonzero().flatten().tolist():
                y[t] += expert(x[t : t + 1])[0] * weight[t]
        return y


class CrossToken(ListMoe):
    """Experts whose rows are averages over all tokens."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            rows = expert[0](x[token])
            y[token] += expert[2](rows - rows.mean(0)) * weights[token, slot, None]
        return y


class NonLinearGate(ListMoe):
    """The weight comes in before the activation."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = torch.zeros_like(x)
        for e, (up, act, down) in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y[token] += down(act(up(x[token]) * weights[token, slot, None]))
        return y


class PlainMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_the_plain_block_is_found():
    assert best(ListMoe()).region.experts == E


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (DenseMixture, "every expert weighs every token (a dense mixture, nothing to route)"),
        (RouterIgnored, "every expert weighs every token (a dense mixture, nothing to route)"),
        (HiddenRouter, "but no router value explains the gates"),
        (CrossToken, "no recorded tensor holds all rows that the experts read"),
        (NonLinearGate, "the routing weight enters before a non-linear step"),
    ],
)
def test_near_misses_say_why(block, reason):
    found, near = search(block())
    assert not found and any(reason in line for line in near), near


def test_no_experts_at_all():
    found, near = search(PlainMlp())
    assert not found and not near


def test_experts_that_no_token_reached():
    class Rare(ListMoe):
        def combine(self, x: Tensor, probs: Tensor) -> Tensor:
            return super().combine(x, probs * torch.tensor([1, 1, 1, 0], dtype=x.dtype))

    twin = probe.probe_copy(Rare())
    x = torch.randn(40, D, dtype=torch.float64)
    first = Lifter(twin)
    capture(twin, (x,), {}, first)
    lifter = Lifter(twin, find.expert_groups(first)[0])
    capture(twin, (x,), {}, lifter)
    with pytest.raises(find.Unreached, match=r"no token reached the expert that owns experts\.3\.0\.weight"):
        find.check_reached(twin, lifter)


def test_a_block_that_writes_to_its_input_is_declined():
    class Writes(ListMoe):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            return super().forward(x)

    with pytest.raises(Decline, match="changes its input in place"):
        search(Writes())


def test_complex_inputs_are_declined():
    trace = capture(nn.Identity(), (torch.zeros(3, dtype=torch.complex64),), {})
    with pytest.raises(Decline, match="complex"):
        find.side_effects(trace)


# ------------------------------------------------------------------------------------------------ explanations


class Dropping(ListMoe):
    """A token's second choice is kept where a mask says so."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        keep = weights > 0.28
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where((ids == e) & keep)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Scaled(ListMoe):
    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        return sum(expert(x) * probs.gt(0.25)[:, e, None] * 2.5 for e, expert in enumerate(self.experts))


class DenseZeros(ListMoe):
    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        gates = F.threshold(probs, 0.25, 0.0)
        return sum(expert(x) * gates[:, e, None] for e, expert in enumerate(self.experts))


class WeightOnInput(ListMoe):
    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, expert(x[token] * weights[token, slot, None]))
        return y


class Identity(ListMoe):
    """Labels beyond the experts pass the token through (zero-computation experts)."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E + 2)

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = (weights * (ids >= E)).sum(-1, keepdim=True) * x
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


class Shuffled(ListMoe):
    """Label l means expert 3 - l."""

    def combine(self, x: Tensor, probs: Tensor) -> Tensor:
        weights, ids = probs.topk(K, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(reversed(self.experts)):
            token, slot = torch.where(ids == e)
            y = y.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return y


@pytest.mark.parametrize(
    ("block", "kind", "more"),
    [
        (ListMoe, "slots", {"scale": 1.0, "order": None, "keep": None}),
        (Scaled, "dense", {"scale": 2.5}),
        (DenseZeros, "dense", {"scale": 1.0}),
        (Shuffled, "slots", {"order": (3, 2, 1, 0)}),
        (Identity, "slots", {}),
        (WeightOnInput, "slots", {}),
    ],
)
def test_how_the_gates_are_explained(block, kind, more):
    h = best(block())
    assert h.routing.kind == kind and {name: getattr(h.routing, name) for name in more} == more
    assert h.region.identity is (block is Identity)
    assert h.region.weight_position == ("input" if block is WeightOnInput else "output")


def test_a_capacity_is_a_mask_of_slots():
    h = best(Dropping())
    assert h.routing.kind == "slots" and h.routing.keep is not None and h.routing.keep.tensor.dtype == torch.bool
