"""Every Triton op against the torch op of the same name, at awkward sizes, with poison where nothing may be read."""

from __future__ import annotations

from triton_here import DEVICE, DTYPES, needs_triton, relative  # first: it chooses Triton's interpreter

# isort: split

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from moefx.codegen import triton_grouped, triton_route, triton_tiles, triton_workspace
from moefx.codegen.triton_ops import OPS, supports
from torch import Tensor

from moefx import ops
from moefx.errors import InputError

D, F = 48, 40  # no multiples of the tiles
NAN = float("nan")
# (T, K, E, routing): "any" has ids outside [0, E), "one" puts all on one expert, "few" leaves experts without rows.
CASES = [
    (1, 1, 1, "any"),
    (1, 3, 5, "few"),
    (17, 3, 5, "any"),
    (17, 1, 5, "one"),
    (255, 3, 5, "any"),
    (255, 1, 1, "one"),
]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = needs_triton


@dataclass
class Case:
    """Inputs on the device; the first n of the R rows belong to experts, the others are poison."""

    x: Tensor  # [T, D]
    w: Tensor  # [T, K]
    rows: Tensor  # [R, D]
    h: Tensor  # [R, F]
    gy: Tensor  # [T, F]
    weight: Tensor  # [E, D, F], a transposed view
    ids: Tensor
    order: Tensor
    offsets: Tensor
    position: Tensor
    top_k: int
    n: int

    def held(self, tensor: Tensor) -> Tensor:
        return tensor[: self.n]


def make(tokens: int, top_k: int, experts: int, routing: str, dtype: torch.dtype = torch.float32) -> Case:
    low, high = {"any": (-1, experts + 1), "one": (experts - 1, experts), "few": (0, max(1, experts // 2))}[routing]
    ids = torch.randint(low, high, (tokens, top_k)).to(DEVICE)
    order, offsets, position = ops.route(ids, experts)
    n, total = int(offsets[-1]), tokens * top_k

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(DEVICE)

    rows, h = randn(total, D), randn(total, F)
    rows[n:], h[n:] = NAN, NAN
    weight = (randn(experts, F, D) / 7).transpose(1, 2)
    w = torch.rand(tokens, top_k).to(DEVICE)  # fp32: routers keep their weights there
    return Case(randn(tokens, D), w, rows, h, randn(tokens, F), weight, ids, order, offsets, position, top_k, n)


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_the_table_has_every_op_of_the_reference_that_is_not_elementwise() -> None:
    assert set(ops.OPS) - set(OPS) == {"identity_add", "identity_backward", "slot_rows", "slot_products", "bias_products"}


# ------------------------------------------------------------------------------------------------ routing


@pytest.mark.parametrize(
    "tokens, top_k, experts", [(0, 2, 3), (1, 1, 1), (17, 3, 5), (255, 3, 5), (700, 8, 128), (520, 1, 513)]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("few", [-1, 1 << 20])
def test_route(
    tokens: int, top_k: int, experts: int, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_route, "FEW_SLOTS", few)
    ids = torch.randint(-2, experts + 2, (tokens, top_k), dtype=dtype).to(DEVICE)
    for got, want in zip(OPS["route"](ids, experts), ops.route(ids, experts)):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_route_over_several_groups_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_route, "GROUPS", 2)
    ids = torch.randint(-1, 6, (1300, 1)).to(DEVICE)
    assert all(map(torch.equal, OPS["route"](ids, 5), ops.route(ids, 5)))


def test_route_takes_ids_of_any_layout_and_far_outside() -> None:
    ids = torch.tensor([[0, 1 << 40, 2], [-(1 << 40), 1, 0]], device=DEVICE)
    assert all(map(torch.equal, OPS["route"](ids.t(), 3), ops.route(ids.t(), 3)))


@pytest.mark.parametrize(("ranks", "experts"), [(1, 1), (2, 3), (4, 32), (3, 5)])
@pytest.mark.parametrize("most", [1, 2, 700])
def test_regroup(ranks: int, experts: int, most: int) -> None:
    received = torch.randint(0, most, (ranks, experts)).to(DEVICE)
    for got, want in zip(OPS["regroup"](received, int(received.sum())), ops.regroup(received, int(received.sum()))):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_regroup_of_rows_that_all_are_of_one_expert() -> None:
    received = torch.zeros(2, 4, dtype=torch.int64)
    received[1, 2] = 5000
    assert all(map(torch.equal, OPS["regroup"](received.to(DEVICE), 5000), ops.regroup(received.to(DEVICE), 5000)))


# ------------------------------------------------------------------------------------------------ rows


@every_case
@every_dtype
def test_rows_in_and_out(case: tuple[int, int, int, str], dtype: torch.dtype) -> None:
    c = make(*case, dtype=dtype)
    tolerance = TOLERANCE[dtype]
    for w in (None, c.w):
        got = OPS["gather_rows"](c.x, c.order, c.top_k, c.offsets, w)
        assert got.shape == (c.order.numel(), D)
        want = ops.gather_rows(c.x, c.order, c.top_k, c.offsets, w)
        assert relative(c.held(got), c.held(want)) <= tolerance

        for out_dtype in {dtype, torch.float32}:
            got = OPS["combine"](c.h, c.position, w, out_dtype)
            want = ops.combine(c.held(c.h), c.position, w, out_dtype)
            assert got.dtype == out_dtype
            assert relative(got, want) <= tolerance
            bias = torch.randn(c.offsets.numel() - 1, F).to(dtype).to(DEVICE)
            got = OPS["combine"](c.h, c.position, w, out_dtype, bias, c.ids)
            assert relative(got, ops.combine(c.held(c.h), c.position, w, out_dtype, bias, c.ids)) <= tolerance

        got_h, got_w = OPS["combine_backward"](c.gy, c.h, c.order, c.position, c.offsets, w)
        want_h, want_w = ops.combine_backward(c.gy, c.held(c.h), c.order, c.position, c.offsets, w)
        assert relative(c.held(got_h), c.held(want_h)) <= tolerance
        got_x, got_wx = OPS["rows_backward"](c.rows, c.x, c.position, c.order, c.offsets, w)
        want_x, want_wx = ops.rows_backward(c.held(c.rows), c.x, c.position, c.order, c.offsets, w)
        assert relative(got_x, want_x) <= tolerance
        for got, want in ((got_w, want_w), (got_wx, want_wx)):
            assert (got is None) == (want is None) == (w is None)
            if got is not None:
                assert got.dtype == want.dtype
                assert relative(got, want) <= tolerance


def test_an_order_shorter_than_the_slots_leaves_no_weight_without_a_gradient() -> None:
    """A chunk of places of experts keeps the rows that it has: the other slots' weights get zeros, not what memory held."""
    c = make(17, 3, 5, "any")
    short = c.held(c.order)
    assert len(short) < c.order.numel(), "some slots have no row"
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is not written yet with NaN
    try:
        got_w = OPS["combine_backward"](c.gy, c.held(c.h), short, c.position, c.offsets, c.w)[1]
        got_wx = OPS["rows_backward"](c.held(c.rows), c.x, c.position, short, c.offsets, c.w)[1]
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative(got_w, ops.combine_backward(c.gy, c.held(c.h), short, c.position, c.offsets, c.w)[1]) <= 2e-6
    assert relative(got_wx, ops.rows_backward(c.held(c.rows), c.x, c.position, short, c.offsets, c.w)[1]) <= 2e-6


def test_combine_over_mostly_empty_slots() -> None:
    """Dense gates: K = E slots per token, few of them with a row."""
    ids = torch.where(torch.rand(17, 40) < 0.1, torch.arange(40), -1).to(DEVICE)
    order, offsets, position = ops.route(ids, 40)
    h, w = torch.randn(ids.numel(), F).to(DEVICE), torch.rand(17, 40).to(DEVICE)
    h[int(offsets[-1]) :] = NAN
    want = ops.combine(h[: int(offsets[-1])], position, w, torch.float32)
    assert relative(OPS["combine"](h, position, w, torch.float32), want) <= 2e-6


def test_expanded_and_sliced_tensors() -> None:
    """The gradient of a sum has stride 0; x may be columns of a wider tensor; w may be transposed, and in fp64."""
    c = make(17, 3, 5, "any")
    gy, w = torch.ones((), device=DEVICE).expand(17, F), c.w.t().contiguous().t().double()
    x = torch.randn(17, 2 * D).to(DEVICE)[:, ::2]
    for got, want in zip(
        OPS["combine_backward"](gy, c.h, c.order, c.position, c.offsets, w),
        ops.combine_backward(gy, c.held(c.h), c.order, c.position, c.offsets, w),
    ):
        assert relative(got[: want.shape[0]], want) <= 2e-6
    got, want = (table["gather_rows"](x, c.order, 3, c.offsets, w) for table in (OPS, ops.OPS))
    assert relative(c.held(got), c.held(want)) <= 2e-6


@every_case
@every_dtype
def test_expert_vectors(case: tuple[int, int, int, str], dtype: torch.dtype) -> None:
    c = make(*case, dtype=dtype)
    leaf = torch.randn(case[2], 2 * F).to(dtype).to(DEVICE)[:, ::2]
    got = OPS["expert_rows"](leaf, c.offsets, c.order.numel())
    assert torch.equal(c.held(got), ops.expert_rows(leaf, c.offsets, c.n))
    for by in ((), (c.order, c.w)):
        assert relative(OPS["expert_sum"](c.h, c.offsets, *by), ops.expert_sum(c.held(c.h), c.offsets, *by)) <= TOLERANCE[dtype]


# ------------------------------------------------------------------------------------------------ grouped products


@every_case
@every_dtype
def test_grouped_products(case: tuple[int, int, int, str], dtype: torch.dtype) -> None:
    c = make(*case, dtype=dtype)
    tolerance = TOLERANCE[dtype]
    for weight in (c.weight, c.weight.contiguous()):
        got = OPS["grouped_linear"](c.rows, weight, c.offsets)
        assert got.shape == (c.order.numel(), F)
        assert relative(c.held(got), ops.grouped_linear(c.held(c.rows), weight, c.offsets)) <= tolerance

    got = OPS["gather_linear"](c.x, c.order, c.top_k, c.weight, c.offsets)
    gathered = c.held(ops.gather_rows(c.x, c.order, c.top_k, c.offsets))
    assert relative(c.held(got), ops.grouped_linear(gathered, c.weight, c.offsets)) <= tolerance

    want = torch.empty(case[2], D, F, dtype=dtype, device=DEVICE)
    ops.grouped_wgrad(c.held(c.rows), c.held(c.h), c.offsets, want)
    for out in (torch.full_like(want, NAN), torch.full_like(want.transpose(1, 2).contiguous(), NAN).transpose(1, 2)):
        OPS["grouped_wgrad"](c.rows, c.h, c.offsets, out)
        assert relative(out, want) <= tolerance
    OPS["grouped_wgrad_add"](c.rows, c.h, c.offsets, out)
    assert relative(out, 2 * want) <= tolerance
    ops.grouped_wgrad(gathered, c.held(c.h), c.offsets, want)
    OPS["gather_wgrad"](c.x, c.order, c.top_k, c.h, c.offsets, out)
    assert relative(out, want) <= tolerance


@pytest.mark.parametrize("case", [(1, 1, 1, "any"), (60, 3, 5, "any"), (100, 2, 5, "few"), (150, 1, 3, "one")], ids=str)
@pytest.mark.parametrize("widths", [(128, 264), (192, 136)], ids=str)
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="no copy engine")
def test_products_by_the_copy_engine(
    case: tuple[int, int, int, str], widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-bit operands of many features: blocks reach over the edges of experts and of features, and touch nothing there."""
    monkeypatch.setattr(triton_grouped, "BLOCKS_FROM", 0)
    c, dtype, (d, f), experts = make(*case, dtype=torch.float16), torch.float16, widths, case[2]
    rows, h = torch.randn(c.rows.shape[0], d).to(dtype).to(DEVICE), torch.randn(c.rows.shape[0], f).to(dtype).to(DEVICE)
    rows[c.n :], h[c.n :] = NAN, NAN
    weight = (torch.randn(experts, f, d) / d**0.5).to(dtype).to(DEVICE).transpose(1, 2)
    for w, tile in product((weight, weight.contiguous()), triton_tiles.candidates("linear", 16, d, f)):
        out = torch.full((rows.shape[0], f), NAN, dtype=dtype, device=DEVICE)
        with triton_tiles.only("linear", tile):
            assert triton_grouped._launch_block_linear(rows, None, 1, w, c.offsets, out)
        assert relative(c.held(out), ops.grouped_linear(c.held(rows), w, c.offsets)) <= 1e-3
        assert out[c.n :].isnan().all()
        x = torch.randn(c.x.shape[0], d).to(dtype).to(DEVICE)
        with triton_tiles.only("linear", tile):
            assert triton_grouped._launch_block_linear(x, c.order, c.top_k, w, c.offsets, out) == (d % tile.inner == 0)
        if d % tile.inner == 0:
            assert relative(c.held(out), ops.gather_linear(x, c.order[: c.n], c.top_k, w, c.offsets)) <= 1e-3
            assert out[c.n :].isnan().all()
    want = torch.empty(experts, d, f, dtype=dtype, device=DEVICE)
    ops.grouped_wgrad(c.held(rows), c.held(h), c.offsets, want)
    for tile in triton_tiles.candidates("wgrad", 16, d, f):
        for out in (torch.full_like(want, NAN), torch.full_like(want.transpose(1, 2).contiguous(), NAN).transpose(1, 2)):
            for times, add in ((1, False), (2, True)):
                with triton_tiles.only("wgrad", tile):
                    assert triton_grouped._launch_block_wgrad(rows, h, c.offsets, out, add)
                assert relative(out, times * want) <= 1e-3


@pytest.mark.parametrize("large", [0, 1 << 40], ids=["halves", "whole"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["pointers", "blocks"])
@pytest.mark.parametrize("case", [(17, 3, 5, "any"), (40, 2, 5, "few")], ids=str)
def test_wide_rows_in_parts(
    case: tuple[int, int, int, str], dtype: torch.dtype, biased: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_workspace, "LARGE_BYTES", large)
    monkeypatch.setattr(triton_grouped, "BLOCKS_FROM", 0)
    (tokens, top_k, experts, _), wide, narrow, c = case, 512, 136, make(*case, dtype=dtype)
    assert len(triton_workspace.column_parts(tokens * top_k, wide, 2)) == (2 if not large else 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).to(DEVICE)

    x, a = randn(tokens, wide), randn(tokens * top_k, narrow)
    a[c.n :] = NAN
    weight = (randn(experts, wide, narrow) / narrow**0.5).transpose(1, 2)
    bias, ids = (randn(experts, wide), c.ids) if biased else (None, None)
    given = (weight, c.offsets, c.position, c.w, torch.float32, bias, ids)
    want = ops.linear_combine(c.held(a), *given)
    for in_parts in (False, True):
        assert relative(OPS["linear_combine"](a, *given, in_parts=in_parts), want) <= TOLERANCE[dtype]
    want = torch.empty(experts, wide, narrow, dtype=dtype, device=DEVICE)
    ops.gather_wgrad(x, c.order[: c.n], top_k, c.held(a), c.offsets, want)
    for out in (torch.full_like(want, NAN), torch.full_like(weight, NAN).transpose(1, 2)):
        OPS["gather_wgrad"](x, c.order, top_k, a, c.offsets, out)
        assert relative(out, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tile", [(16, 64, 16), (64, 32, 64)], ids=str)
def test_any_tile_gives_the_same(tile: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, inner = tile
    chosen = triton_tiles.Tile(rows, columns, inner, 4, 1)
    monkeypatch.setattr(triton_grouped, "pointer_tiles", lambda *_, **__: [chosen])
    c = make(100, 2, 5, "any")
    got = OPS["grouped_linear"](c.rows, c.weight, c.offsets)
    assert relative(c.held(got), ops.grouped_linear(c.held(c.rows), c.weight, c.offsets)) <= 2e-6
    out, want = torch.full((2, 5, D, F), NAN, device=DEVICE)
    OPS["grouped_wgrad"](c.rows, c.h, c.offsets, out)
    ops.grouped_wgrad(c.held(c.rows), c.held(c.h), c.offsets, want)
    assert relative(out, want) <= 2e-6


def test_a_row_with_nan_stays_alone() -> None:
    """NaN of one row reaches that row's result and its expert's gradient, and nothing else."""
    c = make(17, 3, 5, "any")
    c.rows[0] = NAN
    first = int((c.offsets > 0).nonzero()[0]) - 1
    got = OPS["grouped_linear"](c.rows, c.weight, c.offsets)
    assert got[0].isnan().all() and not got[1 : c.n].isnan().any()
    out = torch.empty(5, D, F, device=DEVICE)
    OPS["grouped_wgrad"](c.rows, c.h, c.offsets, out)
    assert [bool(e.isnan().any()) for e in out] == [e == first for e in range(5)]


@pytest.mark.parametrize("name", ["grouped_linear", "grouped_wgrad", "gather_linear"])
def test_no_tokens(name: str) -> None:
    c = make(0, 3, 5, "any")
    if name == "grouped_wgrad":
        out = torch.full((5, D, F), NAN, device=DEVICE)
        OPS[name](c.rows, c.h, c.offsets, out)
        assert not out.any()
    elif name == "grouped_linear":
        assert OPS[name](c.rows, c.weight, c.offsets).shape == (0, F)
    else:
        assert OPS[name](c.x, c.order, 3, c.weight, c.offsets).shape == (0, F)
    assert OPS["combine"](c.h, c.position, c.w, torch.float32).shape == (0, F)
    assert OPS["rows_backward"](c.rows, c.x, c.position, c.order, c.offsets, c.w)[1].shape == (0, 3)


# ------------------------------------------------------------------------------------------------ refusals, tiles


def test_unsupported_dtypes_are_refused_with_the_reason() -> None:
    assert supports(torch.float32) is None
    assert "float64" in (supports(torch.float64) or "")
    c = make(1, 1, 1, "one")
    with pytest.raises(InputError, match="grouped_linear: rows is torch.float64: .*torch ops"):
        OPS["grouped_linear"](c.rows.double(), c.weight.double(), c.offsets)
    with pytest.raises(InputError, match="one dtype expected"):
        OPS["grouped_linear"](c.rows, c.weight.half(), c.offsets)
    with pytest.raises(InputError, match="complex64"):
        OPS["combine"](c.h.to(torch.complex64), c.position, None, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is right on a GPU")
def test_the_interpreter_refuses_bfloat16() -> None:
    assert "interpreter" in (supports(torch.bfloat16) or "")


def test_wrong_shapes_are_refused() -> None:
    c = make(17, 3, 5, "any")
    with pytest.raises(InputError, match="do not fit"):
        OPS["grouped_linear"](c.h, c.weight, c.offsets)
    with pytest.raises(InputError, match="do not fit"):
        OPS["grouped_wgrad"](c.rows, c.h, c.offsets[:-1], torch.empty(5, D, F, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("products", [1, 2])
@pytest.mark.parametrize("shared_bytes", [232448, 101376, 65536], ids=["H100", "RTX 4090", "T4"])
def test_tiles_fit_the_chip(dtype: torch.dtype, precision: str, products: int, shared_bytes: int) -> None:
    for rows_per_expert in (0, 1, 17, 64, 65, 4096):
        for columns in (1, 256, 28672):
            tile = triton_tiles.pointer_tile(
                torch.device("cpu"), dtype, precision, rows_per_expert, 64, columns, shared_bytes, products
            )
            assert tile.shared_bytes(dtype.itemsize, products) <= shared_bytes
            assert min(tile.rows, tile.columns, tile.inner) >= 16
            assert all(n & (n - 1) == 0 for n in (tile.rows, tile.columns, tile.inner))
            # fp32 accumulators: at most 128 of a thread's 255 registers
            assert tile.rows * tile.columns * products / (32 * tile.warps) <= 128
