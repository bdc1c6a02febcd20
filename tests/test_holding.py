"""holding: which experts a rank has, and which parameters cannot be spread, on all ranks alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import regions
import torch

from moefx.errors import Decline
from moefx.holding import Holding, holding
from moefx.ir import Region


def held(region: Region, style: str, ranks: int, rank: int) -> Holding:
    return holding(region, {name: torch.empty(shape) for name, shape in regions.STYLES[style]()[2].items()}, ranks, rank)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_expert_is_on_one_rank(ranks: int) -> None:
    """Stacked in one parameter, or modules of their own."""
    stacked, listed = regions.region("swiglu_fused"), regions.region("listed")
    everyone = [held(stacked, "swiglu_fused", ranks, rank) for rank in range(ranks)]
    assert sum(of.region.experts for of in everyone) == stacked.experts
    assert all(of.stacked and not of.elsewhere for of in everyone)

    everyone = [held(listed, "listed", ranks, rank) for rank in range(ranks)]
    names = {name for leaf in listed.leaves for name in leaf.params}
    own = [{n for leaf in of.region.leaves for n in leaf.params} for of in everyone]
    assert sorted(n for names_of in own for n in names_of) == sorted(names)
    assert all(names_of | set(of.elsewhere) == names for names_of, of in zip(own, everyone))


def test_experts_that_share_a_parameter_are_declined_on_all_ranks() -> None:
    """Also on those that have neither of the two; on one rank they are no trouble."""
    region = regions.region("listed")
    leaf = region.leaves[0]
    last = leaf.params[-1]
    tied = replace(region, leaves=(replace(leaf, params=(last, *leaf.params[1:])), *region.leaves[1:]))
    assert region.experts > 2
    for rank in range(3):
        with pytest.raises(Decline, match=f"several ranks use the parameter {last}"):
            held(tied, "listed", 3, rank)
    assert held(tied, "listed", 1, 0).region.experts == region.experts


@pytest.mark.parametrize("style", ["swiglu_fused", "listed"])
def test_what_is_no_parameter_is_declined(style: str) -> None:
    region = regions.region(style)
    with pytest.raises(Decline, match="is no parameter: it is a buffer, or computed at each call"):
        holding(region, {}, 2, 0)


def test_experts_that_do_not_lie_behind_one_another_are_declined() -> None:
    """An expert's rows between those of others, as where the axis of the experts is not the first one."""
    region = regions.region("swiglu_fused")
    wide = tuple(replace(leaf, strides=(leaf.strides[0] * region.experts, *leaf.strides[1:])) for leaf in region.leaves)
    with pytest.raises(Decline, match="one behind the other on dim 0"):
        held(replace(region, leaves=wide), "swiglu_fused", 2, 0)
