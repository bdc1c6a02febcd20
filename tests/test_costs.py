"""costs: algebra, numbers against it, and refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import regions
import sympy
from layers import LAYOUTS
from moefx.passes.partition import expert_parallel, partition

from moefx.costs import WORK, A, D, E, F, G, K, P, S, Sizes, T, amount, b, c, f, g, m, price, r, s, seconds, work
from moefx.errors import InputError
from moefx.profile import LINES, Line, Profile, preset

SIZES = Sizes(tokens=512, top_k=2, d_model=64, d_expert=96, experts=8, ranks=4, ranks_per_node=2)


def equal(left: Any, right: Any) -> bool:
    return sympy.simplify(left - right) == 0


@pytest.mark.parametrize(
    ("kind", "quantity", "expected"),
    [
        ("experts", "flops", 2 * m * f * T * K * D * F),
        ("experts_dgrad", "flops", 2 * m * f * T * K * D * F),
        ("experts_wgrad", "flops", 2 * m * f * T * K * D * F),
        ("experts_backward", "flops", 4 * m * f * T * K * D * F),
        ("encode", "hbm_bytes", 2 * f * K * T * D * b),
        ("decode", "hbm_bytes", (f * K + 1) * T * D * b),
        ("dispatch_all_to_all", "message_bytes", f * K * T * D * b * c),
        ("dispatch_all_to_all", "wire_bytes", f * K * T * D * b * c * (P - 1) / P),
        ("combine_inter_all_to_all", "wire_bytes", f * K * T * D * b * c * (P - G) / P),
        ("combine_intra_all_to_all", "wire_bytes", f * K * T * D * b * c * (G - 1) / P),
        ("dispatch_compress", "hbm_bytes", f * K * T * D * b * (1 + c)),
        ("all_gather", "wire_bytes", (G - 1) * f * K * T * D * b),
        ("reduce_scatter", "wire_bytes", (G - 1) * f * K * T * D * b),
    ],
)
def test_all_chunks_together(kind, quantity, expected):
    assert equal(r * getattr(work(kind), quantity), expected)


def test_a_gated_expert():
    assert equal((r * work("experts").flops).subs({m: 3, f: 1}), 6 * T * K * D * F)


def test_tasks_of_no_chunk():
    assert equal(work("shared").flops, 2 * m * T * D * S)
    assert equal(work("shared_backward").flops, 2 * work("shared").flops)
    assert equal(s * work("grad_all_reduce").wire_bytes, 2 * g * (A - 1) / A)


def test_both_links_carry_what_one_carries():
    both = work("dispatch_inter_all_to_all").wire_bytes + work("dispatch_intra_all_to_all").wire_bytes
    assert equal(both, work("dispatch_all_to_all").wire_bytes)


def test_backward_has_twice_the_experts_work():
    assert equal(work("experts_dgrad").flops + work("experts_wgrad").flops, 2 * work("experts").flops)


def test_experts_read_their_weights_once_a_chunk():
    assert equal(r * work("experts").hbm_bytes - work("experts").hbm_bytes.subs(r, 1), (r - 1) * m * D * F * b * E / P)


@pytest.mark.parametrize("kind", sorted(WORK))
def test_every_kind_costs_something_and_has_a_line(kind):
    one = work(kind)
    for unit in LINES[one.line]:
        assert amount(kind, unit, replace(SIZES, shared_width=32, gradient_bytes=1e6), 2) > 0


def test_every_task_of_every_graph_has_a_cost():
    graphs = [expert_parallel(2, phase, layout) for layout in LAYOUTS.values() for phase in ("forward", "backward")]
    graphs += [partition(regions.region("swiglu_fused"), 2, phase) for phase in ("forward", "backward")]
    for graph in graphs:
        assert all(work(t.kind).hbm_bytes != 0 for t in graph.tasks)


def test_an_unknown_kind_never_costs_zero():
    with pytest.raises(InputError, match="no cost is known for tasks of kind 'sort'; known: all_gather"):
        work("sort")


def test_a_price_by_hand():
    """PipeMoE's first row: alpha_e = 2 alpha_g, and the message counts a rank's own share."""
    sizes = Sizes(8 * 1024, 2, 4096, 4096, 16, 16, bytes_per_element=4, matrices=2)
    cluster = preset("pipemoe-16")
    rows = 2 * 8 * 1024
    assert seconds("dispatch_all_to_all", sizes, 1, cluster) == pytest.approx(5.70e-4 + 2.96e-10 * 4 * rows * 4096)
    expected = 2 * 1.5e-4 + 2 * 3.73e-14 * 4 * rows * 4096 * 4096
    assert seconds("experts", sizes, 1, cluster) == pytest.approx(expected)
    assert seconds("experts", sizes, 4, cluster) == pytest.approx(3e-4 + (expected - 3e-4) / 4)
    graph = price(expert_parallel(4, "forward", LAYOUTS["pipemoe"]), sizes, cluster)
    assert graph["E_3"].seconds == seconds("experts", sizes, 4, cluster)


def test_a_line_that_the_profile_lacks():
    with pytest.raises(InputError, match="has no line for 'permute'"):
        price(expert_parallel(1, "forward", LAYOUTS["shared"]), SIZES, preset("pipemoe-16"))


def test_a_degree_above_the_capacity():
    assert SIZES.capacity == 128
    profile = Profile("x", {"experts": Line(1e-6, 1e-12, "flops")})
    assert seconds("experts", SIZES, 128, profile) > 0
    with pytest.raises(InputError, match="between 1 and the capacity 128; got 129"):
        seconds("experts", SIZES, 129, profile)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "Sizes.tokens is a whole number >= 1; got 0"),
        ({"d_model": 1.5}, "Sizes.d_model"),
        ({"bytes_per_element": -1}, "Sizes.bytes_per_element is a finite positive number"),
        ({"capacity_factor": float("nan")}, "Sizes.capacity_factor"),
        ({"matrices": 4}, "2 matrices, or 3"),
        ({"ranks": 3}, "8 experts cannot be spread evenly over 3 ranks"),
        ({"top_k": 9}, "at most 8 experts"),
        ({"ranks_per_node": 8}, "a node has at most 4"),
    ],
)
def test_sizes_that_cannot_be(wrong, message):
    with pytest.raises(InputError, match=message):
        replace(SIZES, **wrong)


def test_a_codec_has_a_line_of_its_own():
    line = Line(1e-6, 1e-9, "hbm_bytes")
    profile = Profile("a machine", {"codec": line, "codec:int8": Line(1e-6, 5e-9, "hbm_bytes")})
    coded = replace(SIZES, wire_share=0.25)
    plain = seconds("dispatch_compress", coded, 1, profile)
    assert seconds("dispatch_compress", replace(coded, codec="fp16"), 1, profile) == plain
    assert seconds("dispatch_compress", replace(coded, codec="int8"), 1, profile) > 4 * plain
    for name in ("codec:", "experts:mine", ":"):
        with pytest.raises(InputError, match=f"unknown kind of work '{name}'"):
            Profile("a machine", {name: line})
