"""The optimised model of every family computes what the original computes: outputs and all gradients.

``pytest tests/test_families.py`` runs a sample, ``--full`` runs all families in all implementations, and
``python tests/test_families.py --impl eager [families...]`` prints one line per family and goes on after a failure.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_families import FAMILIES, IMPLEMENTATIONS, TinyModel, build, has_implementation

EXAMPLE = (2, 29)  # (batch, sequence) of the example input, and below of the inputs which are compared
SHAPES = ((3, 17), (1, 5))
TOLERANCE = 1e-5
ZERO = 1e-7  # a gradient below this counts as absent

EXPECTED_DECLINED = {
    "doge": "product keys: an expert is one row of two embeddings, too thin for a grouped product",
    "nllb_moe": "its one-hot of a one-hot sends tokens to the first two experts only, with a gate of 1 - p",
    "vitpose_backbone": "no top-k router: the caller gives the index of the expert",
}

# Families compared in float64: some of their gradients are differences of large terms, so that in float32 the rounding
# of a different order of additions alone (Transformers' own batched_mm against its eager loop) is up to 3e-5 of them.
# The grouped_mm of torch has no float64: there the gradients are compared in float32 with CANCELLING.
CANCELLING = 1e-4
DOUBLE = {
    "ernie4_5_vl_moe": "the router's gradient from five tokens",
    "hy_v4": "scales of the hyper-connections",
    "hy_v4_vl": "scales of the hyper-connections",
    "qwen3_5_moe": "decay rates (A_log) of the linear attention",
    "qwen3_next": "decay rates (A_log) of the linear attention",
    "qwen4_exp": "decay rates (A_log) of the linear attention",
}

_SAMPLE = {
    "eager": (
        *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "switch_transformers", "llama4", "dbrx", "jetmoe"),
        *("longcat_flash", "gemma4", "muse_spark", "deepseek_v4", "nemotron_h", "phimoe", *EXPECTED_DECLINED),
    ),
    "grouped_mm": ("gpt_oss", "nemotron_h"),
    "batched_mm": ("mixtral", "gemma4"),
}


def _cases() -> Iterator[Any]:
    """Yield (family, implementation); those outside the sample are marked slow."""
    for implementation in IMPLEMENTATIONS:
        for family in FAMILIES:
            if implementation == "eager" or has_implementation(family):
                marks = () if family in _SAMPLE[implementation] else (pytest.mark.slow,)
                yield pytest.param(family, implementation, marks=marks, id=f"{family}-{implementation}")


@pytest.mark.parametrize(("family", "implementation"), list(_cases()))
def test_family(family: str, implementation: str) -> None:
    """The blocks are found, and outputs and gradients agree on unseen shapes in evaluation and training mode."""
    problems = check(family, implementation).problems
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("family", [name for name in ("mixtral", "qwen3_moe") if name in FAMILIES])
def test_auxiliary_loss(family: str) -> None:
    """The router logits still reach the load balancing loss, and its gradient the router."""
    import moefx

    tiny = build(family)
    original = copy.deepcopy(tiny.model)
    moefx.optimize(tiny.model, tiny.inputs(*EXAMPLE))
    assert len(moefx.explain(tiny.model).found) == len(tiny.blocks)
    inputs = tiny.inputs(3, 17, seed=1)
    inputs |= {"labels": inputs["input_ids"], "output_router_logits": True}
    expected, actual = original.train()(**inputs), tiny.model.train()(**inputs)
    assert len(actual.router_logits) == len(tiny.blocks)
    torch.testing.assert_close(actual.router_logits, expected.router_logits)
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    torch.testing.assert_close(actual.loss, expected.loss)
    expected.loss.backward()
    actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in original.named_parameters()}
    error, worst = gradient_error(gradients, {name: p.grad for name, p in tiny.model.named_parameters()})
    assert error <= TOLERANCE, worst


@dataclass
class Outcome:
    """What one case showed: the blocks found, the largest relative errors, and what is wrong."""

    found: int = 0
    declined: list[str] = field(default_factory=list)
    output_error: float = 0.0
    gradient_error: float = 0.0
    problems: list[str] = field(default_factory=list)


def check(family: str, implementation: str) -> Outcome:
    """Optimise the family's tiny model and compare it with a copy made before."""
    import moefx

    tiny = build(family, implementation)
    gradient_tolerance = TOLERANCE
    if family in DOUBLE and implementation == "grouped_mm":
        gradient_tolerance = CANCELLING
    elif family in DOUBLE:
        tiny.model.double()
    original = copy.deepcopy(tiny.model)
    keys = list(tiny.model.state_dict())
    parameters = {name: id(parameter) for name, parameter in tiny.model.named_parameters()}

    same = moefx.optimize(tiny.model, tiny.inputs(*EXAMPLE))
    outcome = Outcome()
    if same is not tiny.model:
        outcome.problems.append("optimize returned another object")
    if list(tiny.model.state_dict()) != keys:
        outcome.problems.append("the keys of the state_dict changed")
    if {name: id(parameter) for name, parameter in tiny.model.named_parameters()} != parameters:
        outcome.problems.append("parameters were replaced")
    _check_report(tiny, moefx.explain(tiny.model), outcome)
    for shape in SHAPES:
        for train in (False, True):
            _compare(original, tiny, shape, train, gradient_tolerance, outcome)
    return outcome


def _check_report(tiny: TinyModel, report: Any, outcome: Outcome) -> None:
    outcome.found = len(report.found)
    outcome.declined = [f"{item.name}: {item.reason}" for item in report.declined]
    if tiny.family in EXPECTED_DECLINED:
        if report.found:
            outcome.problems.append(f"found {[item.name for item in report.found]}; nothing was expected")
        if not report.declined:
            outcome.problems.append("nothing was declined")
        return
    if outcome.found != len(tiny.blocks):
        names = [item.name for item in report.found]
        outcome.problems.append(f"found {names} of {list(tiny.blocks)}; declined {outcome.declined}")
    for item in report.found:
        if not any(_related(item.name, block) for block in tiny.blocks):
            outcome.problems.append(f"{item.name} holds none of the blocks {list(tiny.blocks)}")
        if (item.experts, item.top_k) != (tiny.experts, tiny.top_k):
            outcome.problems.append(
                f"{item.name}: {item.experts} experts, top {item.top_k}; not {tiny.experts}, {tiny.top_k}"
            )


def _related(name: str, other: str) -> bool:
    """Tell whether one module contains the other, or both are the same."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _compare(
    original: Any, tiny: TinyModel, shape: tuple[int, int], train: bool, gradient_tolerance: float, outcome: Outcome
) -> None:
    """Run both models on one input with the same random state; add to ``outcome``."""
    inputs = tiny.inputs(*shape, seed=1)
    where = f"{shape} {'train' if train else 'eval'}"
    outputs, gradients = _run(original, inputs, train)
    new_outputs, new_gradients = _run(tiny.model, inputs, train)
    if outputs.keys() != new_outputs.keys():
        outcome.problems.append(f"{where}: outputs {sorted(new_outputs)} instead of {sorted(outputs)}")
        return
    errors = {name: relative_error(outputs[name], new_outputs[name], 1e-30) for name in outputs}
    worst = max(errors, key=errors.__getitem__)
    outcome.output_error = max(outcome.output_error, errors[worst])
    if not errors[worst] <= TOLERANCE:
        outcome.problems.append(f"{where}: output {worst} differs by {errors[worst]:.1e}")
    error, name = gradient_error(gradients, new_gradients)
    outcome.gradient_error = max(outcome.gradient_error, error)
    if not error <= gradient_tolerance:
        outcome.problems.append(f"{where}: gradient of {name} differs by {error:.1e}")


def _run(
    model: Any, inputs: dict[str, Any], train: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Return the floating outputs by path, and the gradient of every parameter for random cotangents."""
    model.train(train).zero_grad(set_to_none=True)
    torch.manual_seed(2)
    outputs = dict(_tensors("output", model(**inputs)))
    roots = [tensor for tensor in outputs.values() if tensor.requires_grad]
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(root.shape, generator=generator, dtype=root.dtype) for root in roots]
    torch.autograd.backward(roots, cotangents)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach() for name, tensor in outputs.items()}, gradients


def _tensors(path: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the floating tensors inside nested outputs, with their path."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{path}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{path}[{index}]", item)


def relative_error(expected: torch.Tensor, actual: torch.Tensor, floor: float) -> float:
    """Return max|a - b| / (max|a| + floor), or infinity where shapes, types or non-finite places differ."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return float("inf")
    finite = expected.isfinite()
    if not actual[finite].isfinite().all() or not torch.allclose(expected[~finite], actual[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    difference = (expected[finite] - actual[finite]).abs().max()
    return float(difference / (expected[finite].abs().max() + floor))


def gradient_error(
    expected: dict[str, torch.Tensor | None], actual: dict[str, torch.Tensor | None]
) -> tuple[float, str]:
    """Return the largest relative error and the parameter which has it.

    The floor is a thousandth of the largest gradient in the model: some gradients (the bias of attention keys) are zero
    in exact arithmetic and rounding noise here. An absent gradient equals one below ``ZERO``.
    """
    floor = 1e-3 * max((float(g.nan_to_num().abs().max()) for g in expected.values() if g is not None), default=0.0)
    errors = {name: _one_gradient_error(expected[name], actual[name], floor) for name in expected}
    worst = max(errors, key=errors.__getitem__)
    return errors[worst], worst


def _one_gradient_error(expected: torch.Tensor | None, actual: torch.Tensor | None, floor: float) -> float:
    if expected is None or actual is None:
        present = [gradient for gradient in (expected, actual) if gradient is not None]
        largest = max((float(gradient.abs().max()) for gradient in present), default=0.0)
        return 0.0 if largest < ZERO else float("inf")
    return relative_error(expected, actual, floor)


def main() -> int:
    """Print one line per family and a total; return the exit status."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--impl", choices=IMPLEMENTATIONS, default="eager")
    parser.add_argument("--verbose", action="store_true", help="print all problems, what was declined, and tracebacks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    families = [name for name in arguments.families if arguments.impl == "eager" or has_implementation(name)]
    right = 0
    begin = time.perf_counter()
    for family in families:
        start = time.perf_counter()
        try:
            outcome = check(family, arguments.impl)
        except Exception as error:  # noqa: BLE001 - the next families must run
            outcome = Outcome(problems=[f"{type(error).__name__}: {str(error)[:200]}"])
            if arguments.verbose:
                traceback.print_exc()
        right += not outcome.problems
        print(
            f"{'FAIL' if outcome.problems else 'OK':4} {family:22} found {outcome.found}  "
            f"out {outcome.output_error:.0e}  grad {outcome.gradient_error:.0e}  {time.perf_counter() - start:5.1f} s",
            *(outcome.problems if arguments.verbose else outcome.problems[:1]),
            *([f"declined {item}" for item in outcome.declined] if arguments.verbose else []),
            sep="\n       ",
            flush=True,
        )
    print(f"{right} of {len(families)} right ({arguments.impl}), {time.perf_counter() - begin:.0f} s")
    return int(right != len(families))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(Path(__file__).parent.parent))  # moefx of this checkout, installed or not
    sys.exit(main())
