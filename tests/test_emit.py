"""emit: the written file, and the template language that it may hold."""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import regions
import torch
from moefx.codegen.emit import emit
from regions import D, E, F

from moefx.build import compile_region, load
from moefx.errors import PlanError
from moefx.ir import Instr, Ref, Region, Template


@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "narrow"])
@pytest.mark.parametrize("degree", [1, 3])
def test_golden(golden, style, degree):
    golden(f"emit_{style}_r{degree}", compile_region(regions.region(style), degree).source)


def test_equal_layers_have_equal_files():
    """The file says what is computed, not whose parameters it is given."""
    one = regions.region("swiglu_fused")
    renamed = tuple(replace(leaf, params=("layers.1." + leaf.params[0],) * E) for leaf in one.leaves)
    assert compile_region(one).source == compile_region(replace(one, leaves=renamed)).source


def unary(target: str, *args: object, **kwargs: object) -> Region:
    """w2(op(w1(x)))."""
    instr = Instr("op", target, (Ref(1), *args), tuple(kwargs.items()), F)
    instrs = (regions.X, regions.linear(0, 0, F), instr, regions.linear(2, 1, D))
    return Region(E, 2, D, D, F, Template(instrs), (regions.stacked("up", D, F), regions.stacked("down", F, D)))


@pytest.mark.parametrize(
    ("instr", "text"),
    [
        (("aten.gelu.default", (), {"approximate": "tanh"}), "aten.gelu.default(v1, approximate='tanh')"),
        (("aten._to_copy.default", (), {"dtype": "model"}), "aten._to_copy.default(v1, dtype=v1.dtype)"),
        (("aten._to_copy.default", (), {"dtype": torch.float32}), "aten._to_copy.default(v1, dtype=torch.float32)"),
        (("aten.clamp.default", (float("-inf"), 7.0), {}), 'aten.clamp.default(v1, float("-inf"), 7.0)'),
        (("aten._softmax.default", (1, False), {}), "aten._softmax.default(v1, 1, False)"),
        (("aten.mean.dim", ([1], True), {}), "aten.mean.dim(v1, [1], True)"),
        (("prims.sin.default", (), {}), "torch.ops.prims.sin.default(v1)"),
    ],
)
def test_arguments(instr, text):
    target, args, kwargs = instr
    assert f"    v2 = {text}  # [R, {F}]" in compile_region(unary(target, *args, **kwargs)).source.splitlines()


def test_an_argument_without_meaning_is_refused():
    with pytest.raises(PlanError, match=r"cannot write device\(type='cpu'\) of type device"):
        compile_region(unary("aten._to_copy.default", device=torch.device("cpu")))


def test_chunk_counts_must_agree():
    one, two = compile_region(regions.region("plain_relu"), 1), compile_region(regions.region("plain_relu"), 2)
    with pytest.raises(PlanError, match="forward saves 6 values, backward reads"):
        emit(one.region, one.plans[0], two.plans[1], "region")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ((0, F, 1), (F, 2 * F, 1), f"v2, v3 = v1.split([{F}, {F}], 1)"),
        ((F, 2 * F, 1), (0, F, 1), f"v3, v2 = v1.split([{F}, {F}], 1)"),
        ((0, 2 * F - 1, 2), (1, 2 * F, 2), f"v2, v3 = v1.unflatten(1, ({F}, 2)).unbind(2)"),
        ((1, 2 * F, 2), (0, 2 * F - 1, 2), f"v3, v2 = v1.unflatten(1, ({F}, 2)).unbind(2)"),
        ((0, F, 1), (0, F, 1), f"v2 = v1[:, 0:{F}]"),
        ((0, F, 1), (1, 2 * F, 2), f"v3 = v1[:, 1:{2 * F}:2]"),
    ],
)
def test_columns(first, second, text):
    """Columns that make up a whole value are taken at once; any other by themselves. Both give the right numbers."""
    instrs = (
        regions.X,
        regions.linear(0, 0, 2 * F),
        regions.columns(1, *first),
        regions.columns(1, *second),
        regions.op("sigmoid.default", Ref(2), width=F),
        regions.op("mul.Tensor", Ref(4), Ref(3), width=F),
        regions.linear(5, 1, D),
    )
    leaves = (regions.stacked("up", D, 2 * F), regions.stacked("down", F, D))
    region = Region(E, 2, D, D, F, Template(instrs), leaves)
    compiled = compile_region(region)
    assert text in compiled.source
    given = regions.inputs(region, 6)
    params = {
        name: torch.randn(leaf.experts, *leaf.shape, dtype=torch.float64) for name, leaf in zip(("up", "down"), leaves)
    }
    y = compiled(given.x, given.ids, given.w, params)
    torch.testing.assert_close(y, regions.reference(region, given, params))


def test_traceback_shows_the_emitted_line():
    compiled = compile_region(regions.region("plain_relu"))
    try:
        compiled.emitted.forward(None, None, None, None, (None, None))
    except AttributeError:
        assert "order, offsets, position = rt.route(ids, 5)" in traceback.format_exc()
    else:
        pytest.fail("a missing runtime went unnoticed")


def test_load_runs_a_file_as_written():
    source = compile_region(regions.region("plain_relu")).source
    assert load(source).source == source
