"""Compiled regions against the definition: numbers, gradients, and on whose tensors they land."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import regions
import torch
from regions import STYLES, D, E, F, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moefx.build import compile_region
from moefx.errors import InputError
from moefx.ir import Instr, Leaf, LeafRef, Ref, Region, Template
from moefx.leaves import packed

DEGREES = [1, 2, 3, 4, 8]
VARIANTS = [{}, {"weight_position": "input"}, {"identity": True}, {"identity": True, "weight_position": "input"}]


def assert_equal_to_reference(
    region: Region, given: regions.Inputs, params: dict[str, Tensor], degrees=DEGREES
) -> None:
    """y and every gradient, fp64, for each number of chunks."""
    expected = regions.reference(region, given, params)
    gy = torch.randn_like(expected)
    of = [given.x, given.w, *params.values()]
    wanted = (
        gradients(expected, of, gy) if expected.requires_grad and len(expected) else [torch.zeros_like(t) for t in of]
    )
    for degree in degrees:
        y = compile_region(region, degree)(given.x, given.ids, given.w, params)
        values = zip(("y", "x", "w", *params), (y, *gradients(y, of, gy)), (expected, *wanted))
        for name, got, want in values:
            place = f"{name} at r={degree}: "
            torch.testing.assert_close(got, want, msg=place.__add__)


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("routing", ["any", "outside", "one", "few"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
@pytest.mark.parametrize("style", sorted(STYLES))
def test_equals_the_definition(style, tokens, routing):
    region = regions.region(style)
    assert_equal_to_reference(region, regions.inputs(region, tokens, routing), regions.parameters(style))


@pytest.mark.parametrize("style", sorted(STYLES))
def test_equals_the_definition_on_many_tokens(style):
    region = regions.region(style)
    assert_equal_to_reference(region, regions.inputs(region, 64, "any"), regions.parameters(style), [1, 3])


@pytest.mark.parametrize("top_k", [1, 4, 19])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "residual_norm"])
def test_slots_weight_positions_and_identity_experts(style, variant, top_k):
    region = regions.region(style, top_k, **variant)
    assert_equal_to_reference(region, regions.inputs(region, 5, "outside"), regions.parameters(style), [1, 3])


@pytest.mark.parametrize("policy", ["serial", "fifo"])
def test_every_policy_gives_the_same_bits(policy):
    region = regions.region("swiglu_fused")
    given, params = regions.inputs(region, 17), regions.parameters("swiglu_fused")
    runs = [compile_region(region, 3, policy=p)(given.x, given.ids, given.w, params) for p in ("serial", policy)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "listed"])
def test_gradcheck(style):
    region = regions.region(style)
    given, params = regions.inputs(region, 4, "outside"), regions.parameters(style)
    names, compiled = list(params), compile_region(region, 2)

    def run(x, w, *tensors):
        return compiled(x, given.ids, w, dict(zip(names, tensors)))

    tensors = [p.detach().clone().requires_grad_() for p in params.values()]
    assert torch.autograd.gradcheck(run, (given.x, given.w, *tensors), fast_mode=True)


def test_experts_in_irregular_places_are_copied_and_right():
    """Two parameters hold the experts, in reverse order: no constant distance."""
    places = {0: ("b", 2), 1: ("b", 1), 2: ("b", 0), 3: ("a", 1), 4: ("a", 0)}
    leaf = Leaf((D, D), (D, 1), tuple(places[e][0] for e in range(E)), tuple(places[e][1] * D * D for e in range(E)))
    region = Region(E, 2, D, D, D, Template((regions.X, regions.linear(0, 0, D))), (leaf,))
    params = {name: torch.randn(n, D, D, dtype=torch.float64, requires_grad=True) for name, n in (("a", 2), ("b", 3))}
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 2])


def test_overlapping_leaves_are_summed():
    """Up is the transposed down, in one parameter: neither may be written over the other."""
    leaves = (regions.stacked("w", D, F), regions.stacked("w", F, D, strides=(1, F)))
    instrs = (regions.X, regions.linear(0, 0, F), regions.op("relu.default", Ref(1), width=F), regions.linear(2, 1, D))
    region = Region(E, 2, D, D, F, Template(instrs), leaves)
    params = {"w": torch.randn(E, D, F, dtype=torch.float64, requires_grad=True)}
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 3])


def test_a_leaf_used_twice():
    instrs = (regions.X, regions.linear(0, 0, D), regions.op("relu.default", Ref(1), width=D), regions.linear(2, 0, D))
    region = Region(E, 2, D, D, D, Template(instrs), (regions.stacked("w", D, D),))
    params = {"w": torch.randn(E, D, D, dtype=torch.float64, requires_grad=True)}
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 3])


def test_template_that_ignores_its_rows():
    constant = Instr("op", "aten.mul.Tensor", (LeafRef(0), 2.0), width=D)
    region = Region(E, 2, D, D, D, Template((regions.X, constant)), (regions.stacked("b", D),))
    params = {"b": torch.randn(E, D, dtype=torch.float64, requires_grad=True)}
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 2])


def test_leaf_computed_before_its_use():
    instrs = (
        regions.X,
        regions.op("exp.default", LeafRef(0), width=F),
        regions.linear(0, 1, F),
        regions.op("mul.Tensor", Ref(2), Ref(1), width=F),
        regions.linear(3, 2, D),
    )
    leaves = (regions.stacked("log_scale", F), *STYLES["plain_relu"]()[1])
    region = Region(E, 2, D, D, F, Template(instrs), leaves)
    params = {
        "log_scale": torch.randn(E, F, dtype=torch.float64, requires_grad=True),
        **regions.parameters("plain_relu"),
    }
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 2])


def test_part_of_a_parameter():
    """What the region does not use of a parameter gets a gradient of zero."""
    region = Region(
        E,
        2,
        D,
        D,
        D,
        Template((regions.X, regions.linear(0, 0, D))),
        (regions.stacked("w", D, D, every=3 * D * D, at=D),),
    )
    params = {"w": torch.randn(E, 3 * D, D, dtype=torch.float64, requires_grad=True)}
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 3])


def test_one_expert():
    leaf = Leaf((D, D), (D, 1), ("w",), (0,))
    region = Region(1, 1, D, D, D, Template((regions.X, regions.linear(0, 0, D))), (leaf,))
    params = {"w": torch.randn(1, D, D, dtype=torch.float64, requires_grad=True)}
    given = regions.Inputs(
        torch.randn(4, D, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.long), torch.rand(4, 1)
    )
    y = compile_region(region, 2)(given.x, given.ids, given.w, params)
    torch.testing.assert_close(y, given.w * (given.x @ params["w"][0]))


def test_noncontiguous_parameter():
    params = {
        n: p.detach().transpose(1, 2).contiguous().transpose(1, 2) for n, p in regions.parameters("plain_relu").items()
    }
    params = {name: p.requires_grad_() for name, p in params.items()}
    assert not params["up"].is_contiguous()
    region = regions.region("plain_relu")
    assert_equal_to_reference(region, regions.inputs(region, 9), params, [1, 2])
    compiled = run("plain_relu", params=params)[0]
    assert compiled.notes == ("copied at each call, not contiguous: up", "copied at each call, not contiguous: down")


def test_tied_parameters():
    """Experts 0 and 1 are the same parameter."""
    region = regions.region("listed")
    params = regions.parameters("listed")
    for role in ("w1", "w2", "w3"):
        params[f"{role}.1"] = params[f"{role}.0"]
    given = regions.inputs(region, 9)
    y = compile_region(region)(given.x, given.ids, given.w, params)
    expected = regions.reference(region, given, params)
    distinct = list({id(p): p for p in params.values()}.values())
    gy = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, distinct, gy), gradients(expected, distinct, gy))


# ------------------------------------------------------------------------------------------------ what is not a number


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("degree", [1, 3])
def test_nan_and_inf_stay_with_their_token(bad, degree):
    region = regions.region("swiglu_fused")
    given, params = regions.inputs(region, 9, "outside"), regions.parameters("swiglu_fused")
    given.ids[4] = torch.tensor([2, 3])
    with torch.no_grad():
        given.x[4, 2] = bad
    y = compile_region(region, degree)(given.x, given.ids, given.w, params)
    (gx,) = torch.autograd.grad(y.sum(), given.x)
    for value in (y, gx):
        assert value.isfinite().all(1).tolist() == [t != 4 for t in range(9)]
    torch.testing.assert_close(y, regions.reference(region, given, params), equal_nan=True)


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("degree", [1, 3])
@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "listed"])
def test_low_precision(dtype, w_dtype, degree, style):
    """Against fp64 on the same rounded values; every gradient has its tensor's dtype."""
    region = regions.region(style)
    given, params = regions.inputs(region, 33, dtype=dtype), regions.parameters(style, dtype)
    given.w = given.w.detach().to(w_dtype).requires_grad_()
    of = [given.x, given.w, *params.values()]
    exact = [t.detach().double().requires_grad_() for t in of]
    y = compile_region(region, degree)(given.x, given.ids, given.w, params)
    expected = regions.reference(region, regions.Inputs(exact[0], given.ids, exact[1]), dict(zip(params, exact[2:])))
    assert y.dtype == dtype
    gy = torch.randn_like(y)
    tolerance = 1e-5 if dtype == torch.float32 == w_dtype else 3e-2
    pairs = zip((y, *gradients(y, of, gy)), (expected, *gradients(expected, exact, gy.double())), (y, *of))
    for got, want, like in pairs:
        assert got.dtype == like.dtype
        assert (got.double() - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("style", ["swiglu_fused", "interleaved_bias", "listed", "residual_norm"])
@pytest.mark.parametrize("degree", [1, 2])
def test_autocast(style, degree):
    """Products in bf16, everything else as it is; gradients in the parameters' dtype."""
    region = regions.region(style)
    given, params = regions.inputs(region, 33, dtype=torch.float32), regions.parameters(style, torch.float32)
    of = [given.x, given.w, *params.values()]
    compiled = compile_region(region, degree)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(given.x, given.ids, given.w, params)
    full = compiled(given.x, given.ids, given.w, params)
    gy = torch.randn_like(y)
    assert y.dtype == torch.float32 and not torch.equal(y, full)
    for got, want in zip((y, *gradients(y, of, gy)), (full, *gradients(full, of, gy))):
        assert got.dtype == torch.float32
        assert (got - want).norm() <= 3e-2 * want.norm()


def test_model_dtype_is_that_of_the_rows():
    instrs = (
        regions.X,
        regions.linear(0, 0, F),
        regions.op("_to_copy.default", Ref(1), width=F, dtype=torch.float32),
        regions.op("silu.default", Ref(2), width=F),
        regions.op("_to_copy.default", Ref(3), width=F, dtype="model"),
        regions.linear(4, 1, D),
    )
    region = Region(E, 2, D, D, F, Template(instrs), STYLES["plain_relu"]()[1])
    given, params = regions.inputs(region, 9, dtype=torch.bfloat16), regions.parameters("plain_relu", torch.bfloat16)
    y = compile_region(region)(given.x, given.ids, given.w, params)
    torch.testing.assert_close(y, regions.reference(region, given, params), rtol=2e-2, atol=2e-2)


# ------------------------------------------------------------------------------------------------ autograd


def run(
    style: str = "swiglu_fused", tokens: int = 9, degree: int = 1, params: dict[str, Tensor] | None = None, **changes
):
    region = regions.region(style, **changes)
    compiled, given = compile_region(region, degree), regions.inputs(region, tokens)
    params = params or regions.parameters(style)
    return compiled, given, params, compiled(given.x, given.ids, given.w, params)


def test_gradients_land_on_the_users_parameters():
    _, given, params, y = run()
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in params.values())
    assert given.x.grad is not None and given.w.grad is not None
    first = {name: p.grad.clone() for name, p in params.items()}
    run(params=params)[3].sum().backward()
    for name, p in params.items():
        torch.testing.assert_close(p.grad, 2 * first[name])


@pytest.mark.parametrize("degree", [1, 2])
def test_frozen_parameters_and_inputs(degree):
    params = regions.parameters("swiglu_fused")
    params["gate_up"].requires_grad_(False)
    compiled, given, _, y = run(params=params, degree=degree)
    expected = torch.autograd.grad(y.sum(), [given.x, given.w, params["down"]], retain_graph=True)
    y.sum().backward()
    assert params["gate_up"].grad is None
    torch.testing.assert_close([given.x.grad, given.w.grad, params["down"].grad], list(expected))
    plain = compiled(given.x.detach(), given.ids, given.w.detach(), params)
    torch.testing.assert_close(torch.autograd.grad(plain.sum(), params["down"])[0], expected[2])


def test_some_experts_frozen():
    params = regions.parameters("listed")
    params["w1.2"].requires_grad_(False)
    run("listed", params=params)[3].sum().backward()
    assert params["w1.2"].grad is None
    assert all(p.grad is not None for name, p in params.items() if name != "w1.2")


def test_all_parameters_frozen():
    params = {name: p.requires_grad_(False) for name, p in regions.parameters("interleaved_bias").items()}
    _, given, _, y = run("interleaved_bias", params=params)
    y.sum().backward()
    assert given.x.grad is not None and all(p.grad is None for p in params.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_recorded(context):
    compiled, given, params, y = run()
    with context():
        quiet = compiled(given.x, given.ids, given.w, params)
    assert quiet.grad_fn is None and torch.equal(quiet, y)


def test_packing_in_inference_mode_leaves_trainable_parameters():
    region, params = regions.region("listed"), regions.parameters("listed")
    compiled, given = compile_region(region), regions.inputs(region, 9)
    with torch.inference_mode():
        compiled(given.x, given.ids, given.w, params)
    assert packed([params[f"w1.{e}"] for e in range(E)])
    compiled(given.x, given.ids, given.w, params).sum().backward()
    with torch.no_grad():
        params["w1.0"].add_(1.0)


def test_nothing_requires_grad():
    params = {name: p.detach() for name, p in regions.parameters("swiglu_fused").items()}
    compiled, given, _, _ = run(params=params)
    assert compiled(given.x.detach(), given.ids, given.w.detach(), params).grad_fn is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    compiled, given, params, y = run()
    again = checkpoint(lambda x: compiled(x, given.ids, given.w, params), given.x, use_reentrant=reentrant)
    torch.testing.assert_close(
        torch.autograd.grad(again.sum(), given.x) if not reentrant else _grad_by_backward(again, given.x),
        torch.autograd.grad(y.sum(), given.x),
    )


def _grad_by_backward(y: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    y.sum().backward()
    return (x.grad,)


def test_backward_twice():
    _, given, _, y = run()
    first = torch.autograd.grad(y.sum(), given.x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(y.sum(), given.x)[0])


@pytest.mark.parametrize("power", [1, 2])
def test_second_derivatives_are_an_error(power):
    """Not a silent zero, even where the incoming gradient is a constant."""
    _, given, _, y = run()
    (gx,) = torch.autograd.grad((y**power).sum(), given.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        (gx.sum() + given.x.sum()).backward()


def test_parameters_changed_before_backward_are_noticed():
    _, _, params, y = run()
    with torch.no_grad():
        params["down"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_same_bits_from_run_to_run():
    region = regions.region("swiglu_fused")
    given, params = regions.inputs(region, 64), regions.parameters("swiglu_fused")
    results = []
    for _ in range(3):
        y = compile_region(region, 2)(given.x, given.ids, given.w, params)
        results.append((y, *gradients(y, [given.x, given.w, *params.values()], torch.ones_like(y))))
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(results[0], later))


def test_gathered_rows_and_activations_are_not_kept():
    """Kept beside the inputs: routing and preactivations."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, given, params, _ = run(tokens=9)
    own = [tuple(t.shape) for t in kept if not any(t is p for p in (given.x, given.w, *params.values()))]
    assert sorted(own) == sorted([(18,), (E + 1,), (9, 2), (18, 2 * F)])


# ------------------------------------------------------------------------------------------------ parameters


def test_stacked_parameters_are_used_in_place():
    compiled, _, params, _ = run("swiglu_fused")
    leaves, notes = compiled.binder.bind(params)
    assert {leaf.untyped_storage().data_ptr() for leaf in leaves} == {
        p.untyped_storage().data_ptr() for p in params.values()
    }
    assert not notes


def test_listed_parameters_become_views_of_one_buffer_per_role():
    params = regions.parameters("listed")
    before = {name: (id(p), p.detach().clone()) for name, p in params.items()}
    run("listed", params=params)
    for role in ("w1", "w2", "w3"):
        members = [params[f"{role}.{e}"] for e in range(E)]
        assert packed(members)
        assert members[0].untyped_storage().nbytes() == sum(p.nbytes for p in members)
    for name, p in params.items():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1]) and isinstance(p, torch.nn.Parameter)


def test_packing_does_not_keep_the_old_memory():
    params = regions.parameters("listed")
    old = [weakref.ref(p.untyped_storage()) for p in params.values()]
    run("listed", params=params)
    gc.collect()
    assert all(ref() is None for ref in old)


class _Experts(torch.nn.Module):
    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterDict({name.replace(".", "_"): p for name, p in params.items()})

    def named(self) -> dict[str, Tensor]:
        return {name.replace("_", "."): p for name, p in self.all.items()}


@pytest.mark.parametrize("change", ["to", "deepcopy", "load", "one"])
def test_packing_survives_what_dissolves_it(change):
    compiled, given, params, y = run("listed")
    module = _Experts(params)
    if change == "to":
        module.to(torch.float32).to(torch.float64)
        y = compiled(given.x, given.ids, given.w, {n: p.float().double() for n, p in params.items()})
    elif change == "deepcopy":
        module = copy.deepcopy(module)
    elif change == "load":
        module.load_state_dict({k: v.clone() for k, v in module.state_dict().items()}, strict=True, assign=True)
    else:
        params["w1.3"].data = params["w1.3"].data.clone()
    named = module.named()
    torch.testing.assert_close(compiled(given.x, given.ids, given.w, named), y)
    assert packed([named[f"w1.{e}"] for e in range(E)])


def test_optimizer_steps_are_seen():
    compiled, given, params, y = run("listed")
    torch.optim.SGD(params.values(), lr=0.5).zero_grad()
    y.sum().backward()
    torch.optim.SGD(params.values(), lr=0.5).step()
    torch.testing.assert_close(
        compiled(given.x, given.ids, given.w, params), regions.reference(compiled.region, given, params)
    )


def test_copies_of_a_model_share_the_compiled_region():
    compiled = run()[0]
    assert copy.deepcopy({"a": compiled})["a"] is compiled


# ------------------------------------------------------------------------------------------------ wrong input


def test_wrong_inputs_are_named():
    compiled, given, params, _ = run()
    with pytest.raises(InputError, match=r"x must be \[T, 8\]; got \[9, 7\]"):
        compiled(given.x[:, :7], given.ids, given.w, params)
    with pytest.raises(InputError, match=r"ids must be integers \[9, 2\]; got torch.int64 \[9, 1\]"):
        compiled(given.x, given.ids[:, :1], given.w, params)
    with pytest.raises(InputError, match="ids must be integers"):
        compiled(given.x, given.ids.float(), given.w, params)
    with pytest.raises(InputError, match=r"w must be \[9, 2\]"):
        compiled(given.x, given.ids, given.w[:3], params)
    with pytest.raises(InputError, match="parameters missing: gate_up"):
        compiled(given.x, given.ids, given.w, {"down": params["down"]})
