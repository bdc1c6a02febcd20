"""routing: whatever the layout of the router's values, ids and weights per slot say the same as the gate matrix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moefx.routing import Routing, dense_gates, region_inputs, slots
from moefx.trace import Value

tokens_, experts_, seeds = st.integers(1, 9), st.integers(2, 6), st.integers(0, 2**20)
scales = st.sampled_from([1.0, 2.5, -0.5])


def value(t: Tensor) -> Value:
    return Value(0, t, 0, 0, "call")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gates_of(ids: Tensor, w: Tensor | None, experts: int) -> Tensor:
    """G [T, E] of slots, one at a time; ids outside [0, E) add nothing."""
    gates = torch.zeros(ids.shape[0], experts, dtype=torch.float64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if 0 <= int(ids[t, k]) < experts:
                gates[t, int(ids[t, k])] += 1.0 if w is None else float(w[t, k])
    return gates


def check(routing: Routing, gates: Tensor, ids: Tensor | None, w: Tensor | None, keep: Tensor | None = None) -> None:
    tokens, experts = gates.shape
    region_ids, region_w = region_inputs(routing, experts, tokens, ids, w, keep)
    assert region_ids.shape == (tokens, routing.slots(experts))
    assert region_w is None or region_w.shape == region_ids.shape
    torch.testing.assert_close(gates_of(region_ids, region_w, experts), gates, rtol=1e-6, atol=1e-12)


def shuffled(tokens: int, experts: int, top_k: int, seed: int) -> Tensor:
    """ids [T, K], distinct in a row."""
    return torch.rand(tokens, experts, generator=generator(seed)).argsort(-1)[:, :top_k]


@given(tokens_, experts_, st.integers(1, 4), seeds, scales, st.booleans(), st.booleans(), st.booleans())
def test_slots(tokens, experts, top_k, seed, scale, transposed, weighted, dropping):
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator(seed))  # also twice the same, and outside
    w = torch.rand(tokens, top_k, generator=generator(seed + 1), dtype=torch.float64) if weighted else None
    keep = torch.rand(tokens, top_k, generator=generator(seed + 2)) > 0.4 if dropping else None
    gates = torch.zeros(tokens, experts, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            if 0 <= int(ids[t, k]) < experts and (keep is None or keep[t, k]):
                gates[t, int(ids[t, k])] += scale * (1.0 if w is None else float(w[t, k]))
    if transposed:
        ids, w, keep = ids.t(), None if w is None else w.t(), None if keep is None else keep.t()
    routing = Routing("slots", top_k, value(ids), None if w is None else value(w), scale, transposed)
    check(routing, gates, ids, w, keep)


@given(tokens_, experts_, st.integers(0, 2), seeds, scales)
def test_gather(tokens, experts, more, seed, scale):
    top_k = min(2, experts)
    ids = shuffled(tokens, experts, top_k, seed)
    scores = torch.rand(tokens, experts + more, generator=generator(seed + 1), dtype=torch.float64)
    gates = torch.zeros(tokens, experts, dtype=torch.float64)
    for t in range(tokens):
        for k in range(top_k):
            gates[t, ids[t, k]] += scale * scores[t, ids[t, k]]
    check(Routing("gather", top_k, value(ids), value(scores), scale), gates, ids, scores)


@given(tokens_, experts_, seeds, scales, st.sampled_from([(0, 1, 2), (0, 2, 1), (1, 0, 2)]))
def test_dense_with_further_axes(tokens, experts, seed, scale, axes):
    """w [T, E, C], [T, C, E] or [E, T, C]."""
    dense = torch.rand(tokens, experts, 3, generator=generator(seed), dtype=torch.float64)
    dense = torch.where(torch.rand(dense.shape, generator=generator(seed + 1)) > 0.5, dense, 0.0)
    w = dense.permute(axes)
    axis = axes.index(1) - 3
    check(Routing("dense", 2, None, value(w), scale, axis=axis), scale * dense.sum(2), None, w)


@given(st.integers(1, 3), st.integers(1, 4), experts_, seeds)
def test_dense_over_batch_and_sequence(batch, length, experts, seed):
    w = torch.rand(batch, length, experts, generator=generator(seed), dtype=torch.float64)
    w = torch.where(w > 0.4, w, 0.0)
    check(Routing("dense", 2, None, value(w)), w.reshape(-1, experts), None, w)
    first = w.permute(2, 0, 1)
    check(Routing("dense", 2, None, value(first), axis=-3), w.reshape(-1, experts), None, first)


@given(tokens_, experts_, seeds, scales)
def test_masked(tokens, experts, seed, scale):
    mask = torch.rand(tokens, experts, generator=generator(seed)) > 0.5
    w = torch.rand(tokens, generator=generator(seed + 1), dtype=torch.float64)
    gates = scale * mask.double() * w[:, None]
    check(Routing("masked", 2, value(mask), value(w), scale), gates, mask, w)


@given(tokens_, experts_, seeds, scales, st.booleans(), st.booleans())
def test_choice(tokens, experts, seed, scale, last, weighted):
    capacity = max(1, tokens // 2)
    ids = torch.rand(experts, tokens, generator=generator(seed)).argsort(-1)[:, :capacity]
    w = torch.rand(experts, capacity, generator=generator(seed + 1), dtype=torch.float64) if weighted else None
    gates = torch.zeros(tokens, experts, dtype=torch.float64)
    for e in range(experts):
        for c in range(capacity):
            gates[ids[e, c], e] += scale * (1.0 if w is None else float(w[e, c]))
    ids, w = (ids.t(), None if w is None else w.t()) if last else (ids, w)
    routing = Routing("choice", capacity, value(ids), None if w is None else value(w), scale, axis=1 if last else 0)
    check(routing, gates, ids, w)


@given(tokens_, seeds, st.permutations(range(4)))
def test_labels_in_another_order(tokens, seed, order):
    """Label l means expert order[l]; -1 in the order is a label that is no expert."""
    ids = shuffled(tokens, 4, 2, seed)
    w = torch.rand(tokens, 2, generator=generator(seed), dtype=torch.float64)
    for meaning in (tuple(order), tuple(e if e < 3 else -1 for e in order)):
        experts = max(meaning) + 1
        gates = torch.zeros(tokens, experts, dtype=torch.float64)
        for t in range(tokens):
            for k in range(2):
                if (e := meaning[int(ids[t, k])]) >= 0:
                    gates[t, e] += w[t, k]
        check(Routing("slots", 2, value(ids), value(w), order=meaning), gates, ids, w)


@given(tokens_, seeds, st.permutations(range(4)))
def test_columns_in_another_order(tokens, seed, order):
    w = torch.rand(tokens, 5, generator=generator(seed), dtype=torch.float64)  # one column more than experts
    check(Routing("dense", 2, None, value(w), order=tuple(order)), w[:, list(order)], None, w)


@pytest.mark.parametrize("kind", ["slots", "gather", "dense", "masked"])
def test_no_tokens(kind):
    ids, w = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    w = {"slots": w, "gather": torch.zeros(0, 4), "dense": torch.zeros(0, 4), "masked": torch.zeros(0)}[kind]
    mask = torch.zeros(0, 4, dtype=torch.bool)
    routing = Routing(kind, 2, value(ids), value(w))
    region_ids, region_w = region_inputs(routing, 4, 0, mask if kind == "masked" else ids, w)
    assert region_ids.shape == (0, routing.slots(4)) and region_w is not None and region_w.shape == region_ids.shape


@given(st.integers(1, 3), st.integers(1, 5), experts_, seeds, st.booleans())
def test_choice_in_each_sequence(sequences, length, experts, seed, last):
    """ids [B, E, C] or [B, C, E] number the tokens of a sequence."""
    size = min(2, length)
    scores = torch.rand(sequences, experts, length, generator=generator(seed), dtype=torch.float64)
    w, ids = scores.topk(size)
    gates = torch.zeros_like(scores).scatter(2, ids, w).transpose(1, 2).reshape(-1, experts)
    if last:
        w, ids = w.transpose(1, 2), ids.transpose(1, 2)
    check(Routing("choice", size, value(ids), value(w), axis=-1 if last else 1, apart=True), gates, ids, w)


def test_gates_of_zero_are_slots_to_skip():
    w = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.0, 0.0]])
    ids, _ = region_inputs(Routing("dense", 1, None, value(w)), 3, 2, None, w)
    assert ids.tolist() == [[3, 1, 3], [0, 3, 3]]


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_the_rest_passes(kind):
    """Tokens without a gate, not those whose weight happens to be 0, have an id outside and weight 1."""
    mask = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    weights = torch.tensor([0.5, 0.25, 0.0, 0.0])
    w = weights if kind == "masked" else mask * 0.5
    routing = Routing(kind, 1, value(mask) if kind == "masked" else None, value(w), rest=True)
    ids, found = region_inputs(routing, 3, 4, mask if kind == "masked" else None, w)
    assert found is not None and ids.shape == found.shape == (4, 4) and ids[:, 3].tolist() == [3, 3, 3, 3]
    assert found[:, 3].tolist() == [0, 1, 0, 1] and "the rest passes" in str(routing)
    assert found[:, :3].sum(1).tolist() == ([0.5, 0, 0, 0] if kind == "masked" else [0.5, 0, 0.5, 0])
    assert torch.where(ids < 3, 0, found).sum(1).tolist() == [0, 1, 0, 1]  # slots to skip weigh nothing


def test_dense_gates_needs_the_tokens_in_the_leading_axes():
    assert dense_gates(torch.zeros(6, 4), 1, 5) is None
    w = torch.rand(2, 3, 4)
    made = dense_gates(w, 2, 6)
    assert made is not None and torch.equal(made, w.reshape(6, 4))


def test_slots_of_both_layouts():
    t = torch.arange(6).view(3, 2)
    assert torch.equal(slots(t, 2, False), t) and torch.equal(slots(t.t(), 2, True), t)
    assert torch.equal(slots(t.view(3, 1, 2), 2, False), t)


def test_weights_keep_their_gradient():
    ids = torch.tensor([[0, 1], [1, 2]])
    w = torch.rand(2, 2, requires_grad=True)
    _, out = region_inputs(Routing("slots", 2, value(ids), value(w), 2.0), 3, 2, ids, w)
    assert out is not None
    out.sum().backward()
    assert w.grad is not None and bool((w.grad == 2).all())


def test_text_names_the_kind_weight_and_scale():
    routing = Routing("slots", 2, value(torch.zeros(1, 2)), None)
    assert str(routing) == "top-2 ids and weights, weight 1"
    w = value(torch.zeros(1, 2))
    assert str(replace(routing, w=w, scale=2.5)) == "top-2 ids and weights, scaled by 2.5"
    assert str(Routing("choice", 3, w, w)) == "expert choice: each expert picks its tokens"
