"""capture: one run of a block, as the torch functions and module calls that the user wrote."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from moefx.passes.capture import capture
from test_sizes import evaluate
from torch import Tensor, nn

from moefx import sizes
from moefx.errors import Decline
from moefx.trace import Call, Trace, Value, values_in

GLOBAL = torch.ones(3)


class Block(nn.Module):
    """A block whose forward is any function of itself and its inputs."""

    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.body = forward
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def record(forward: Callable[..., Any], *inputs: Any, **members: Any) -> Trace:
    return capture(Block(forward, **members), inputs, {})


def names(trace: Trace) -> list[str]:
    return [call.name for call in trace.calls]


def only(trace: Trace, name: str) -> Call:
    (call,) = [c for c in trace.calls if c.name == name]
    return call


def result(trace: Trace) -> Value:
    (value,) = trace.result[0]
    return value


# ------------------------------------------------------------------------------------------------ values


def test_a_chain_of_calls():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    trace = record(lambda self, x, y: (x + y).relu() * 2, x, y)
    assert names(trace) == ["add", "relu", "mul"]
    assert trace.calls[0].reads() == list(trace.inputs) and [v.origin for v in trace.inputs] == ["input", "input"]
    assert trace.calls[1].reads() == [trace.calls[0].result] and trace.calls[2].result is result(trace)
    torch.testing.assert_close(result(trace).tensor, (x + y).relu() * 2)


def test_writing_to_a_mask_renames():
    def forward(self: Block, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        before = y + 1
        y[x > 0] = 5.0
        return before + y

    x = torch.tensor([1.0, -1.0, 2.0])
    trace = record(forward, x)
    made, write = only(trace, "zeros_like").result, only(trace, "__setitem__")
    (written,) = write.writes
    assert written is not made and written.object is made and written.producer is write
    assert written.storage == made.storage and written.version > made.version
    assert made.tensor.tolist() == [0, 0, 0] and written.tensor.tolist() == [5, 0, 5]
    first, last = [c for c in trace.calls if c.name == "add"]
    assert first.reads() == [made] and last.reads() == [first.result, written]


@pytest.mark.parametrize(
    "write",
    [lambda y: y.add_(1), lambda y: y.mul_(1).add_(1), lambda y: torch.add(y, 1, out=y)],
    ids=["add_", "twice", "out"],
)
def test_in_place_functions_rename(write):
    def forward(self: Block, x: Tensor) -> Tensor:
        y = x * 2
        write(y)
        return y

    trace = record(forward, torch.arange(3.0))
    made = only(trace, "mul").result
    assert result(trace) is not made and result(trace).object is made
    assert made.tensor.tolist() == [0, 2, 4] and result(trace).tensor.tolist() == [1, 3, 5]


def test_augmented_assignment_renames():
    def forward(self: Block, x: Tensor) -> Tensor:
        y = x * 2
        y += 1
        y[0] -= 10
        return y

    trace = record(forward, torch.arange(3.0))
    assert result(trace).object is only(trace, "mul").result
    assert result(trace).tensor.tolist() == [-9, 3, 5] and only(trace, "mul").result.tensor.tolist() == [0, 2, 4]


def test_views_see_what_is_written_to_their_base():
    def forward(self: Block, x: Tensor) -> Tensor:
        base = x * 2
        view = base[1:]
        early = view + 0
        base.zero_()
        return early + view

    trace = record(forward, torch.arange(3.0))
    view = only(trace, "__getitem__").result
    early, late = [c for c in trace.calls if c.name == "add"]
    assert early.reads() == [view] and view.tensor.tolist() == [2, 4]
    seen = late.reads()[1]
    assert seen is not view and seen.object is view and seen.tensor.tolist() == [0, 0]
    assert seen.producer is only(trace, "__getitem__") and result(trace).tensor.tolist() == [2, 4]


def test_a_base_sees_what_is_written_to_its_view():
    def forward(self: Block, x: Tensor) -> Tensor:
        base = x * 2
        base[1:].zero_()
        return base

    trace = record(forward, torch.arange(3.0))
    base = only(trace, "mul").result
    assert result(trace).object is base and result(trace).version > base.version
    assert result(trace).tensor.tolist() == [0, 0, 0] and base.tensor.tolist() == [0, 2, 4]


def test_an_input_that_is_written_to():
    trace = record(lambda self, x: x.add_(1), torch.zeros(3))
    (before,), (after,) = trace.inputs, trace.inputs_after
    assert before is not after and after.object is before
    assert before.tensor.tolist() == [0, 0, 0]
    untouched = record(lambda self, x: x + 1, torch.zeros(3))
    assert untouched.inputs[0] is untouched.inputs_after[0]


def test_origins():
    def forward(self: Any, x: Tensor) -> Tensor:
        return x + self.weight + self.load + self.constant + GLOBAL

    block = Block(forward, weight=nn.Parameter(torch.ones(3)), constant=torch.ones(3), inner=nn.Linear(3, 3))
    block.register_buffer("load", torch.ones(3))
    trace = capture(block, (torch.ones(3),), {})
    operands = [c.reads()[1] for c in trace.calls]
    assert [(v.origin, v.path) for v in operands] == [
        ("param", "weight"),
        ("buffer", "load"),
        ("attr", "constant"),
        ("unseen", ""),
    ]


def test_outputs_keep_their_structure_and_constants():
    trace = record(lambda self, x: {"y": (x + 1, 3), "z": [x]}, torch.ones(2))
    flat, structure = trace.result
    assert flat == [only(trace, "add").result, 3, trace.inputs[0]]
    assert set(structure.put_together(flat)) == {"y", "z"}


@pytest.mark.parametrize("name", ["detach", "data"])
def test_a_detached_tensor_is_another_value(name):
    """It lies where the first one does, with the same numbers, and so do its views."""

    def forward(self: Block, x: Tensor) -> tuple[Tensor, ...]:
        apart = x.detach() if name == "detach" else x.data
        return x.view(4).exp(), apart.view(4).neg(), x.view(4).abs(), apart.sin()

    trace = record(forward, torch.ones(2, 2))
    first, of_view, again, whole = (only(trace, n).args[0] for n in ("exp", "neg", "abs", "sin"))
    made = only(trace, name).result
    assert whole is made is not trace.inputs[0] and made.storage == trace.inputs[0].storage
    assert first is again is not of_view and of_view.producer.args[0] is made


def test_what_detached_values_are_written_into_is_not_detached():
    def forward(self: Block, x: Tensor) -> Tensor:
        total = x + 1
        total.add_(total.detach())
        total[0] = x.detach()[1]
        return total.view(4)

    trace = record(forward, torch.ones(2, 2))
    last = result(trace).producer.args[0]
    assert last.object is only(trace, "add").result


def test_calls_with_several_results():
    trace = record(lambda self, x: x.topk(2).indices + x.topk(1)[1] + x.chunk(2)[0].long(), torch.ones(4))
    for call in trace.calls:
        if call.name in ("topk", "chunk"):
            assert len(values_in(call.result)) == 2


def test_python_that_only_looks_is_not_recorded():
    def forward(self: Block, x: Tensor) -> Tensor:
        assert x.dim() == 2 and x.dtype.is_floating_point and x.device.type == "cpu" and x.is_contiguous()
        return x + 1

    assert names(record(forward, torch.ones(2, 2))) == ["add"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x.equal(x),
    ],
    ids=["item", "tolist", "bool", "int", "equal"],
)
def test_reading_values_into_python_is_recorded(read):
    trace = record(lambda self, x: x + (1 if read(x) else 2), torch.ones(2))
    assert [c.reads_host for c in trace.calls].count(True) == 1


# ------------------------------------------------------------------------------------------------ what surrounds a call


def test_module_calls_nest():
    inner = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    trace = record(lambda self, x: self.inner(x + 1) * 2, torch.ones(3), inner=inner)
    outer, linear, relu = trace.module_calls
    assert [m.path for m in trace.module_calls] == ["inner", "inner.0", "inner.1"]
    assert outer.scope == () and linear.scope == (outer,) and relu.scope == (outer,)
    assert [c.name for c in trace.calls[outer.start : outer.stop]] == ["linear", "relu"]
    assert [len(c.scope) for c in trace.calls] == [0, 2, 2, 0]
    assert trace.calls[1].scope == (outer, linear)
    assert outer.args == (trace.calls[0].result,) and outer.result is trace.calls[2].result is relu.result
    assert linear.result is relu.args[0]


def test_a_module_called_twice():
    trace = record(lambda self, x: self.inner(self.inner(x)), torch.ones(3), inner=nn.Linear(3, 3))
    first, second = trace.module_calls
    assert first.result is second.args[0] and (first.start, first.stop, second.start, second.stop) == (0, 1, 1, 2)


def test_regions_without_gradient():
    def forward(self: Block, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * 2
        return y + x

    trace = record(forward, torch.ones(3))
    assert [(c.name, c.grad_enabled) for c in trace.calls] == [("mul", False), ("add", True)]
    with torch.no_grad():
        assert record(forward, torch.ones(3)).calls[1].grad_enabled


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor + 0 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return 7 * g, None


def test_an_autograd_function_is_one_call():
    trace = record(lambda self, x: Double.apply(x, 2.0) + 1, torch.ones(3))
    assert names(trace) == ["apply", "add"]
    call = trace.calls[0]
    assert call.reads() == [trace.inputs[0]] and call.args[1] == 2.0 and call.result.tensor.tolist() == [2, 2, 2]
    x = torch.ones(3, requires_grad=True)
    call.func(x, 2.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [7, 7, 7]


def test_calls_know_their_line():
    def forward(self: Block, x: Tensor) -> Tensor:
        y = x + 1
        return F.relu(y)

    line = forward.__code__.co_firstlineno
    trace = record(forward, torch.ones(3))
    assert [c.location for c in trace.calls] == [f"{__file__}:{line + 1}", f"{__file__}:{line + 2}"]


def test_vmap_stays_inside():
    trace = record(lambda self, x: torch.vmap(lambda row: row * 2)(x) + 1, torch.ones(2, 3))
    assert result(trace).tensor.tolist() == [[3, 3, 3]] * 2 and names(trace)[-1] == "add"


# ------------------------------------------------------------------------------------------------ sizes


def expression_at(value: Any, **replaced: int) -> Any:
    """A size evaluated with size `dim0` of the input replaced."""

    class Other:
        def size(self, dim: int) -> int:
            return replaced.get(f"dim{dim}", 1)

    def substitute(expr: Any) -> Any:
        if not isinstance(expr, sizes.Expr):
            return expr
        if expr.fn is sizes.size_of:
            return sizes.Expr(sizes.size_of, (Other(), expr.args[1]))
        return sizes.Expr(expr.fn, tuple(substitute(a) for a in expr.args))

    return evaluate(substitute(value.expr))


@pytest.mark.parametrize(
    "rows",
    [
        lambda x: x.shape[0],
        lambda x: x.size(0),
        lambda x: x.size(dim=0),
        lambda x: x.size()[-2],
        lambda x: len(x),
        lambda x: x.numel() // x.shape[1],
        lambda x: x.shape[:-1][0],
        lambda x: min(x.shape[0], 100),
        lambda x: max(1, len(x)),
        lambda x: len(x[:, :2]),
    ],
    ids="shape size dim negative len numel sliced min max getitem".split(),
)
def test_sizes_keep_their_expression(rows):
    trace = record(lambda self, x: torch.zeros(rows(x), 3), torch.ones(5, 4))
    size = only(trace, "zeros").args[0]
    assert not trace.log.guards
    assert isinstance(size, sizes.Size) and sizes.plain(size) == 5 and result(trace).shape == (5, 3)


def test_sizes_of_inputs_evaluate_at_other_sizes():
    trace = record(lambda self, x: torch.zeros(len(x) * x.shape[1] // 2, min(x.shape[0], 9)), torch.ones(5, 4))
    rows, columns = only(trace, "zeros").args
    assert (expression_at(rows, dim0=10, dim1=4), expression_at(columns, dim0=10)) == (20, 9)
    assert (expression_at(rows, dim0=7, dim1=2), expression_at(columns, dim0=7)) == (7, 7)


@pytest.mark.parametrize(
    "capacity",
    [
        lambda self, x: int(len(x) * self.factor / 4),
        lambda self, x: int(self.factor * len(x) / 4),
        lambda self, x: int(self.factor * (len(x) / 4)),
    ],
    ids=["size * float", "float * size", "float * fraction"],
)
def test_a_capacity_factor_of_the_module(capacity):
    """`self.capacity_factor * tokens`: how nearly every capacity is written."""
    trace = record(lambda self, x: torch.zeros(capacity(self, x)), torch.ones(8, 2), factor=1.5)
    assert result(trace).shape == (3,)
    assert [(value, str(expr)[:5]) for expr, value in trace.log.truncations] == [(3, "trunc")]


def test_comparing_sizes_is_a_guard():
    trace = record(lambda self, x: x + 1 if x.shape[0] > 3 else x, torch.ones(5, 4))
    ((expr, outcome),) = trace.log.guards
    assert outcome is True and expr.args[1] == 3


def test_builtins_and_functions_are_put_back():
    before = (builtins.len, builtins.min, builtins.max, torch.autograd.Function.__dict__["apply"])
    record(lambda self, x: x + len(x), torch.ones(3))
    with pytest.raises(Decline):
        record(lambda self, x: x @ x[:2], torch.ones(3))
    assert (builtins.len, builtins.min, builtins.max, torch.autograd.Function.__dict__["apply"]) == before


# ------------------------------------------------------------------------------------------------ side effects


def effects(forward: Callable[..., Any], **members: Any) -> tuple[tuple[str, str], ...]:
    def body(self: Block, x: Tensor) -> Tensor:
        forward(self, x)
        return x + 1

    return record(body, torch.ones(3), **members).side_effects


def set_buffer(self: Any, x: Tensor) -> None:
    self.inner.running_mean = x


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: setattr(self, "calls", self.calls + 1), (("", "self.calls"),)),
        (lambda self, x: self.log.append(x), (("", "self.log"),)),
        (lambda self, x: self.seen.update(rows=1), (("", "self.seen"),)),
        (lambda self, x: setattr(self, "last", x), (("", "self.last"),)),
        (lambda self, x: self.total.add_(x), (("", "self.total"),)),
        (lambda self, x: setattr(self.inner, "mode", "off"), (("inner", "self.mode"),)),
        (set_buffer, (("inner", "self.running_mean"),)),
        (lambda self, x: self.inner.running_var.add_(1), ()),  # a write to a buffer is a call
        (lambda self, x: self.log + [1], ()),
        (lambda self, x: None, ()),
    ],
    ids="number list dict tensor tensor_write child buffer buffer_write read nothing".split(),
)
def test_side_effects_are_noticed(forward, expected):
    members = {"calls": 0, "log": [], "seen": {}, "total": torch.zeros(3), "inner": nn.BatchNorm1d(3)}
    assert effects(forward, **members) == expected


def test_no_hooks_stay():
    inner = nn.Linear(3, 3)
    record(lambda self, x: self.inner(x), torch.ones(3), inner=inner)
    assert not inner._forward_hooks and not inner._forward_pre_hooks


def test_a_block_that_raises_is_declined_where_it_raised():
    def forward(self: Block, x: Tensor) -> Tensor:
        raise ValueError("only even lengths")

    with pytest.raises(Decline, match="raised ValueError on probe inputs: only even lengths") as caught:
        record(forward, torch.ones(3))
    assert caught.value.location == f"{__file__}:{forward.__code__.co_firstlineno + 1}"
