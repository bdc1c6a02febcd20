"""Leaves in the user's parameters: what may be seen as one buffer, and which leaves may be written side by side."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefx.leaves import Lattice, pack, packable, packed


def test_neighbours_in_memory_are_not_taken_for_one_buffer():
    buffer = torch.zeros(2, 4)
    assert packed([buffer[0], buffer[1]])
    assert not packed([buffer[1], buffer[0]])
    assert not packed([buffer[0], buffer[1].clone()])


def test_pack_keeps_objects_and_values():
    params = [torch.nn.Parameter(torch.randn(2, 3)) for _ in range(4)]
    values = [p.detach().clone() for p in params]
    assert packable(params) and not packed(params)
    pack(params)
    assert packed(params)
    assert all(torch.equal(p, v) and p.requires_grad for p, v in zip(params, values))


def test_what_cannot_be_packed():
    p = torch.nn.Parameter(torch.randn(2, 3))
    assert not packable([p, p])
    assert not packable([p, torch.randn(3, 2)])
    assert not packable([p, torch.randn(2, 3, dtype=torch.float64)])
    assert not packable([p, torch.randn(3, 2).t()])
    assert not packable([torch.zeros(0), torch.zeros(0)])


def places(lattice: Lattice) -> list[int]:
    index = torch.full(lattice.shape, lattice.offset)
    for dim, stride in enumerate(lattice.strides):
        steps = torch.arange(lattice.shape[dim]) * stride
        index = index + steps.view([-1 if d == dim else 1 for d in range(len(lattice.shape))])
    return index.flatten().tolist()


LATTICES = st.integers(1, 3).flatmap(
    lambda dims: st.builds(
        Lattice,
        st.integers(0, 30),
        st.lists(st.integers(1, 4), min_size=dims, max_size=dims).map(tuple),
        st.lists(st.integers(0, 16), min_size=dims, max_size=dims).map(tuple),
    )
)


@given(LATTICES)
def test_injective_is_never_claimed_wrongly(lattice):
    if lattice.injective():
        assert len(set(places(lattice))) == len(places(lattice))


@given(LATTICES, LATTICES, st.booleans())
def test_disjoint_is_never_claimed_wrongly(a, b, same_strides):
    if same_strides and len(a.shape) == len(b.shape):
        b = Lattice(b.offset, b.shape, a.strides)
    if a.disjoint(b):
        assert set(places(a)).isdisjoint(places(b))
    assert a.disjoint(b) == b.disjoint(a)


@pytest.mark.parametrize("offset", [4, 1])
def test_halves_side_by_side_or_in_turn_are_disjoint(offset):
    """Gate and up in one parameter of 3 experts, 5 rows, 8 columns."""
    strides = (40, 8, 1) if offset == 4 else (40, 8, 2)
    gate, up = Lattice(0, (3, 5, 4), strides), Lattice(offset, (3, 5, 4), strides)
    assert gate.injective() and gate.disjoint(up)
