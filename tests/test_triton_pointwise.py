"""Generated Triton kernels of pointwise segments: value, gradient, fused epilogue, against torch and its autograd."""

from __future__ import annotations

from triton_here import DEVICE, DTYPES, needs_triton, relative  # first: it chooses Triton's interpreter

# isort: split

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import regions
import torch
from moefx.codegen import triton_grouped, triton_pointwise, triton_tiles
from moefx.codegen.triton_ops import OPS
from moefx.codegen.triton_pointwise import Pointwise, Unsupported, compile_pointwise
from moefx.codegen.triton_rules import RULES
from regions import columns, linear, op
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefx import ops
from moefx.errors import InputError
from moefx.ir import Instr, Leaf, LeafRef, Ref, Template
from moefx.segments import Segment, steps

E, D, F = 5, 48, 40
NAN, INF = float("nan"), float("inf")
X = Instr("x", width=F)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}

pytestmark = [needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's, of masked lanes


def leaf(*shape: int, shared: bool = False) -> Leaf:
    """Only shape and sharing matter here."""
    size = torch.Size(shape).numel()
    return Leaf(
        shape, tuple(torch.empty(shape).stride()), ("p",) * E, tuple(0 if shared else e * size for e in range(E))
    )


def only_segment(instrs: Sequence[Instr]) -> tuple[Template, Segment]:
    template = Template(tuple(instrs))
    (segment,) = (step for step in steps(template) if isinstance(step, Segment))
    return template, segment


def compiled(instrs: Sequence[Instr], leaves: Sequence[Leaf] = ()) -> Pointwise:
    template, segment = only_segment(instrs)
    result = compile_pointwise(template, segment, leaves)
    assert isinstance(result, Pointwise), result
    return result


def evaluate(template: Template, segment: Segment, inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """The segment in torch, instruction by instruction; `rows` are its leaves spread over the rows."""
    values = dict(zip(segment.inputs, inputs))
    spread = dict(zip(segment.leaves, rows))

    def argument(value: object) -> object:
        if isinstance(value, Ref):
            return values[value.index]
        return spread[value.index] if isinstance(value, LeafRef) else value

    for i in segment.body:
        instr = template.instrs[i]
        if instr.kind == "columns":
            rows_of, start, stop, step = instr.args
            values[i] = values[rows_of.index][:, start:stop:step]
        else:
            _, name, overload = instr.target.split(".")
            kwargs = {key: argument(value) for key, value in instr.kwargs}
            values[i] = getattr(getattr(torch.ops.aten, name), overload)(*map(argument, instr.args), **kwargs)
    return [values[i] for i in segment.outputs]


def routed(rows: int) -> tuple[Tensor, int]:
    """Offsets of `rows` rows in all, some experts without any, the last rows of no expert; and how many have one."""
    ids = torch.randint(0, 4, (rows, 1)) * 2  # experts 0, 2, 4, and 6: none
    offsets = ops.route(ids, E)[1]
    return offsets.to(DEVICE), int(offsets[-1])


def check(
    pointwise: Pointwise, inputs: Sequence[Tensor], leaves: Sequence[Tensor], offsets: Tensor, n: int, tolerance: float
) -> None:
    """Value and gradient on the first n rows, with poison behind them."""
    template, segment = pointwise.template, pointwise.segment
    held = [t[:n].detach().float().requires_grad_() for t in inputs]
    own = [t.detach().float().requires_grad_() for t in leaves]
    one = torch.tensor([0, int(offsets[-1])], dtype=torch.int32, device=offsets.device)
    spread = [ops.expert_rows(t.reshape(t.shape[0], -1), offsets if t.shape[0] > 1 else one, n) for t in own]
    want = evaluate(template, segment, held, spread)
    grads = [torch.randn(t.shape).to(t.device) for t in want]
    expected = torch.autograd.grad(want, [*held, *own], grads, materialize_grads=True)

    poisoned = []
    for t in inputs:
        t = t.clone()
        t[n:] = NAN
        poisoned.append(t)
    given = []
    for g, t in zip(grads, want):
        full = torch.full((inputs[0].shape[0], t.shape[1]), NAN, device=g.device, dtype=inputs[0].dtype)
        full[:n] = g
        given.append(full)
    for got, t in zip(pointwise.forward(poisoned, leaves, offsets), want):
        assert relative(got[:n], t) <= tolerance
    again, g_inputs, g_leaves = pointwise.vjp(poisoned, leaves, offsets, given)
    for got, t in zip(again, want):
        assert relative(got[:n], t) <= tolerance
    for got, t, like in zip(g_inputs, expected, inputs):
        assert got.dtype == like.dtype
        assert relative(got[:n], t) <= tolerance
    for got, t, like in zip(g_leaves, expected[len(held) :], leaves):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
        assert relative(got, t) <= tolerance


# ------------------------------------------------------------------------------------------------ one op at a time

SIMPLE = "silu relu sigmoid tanh relu6 mish neg reciprocal abs square exp erf sin cos alias log_sigmoid".split()
OPS_OF_ONE: dict[str, Instr] = {
    instr.target + "".join(map(str, (*instr.args[1:], *instr.kwargs))): instr
    for instr in [
        *(op(f"{name}.default", Ref(0), width=F) for name in SIMPLE),
        op("gelu.default", Ref(0), width=F),
        op("gelu.default", Ref(0), width=F, approximate="tanh"),
        op("hardtanh.default", Ref(0), width=F),
        op("hardtanh.default", Ref(0), -0.5, 0.25, width=F),
        op("leaky_relu.default", Ref(0), width=F),
        op("leaky_relu.default", Ref(0), 0.3, width=F),
        op("elu.default", Ref(0), width=F),
        op("elu.default", Ref(0), 1.5, 2.0, width=F),
        op("softplus.default", Ref(0), width=F),
        op("softplus.default", Ref(0), 2.0, 3.0, width=F),
        op("add.Tensor", Ref(0), 1, width=F),
        op("add.Tensor", Ref(0), Ref(0), width=F, alpha=3),
        op("sub.Tensor", Ref(0), 0.5, width=F, alpha=2),
        op("rsub.Scalar", Ref(0), 1.0, width=F),
        op("mul.Tensor", Ref(0), Ref(0), width=F),
        op("div.Tensor", Ref(0), -3.0, width=F),
        *(op("pow.Tensor_Scalar", Ref(0), n, width=F) for n in (0, 1, 2, 3, -1, -2)),
        op("clamp.default", Ref(0), None, 0.5, width=F),
        op("clamp.default", Ref(0), -0.5, 0.5, width=F),
        op("clamp.default", Ref(0), width=F, min=-0.5),
        op("clamp.default", Ref(0), 2.0, 1.0, width=F),
        op("clamp_min.default", Ref(0), 0, width=F),
        op("clamp_max.default", Ref(0), 0.25, width=F),
        op("clone.default", Ref(0), width=F, memory_format=torch.contiguous_format),
        op("_to_copy.default", Ref(0), width=F, dtype=torch.float32),
    ]
}


@pytest.mark.parametrize("instr", OPS_OF_ONE.values(), ids=OPS_OF_ONE.keys())
def test_op(instr: Instr) -> None:
    x = torch.randn(17, F).to(DEVICE)
    special = torch.tensor([0.5, -0.5, 0.25, 1.0, -1.0, 6.0, 1e-4, -1e-4, 30.0, -30.0], device=DEVICE)
    x[0, :10] = special  # bounds and kinks; 0 itself below
    offsets, n = torch.tensor([0, 3, 3, 10, 10, 15], dtype=torch.int32, device=DEVICE), 15
    after = op("mul.Tensor", Ref(1), -1.5, width=F)  # so that {g} is not the incoming gradient itself
    check(compiled([X, instr, after]), [x], [], offsets, n, 3e-6)


@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "log"])
@pytest.mark.parametrize("exponent", [0.5, 1.7, -0.5, -1.5, 12.0])
def test_ops_of_positive_values(name: str, exponent: float) -> None:
    x = (torch.rand(17, F) + 0.1).to(DEVICE)
    offsets, n = routed(17)
    power = op("pow.Tensor_Scalar", Ref(1), exponent, width=F)
    root = op(f"{name}.default", Ref(0), width=F)
    if name == "log":
        power = op("pow.Tensor_Scalar", Ref(0), exponent, width=F)
        check(compiled([X, root, power, op("mul.Tensor", Ref(1), Ref(2), width=F)]), [x], [], offsets, n, 1e-5)
    else:
        check(compiled([X, root, power]), [x], [], offsets, n, 1e-5)


def test_division_and_detach() -> None:
    instrs = [
        X,
        op("exp.default", Ref(0), width=F),
        op("div.Tensor", Ref(0), Ref(1), width=F),
        op("detach.default", Ref(2), width=F),
        op("mul.Tensor", Ref(3), Ref(2), width=F),
    ]
    offsets, n = routed(17)
    check(compiled(instrs), [torch.randn(17, F).to(DEVICE)], [], offsets, n, 3e-6)


COMPARE = ["lt", "le", "gt", "ge", "eq", "ne"]


@pytest.mark.parametrize("name", COMPARE)
def test_masks(name: str) -> None:
    """Comparisons in where, masked_fill and arithmetic."""
    instrs = [
        X,
        op("mul.Tensor", Ref(0), 2.0, width=F),
        op(f"{name}.Scalar", Ref(0), 0.5, width=F),
        op(f"{name}.Tensor", Ref(0), Ref(1), width=F),
        op("logical_not.default", Ref(3), width=F),
        op("logical_or.default", Ref(2), Ref(4), width=F),
        op("where.self", Ref(5), Ref(1), Ref(0), width=F),
        op("masked_fill.Scalar", Ref(6), Ref(2), 3.0, width=F),
        op("mul.Tensor", Ref(7), Ref(4), width=F),
        op("add.Tensor", Ref(8), Ref(6), width=F),
    ]
    x = torch.randn(17, F).round(decimals=1).to(DEVICE)
    offsets, n = routed(17)
    check(compiled(instrs), [x], [], offsets, n, 3e-6)


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_extrema_share_the_gradient_of_ties(name: str) -> None:
    instrs = [X, op("neg.default", Ref(0), width=F), op(f"{name}.default", Ref(0), Ref(1), width=F)]
    x = torch.randn(17, F).to(DEVICE)
    x[0, :5] = 0
    check(compiled(instrs), [x], [], torch.tensor([0, 1, 17, 17, 17, 17], dtype=torch.int32, device=DEVICE), 17, 3e-6)


def test_nan_infinity_and_zero_pass_like_in_torch() -> None:
    given = torch.tensor([NAN, INF, -INF, 0.0, 88.0, -104.0, 1e30, -1e30], device=DEVICE)
    x = given.repeat(5)[None, :].repeat(2, 1)
    offsets = torch.tensor([0, 1, 2, 2, 2, 2], dtype=torch.int32, device=DEVICE)
    for name in ("silu", "relu", "sigmoid", "tanh", "abs", "softplus", "relu6", "leaky_relu"):
        instr = op(f"{name}.default", Ref(0), width=F)
        (got,) = compiled([X, instr]).forward([x], [], offsets)
        want = getattr(torch.ops.aten, name).default(x)
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-7, equal_nan=True, msg=f"{name}: {got[0]} for {want[0]}"
        )
    clamp = op("clamp.default", Ref(0), -1.0, 1.0, width=F)
    (got,) = compiled([X, clamp]).forward([x], [], offsets)
    torch.testing.assert_close(got, x.clamp(-1, 1), equal_nan=True)


def test_small_values_keep_their_relative_precision() -> None:
    x = (torch.randn(8, F) * 1e-4).to(DEVICE)
    offsets = torch.tensor([0, 8, 8, 8, 8, 8], dtype=torch.int32, device=DEVICE)
    for name in ("tanh", "silu", "gelu"):
        check(compiled([X, op(f"{name}.default", Ref(0), width=F)]), [x], [], offsets, 8, 2e-6)


def test_every_rule_is_tested() -> None:
    tested = {instr.target.split(".")[1] for instr in OPS_OF_ONE.values()} | {
        *COMPARE,
        "sqrt",
        "rsqrt",
        "log",
        "detach",
    }
    tested |= {"where", "masked_fill", "logical_not", "logical_or", "maximum", "minimum"}
    alike = {"logical_and", "bitwise_and", "bitwise_or", "bitwise_not"}  # no gradient, one operator
    assert set(RULES) - tested == alike


# ------------------------------------------------------------------------------------------------ segments


def swiglu(step: int) -> list[Instr]:
    """Gate and up side by side (step 1) or column by column in turn (step 2), as they come from one linear."""
    gate = columns(0, 0, F) if step == 1 else columns(0, 0, 2 * F, 2)
    up = columns(0, F, 2 * F) if step == 1 else columns(0, 1, 2 * F, 2)
    silu, mul = op("silu.default", Ref(1), width=F), op("mul.Tensor", Ref(3), Ref(2), width=F)
    return [Instr("x", width=2 * F), gate, up, silu, mul]


@pytest.mark.parametrize("rows", [1, 17, 255])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 2])
def test_fused_gate_and_up(rows: int, dtype: torch.dtype, step: int) -> None:
    offsets, n = routed(rows)
    x = torch.randn(rows, 2 * F).to(dtype).to(DEVICE)
    check(compiled(swiglu(step)), [x], [], offsets, n, TOLERANCE[dtype])


def test_leaves_of_every_kind() -> None:
    """A bias [n] per expert, a bias of which two halves are read, one shared by all, a scalar per expert; strided."""
    leaves = [leaf(2 * F), leaf(F), leaf(F, shared=True), leaf()]
    instrs = [
        Instr("x", width=2 * F),
        op("add.Tensor", Ref(0), LeafRef(0), width=2 * F),
        columns(1, 0, F),
        columns(1, F, 2 * F),
        op("mul.Tensor", Ref(2), LeafRef(1), width=F),
        op("tanh.default", Ref(3), width=F),
        op("mul.Tensor", Ref(5), LeafRef(2), width=F),
        op("add.Tensor", Ref(4), Ref(6), width=F),
        op("mul.Tensor", Ref(7), LeafRef(3), width=F),
    ]
    tensors = [
        torch.randn(E, 4 * F).to(DEVICE)[:, ::2],
        torch.randn(E, F).to(DEVICE),
        torch.randn(1, F).to(DEVICE),
        torch.randn(E, 1).to(DEVICE),
    ]
    for rows in (1, 90):
        offsets, n = routed(rows)
        check(compiled(instrs, leaves), [torch.randn(rows, 2 * F).to(DEVICE)], tensors, offsets, n, 5e-6)


def test_a_scalar_leaf_wider_than_one_block_of_columns() -> None:
    width = 1100
    x = Instr("x", width=width)
    scaled = op("mul.Tensor", Ref(0), LeafRef(0), width=width)
    offsets, n = routed(9)
    given = [torch.randn(9, width).to(DEVICE)], [torch.randn(E).to(DEVICE)]
    check(compiled([x, scaled], [leaf()]), *given, offsets, n, 5e-6)


def test_several_inputs_and_outputs() -> None:
    instrs = [
        X,
        linear(0, 0, F),
        op("silu.default", Ref(1), width=F),
        linear(2, 1, F),
        op("add.Tensor", Ref(3), Ref(0), width=F),
        op("mul.Tensor", Ref(4), Ref(2), width=F),
    ]
    template = Template(tuple(instrs))
    segment = [step for step in steps(template) if isinstance(step, Segment)][-1]
    pointwise = compile_pointwise(template, segment, [leaf(F, F)] * 2)
    assert isinstance(pointwise, Pointwise), pointwise
    assert "not every input" in pointwise.why_not_linear
    offsets, n = routed(17)
    check(pointwise, [torch.randn(17, F).to(DEVICE) for _ in segment.inputs], [], offsets, n, 3e-6)


def test_columns_that_nobody_reads_have_no_gradient() -> None:
    instrs = [Instr("x", width=2 * F), columns(0, 0, F), op("silu.default", Ref(1), width=F)]
    pointwise = compiled(instrs)
    offsets = torch.tensor([0, 9, 9, 9, 9, 9], dtype=torch.int32, device=DEVICE)
    check(pointwise, [torch.randn(9, 2 * F).to(DEVICE)], [], offsets, 9, 3e-6)


def test_casts_decide_the_dtype_of_the_result() -> None:
    instrs = [
        X,
        op("_to_copy.default", Ref(0), width=F, dtype=torch.float32),
        op("silu.default", Ref(1), width=F),
    ]
    back = op("_to_copy.default", Ref(2), width=F, dtype="model")
    x = torch.randn(9, F).half().to(DEVICE)
    offsets = torch.tensor([0, 9, 9, 9, 9, 9], dtype=torch.int32, device=DEVICE)
    assert compiled(instrs).forward([x], [], offsets)[0].dtype == torch.float32
    assert compiled([*instrs, back]).forward([x], [], offsets)[0].dtype == torch.float16


def test_no_rows() -> None:
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=DEVICE)
    pointwise = compiled([X, op("add.Tensor", Ref(0), LeafRef(0), width=F)], [leaf(F)])
    bias = torch.randn(E, F, device=DEVICE)
    empty = torch.empty(0, F, device=DEVICE)
    assert pointwise.forward([empty], [bias], offsets)[0].shape == (0, F)
    assert not pointwise.vjp([empty], [bias], offsets, [empty])[2][0].any()


@pytest.mark.parametrize(
    "instrs, leaves, reason",
    [
        ([X, op("softmax.int", Ref(0), 1, width=F)], [], "no rule for aten.softmax.int"),
        ([X, op("mean.dim", Ref(0), [1], True, width=1)], [], "no rule for aten.mean.dim"),
        ([X, op("div.Tensor_mode", Ref(0), 2.0, width=F, rounding_mode="floor")], [], "no rule for these arguments"),
        ([X, op("pow.Tensor_Tensor", Ref(0), Ref(0), width=F)], [], "no rule for these arguments"),
        ([X, op("clamp_min.Tensor", Ref(0), Ref(0), width=F)], [], "no gradient for argument 1"),
        ([X, op("_to_copy.default", Ref(0), width=F, dtype=torch.float64)], [], "casts to torch.float64"),
        ([X, op("gt.Scalar", Ref(0), 0.0, width=F)], [], "truth value"),
        ([X, op("add.Tensor", Ref(0), LeafRef(0), width=F)], [leaf(3)], "broadcasts leaf0"),
        ([X, columns(0, 0, 1), op("mul.Tensor", Ref(0), Ref(1), width=F)], [], "broadcasts v1 from 1 to 40"),
        (
            [X, columns(0, 0, 30), columns(0, 10, 40), op("mul.Tensor", Ref(1), Ref(2), width=30)],
            [],
            "v0 is read twice at column 10",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_has_no_kernel_says_why(instrs: list[Instr], leaves: list[Leaf], reason: str) -> None:
    result = compile_pointwise(*only_segment(instrs), leaves)
    assert isinstance(result, Unsupported) and not result
    assert reason in result.reason


def test_wrong_arguments_are_refused() -> None:
    pointwise = compiled([X, op("silu.default", Ref(0), width=F)])
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(InputError, match="widths"):
        pointwise.forward([torch.randn(3, F + 1, device=DEVICE)], [], offsets)
    with pytest.raises(InputError, match="float64"):
        pointwise.forward([torch.randn(3, F, dtype=torch.float64, device=DEVICE)], [], offsets)
    with pytest.raises(InputError, match="no fused linear"):
        pointwise.linear(torch.randn(3, F, device=DEVICE), [], [], offsets)


# ------------------------------------------------------------------------------------------------ fused epilogue


def first_act(style: str, simplified: bool) -> tuple[Template, Segment, Sequence[Leaf]]:
    from moefx.passes import lower

    region = regions.region(style)
    if simplified:
        simplify = getattr(lower, "simplify", None)
        if simplify is None:
            from moefx.passes.simplify import simplify
        region = simplify(region)
    segment = next(step for step in steps(region.template) if isinstance(step, Segment))
    return region.template, segment, region.leaves


@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "plain_relu"])
@pytest.mark.parametrize("simplified", [False, True], ids=["two linears", "joined"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_in_the_epilogue(style: str, simplified: bool, dtype: torch.dtype) -> None:
    template, segment, leaves = first_act(style, simplified)
    pointwise = compile_pointwise(template, segment, leaves)
    assert isinstance(pointwise, Pointwise) and not pointwise.why_not_linear
    tokens, top_k = 33, 2
    ids = torch.randint(-1, E + 1, (tokens, top_k)).to(DEVICE)
    order, offsets, _ = ops.route(ids, E)
    n = int(offsets[-1])
    x = torch.randn(tokens, D).to(dtype).to(DEVICE)
    rows = torch.full((order.numel(), D), NAN, dtype=dtype, device=DEVICE)
    rows[:n] = ops.gather_rows(x, order, top_k, offsets)[:n]
    widths = [template.instrs[i].width for i in segment.inputs]
    weights = [(torch.randn(E, width, D) / 7).to(dtype).to(DEVICE).transpose(1, 2) for width in widths]
    vectors = [torch.randn(E, *leaves[i].shape).to(dtype).to(DEVICE) for i in segment.leaves]

    pre = [ops.grouped_linear(rows[:n].float(), weight.float(), offsets) for weight in weights]
    want = evaluate(template, segment, pre, [ops.expert_rows(v.float(), offsets, n) for v in vectors])
    for given in ((rows, None, 1), (x, order, top_k)):
        source, by, k = given
        saved, outputs = OPS["grouped_linear_act"](pointwise, source, weights, vectors, offsets, by, k)
        for got, expected in zip((*saved, *outputs), (*pre, *want)):
            assert got.dtype == dtype
            assert relative(got[:n], expected) <= TOLERANCE[dtype]
    saved, outputs = pointwise.linear(rows, weights, vectors, offsets, save=False)
    assert saved is None
    assert relative(outputs[0][:n], want[0]) <= TOLERANCE[dtype]


def wide(style: str, w: int, d: int) -> tuple[list[Instr], list[Leaf]]:
    """Experts' first half with w features from d: the forms in which the linears give gate and up."""
    x = Instr("x", width=d)
    if style == "two linears":
        silu, mul = op("silu.default", Ref(1), width=w), op("mul.Tensor", Ref(3), Ref(2), width=w)
        return [x, linear(0, 0, w), linear(0, 1, w), silu, mul], [leaf(d, w), leaf(d, w)]
    if style == "one":
        return [x, linear(0, 0, w), op("relu.default", Ref(1), width=w)], [leaf(d, w)]
    halves = style == "halves"
    gate, up = (columns(2, 0, w), columns(2, w, 2 * w)) if halves else (columns(2, 0, 2 * w, 2), columns(2, 1, 2 * w, 2))
    bias, silu = op("add.Tensor", Ref(1), LeafRef(1), width=2 * w), op("silu.default", Ref(3), width=w)
    instrs = [x, linear(0, 0, 2 * w), bias, gate, up, silu, op("mul.Tensor", Ref(5), Ref(4), width=w)]
    return instrs, [leaf(d, 2 * w), leaf(2 * w)]


@pytest.mark.parametrize("style", ["halves", "pairs", "two linears", "one"])
@pytest.mark.parametrize("inner_last", [True, False])
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0), reason="no copy engine")
def test_epilogues_by_the_copy_engine(style: str, inner_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_grouped, "BLOCKS_FROM", 0)
    w, d, tokens, top_k, dtype = 264 if style == "one" else 136, 64, 90, 2, torch.float16
    instrs, leaves = wide(style, w, d)
    pointwise = compiled(instrs, leaves)
    ids = torch.randint(-1, E, (tokens, top_k)).to(DEVICE)
    order, offsets, _ = ops.route(ids, E)
    n = int(offsets[-1])
    x = torch.randn(tokens, d).to(dtype).to(DEVICE)
    rows = torch.full((order.numel(), d), NAN, dtype=dtype, device=DEVICE)
    rows[:n] = ops.gather_rows(x, order, top_k, offsets)[:n]
    widths = [pointwise.template.instrs[i].width for i in pointwise.segment.inputs]
    weights = [(torch.randn(E, width, d) / 8).to(dtype).to(DEVICE).transpose(1, 2) for width in widths]
    if not inner_last:
        weights = [weight.contiguous() for weight in weights]
    vectors = [torch.randn(E, *leaves[i].shape).to(dtype).to(DEVICE) for i in pointwise.segment.leaves]
    pre = [ops.grouped_linear(rows[:n].float(), weight.float(), offsets) for weight in weights]
    spread = [ops.expert_rows(v.float(), offsets, n) for v in vectors]
    want = evaluate(pointwise.template, pointwise.segment, pre, spread)
    tiles = triton_tiles.candidates("act", 16, d, w)
    for source, by, k in ((rows, None, 1), (x, order, top_k)):
        for save, tile in ((True, tiles[0]), (False, tiles[-1])):
            products = [torch.full((order.numel(), width), NAN, dtype=dtype, device=DEVICE) for width in widths]
            outputs = [torch.full((order.numel(), w), NAN, dtype=dtype, device=DEVICE)]
            assert pointwise._launch_block(source, weights, products, vectors, outputs, offsets, by, k, save, tile)
            for got, expected in zip((*products, *outputs), (*pre, *want)):
                if save or got is outputs[0]:
                    assert relative(got[:n], expected) <= TOLERANCE[dtype]
                assert got[n:].isnan().all()

    gathered = []
    gather = triton_pointwise.gather_rows
    monkeypatch.setattr(triton_pointwise, "gather_rows", lambda *given: (gathered.append(given), gather(*given))[1])
    for first in (True, False):  # whether rows are gathered before the product is the tile's choice, the result is the same
        with triton_tiles.only("act", replace(tiles[0], gathers=first)):
            products, outputs = pointwise.linear(x, weights, vectors, offsets, order, top_k)
        assert all(relative(got[:n], expected) <= TOLERANCE[dtype] for got, expected in zip((*products, *outputs), (*pre, *want)))
        assert len(gathered) == 1


class Rooms(TorchDispatchMode):
    """Notes the shape of all memory that is taken without being filled."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format):
            self.made.append(result.shape)
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", ["halves", "one"])
def test_gradients_of_a_weighted_output(style: str, dtype: torch.dtype) -> None:
    """Of w a, for the routing weights w of each row's slot."""
    tokens, top_k, width = 33, 3, 600 if style == "halves" else 40
    instrs, leaves = wide(style, width, 16)
    pointwise = compiled(instrs, leaves)
    ids = torch.randint(-1, E + 1, (tokens, top_k)).to(DEVICE)
    order, offsets, position = ops.route(ids, E)
    n, slots = int(offsets[-1]), order.numel()
    pre = torch.full((slots, width * (2 if style == "halves" else 1)), NAN, dtype=dtype, device=DEVICE)
    g = torch.full((slots, width), NAN, dtype=dtype, device=DEVICE)
    pre[:n], g[:n] = torch.randn(n, pre.shape[1]), torch.randn(n, width)
    vectors = [torch.randn(E, *leaves[i].shape).to(dtype).to(DEVICE) for i in pointwise.segment.leaves]
    w = torch.rand(tokens, top_k).to(DEVICE)
    again, inner, of_leaves, gw = pointwise.weighted_vjp([pre], vectors, offsets, [g], order, w)

    own = [t.float().requires_grad_() for t in (pre[:n], *vectors, w)]
    spread = [ops.expert_rows(v, offsets, n) for v in own[1:-1]]
    (a,) = evaluate(pointwise.template, pointwise.segment, own[:1], spread)
    product = a * own[-1].reshape(-1)[order[:n], None]
    wanted = torch.autograd.grad(product, own, g[:n].float())
    assert gw.shape == w.shape and gw.dtype == w.dtype
    assert not gw[position < 0].any()
    taken = pointwise.weighted_vjp([pre.clone()], vectors, offsets, [given := g.clone()], order, w, in_place=True)
    assert taken[0][0].data_ptr() == given.data_ptr()
    with Rooms() as rooms:
        pointwise.weighted_vjp([pre.clone()], vectors, offsets, [g.clone()], order, w, in_place=True)
    assert all(shape != g.shape for shape in rooms.made), "what takes the memory of another value needs none of its own"
    for got, want in zip((taken[0][0][:n], taken[1][0][:n], *taken[2], taken[3]), (again[0][:n], inner[0][:n], *of_leaves, gw)):
        assert torch.equal(got, want)
    for got, want in zip((again[0][:n], inner[0][:n], *of_leaves, gw), (product, *wanted)):
        assert relative(got, want) <= 2 * TOLERANCE[dtype]


def test_the_source_is_readable(golden) -> None:
    template, segment, leaves = first_act("interleaved_bias", simplified=True)
    pointwise = compile_pointwise(template, segment, leaves)
    assert isinstance(pointwise, Pointwise)
    golden("triton_interleaved_bias", pointwise.source)
