"""Models that others have wrapped: torch.compile, replicas of torch.nn.DataParallel, parameters spread over ranks."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_block import BUILDERS, CLOSE, ListBlock, relative, tokens
from torch import Tensor, fx, nn

import moefx

# ------------------------------------------------------------------------------------------------ torch.compile


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(tokens().shape[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))  # type: ignore[no-any-return]


class Counting:
    """A backend that runs graphs as they are. regions: of the last one."""

    regions = -1

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.regions = sum("moefx.routed" in str(node.target) for node in gm.graph.nodes)
        return gm.forward


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("pending", [False, True])
def test_what_is_compiled_can_be_optimised(called: bool, pending: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, backend = Model(BUILDERS["stacked"]()), Counting()
    expected = copy.deepcopy(model)(tokens())
    compiled = torch.compile(model, backend=backend)
    if called:
        compiled(tokens())
    assert moefx.optimize(compiled, None if pending else (tokens(),)) is compiled
    if pending:
        compiled(tokens())
    (found,) = moefx.explain(compiled).found
    assert found.name == "block" and moefx.explain(model).found == [found]
    assert relative(compiled(tokens()), expected) <= CLOSE and backend.regions == 1
    assert moefx.restore(compiled) is compiled
    assert type(model.block).forward is model.block.forward.__func__  # type: ignore[union-attr]
    assert relative(compiled(tokens()), expected) <= CLOSE


@pytest.mark.parametrize("which", ["block", "expert"])
def test_a_part_that_is_compiled(which: str) -> None:
    """It is found by what it computes: its code runs as it is written meanwhile."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ListBlock()
    expected = copy.deepcopy(block)(tokens())
    compiles = lambda module: torch.compile(module, backend="eager")  # noqa: E731
    if which == "expert":
        block.experts = nn.ModuleList(map(compiles, block.experts))
    model = Model(compiles(block) if which == "block" else block)
    moefx.optimize(model, (tokens(),))
    assert len(moefx.explain(model).found) == 1
    assert relative(model.block(tokens()), expected) <= CLOSE


# ------------------------------------------------------------------------------------------------ nn.DataParallel


def replica_of(model: nn.Module, scale: float) -> nn.Module:
    """As torch.nn.parallel.replicate makes one, with other parameters, to tell them apart."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach() * scale)
    return twins[model]


@pytest.mark.parametrize("pending", [False, True])
def test_a_replica_has_its_own_parameters(pending: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    original = Model(BUILDERS["stacked"]())
    mine = moefx.optimize(copy.deepcopy(original), None if pending else (tokens(),))
    with torch.no_grad():
        doubled = copy.deepcopy(original)
        for parameter in doubled.parameters():
            parameter.mul_(2.0)
    for _ in range(2):
        torch.testing.assert_close(replica_of(mine, 2.0)(tokens()), doubled(tokens()))
    (message,) = caplog.messages
    assert "DataParallel" in message
    assert relative(mine(tokens()), original(tokens())) <= CLOSE
    assert len(moefx.explain(mine).found) == 1, "the model itself is rewritten, or was by that call"


def test_copies_and_restored_models_make_plain_replicas() -> None:
    torch.manual_seed(0)
    model = Model(BUILDERS["stacked"]())
    before = set(vars(model.block))
    moefx.optimize(model, (tokens(),))
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert vars(twin.block)["_replicate_for_data_parallel"].module is twin.block
    for module in (twin, loaded):
        torch.testing.assert_close(replica_of(module, 1.0)(tokens()), model(tokens()))
    moefx.restore(model)
    assert set(vars(model.block)) == before


# ------------------------------------------------------------------------------------------------ parameters spread over ranks


def spread_by_others(builder: str, how: str) -> tuple[int, str, float]:
    """Blocks found, why not, and how far the mean gradient over the ranks is from that of the model as it was."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    original = Model(BUILDERS[builder]())
    mine: Any = copy.deepcopy(original)
    x = tokens(seed=10 + dist.get_rank())
    if how != "fully_shard, then optimize":
        moefx.optimize(mine, (tokens(),))
    if how == "optimize, then fully_shard of the block":
        fully_shard(mine.block)
    if "fully_shard" in how:
        fully_shard(mine)
    if how == "fully_shard, then optimize":
        moefx.optimize(mine, (tokens(),))
    report = moefx.explain(mine)
    call = DistributedDataParallel(mine) if "DistributedDataParallel" in how else mine
    for _ in range(2):
        original.zero_grad()
        mine.zero_grad()
        call(x).square().sum().backward()
        original(x).square().sum().backward()
    worst = 0.0
    for p, own in zip(original.parameters(), mine.parameters()):
        dist.all_reduce(p.grad)
        full = own.grad.full_tensor() if hasattr(own.grad, "full_tensor") else own.grad
        worst = max(worst, relative(full, p.grad / dist.get_world_size()))  # type: ignore[operator]
    return len(report.found), " ".join(d.reason for d in report.declined), worst


@pytest.mark.parametrize("builder", ["list", "stacked"])
@pytest.mark.parametrize(
    "how",
    [
        "optimize, then DistributedDataParallel",
        "optimize, then fully_shard",
        "optimize, then fully_shard of the block",
        "fully_shard, then optimize",
    ],
)
def test_parameters_that_others_spread_over_ranks(builder: str, how: str) -> None:
    for found, declined, worst in run_ranks(2, spread_by_others, builder, how):
        assert worst <= 1e-5
        assert (found == 0) == (how == "fully_shard, then optimize") == ("optimise the model before that" in declined)
