"""A region as torch operators: shapes, gradients, compilers."""

from __future__ import annotations

import copy

import pytest
import regions
import torch
from moefx.models.mixtral import MixtralMoE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import moefx
from moefx.build import compile_region
from moefx.compiled import CompiledRegion
from moefx.errors import InputError
from moefx.region_op import REGIONS, region_of, routed

CASES = [(style, degree) for style in regions.STYLES for degree in (1, 3)]


def made(
    style: str, degree: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[CompiledRegion, dict[str, Tensor]]:
    return compile_region(regions.region(style), degree), regions.parameters(style, dtype)


def differentiated(y: Tensor, given: regions.Inputs, params: dict[str, Tensor]) -> list[Tensor]:
    return [y, *regions.gradients(y, [given.x, given.w, *params.values()], torch.ones_like(y))]


@pytest.mark.parametrize(("style", "degree"), CASES)
@pytest.mark.parametrize("routing", ["any", "outside"])
def test_the_operator_is_the_region(style: str, degree: int, routing: str) -> None:
    """Bit for bit, outputs and gradients; rows that do not exist are padded and cut again."""
    compiled, params = made(style, degree)
    given = regions.inputs(compiled.region, 11, routing)
    expected = differentiated(compiled(given.x, given.ids, given.w, params), given, params)
    actual = differentiated(routed(compiled.handle, given.x, given.ids, given.w, params), given, params)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize(("style", "degree"), CASES)
def test_opcheck(style: str, degree: int) -> None:
    """Schema, autograd registration, fake implementation (shapes, strides, dtypes), and the whole under AOTAutograd."""
    compiled, params = made(style, degree)
    for routing in ("any", "outside"):
        given = regions.inputs(compiled.region, 11, routing)
        tensors = [params[name] for name in compiled.binder.names]
        torch.library.opcheck(torch.ops.moefx.routed.default, (compiled.handle, given.x, given.ids, given.w, tensors, None, True))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.moefx.routed.default, (compiled.handle, given.x, given.ids, given.w, tensors, None, False))


@pytest.mark.parametrize(("style", "degree"), CASES)
def test_results_share_no_memory(style: str, degree: int) -> None:
    """Neither with arguments nor with each other; the short way to an operator's function does not check it."""
    compiled, params = made(style, degree)
    given = regions.inputs(compiled.region, 11)
    x, w, tensors = given.x.detach(), given.w.detach(), [params[name].detach() for name in compiled.binder.names]
    y, *saved = torch.ops.moefx.routed(compiled.handle, x, given.ids, w, tensors, None, True)
    gy, wanted = torch.ones_like(y), [True] * len(tensors)
    grads = torch.ops.moefx.routed_backward(compiled.handle, gy, saved, x, w, tensors, True, wanted, None)
    every = [x, given.ids, w, *tensors, y, *saved, gy, *grads]
    storages = [t.untyped_storage().data_ptr() for t in every if t.numel()]
    lent = len(tensors) - len({t.untyped_storage().data_ptr() for t in tensors})  # packed parameters lie in one buffer
    assert len(set(storages)) == len(storages) - lent


@pytest.mark.parametrize("degree", [1, 3])
def test_one_graph_for_all_token_counts(degree: int) -> None:
    """Chunks too: their sizes are symbolic, as long as each has two tokens (of one, a compiler makes a case of its own)."""
    compiled, params = made("interleaved_bias", degree)
    call = torch.compile(
        lambda x, ids, w: routed(compiled.handle, x, ids, w, params), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for count in (7, 64, 333, 6):
        given = regions.inputs(compiled.region, count)
        with torch._dynamo.config.patch(error_on_recompile=count != 7):
            actual = differentiated(call(given.x, given.ids, given.w), given, params)
        expected = differentiated(compiled(given.x, given.ids, given.w, params), given, params)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_only_wanted_gradients() -> None:
    compiled, params = made("listed")
    frozen = copy.deepcopy(params)
    for name in list(frozen)[::2]:
        frozen[name].requires_grad_(False)
    given = regions.inputs(compiled.region, 11)
    y = routed(compiled.handle, given.x.detach(), given.ids, given.w, frozen)
    y.sum().backward()
    whole = routed(compiled.handle, given.x, given.ids, given.w, params)
    whole.sum().backward()
    for name, p in frozen.items():
        assert torch.equal(p.grad, params[name].grad) if p.requires_grad else p.grad is None  # type: ignore[arg-type]


def test_without_a_backward_nothing_is_saved() -> None:
    compiled, params = made("swiglu_fused")
    given = regions.inputs(compiled.region, 11)
    tensors = [params[name] for name in compiled.binder.names]
    arguments = (compiled.handle, given.x, given.ids, given.w, tensors, None)
    assert len(torch.ops.moefx.routed(*arguments, False)) == 1
    assert len(torch.ops.moefx.routed(*arguments, True)) > 1
    with pytest.raises(RuntimeError, match="save=False"):
        torch.ops.moefx.routed(*arguments, False)[0].sum().backward()


def test_stand_ins_are_not_packed() -> None:
    """A compiler's stand-ins for parameters are read where they are."""
    compiled, params = made("listed")
    given = regions.inputs(compiled.region, 11)
    stand_ins = {name: p.detach().clone() for name, p in params.items()}
    places = [t.data_ptr() for t in stand_ins.values()]
    with torch.no_grad():
        y = routed(compiled.handle, given.x, given.ids, given.w, stand_ins)
    assert [t.data_ptr() for t in stand_ins.values()] == places
    torch.testing.assert_close(y, compiled(given.x, given.ids, given.w, params))


def test_handles_name_what_is_computed() -> None:
    first, again, chunked, other = made("plain_relu")[0], made("plain_relu")[0], made("plain_relu", 3)[0], made("one_linear")[0]
    assert first.handle == again.handle
    assert len({first.handle, chunked.handle, other.handle}) == 3
    assert region_of(first.handle or "") is REGIONS[first.handle or ""]
    with pytest.raises(InputError, match="has not made|has no moefx region"):
        region_of("nobody")


def test_autocast_is_a_part_of_the_graph() -> None:
    compiled, params = made("swiglu_fused", dtype=torch.float32)
    given = regions.inputs(compiled.region, 11, dtype=torch.float32)
    call = torch.compile(lambda x, ids, w: routed(compiled.handle, x, ids, w, params), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = call(given.x, given.ids, given.w)
        expected = compiled(given.x, given.ids, given.w, params)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, compiled(given.x, given.ids, given.w, params))


@pytest.mark.parametrize("frozen", [False, True])
def test_flops_are_those_of_the_original(frozen: bool) -> None:
    """Counted by torch's own counter, of an eager call as well: 2 T K I O a product, three times that with its backward."""
    model = nn.Sequential(MixtralMoE(24, 40, 5, 2))  # a loop over experts: torch counts each mm of the original
    x = torch.randn(2, 9, 24, requires_grad=True)
    if frozen:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.shape[-1] == 40)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            y = model(x)
            (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        return counter.get_total_flops()

    before = flops()
    moefx.optimize(model, (x.detach(),))
    assert moefx.explain(model).found
    assert flops() == before
