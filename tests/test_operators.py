"""The short way to an operator's function: taken where nobody watches, with the results of the long one everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moefx.operators import shorten

calls: list[bool] = []  # whether each call of the function came by the short way: then autograd's keys are not excluded


def _scaled(x: Tensor, others: list[Tensor], by: float) -> list[Tensor]:
    calls.append(not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality))
    return [x * by, *(t * by for t in others)]


SCHEMA = "(Tensor x, Tensor[] others, float by) -> Tensor[]"
scaled = torch.library.custom_op("moefx_test::scaled", _scaled, mutates_args=(), schema=SCHEMA)


@scaled.register_fake
def _(x: Tensor, others: list[Tensor], by: float) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *others)]


def _save(ctx, inputs, output) -> None:
    ctx.by, ctx.others = inputs[2], len(inputs[1])


scaled.register_autograd(lambda ctx, g: (g[0] * ctx.by, [t * ctx.by for t in g[1:]], None), setup_context=_save)
shorten(scaled)
OP = torch.ops.moefx_test.scaled.default


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def test_without_gradients_the_function_is_called_at_once() -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(2)
    with torch.no_grad():
        a, b = OP(x, [y], 2.0)
    assert torch.equal(a, 2 * x) and torch.equal(b, 2 * y) and calls == [True] and not a.requires_grad


def test_with_gradients_autograd_sees_it() -> None:
    x, y = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    a, b = OP(x, [y], 3.0)
    gx, gy = torch.autograd.grad([a, b], [x, y], [torch.ones(3), torch.ones(2)])
    assert torch.equal(gx, torch.full((3,), 3.0)) and torch.equal(gy, torch.full((2,), 3.0)) and calls == [False]


def test_a_mode_sees_it() -> None:
    class Watching(TorchDispatchMode):
        seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(3)
    with torch.no_grad(), Watching():
        OP(x, [], 2.0)
    assert Watching.seen == ["moefx_test.scaled.default"]


def test_what_is_fake_stays_fake() -> None:
    with torch.no_grad(), FakeTensorMode() as mode:
        a, b = OP(mode.from_tensor(torch.randn(3)), [mode.from_tensor(torch.randn(2))], 2.0)
    assert type(a).__name__ == "FakeTensor" and b.shape == (2,) and not calls


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        a, b = OP(torch.ones(3), [torch.ones(2)], 2.0)
    assert a.is_inference() and torch.equal(b, torch.full((2,), 2.0))


@pytest.mark.parametrize("grad", [True, False])
def test_under_torch_compile(grad: bool) -> None:
    def f(x: Tensor) -> Tensor:
        a, b = torch.ops.moefx_test.scaled(x.sin(), [x.cos()], 2.0)
        return a + b

    x = torch.randn(5, requires_grad=grad)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    compiled(x)  # the first call is watched by a mode of AOTAutograd, which looks for aliases
    calls.clear()
    y = compiled(x)
    want = 2 * (x.sin() + x.cos())
    assert torch.allclose(y, want)
    if grad:
        assert torch.allclose(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, want)))
    assert calls == [True]  # a compiled graph runs without gradients
