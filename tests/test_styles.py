"""Every style of styles_positive and styles_negative, with the engine between the user's code and the result.

A block that is found has to give the original's outputs, gradients and effects on shapes and routings that the engine
did not see; a block that is declined has to stay exactly as it was. As a script it prints one line a style:

    python tests/test_styles.py [--train] [name or pattern ...]
"""

import argparse
import copy
import dataclasses
import fnmatch
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from styles_negative import NEGATIVE
from styles_positive import POSITIVE, Inputs, Style
from torch import Tensor, nn

if __name__ == "__main__":  # from a checkout: tests/ is on the path, the folder above it is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moefx

STYLES = {**POSITIVE, **NEGATIVE}

# Positives that today's finder declines, with the reason. They may be found one day; they must never be matched wrongly.
GAPS = {
    "fused_linear": "one Linear for all experts, followed by one per expert",
    "batch_prioritised": "dropping by priority: no recorded value equals the gates",
}


def expected(name: str, style: Style, train: bool) -> list[str]:
    """The verdicts that are right for a style."""
    return (style.train if train else style.expect).split("_or_") + (["declined"] if name in GAPS else [])

SMALLEST = 1e-3  # tensors whose largest value is below this are compared absolutely

# ------------------------------------------------------------------------------------------------- what to compare


def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, lists, dicts and dataclasses, each with its place."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from flatten(item, f"{path}[{index}]")
    else:
        yield path, value


def state_of(module: nn.Module) -> dict[str, Any]:
    """Buffers and plain attributes, copied: whatever a forward may change without returning it."""
    state: dict[str, Any] = {}
    for name, child in module.named_modules():
        data = dict(child.named_buffers(recurse=False))
        data.update({key: value for key, value in vars(child).items() if not key.startswith("_")})
        for key, value in data.items():
            for path, leaf in flatten(value):
                if isinstance(leaf, Tensor):
                    state[f"{name}.{key}{path}"] = leaf.detach().clone()
                elif isinstance(leaf, int | float | str):
                    state[f"{name}.{key}{path}"] = leaf
    return state


@dataclasses.dataclass
class Outcome:
    """Everything that one call does: outputs, gradients, inputs after the call, changes of the module."""

    values: dict[str, Any]
    gradients: dict[str, Tensor | None]
    state: dict[str, Any]


def call(module: nn.Module, inputs: Inputs, seed: int, grad: bool = True) -> Outcome:
    """Run forward and backward; the inputs are copies, so that a module may write into them."""
    module.zero_grad(set_to_none=True)
    leaves = [value.clone().requires_grad_(value.is_floating_point() and grad) for value in inputs]
    copies = [leaf.clone() for leaf in leaves]
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        result = module(*copies)
    values = dict(flatten(result, "output"))
    values.update({f"input {index} after the call": value.detach().clone() for index, value in enumerate(copies)})
    differentiable = [value for value in values.values() if isinstance(value, Tensor) and value.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in differentiable]
        torch.autograd.backward(differentiable, weights)
    gradients = {f"gradient of input {index}": leaf.grad for index, leaf in enumerate(leaves)}
    gradients.update({f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()})
    return Outcome(values, gradients, state_of(module))


def differs(mine: Any, reference: Any, tolerance: float) -> str:
    """Why two values are not the same, or nothing. A tolerance of zero asks for the same bits."""
    if not isinstance(reference, Tensor):
        return "" if mine == reference else f"{mine!r} instead of {reference!r}"
    if not isinstance(mine, Tensor):
        return f"{type(mine).__name__} instead of a tensor"
    if (mine.shape, mine.dtype) != (reference.shape, reference.dtype):
        return f"{mine.dtype}{list(mine.shape)} instead of {reference.dtype}{list(reference.shape)}"
    if tolerance == 0 or not (reference.is_floating_point() or reference.is_complex()):
        return "" if torch.equal(mine, reference) else "not the same bits"
    if not reference.numel():
        return ""
    error = float((mine - reference).detach().abs().max()) / max(float(reference.detach().abs().max()), SMALLEST)
    return "" if error <= tolerance else f"relative error {error:.1e}"


def compare(mine: Outcome, reference: Outcome, before: dict[str, Any], tolerance: float) -> str:
    """The first difference between two outcomes, or nothing. An absent gradient counts as zero."""
    for name, value in reference.values.items():
        if name not in mine.values:
            return f"{name} is missing"
        if why := differs(mine.values[name], value, tolerance):
            return f"{name}: {why}"
    if extra := mine.values.keys() - reference.values.keys():
        return f"{sorted(extra)} should not be there"
    if mine.gradients.keys() != reference.gradients.keys():
        return f"parameters differ: {sorted(mine.gradients.keys() ^ reference.gradients.keys())}"
    for name, value in reference.gradients.items():
        other = mine.gradients[name]
        if value is None and other is not None:
            value = torch.zeros_like(other)
        if other is None and value is not None:
            other = torch.zeros_like(value)
        if why := differs(other, value, tolerance):
            return f"{name}: {why}"
    for name, value in reference.state.items():
        if name not in before or differs(before[name], value, 0):  # the call changed it
            if name not in mine.state:
                return f"effect on {name} is lost"
            if why := differs(mine.state[name], value, tolerance):
                return f"effect on {name}: {why}"
    return ""


# --------------------------------------------------------------------------------------------------------- inputs


def module_of(style: Style) -> nn.Module:
    return style.module.double() if style.dtype == torch.float64 else style.module.float()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tuple(value.to(dtype) if value.is_floating_point() else value for value in inputs)


def example_of(style: Style) -> Inputs:
    return cast(style.example_inputs, style.dtype)


def skewed(inputs: Inputs, seed: int) -> Inputs:
    """Every token nearly like the first one, so that nearly all of them want the same experts."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for value in inputs:
        first = value.reshape(-1, value.shape[-1])[:1] if value.is_floating_point() else value.reshape(-1)[:1]
        if value.dtype == torch.bool:
            result.append(value)
        elif value.is_floating_point():
            result.append(first + 0.01 * torch.randn(value.shape, generator=generator))
        else:
            result.append(first.expand(value.numel()).reshape(value.shape))
    return tuple(result)


def trials(style: Style) -> Iterator[tuple[str, Inputs]]:
    """Inputs that the engine was not shown."""
    for label, inputs in (
        ("another shape", style.make_inputs((3, 23), 1)),
        ("one token", style.make_inputs((1, 1), 2)),
        ("many tokens", style.make_inputs((5, 37), 3)),
        ("skewed", skewed(style.make_inputs((2, 31), 4), 5)),
        ("one token again", style.make_inputs((1, 1), 6)),
    ):
        yield label, cast(inputs, style.dtype)


# -------------------------------------------------------------------------------------------------------- verdict


@dataclasses.dataclass(frozen=True)
class Verdict:
    """found and declined are both right answers where the style allows them; wrong never is."""

    status: str  # "found", "declined" or "wrong"
    detail: str


def judge(style: Style, train: bool) -> Verdict:
    """Optimize a copy of the style's module and compare it with the original."""
    original = module_of(style).train(train)
    module = copy.deepcopy(original)
    parameters = dict(module.named_parameters())

    if moefx.optimize(module, example_inputs=example_of(style)) is not module:
        return Verdict("wrong", "optimize returned another object")
    report = moefx.explain(module)
    after = dict(module.named_parameters())
    if list(after) != list(parameters) or any(after[name] is not parameters[name] for name in parameters):
        return Verdict("wrong", "parameters were replaced or renamed")
    tolerance = style.tolerance if report.found else 0.0
    for label, inputs in trials(style):
        for grad in (True, False):
            before = state_of(original)
            reference = call(original, inputs, seed=7, grad=grad)
            mine = call(module, inputs, seed=7, grad=grad)
            if why := compare(mine, reference, before, tolerance):
                return Verdict("wrong", f"{label}{'' if grad else ', no_grad'}: {why}")
    if report.found:
        return Verdict("found", "; ".join(str(entry) for entry in report.found))
    return Verdict("declined", "; ".join(str(entry.reason) for entry in report.declined))


def build(name: str) -> Style:
    """The style; a test that needs a package that is not here is skipped."""
    try:
        return STYLES[name]()
    except ModuleNotFoundError as missing:
        pytest.skip(f"{missing.name} is not installed")


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", STYLES)
def test_style_runs_by_itself(name: str) -> None:
    style = build(name)
    module = module_of(style)
    for _, inputs in trials(style):
        outcome = call(module, inputs, seed=7)
        for value in (*outcome.values.values(), *outcome.gradients.values()):
            assert not isinstance(value, Tensor) or value.isfinite().all()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", POSITIVE)
def test_positive(name: str, train: bool) -> None:
    style = build(name)
    verdict = judge(style, train)
    assert verdict.status in expected(name, style, train), verdict


@pytest.mark.parametrize("name", NEGATIVE)
def test_negative(name: str) -> None:
    style = build(name)
    verdict = judge(style, style.module.training)
    assert verdict.status in style.expect.split("_or_"), verdict


SWITCHED = ["dropout_experts", "batch_norm_experts", "noisy_top_k", "load_tracking_router", "sinkhorn_routing"]


@pytest.mark.parametrize("train", [False, True], ids=["to_eval", "to_train"])
@pytest.mark.parametrize("name", SWITCHED)
def test_mode_switched_after_optimize(name: str, train: bool) -> None:
    """What was learnt in one mode must not be used in the other."""
    style = build(name)
    original = module_of(style).train(not train)
    module = copy.deepcopy(original)
    moefx.optimize(module, example_inputs=example_of(style))
    original.train(train)
    module.train(train)
    for label, inputs in trials(style):
        before = state_of(original)
        reference = call(original, inputs, seed=7)
        assert not compare(call(module, inputs, seed=7), reference, before, style.tolerance), label


@pytest.mark.parametrize("arguments", [{"return_logits": True}, {"temperature": 0.5}, {"top_k": 3}], ids=str)
def test_keyword_arguments_after_optimize(arguments: dict[str, Any]) -> None:
    """Arguments that the example did not have still mean what they meant."""
    style = build("keyword_arguments")
    original = module_of(style)
    module = moefx.optimize(copy.deepcopy(original), example_inputs=example_of(style))
    (x,) = cast(style.make_inputs((3, 23), 1), style.dtype)
    for (_, mine), (_, reference) in zip(
        flatten(module(x, **arguments)), flatten(original(x, **arguments)), strict=True
    ):
        assert not differs(mine, reference, style.tolerance)


# --------------------------------------------------------------------------------------------------------- script


def print_line(name: str, train: bool) -> str:
    """Judge one style and print a line about it; the answer is the word the line starts with."""
    start = time.perf_counter()
    try:
        style = STYLES[name]()
        verdict = judge(style, train or style.module.training)
        right = verdict.status in expected(name, style, train)
        word, detail = "OK" if right else verdict.status.upper(), f"{verdict.status}: {verdict.detail}"
    except ModuleNotFoundError as missing:
        word, detail = "SKIP", f"{missing.name} is not installed"
    except Exception as error:  # noqa: BLE001 (the next style may still work)
        word, detail = "EXC", f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    print(f"{word:9s} {name:32s} {seconds:5.1f} s  {' '.join(detail.split())[:300]}", flush=True)
    return word


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"], help="names or patterns; all styles if there are none")
    parser.add_argument("--train", action="store_true", help="optimize and compare in training mode")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for title, registry in (("positive", POSITIVE), ("negative", NEGATIVE)):
        names = [name for name in registry if any(fnmatch.fnmatch(name, pattern) for pattern in arguments.names)]
        counts = Counter(print_line(name, arguments.train) for name in names)
        print(f"{title}: {len(names)} styles; {', '.join(f'{word} {count}' for word, count in counts.items())}\n")


if __name__ == "__main__":
    main()
