"""lift: experts of one function are the bindings of one template value, however the block spells their work.

The spellings below share nothing but their meaning: a SwiGLU of each token's two best experts. The point of lifting is
that the template, as text, comes out the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moefx.passes import _keys
from moefx.passes._experts import Bank, Evaluator, banks, depth_of, expert_groups
from moefx.passes._lift import DATA, ZERO, Lifter
from moefx.passes._template import write_template
from moefx.passes.capture import capture
from torch import Tensor, nn

from moefx.probe import Emulated, probe_copy

D, H, E, K, T = 12, 10, 4, 2, 29

SWIGLU = """\
v0 = x()  # [R, 12]
v1 = linear(v0, leaf0)  # [R, 10]
v2 = aten.silu.default(v1)  # [R, 10]
v3 = linear(v0, leaf1)  # [R, 10]
v4 = aten.mul.Tensor(v2, v3)  # [R, 10]
v5 = linear(v4, leaf2)  # [R, 12]"""


class Parts(nn.Module):
    """A router and one layout of the experts' parameters; `spell` does the rest."""

    def __init__(self, spell: Callable[..., Tensor], **parameters: tuple[int, ...]) -> None:
        super().__init__()
        self.spell = spell
        self.router = nn.Linear(D, E)
        for name, shape in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        return self.spell(self, x, weights, ids)


SEPARATE = {"gate": (E, D, H), "up": (E, D, H), "down": (E, H, D)}
TRANSPOSED = {"gate": (E, H, D), "up": (E, H, D), "down": (E, D, H)}
FUSED = {"gate_up": (E, D, 2 * H), "down": (E, H, D)}
FUSED_TRANSPOSED = {"gate_up": (E, 2 * H, D), "down": (E, D, H)}


def put_back(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    back = torch.empty_like(rows)
    back[order] = rows
    return (back.view(-1, K, D) * weights[..., None]).sum(1)


def loop(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        rows = x[token]
        hidden = F.silu(rows @ self.gate[e]) * (rows @ self.up[e])
        out.index_add_(0, token, hidden @ self.down[e] * weights[token, slot, None])
    return out


def loop_of_linears(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        mask = (ids == e).any(-1)
        rows = x[mask]
        weight = (weights * (ids == e)).sum(-1)[mask]
        out[mask] += weight[:, None] * F.linear(
            F.silu(F.linear(rows, self.gate[e])) * F.linear(rows, self.up[e]), self.down[e]
        )
    return out


def loop_of_chunks(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, -1)
        out = out.index_add(0, token, F.linear(F.silu(gate) * up, self.down[e]) * weights[token, slot].unsqueeze(-1))
    return out


def interleaved(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(E):
        token, slot = torch.where(ids == e)
        both = x[token] @ self.gate_up[e]
        out[token] = out[token] + (F.silu(both[:, ::2]) * both[:, 1::2]) @ self.down[e] * weights[token, slot, None]
    return out


def bmm(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    every = x.expand(E, -1, -1)
    rows = torch.bmm(F.silu(torch.bmm(every, self.gate)) * torch.bmm(every, self.up), self.down)
    gates = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, ids, weights)
    return torch.einsum("te,etd->td", gates, rows)


def einsum(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    hidden = F.silu(torch.einsum("td,edh->teh", x, self.gate)) * torch.einsum("td,edh->teh", x, self.up)
    rows = torch.einsum("teh,ehd->ted", hidden, self.down)
    return (rows.gather(1, ids[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1)


def gathered_weights(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    rows = x[:, None, None]
    hidden = F.silu(rows @ self.gate[ids]) * (rows @ self.up[ids])
    return ((hidden @ self.down[ids])[:, :, 0] * weights[..., None]).sum(1)


def gathered_transposed(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """As in gpt-oss's reference: einsum over weights picked by index."""
    gate, up = torch.einsum("kid,d->ki", self.gate_up[ids[0]], x[0]).chunk(2, -1)
    del gate, up
    hidden = torch.einsum("tkid,td->tki", self.gate_up[ids], x)
    gate, up = hidden.chunk(2, dim=-1)
    return torch.einsum("tkdi,tki,tk->td", self.down[ids], F.silu(gate) * up, weights)


def sort(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    rows = x[order // K]
    parts = rows.split(ids.flatten().bincount(minlength=E).tolist())
    done = [(F.silu(p @ g) * (p @ u)) @ d for p, g, u, d in zip(parts, self.gate, self.up, self.down)]
    return put_back(torch.cat(done), order, weights)


def padded(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A buffer [E, C, D] filled by index_put, with empty slots at the end."""
    flat = ids.flatten()
    assigned = F.one_hot(flat, E)
    place = (assigned.cumsum(0) * assigned).sum(-1) - 1
    buffer = torch.zeros(E, T * K, D, dtype=x.dtype)
    buffer[flat, place] = x.repeat_interleave(K, 0)
    rows = torch.bmm(F.silu(torch.bmm(buffer, self.gate)) * torch.bmm(buffer, self.up), self.down)
    return (rows[flat, place].view(-1, K, D) * weights[..., None]).sum(1)


def grouped(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    order = ids.flatten().argsort()
    ends = ids.flatten().bincount(minlength=E).cumsum(0).to(torch.int32)
    rows = x[order // K]
    product = torch.ops.moefx_test.grouped_product
    return put_back(
        product(F.silu(product(rows, self.gate, ends)) * product(rows, self.up, ends), self.down, ends), order, weights
    )


@torch.library.custom_op("moefx_test::grouped_product", mutates_args=())
def _grouped_product(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """An operator that lifting has never heard of: known by its values only."""
    out = x.new_zeros(x.shape[0], w.shape[2])
    start = 0
    for e, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end] @ w[e]
        start = end
    return out


SPELLINGS = {
    "loop": (loop, SEPARATE),
    "loop of linears": (loop_of_linears, TRANSPOSED),
    "loop of chunks": (loop_of_chunks, FUSED_TRANSPOSED),
    "bmm": (bmm, SEPARATE),
    "einsum": (einsum, SEPARATE),
    "gathered weights": (gathered_weights, SEPARATE),
    "gathered weights transposed": (gathered_transposed, FUSED_TRANSPOSED),
    "sort": (sort, SEPARATE),
    "padded": (padded, SEPARATE),
    "grouped product": (grouped, SEPARATE),
}


def run(module: nn.Module, *inputs: Tensor, experts: frozenset[str] | None = None) -> tuple[nn.Module, Lifter, Tensor]:
    """A private copy, the lifter that followed it, and its result."""
    twin = probe_copy(module)
    lifter = Lifter(twin, experts)
    trace = capture(twin, inputs, {}, lifter)
    return twin, lifter, trace.result[0][0].tensor


def lifted(module: nn.Module) -> tuple[Lifter, Bank]:
    """As the pipeline does: once for all parameters, and again for the group of experts that was seen."""
    x = torch.randn(T, D, dtype=torch.float64)
    first = run(module, x)[1]
    lifter = run(module, x, experts=expert_groups(first)[0])[1]
    return lifter, banks(lifter)[0]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_gives_the_same_template(name):
    spell, layout = SPELLINGS[name]
    lifter, bank = lifted(Parts(spell, **layout))
    template, leaves = write_template(lifter, _without_gate(lifter, bank))
    assert str(template) == SWIGLU
    assert bank.experts == E and bank.stacked
    assert [leaf.shape for leaf in leaves] == [(D, H), (D, H), (H, D)]


def _without_gate(lifter: Lifter, bank: Bank) -> Bank:
    """Whether the weight was multiplied in already is the spelling's affair: `f` is what it weighs."""
    node = lifter.nodes[bank.tv]
    if node.kind != "gate":
        return bank
    ((child, _),) = node.children
    return Bank(child, bank.bindings, bank.stacked)


def test_interleaved_columns_are_the_same_function():
    """Columns taken after the product are columns of the matrix."""
    lifter, bank = lifted(Parts(interleaved, **FUSED))
    template, leaves = write_template(lifter, _without_gate(lifter, bank))
    assert str(template) == SWIGLU
    assert [leaf.strides for leaf in leaves] == [(2 * H, 2), (2 * H, 2), (D, 1)]
    assert [leaf.offsets[0] for leaf in leaves] == [0, 1, 0]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H, False), nn.Linear(D, H, False), nn.Linear(H, D, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ListMoe(nn.Module):
    def __init__(self, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(expert() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(K, -1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(ids == e)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out


def test_listed_experts_give_it_too():
    lifter, bank = lifted(ListMoe(Expert))
    template, leaves = write_template(lifter, _without_gate(lifter, bank))
    assert str(template) == SWIGLU
    assert not bank.stacked and leaves[0].params == tuple(f"experts.{e}.gate.weight" for e in range(E))


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n != "gathered weights"])
def test_bindings_are_the_experts_slices(name):
    """The template evaluated with expert e's binding is expert e."""
    spell, layout = SPELLINGS[name]
    torch.manual_seed(1)
    module = Parts(spell, **layout)
    lifter, bank = lifted(module)
    bank = _without_gate(lifter, bank)
    twin: Any = probe_copy(module)
    x = torch.randn(5, D, dtype=torch.float64)
    for e, binding in enumerate(bank.bindings):
        if layout is SEPARATE:
            gate, up, down = twin.gate[e], twin.up[e], twin.down[e]
        elif layout is TRANSPOSED:
            gate, up, down = twin.gate[e].t(), twin.up[e].t(), twin.down[e].t()
        else:
            gate, up, down = twin.gate_up[e, :H].t(), twin.gate_up[e, H:].t(), twin.down[e].t()
        made = Evaluator(lifter)(bank.tv, binding, x)
        torch.testing.assert_close(made, (F.silu(x @ gate) * (x @ up)) @ down)


# ------------------------------------------------------------------------------------------------ more functions


def texts(module: nn.Module) -> str:
    lifter, bank = lifted(module)
    return str(write_template(lifter, _without_gate(lifter, bank))[0])


def mlp(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(D, H), *layers, nn.Linear(H, D))


def test_biases_are_added():
    assert texts(ListMoe(mlp(nn.ReLU()))).splitlines() == [
        "v0 = x()  # [R, 12]",
        "v1 = linear(v0, leaf0)  # [R, 10]",
        "v2 = aten.add.Tensor(v1, leaf1)  # [R, 10]",
        "v3 = aten.relu.default(v2)  # [R, 10]",
        "v4 = linear(v3, leaf2)  # [R, 12]",
        "v5 = aten.add.Tensor(v4, leaf3)  # [R, 12]",
    ]


def test_stacked_biases_read_the_same_as_a_lists():
    def baddbmm(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        hidden = torch.baddbmm(self.b1[:, None], x.expand(E, -1, -1), self.w1).relu()
        rows = torch.baddbmm(self.b2[:, None], hidden, self.w2)
        gates = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, ids, weights)
        return (gates.t()[..., None] * rows).sum(0)

    stacked = Parts(baddbmm, w1=(E, D, H), b1=(E, H), w2=(E, H, D), b2=(E, D))
    assert texts(stacked) == texts(ListMoe(mlp(nn.ReLU())))


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        (nn.GELU(approximate="tanh"), "aten.gelu.default(v2, approximate=tanh)"),
        (nn.Hardtanh(-1, 2), "aten.hardtanh.default(v2, -1, 2)"),
        (nn.LeakyReLU(0.1), "aten.leaky_relu.default(v2, 0.1)"),
        (nn.Softmax(-1), "aten._softmax.default(v2, 1, False)"),
        (nn.Tanh(), "aten.tanh.default(v2)"),
    ],
)
def test_activations_keep_their_arguments(layer, line):
    assert f"v3 = {line}  # [R, 10]" in texts(ListMoe(mlp(layer)))


def test_norms_are_followed_by_their_weights():
    text = texts(ListMoe(lambda: nn.Sequential(nn.Linear(D, H), nn.LayerNorm(H), nn.Linear(H, D))))
    assert text.splitlines()[3:7] == [
        "v3 = aten.native_layer_norm.default(v2, [10], None, None, 1e-05)  # [R, 10]",
        "v4 = item(v3, 0)  # [R, 10]",
        "v5 = aten.mul.Tensor(v4, leaf2)  # [R, 10]",
        "v6 = aten.add.Tensor(v5, leaf3)  # [R, 10]",
    ]


def test_a_norm_with_an_experts_weights_begins_its_computation():
    text = texts(ListMoe(lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D))))
    assert text.splitlines()[:5] == [
        "v0 = x()  # [R, 12]",
        "v1 = aten.native_layer_norm.default(v0, [12], None, None, 1e-05)  # [R, 12]",
        "v2 = item(v1, 0)  # [R, 12]",
        "v3 = aten.mul.Tensor(v2, leaf0)  # [R, 12]",
        "v4 = aten.add.Tensor(v3, leaf1)  # [R, 12]",
    ]


def test_what_an_expert_does_before_its_first_parameter_is_followed_back():
    class Normed(Expert):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def forward(self, x: Tensor) -> Tensor:
            size = x.pow(2).mean(-1, keepdim=True).add_(1e-6)
            return super().forward(x / size.sqrt().expand_as(x) * self.scale)

    assert texts(ListMoe(Normed)).splitlines()[:8] == [
        "v0 = x()  # [R, 12]",
        "v1 = aten.pow.Tensor_Scalar(v0, 2)  # [R, 12]",
        "v2 = aten.mean.dim(v1, [1], keepdim=True)  # [R, 1]",
        "v3 = aten.add.Tensor(v2, 1e-06)  # [R, 1]",
        "v4 = aten.sqrt.default(v3)  # [R, 1]",
        "v5 = aten.div.Tensor(v0, v4)  # [R, 12]",
        "v6 = aten.mul.Tensor(v5, leaf0)  # [R, 12]",
        "v7 = linear(v6, leaf1)  # [R, 10]",
    ]


def operators(body: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (E, D)) -> set[str]:
    """The operators of all template values."""
    _, lifter, _ = run(Once(body, shape), torch.randn(3, D, dtype=torch.float64))
    return {node.name.split(".")[1] for node in lifter.nodes if node.kind == "op"}


def changed_since(x: Tensor, w: Tensor) -> Tensor:
    doubled = x * 2
    raised = doubled.exp()
    doubled.add_(1)
    return raised * w[0]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x, w: x.exp() * w[0], {"exp", "mul"}),
        (lambda x, w: x[[2, 0]].exp().neg() * w[0], {"exp", "neg", "mul"}),
        (lambda x, w: F.layer_norm(x, (D,), w[0], w[1]), {"native_layer_norm", "mul", "add"}),
        (lambda x, w: F.layer_norm(x, (D,), None, w[1]), {"native_layer_norm", "add"}),
        (changed_since, {"mul"}),  # what was read is gone
        (lambda x, w: x.exp().index_fill_(0, torch.tensor([1]), 2.0) * w[0], {"mul"}),  # and so is what was made
        (lambda x, w: x.exp().copy_(x.flip(0)) * w[0], {"mul"}),
        (lambda x, w: x.exp().fill_(3.0) * w[0], {"mul"}),
        (lambda x, w: x.exp().masked_fill_(x > 0, 1.0) * w[0], {"mul"}),
        (lambda x, w: x.exp().zero_() * w[0], set()),
        (lambda x, w: (x - x.mean(0)) * w[0], {"mul"}),  # mixes tokens
        (lambda x, w: (x + x.roll(1, 0)) * w[0], {"mul"}),
        (lambda x, w: F.layer_norm(x, (D,)), set()),  # no parameter
    ],
)
def test_how_far_back_it_is_followed(body, expected):
    assert operators(body) == expected


@pytest.mark.parametrize("order", ["teh", "the"])
def test_products_that_are_summed_at_once_are_known(order):
    """No tensor holds what a single expert gives."""

    def summed(self: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        gates = torch.zeros(len(x), E, dtype=x.dtype).scatter(1, ids, weights)[..., None]
        hidden = (torch.einsum("td,edh->teh", x, self.up).relu() * gates).transpose(1, 2 if order == "the" else 1)
        return torch.einsum(f"{order},ehd->td", hidden, self.down)

    assert texts(Parts(summed, up=(E, D, H), down=(E, H, D))).splitlines() == [
        "v0 = x()  # [R, 12]",
        "v1 = linear(v0, leaf0)  # [R, 10]",
        "v2 = aten.relu.default(v1)  # [R, 10]",
        "v3 = linear(v2, leaf1)  # [R, 12]",
    ]


def test_a_residual_reads_the_token_again():
    class Residual(Expert):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert texts(ListMoe(Residual)).splitlines()[-1] == "v6 = aten.add.Tensor(v0, v5)  # [R, 12]"


def test_different_functions_do_not_share_a_template():
    class Mixed(ListMoe):
        def __init__(self) -> None:
            super().__init__(mlp(nn.ReLU()))
            self.experts[0] = mlp(nn.Tanh())()

    lifter, _ = lifted(Mixed())
    deepest = [b for b in banks(lifter) if depth_of(lifter, b.tv) == 2]
    assert deepest and all(b.experts < E for b in deepest)


# ------------------------------------------------------------------------------------------------ codes


class Once(nn.Module):
    """One parameter and any function of it and the tokens."""

    def __init__(self, body: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.w)


def kinds(body: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...] = (E, D, D), rows: int = 3) -> set[str]:
    """What the elements of body's result are: "data", "zero", "dot", "val", "leaf"."""
    twin = probe_copy(Once(body, shape))
    lifter = Lifter(twin)
    seen: list[Tensor] = []
    module: Any = twin
    module.body = lambda x, w: seen.append(body(x, w)) or seen[0]
    capture(twin, (torch.randn(rows, D, dtype=torch.float64),), {}, lifter)
    codes = lifter.codes(seen[0])
    codes = torch.tensor([codes]) if isinstance(codes, int) else codes
    names = {DATA: "data", ZERO: "zero"}
    return {names.get(c) or lifter.handles[c >> 34][0] for c in codes.flatten().tolist()}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x, w: x @ w[0], {"dot"}),
        (lambda x, w: (x @ w[0]).t().reshape(-1, 2), {"dot"}),
        (lambda x, w: torch.cat([x @ w[0], x @ w[1]], 1)[:, 1::3], {"dot"}),
        (lambda x, w: torch.cat([x @ w[0], x], 1), {"dot", "data"}),
        (lambda x, w: torch.zeros(5, D, dtype=x.dtype).index_copy(0, torch.arange(3), x @ w[0]), {"dot", "zero"}),
        (lambda x, w: F.pad(x @ w[0], (0, 2)), {"dot", "zero"}),
        (lambda x, w: (x @ w[0]).masked_fill(x > 0, 0.0), {"dot", "zero"}),
        (lambda x, w: torch.where(torch.arange(3)[:, None] > 0, x @ w[0], 0.0), {"dot", "zero"}),
        (lambda x, w: (x @ w[0]).masked_fill(x > 0, 1.0), {"dot", "data"}),
        (lambda x, w: torch.where(x > 0, x @ w[0], x @ w[1]), {"dot"}),
        (lambda x, w: (x @ w[0]).relu(), {"val"}),
        (lambda x, w: w[[0, 1]].transpose(1, 2), {"leaf"}),
        (lambda x, w: x @ x.t(), {"data"}),
        (lambda x, w: (x @ w[0]).cumsum(0), {"data"}),
        (lambda x, w: (x @ w[0]).sum(0), {"data"}),
        (lambda x, w: (x @ w[0]) + (x @ w[0]).roll(1, 0), {"data"}),  # mixes tokens
        (lambda x, w: F.dropout(x @ w[0], 0.5), {"data"}),
        (lambda x, w: (x @ w[0]) @ w[1], {"dot"}),
        (lambda x, w: torch.zeros_like(x) @ w[0], {"zero"}),
    ],
)
def test_what_elements_are(body, expected):
    assert kinds(body) == expected


def test_one_row_of_a_lifted_tensor_may_become_unknown():
    """`y[t] += ...` where y holds rows already: the view's codes change, the others stay."""

    def body(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w[0]
        y[1] += x[0]
        return y

    assert kinds(body) == {"dot", "data"}


def test_equal_rows_are_the_same_token():
    lifter = Lifter(nn.Linear(2, 2))
    rows = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0], [2.0, 1.0], [-0.0, 0.0]], dtype=torch.float64)
    ids = lifter.token_ids(rows).tolist()
    assert ids[0] == ids[2] != ids[3] and ids[1] == ids[4] == 0 and min(ids[0], ids[3]) > 0
    assert lifter.token_ids(rows[3:4]).tolist() == [ids[3]]


@pytest.mark.parametrize(
    ("row", "runs"),
    [
        ([5, 5, 5, 5], []),
        ([5, 5, 7, 7], [slice(0, 2, 1), slice(2, 4, 1)]),
        ([5, 7, 5, 7], [slice(0, 3, 2), slice(1, 4, 2)]),
        ([5, 7, 9, 5], []),
        ([5, 5, 7, 5], []),
        ([5, 6, 7], [slice(0, 1, 1), slice(1, 2, 1), slice(2, 3, 1)]),
    ],
)
def test_where_the_same_handles_stand(row: list[int], runs: list[slice]):
    assert _keys.runs_of(torch.tensor([[0] * len(row), [5] * len(row), row])) == runs


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_many_rows_are_told_apart_as_few_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    keys = torch.randint(-2, 3, (500, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    few = _keys.distinct(keys)
    monkeypatch.setattr(_keys, "MANY_ROWS", 0)
    many = _keys.distinct(keys)
    assert many[0] == few[0] and len(few[0]) > 50 and torch.equal(many[1], few[1])
    assert _keys.distinct(keys[:0])[0] == []


def test_only_the_operators_of_the_block_are_emulated(monkeypatch: pytest.MonkeyPatch):
    """Those by which the lifter follows them are many times as many."""
    seen: list[str] = []
    plain = Emulated.__torch_dispatch__

    def counted(self: Emulated, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(str(func))
        return plain(self, func, types, args, kwargs)

    monkeypatch.setattr(Emulated, "__torch_dispatch__", counted)
    twin = probe_copy(Once(lambda x, w: F.gelu(x @ w[0]) * 2.0, (E, D, D)))
    x, runs = torch.randn(3, D, dtype=torch.float64), []
    for watch in (None, Lifter(twin)):
        capture(twin, (x,), {}, watch)
        runs.append(seen[:])
        seen.clear()
    assert runs[0] == runs[1] and any("gelu" in name for name in runs[0])


def test_what_stops_a_lift_is_noted():
    _, lifter, _ = run(Once(lambda x, w: (x @ w[0]).cumsum(0), (E, D, D)), torch.randn(3, D, dtype=torch.float64))
    assert any("cumsum" in note for note in lifter.notes)
    _, lifter, _ = run(Once(lambda x, w: F.dropout(x @ w[0], 0.5), (E, D, D)), torch.randn(3, D, dtype=torch.float64))
    assert any("random" in note for note in lifter.notes)


def test_taint_follows_the_experts_only():
    def body(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w[0]).cumsum(0)

    twin = probe_copy(Once(body, (E, D, D)))
    x = torch.randn(3, D, dtype=torch.float64)
    for experts, tainted in ((frozenset({"w"}), True), (frozenset({"other"}), False)):
        trace = capture(twin, (x,), {}, Lifter(twin, experts))
        assert trace.result[0][0].tainted is tainted and not trace.inputs[0].tainted
