"""Each op against its definition, on the sizes and values that go wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefx import ops
from moefx.ops import OPS

E, D = 5, 8
NAN = float("nan")


def routed(tokens: int, top_k: int = 2, low: int = -1, high: int = E + 1) -> tuple[torch.Tensor, ...]:
    """ids (some outside by default), order, offsets, position."""
    ids = torch.randint(low, high, (tokens, top_k))
    return (ids, *ops.route(ids, E))


def slots_of(order: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return order[: int(offsets[-1])]


# ------------------------------------------------------------------------------------------------ route


@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6))
def test_route_sorts_and_position_inverts_order(tokens, top_k, experts, seed):
    ids = torch.randint(-2, experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    order, offsets, position = ops.route(ids, experts)
    assert (order.dtype, offsets.dtype, position.dtype) == (torch.int64, torch.int32, torch.int64)
    assert sorted(order.tolist()) == list(range(tokens * top_k))
    flat, place, edges = ids.flatten().tolist(), position.flatten().tolist(), offsets.tolist()
    for e in range(experts):
        rows = order[edges[e] : edges[e + 1]].tolist()
        assert rows == [slot for slot, i in enumerate(flat) if i == e]  # all of them, and stable
    for slot, e in enumerate(flat):
        assert place[slot] == (order.tolist().index(slot) if 0 <= e < experts else -1)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_route_takes_any_integers(dtype):
    ids = torch.tensor([[1, 0], [1, 3]], dtype=dtype)
    order, offsets, position = ops.route(ids, 3)
    assert order.tolist() == [1, 0, 2, 3]
    assert offsets.tolist() == [0, 1, 3, 3]
    assert position.tolist() == [[1, 0], [2, -1]]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_gather_rows(tokens, weighted):
    _, order, offsets, _ = routed(tokens)
    x, w = torch.randn(tokens, D), torch.rand(tokens, 2, dtype=torch.float64)
    rows = ops.gather_rows(x, order, 2, offsets, w if weighted else None)
    assert rows.dtype == x.dtype
    slots = slots_of(order, offsets)
    expected = x[slots // 2] * (w.flatten()[slots, None] if weighted else 1)
    torch.testing.assert_close(rows, expected.to(x.dtype))


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_backward_is_the_gradient_of_gather_rows(tokens, weighted):
    _, order, offsets, position = routed(tokens)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    w = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    rows = ops.gather_rows(x, order, 2, offsets, w if weighted else None)
    g = torch.randn_like(rows)
    expected = torch.autograd.grad(rows, [x, w], g, materialize_grads=True, allow_unused=True)
    gx, gw = ops.rows_backward(g, x.detach(), position, order, offsets, w.detach() if weighted else None)
    torch.testing.assert_close(gx, expected[0])
    if weighted:
        torch.testing.assert_close(gw, expected[1])
    else:
        assert gw is None


# ------------------------------------------------------------------------------------------------ experts

# Widths of 3 and 5 keep grouped_mm out (its strides are multiples of 16 bytes), widths of 8 let it in.
WIDTHS = [(8, 8), (8, 16), (3, 5), (8, 5), (5, 8)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_grouped_linear(dtype, transposed, width, tokens):
    ids, order, offsets, _ = routed(tokens)
    rows = torch.randn(int(offsets[-1]), width[0], dtype=dtype)
    weight = torch.randn(E, *width, dtype=dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    expected = [row.double() @ weight[e].double() for row, e in zip(rows, ids.flatten()[slots_of(order, offsets)])]
    out = ops.grouped_linear(rows, weight, offsets)
    assert out.dtype == dtype
    torch.testing.assert_close(out, torch.stack(expected).to(dtype) if expected else rows.new_zeros(0, width[1]))


def test_grouped_linear_on_every_other_column_and_an_unaligned_address():
    _, _, offsets, _ = routed(9)
    rows = torch.randn(int(offsets[-1]), 8)
    wide = torch.randn(E, 8, 16)
    torch.testing.assert_close(
        ops.grouped_linear(rows, wide[:, :, ::2], offsets), ops.grouped_linear(rows, wide[:, :, ::2].clone(), offsets)
    )
    shifted = torch.randn(E * 64 + 1)[1:].view(E, 8, 8)
    torch.testing.assert_close(
        ops.grouped_linear(rows, shifted, offsets), ops.grouped_linear(rows, shifted.clone(), offsets)
    )


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_grouped_wgrad_writes_every_expert(out_dtype, transposed, tokens):
    _, _, offsets, _ = routed(tokens)
    rows, grad = torch.randn(int(offsets[-1]), 3), torch.randn(int(offsets[-1]), 4)
    out = torch.full((E, 4, 3), NAN, dtype=out_dtype).transpose(1, 2) if transposed else torch.full((E, 3, 4), NAN)
    edges = offsets.tolist()
    expected = torch.stack([rows[a:b].t() @ grad[a:b] for a, b in zip(edges, edges[1:])])
    ops.grouped_wgrad(rows, grad, offsets, out)
    torch.testing.assert_close(out, expected.to(out.dtype))
    ops.grouped_wgrad_add(rows, grad, offsets, out)
    torch.testing.assert_close(out, 2 * expected.to(out.dtype))


@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_expert_rows_and_expert_sum(tokens):
    ids, order, offsets, _ = routed(tokens)
    leaf = torch.randn(E, 3)
    of_row = ids.flatten()[slots_of(order, offsets)]
    rows = ops.expert_rows(leaf, offsets, len(of_row))
    torch.testing.assert_close(rows, leaf[of_row])
    expected = torch.zeros(E, 3).index_add(0, of_row, rows)
    torch.testing.assert_close(ops.expert_sum(rows, offsets), expected)


def test_expert_sum_adds_in_fp32():
    offsets = torch.tensor([0, 4096, 4096], dtype=torch.int32)
    ones = torch.ones(4096, 1, dtype=torch.bfloat16)
    assert ops.expert_sum(ones, offsets).tolist() == [[4096.0], [0.0]]


# ------------------------------------------------------------------------------------------------ combine


def slot_by_slot(h, position, w):
    y = torch.zeros(position.shape[0], h.shape[1], dtype=torch.float64)
    for t, row in enumerate(position.tolist()):
        for k, r in enumerate(row):
            if r >= 0:
                y[t] += (1 if w is None else w[t, k].double()) * h[r].double()
    return y


# Beyond MANY_SLOTS combine works by rows.
@pytest.mark.parametrize("top_k", [1, 2, 4, ops.MANY_SLOTS + 3])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("low", [0, -3])
def test_combine(top_k, tokens, weighted, low):
    _, _, offsets, position = routed(tokens, top_k, low, E)
    h = torch.randn(int(offsets[-1]), D, dtype=torch.bfloat16)
    w = torch.rand(tokens, top_k) if weighted else None
    y = ops.combine(h, position, w, torch.float32)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, slot_by_slot(h, position, w).float())


def test_combine_where_no_slot_has_a_row():
    _, _, _, position = routed(3, 2, E, E + 1)
    assert ops.combine(torch.zeros(0, D), position, torch.rand(3, 2), torch.float32).eq(0).all()


@pytest.mark.parametrize("top_k", [1, 2, ops.MANY_SLOTS + 3])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_bias_of_each_expert_and_its_gradients(top_k, tokens):
    """Against rows that had it added before they were summed."""
    ids, order, offsets, position = routed(tokens, top_k)
    h, bias = torch.randn(int(offsets[-1]), D, dtype=torch.float64), torch.randn(E, D, dtype=torch.float64, requires_grad=True)
    w, gy = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True), torch.randn(tokens, D, dtype=torch.float64)
    rows = bias.repeat_interleave(offsets.long().diff(), 0)
    expected = slot_by_slot_with_grad(h + rows, position, w)
    torch.testing.assert_close(ops.combine(h, position, w.detach(), torch.float64, bias.detach(), ids), expected.detach())
    of_w, of_bias = torch.autograd.grad((expected * gy).sum(), [w, bias], materialize_grads=True, allow_unused=True)
    of_rows = ops.combine_backward(gy, h, order, position, offsets, w.detach())[1]
    torch.testing.assert_close(ops.bias_products(gy, position, offsets, bias.detach()) + of_rows, of_w)
    gathered = ops.gather_rows(gy, order, top_k, offsets)
    torch.testing.assert_close(ops.expert_sum(gathered, offsets, order, w.detach()), of_bias)


@pytest.mark.parametrize("top_k", [2, ops.MANY_SLOTS + 3])
@pytest.mark.parametrize("bad", ["h", "w"])
def test_nan_stays_with_its_token(top_k, bad):
    _, order, offsets, position = routed(7, top_k)
    h, w = torch.randn(int(offsets[-1]), D), torch.rand(7, top_k)
    outside = position < 0
    w[outside] = NAN  # a weight without a row is not used
    row = 3
    slot = int(order[row])
    (h[row] if bad == "h" else w.view(-1)[slot : slot + 1]).fill_(NAN)
    y = ops.combine(h, position, w, torch.float32)
    assert y.isnan().any(1).tolist() == [t == slot // top_k for t in range(7)]


@pytest.mark.parametrize("top_k", [1, 2, ops.MANY_SLOTS + 3])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_combine_backward_is_the_gradient_of_combine(top_k, tokens, weighted):
    _, order, offsets, position = routed(tokens, top_k)
    h = torch.randn(int(offsets[-1]), D, dtype=torch.float64, requires_grad=True)
    w = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(tokens, D, dtype=torch.float64)
    y = slot_by_slot_with_grad(h, position, w if weighted else torch.ones_like(w))
    expected = torch.autograd.grad((y * gy).sum(), [h, w], materialize_grads=True, allow_unused=True)
    given_w = w.detach() if weighted else None
    gh, gw = ops.combine_backward(gy, h.detach(), order, position, offsets, given_w)
    torch.testing.assert_close(gh, expected[0])
    if weighted:
        torch.testing.assert_close(gw, expected[1])
    else:
        assert gw is None


def slot_by_slot_with_grad(h, position, w):
    rows = torch.cat([h, h.new_zeros(1, h.shape[1])])  # position -1 is the row of zeros
    return (rows[position] * w.unsqueeze(2)).sum(1)


@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtypes_of_their_values(w_dtype):
    _, order, offsets, position = routed(7)
    h = torch.randn(int(offsets[-1]), D, dtype=torch.bfloat16)
    w = torch.rand(7, 2, dtype=w_dtype)
    gh, gw = ops.combine_backward(torch.randn(7, D), h, order, position, offsets, w)
    assert (gh.dtype, gw.dtype) == (torch.bfloat16, w_dtype)
    gx, gw = ops.rows_backward(h, torch.randn(7, D), position, order, offsets, w)
    assert (gx.dtype, gw.dtype) == (torch.float32, w_dtype)


# ------------------------------------------------------------------------------------------------ identity experts


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_identity(tokens):
    ids, _, _, position = routed(tokens)
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    w = torch.rand(tokens, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(tokens, D, dtype=torch.float64)
    outside = ((ids < 0) | (ids >= E)).double()
    expected = y + x * (w * outside).sum(1, keepdim=True)
    torch.testing.assert_close(ops.identity_add(y, x.detach(), position, w.detach()), expected.detach())
    gy = torch.randn_like(y)
    gradients = torch.autograd.grad(expected, [x, w], gy)
    for got, wanted in zip(ops.identity_backward(gy, x.detach(), position, w.detach()), gradients):
        torch.testing.assert_close(got, wanted)


def test_identity_does_not_touch_tokens_without_identity_slots():
    position = torch.tensor([[0, 1], [2, -1]])
    x = torch.full((2, D), float("inf"))
    y = ops.identity_add(torch.ones(2, D), x, position, torch.ones(2, 2))
    assert y[0].eq(1).all() and y[1].isinf().all()


def test_table_holds_every_op():
    assert all(getattr(ops, name) is op for name, op in OPS.items())
    assert len(OPS) == 20
