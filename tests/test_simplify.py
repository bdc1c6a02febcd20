"""simplify: linears on the same rows become one, dead parts go, and the rest stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import regions
from moefx.passes.simplify import join_leaves, simplify
from regions import D, E, F

from moefx.ir import Leaf, Region, Template


def test_gate_and_up_side_by_side_become_one_linear(golden):
    region = simplify(regions.region("swiglu_fused"))
    assert [leaf.shape for leaf in region.leaves] == [(F, D), (D, 2 * F)]
    golden("simplify_swiglu_fused", str(region))


def test_gate_and_up_in_turn_become_one_linear(golden):
    region = simplify(regions.region("interleaved_bias"))
    wide = next(leaf for leaf in region.leaves if leaf.shape == (D, 2 * F))
    assert wide.strides == (2 * F, 1)
    golden("simplify_interleaved_bias", str(region))


def test_separate_parameters_stay_apart():
    region = regions.region("swiglu_separate")
    assert simplify(region) == region


def leaf(offset: int, width: int = F, strides: tuple[int, int] = (100, 1), params: str = "p") -> Leaf:
    return Leaf((D, width), strides, (params,) * E, tuple(offset + 1000 * e for e in range(E)))


@pytest.mark.parametrize(
    "other",
    [
        leaf(F + 1),  # a gap
        leaf(F, params="q"),  # another parameter
        leaf(F, strides=(100, 2)),  # another layout
        replace(leaf(F), shape=(D + 1, F)),  # other rows
        replace(leaf(F), offsets=tuple(F + 999 * e for e in range(E))),  # the distance varies
    ],
)
def test_leaves_that_do_not_join(other):
    assert join_leaves(leaf(0), other) is None


def test_leaves_of_unequal_width_join():
    wide, first, second = join_leaves(leaf(0), leaf(F, width=3))
    assert (wide.shape, first, second) == ((D, F + 3), (0, F, 1), (F, F + 3, 1))


def test_dead_instructions_and_leaves_go():
    instrs = (regions.X, regions.linear(0, 1, F), regions.linear(0, 0, D))
    leaves = (regions.stacked("w", D, D), regions.stacked("dead", D, F))
    region = simplify(Region(E, 2, D, D, D, Template(instrs), leaves))
    assert [i.kind for i in region.template.instrs] == ["x", "linear"]
    assert [x.params[0] for x in region.leaves] == ["w"]
