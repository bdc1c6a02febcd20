"""Experts spread over gloo ranks: outputs and all gradients are those of one process."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import moefx
from moefx.block import rewritten
from moefx.exchange import experts_of
from moefx.models import BLOCKS, TinyMoELM
from moefx.parallel import expert_parameters

VOCAB, WIDTH = 64, 16
EXACT = 1e-10  # float64


def language_model(name: str, layers: int = 2, **sizes: Any) -> nn.Module:
    torch.manual_seed(0)
    model = TinyMoELM(lambda d: BLOCKS[name](d, **sizes), vocab=VOCAB, d_model=WIDTH, layers=layers)  # type: ignore[call-arg]
    return model.double()


def batch(rank: int, length: int = 9) -> Tensor:
    """Every rank has another number of tokens."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, VOCAB, (1 + rank % 2, length + 2 * rank), generator=generator)


def gradients(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and gradients for fixed random cotangents."""
    model.zero_grad(set_to_none=True)
    y = model(ids)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype))
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) if b.numel() else 0.0


def own_part(name: str, total: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of the summed gradient of a parameter."""
    if isinstance(parameter, DTensor):
        rows = experts_of(total.shape[0], dist.get_world_size(), dist.get_rank())
        return total[rows.start : rows.stop]
    return total


def differences(original: nn.Module, model: nn.Module, ids: Tensor) -> dict[str, float]:
    """Relative errors of the logits and of every gradient against the original on one process."""
    y, mine = gradients(model, ids)
    reference_y, reference = gradients(original, ids)
    experts = {name for name, _ in expert_parameters(model)}
    errors = {"logits": relative(y, reference_y)}
    parameters = dict(model.named_parameters())
    for name, g in reference.items():
        total = torch.zeros_like(original.get_parameter(name)) if g is None else g.clone()
        if name in experts or name not in parameters:  # a sum over the tokens of all ranks
            dist.all_reduce(total)
        if name not in parameters:
            continue  # another rank's expert
        grad = mine[name]
        if grad is None:
            grad = torch.zeros_like(parameters[name])
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        errors[name] = relative(local, own_part(name, total, parameters[name]))
    return errors


def compare(name: str, options: dict[str, Any], sizes: dict[str, Any], layers: int = 2) -> dict[str, float]:
    original = language_model(name, layers, **sizes)
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(policy="fifo", **options), mesh=dist.group.WORLD)
    report = moefx.explain(model)
    assert len(report.found) == layers, str(report)
    worst: dict[str, float] = {}
    for seed in (0, 7):
        for what, error in differences(original, model, batch(dist.get_rank() + seed, 5 + seed)).items():
            worst[what] = max(worst.get(what, 0.0), error)
    return worst


def assert_exact(results: list[dict[str, float]]) -> None:
    for rank, errors in enumerate(results):
        wrong = {what: error for what, error in errors.items() if not error <= EXACT}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.parametrize("name", ["mixtral", "deepseek", "gpt_oss", "switch"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_models_equal_one_process(name: str, ranks: int) -> None:
    assert_exact(run_ranks(ranks, compare, name, {"degree": 2}, {"experts": 8}))


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (3, 3), (1, 3), (4, 2), (2, 3), (8, 1)])
def test_degrees(forward: int, backward: int) -> None:
    """Forward and backward are cut apart, into uneven chunks and chunks without tokens."""
    assert_exact(run_ranks(2, compare, "mixtral", {"degree": forward, "backward_degree": backward}, {"experts": 6}))


def test_one_rank() -> None:
    assert_exact(run_ranks(1, compare, "gpt_oss", {"degree": 3, "backward_degree": 2}, {}))


@pytest.mark.parametrize(("codec", "bound"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_codecs_change_little(codec: str, bound: float) -> None:
    options = {"degree": 2, "codec": codec, "backward_codec": codec}
    for errors in run_ranks(2, compare, "mixtral", options, {"experts": 4}):
        assert 1e-9 < max(errors.values()) < bound


def delayed(runs: int) -> int:
    """Random delays before every task; how many runs differ from the first."""
    torch.manual_seed(0)
    model = language_model("deepseek")
    ids = batch(dist.get_rank())
    options = moefx.Options(degree=3, backward_degree=2, policy="fifo")
    moefx.optimize(model, (ids,), options, mesh=dist.group.WORLD)
    rng = random.Random(dist.get_rank())
    first, different = None, 0
    for _ in range(runs):
        for module in model.modules():
            forward = rewritten(module)
            for variant in forward.variants.values() if forward else ():
                variant.compiled.delays = lambda lane: time.sleep(rng.random() * 2e-3)  # type: ignore[union-attr]
        y, grads = gradients(model, ids)
        local = [y, *(g.to_local() if isinstance(g, DTensor) else g for g in grads.values() if g is not None)]
        different += first is not None and not all(torch.equal(a, b) for a, b in zip(first, local))
        first = first or [t.clone() for t in local]
    return different


def test_delays_change_nothing() -> None:
    assert run_ranks(2, delayed, 12) == [0, 0]


def many_layers() -> dict[str, float]:
    return compare("mixtral", {"degree": 2}, {"experts": 4, "hidden": 8}, layers=24)


def test_24_layers_in_one_backward() -> None:
    assert_exact(run_ranks(2, many_layers, timeout_s=120))


# ------------------------------------------------------------------------------------------------ errors


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except moefx.MoefxError as error:
        return str(error)
    return "no error"


def mismatch(what: str) -> str:
    rank = dist.get_rank()
    model = language_model("mixtral", layers=1, experts=4 + 4 * (what == "model" and rank))
    if what == "dtype" and rank:
        model = model.float()
    options = moefx.Options(degree=2 + (what == "degree" and rank), policy="fifo")
    return message(lambda: moefx.optimize(model, (batch(rank),), options, mesh=dist.group.WORLD))


@pytest.mark.parametrize(("what", "named"), [("degree", "options"), ("model", "blocks"), ("dtype", "parameters")])
def test_ranks_that_differ_are_told(what: str, named: str) -> None:
    for text in run_ranks(2, mismatch, what):
        assert f"ranks 0 and 1 differ in {named}" in text


def too_many_ranks() -> str:
    model = language_model("mixtral", layers=1, experts=5)
    ids = batch(0)
    return message(lambda: moefx.optimize(model, (ids,), moefx.Options(degree=1), mesh=dist.group.WORLD))


def test_a_rank_without_experts_is_refused() -> None:
    for text in run_ranks(4, too_many_ranks):
        assert "leave the last of 4 ranks without any" in text
        assert "possible numbers of ranks: 1, 2, 3, 5" in text


def restored() -> float:
    original = language_model("switch")
    model = copy.deepcopy(original)
    ids = batch(dist.get_rank())
    moefx.optimize(model, (ids,), moefx.Options(degree=2, policy="fifo"), mesh=dist.group.WORLD)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in original.parameters())
    moefx.restore(model)
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), original.state_dict().values()))
    return relative(model(ids), original(ids))


def test_restore_brings_the_experts_back() -> None:
    assert run_ranks(2, restored) == [0.0, 0.0]
