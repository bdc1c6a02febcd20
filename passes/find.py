"""find: Trace --> hypotheses of what the block's routed part computes.

    y[t] = sum_e G[t, e] * f(x_t; theta_e)

The proof, step by step; 1 is in `_experts`, 2 and 3 in `_gates`, 4 in `_explain`.

1. *experts*   Template values (see `_lift`) with several bindings: f with several theta_e.    -> Bank
2. *tokens*    The smallest recorded tensor that holds every row fed to f.                      -> x [T, D]
3. *gates*     For every later tensor y of T rows, solve the equation for G by least squares.
               A residual of rounding size means: y IS a routed output, and G is the true gate matrix.
4. *routing*   Explain G by recorded router values: ids and weights, or a dense gate tensor.
5. *identity*  Experts beyond the bank pass the token through, if G has such a part.

Nothing here knows how the block spelled its dispatch and combine. A hypothesis may still be wrong outside of the probe
(a capacity that was not reached, say): verification decides, and the next hypothesis gets its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from moefx.passes._experts import Bank, Evaluator, banks, depth_of, expert_groups, gate_nodes
from moefx.passes._explain import explanations
from moefx.passes._gates import (
    NOISE,
    TOLERANCE,
    Gates,
    GateSystem,
    is_rows,
    scaled_bases,
    solve_gates,
    token_bases,
    token_width,
)
from moefx.passes._lift import Lifter
from moefx.passes._template import layout_of, write_template
from torch import Tensor, nn

from moefx.errors import Decline
from moefx.ir import Leaf, Region, Template
from moefx.routing import Hypothesis, Routing
from moefx.trace import Trace, Value, precision


def hypotheses(
    trace: Trace, lifter: Lifter, redraw: Callable[[int], Trace | None], near: list[str]
) -> Generator[Hypothesis, None, str]:
    """Everything the routed part may be, likeliest first. `near` collects why candidates failed.

    Returns the name of a parameter whose expert ran without a gate in this run, or "": it may be a shared expert of the
    same kind, and was taken for one, or it had no luck.
    redraw(seed): the trace of the same run with other expert parameters, for blocks with more experts than outputs.
    """
    evaluate = Evaluator(lifter)
    ungated = ""
    for bank in banks(lifter)[:6]:
        what = f"{bank.experts} experts of {depth_of(lifter, bank.tv)} products"
        template, leaves = write_template(lifter, bank)
        if not any(len(leaf.shape) == 2 and not leaf.shared for leaf in leaves):
            near.append(f"{what}: the varying parameters are not matrices")
            continue
        ungated = (yield from _output_side(trace, lifter, evaluate, bank, template, leaves, redraw, near, what)) or ungated
        yield from _input_side(trace, lifter, evaluate, bank, template, leaves, near, what)
    return ungated


def _region(
    lifter: Lifter, bank: Bank, template: Template, leaves: tuple[Leaf, ...], routing: Routing, **more: Any
) -> Region:
    matrices = [leaf.shape for leaf in leaves if len(leaf.shape) == 2 and not leaf.shared]
    width = lifter.nodes[bank.tv].width
    hidden = matrices[0][1] if len(matrices) > 1 else width
    return Region(
        bank.experts, routing.slots(bank.experts), token_width(lifter, bank.tv), width, hidden, template, leaves,
        routing=str(routing), layout=layout_of(leaves), **more,
    )  # fmt: skip


def _output_side(
    trace: Trace, lifter: Lifter, evaluate: Evaluator, bank: Bank, template: Template, leaves: tuple[Leaf, ...],
    redraw: Callable[[int], Trace | None], near: list[str], what: str,
) -> Generator[Hypothesis, None, str]:  # fmt: skip
    """Weights on f's result (or inside f, where f is linear in them). Returns as `hypotheses`."""
    ungated = ""
    width = lifter.nodes[bank.tv].width
    bases = token_bases(trace, lifter, bank)
    if not bases:
        near.append(f"{what}: no recorded tensor holds all rows that the experts read")
    for base, dtype in bases:
        x = base.tensor.reshape(-1, base.shape[-1]).to(dtype)
        read_as = None if dtype is base.tensor.dtype else dtype
        if read_as is not None:
            template, leaves = write_template(lifter, bank, read_as)
        if gate_nodes(lifter, bank.tv) and not _linear_in_weight(evaluate, bank, x):
            near.append(f"{what}: the routing weight enters before a non-linear step")
            return ungated
        system = _gate_systems(trace, evaluate, bank, x, width, redraw)
        found = False
        for solution in solve_gates(trace, system, x.shape[0], width, x.shape[1]):
            found = True
            gates, support = solution.gates, solution.gates.support
            chosen, text, theta = bank, template, leaves
            if not bank.stacked and int(support.any(0).sum()) >= 2 and not bool(support.any(0).all()):
                used = torch.nonzero(support.any(0)).flatten().tolist()  # without the shared expert of the same kind
                ungated = lifter.names[bank.bindings[int((~support.any(0)).nonzero()[0])][0][0]]
                chosen = Bank(bank.tv, tuple(bank.bindings[e] for e in used), False)
                text, theta = write_template(lifter, chosen, read_as)
                gates, support = gates.of(used), support[:, used]
            explained = False
            for routing in explanations(trace, gates, chosen, solution.combined.index):
                if routing.kind in ("slots", "gather") and routing.top_k >= chosen.experts and bool(support.all()):
                    continue
                explained = True
                region = _region(lifter, chosen, text, theta, routing, identity=gates.identity is not None)
                yield Hypothesis(trace, region, base, routing, solution.combined, solution.residual)
            if not explained:
                dense = float(support.float().mean()) > 0.95
                made = f" (the sum is made at {solution.combined.line})"
                near.append(
                    f"{what}: every expert weighs every token (a dense mixture, nothing to route){made}"
                    if dense else f"{what}: residual {solution.residual:.1e}, but no router value explains the gates{made}"
                )  # fmt: skip
        if not found:
            near.append(f"{what}: no tensor of {x.shape[0]} rows is a weighted sum of expert outputs")
    return ungated


def _gate_systems(
    trace: Trace, evaluate: Evaluator, bank: Bank, x: Tensor, width: int, redraw: Callable[[int], Trace | None]
) -> Callable[[bool], GateSystem]:
    """The gate system without or with an identity part, with as many draws of expert parameters as it needs."""

    def outputs() -> Tensor:
        return torch.stack([evaluate(bank.tv, b, x) for b in bank.bindings], 1)

    def reader(t: Trace) -> Callable[[Value], Tensor | None]:
        def read(value: Value) -> Tensor | None:
            same = t.values[value.index].tensor
            return same.reshape(x.shape[0], width) if same.shape == value.shape else None

        return read

    draws = [(outputs(), reader(trace))]
    if width < bank.experts + 3:
        for seed in range(1, min(-(-2 * (bank.experts + 3) // width), 12) + 1):
            again = redraw(seed)
            if again is not None and len(again.values) == len(trace.values):
                draws.append((outputs(), reader(again)))
        redraw(0)  # the first parameters again
    lowest = precision([v.tensor for v in trace.values if v.tainted])
    return lambda identity: GateSystem(draws, x, identity, NOISE.get(lowest, 1e-5))


def _linear_in_weight(evaluate: Evaluator, bank: Bank, x: Tensor) -> bool:
    once, twice = (evaluate(bank.tv, bank.bindings[0], x, w) for w in (1.0, 2.0))
    return torch.allclose(2 * once, twice, rtol=1e-6, atol=1e-9 * float(once.abs().max()))


def _input_side(
    trace: Trace,
    lifter: Lifter,
    evaluate: Evaluator,
    bank: Bank,
    template: Template,
    leaves: tuple[Leaf, ...],
    near: list[str],
    what: str,
) -> Iterator[Hypothesis]:
    """Weights on the experts' input: y[t] = sum_e f(G[t,e] * x_t; theta_e)."""
    width = lifter.nodes[bank.tv].width
    if gate_nodes(lifter, bank.tv):
        return
    for base, gates in scaled_bases(trace, lifter, bank):
        x = base.tensor.reshape(-1, base.shape[-1]).double()
        total = torch.zeros(x.shape[0], width, dtype=torch.float64)
        for e, binding in enumerate(bank.bindings):
            column = gates[:, e : e + 1]
            total += torch.where(
                column != 0, evaluate(bank.tv, binding, (column * x).to(base.tensor.dtype)).double(), 0.0
            )
        for value in trace.values:
            if value.tainted and is_rows(value, width) and value.tensor.numel() == total.numel():
                y = value.tensor.reshape(total.shape).double()
                residual = float((y - total).norm() / total.norm().clamp_min(1e-300))
                if residual > TOLERANCE.get(value.tensor.dtype, 1e-6):
                    continue
                for routing in explanations(trace, Gates(gates, None), bank, value.index):
                    region = _region(lifter, bank, template, leaves, routing, weight_position="input")
                    yield Hypothesis(trace, region, base, routing, value, residual)
    near.append(f"{what}: nor are weights found on the input side")


class Unreached(Exception):
    """Some listed expert seems to have had no token in this run."""


def check_reached(module: nn.Module, lifter: Lifter) -> None:
    """Raises Unreached when matrices are shaped like those of listed experts, and no expert uses them."""
    found = banks(lifter)
    if not found or found[0].stacked:
        return
    leaves = write_template(lifter, found[0])[1]
    used = {name for leaf in leaves for name in leaf.params}
    tensors = dict(module.named_parameters())
    listed = [leaf for leaf in leaves if len(leaf.shape) == 2 and not leaf.stacked]
    shapes = {tuple(tensors[name].shape) for leaf in listed for name in leaf.params if name in tensors}
    missing = [name for name, p in tensors.items() if name not in used and tuple(p.shape) in shapes]
    if missing:
        raise Unreached(f"no token reached the expert that owns {missing[0]}")


def side_effects(trace: Trace) -> None:
    """Raises Decline for what a replay cannot keep."""
    before = [v for v in trace.inputs if isinstance(v, Value)]
    for old, new in zip(before, trace.inputs_after):
        if old is not new:
            raise Decline(
                "the block changes its input in place, which a rewritten block would not do at the same moment"
            )
    if any(v.tensor.is_complex() for v in before):
        raise Decline("the block takes complex inputs")


__all__ = [
    "Hypothesis",
    "Lifter",
    "Routing",
    "expert_groups",
    "hypotheses",
    "Unreached",
    "check_reached",
    "side_effects",
]
