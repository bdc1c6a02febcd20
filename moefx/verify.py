"""verify: is the rewritten block the original block? Asked with numbers, forward and gradients, before it may take over."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.errors import Decline
from moefx.probe import Emulated, Example, draw, dtype_of, shapes_for
from moefx.structure import taken_apart

# relative error allowed, by the least precise floating dtype that took part
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}
# the same for a block on its own weights and device, whose sums may be taken in another order
ON_DEVICE = {torch.float64: 2e-8, torch.float32: 1e-3, torch.float16: 1e-1, torch.bfloat16: 2.5e-1}
PIECE = 1 << 22  # elements compared at a time
HEAVY = 1 << 26  # elements of a block above which its large parameters' gradients are left to the check on its own weights
LARGE = 1 << 22  # elements of a large parameter in such a block
Run = Callable[[tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True)
class Case:
    """One input: token sizes, how tokens are drawn (see `probe.draw`), and whether gradients are compared."""

    token_shape: tuple[int, ...]
    tokens: str
    gradients: bool

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.token_shape)) or '1'} tokens {self.tokens}"


def adversarial_cases(example: Example, again: bool = False) -> list[Case]:
    """Other token counts than the analysis saw, skewed routing, one token, many tokens, none. again: the sharpest of them."""
    first, second, one, large = (*shapes_for(example), *[()] * 3)[:4] if example.token_sizes else ((),) * 4
    none = (0, *one[1:])
    cases = [
        Case(second, "random", True), Case(second, "alike", True), Case(large, "near", False), Case(large, "random", False),
        Case(one, "random", True), Case(first, "one", True), Case(none, "random", False),
    ]  # fmt: skip
    if not example.token_sizes:
        return [Case((), "random", True)]
    return cases[:3] if again else cases


def verify(
    module: nn.Module, rewritten: Run, example: Example, experts: int, lowest: torch.dtype, skip: type[Exception],
    again: bool = False, own_sizes: bool = False, fixed: bool = False,
) -> dict[str, float]:
    """Compares `module` (a probe copy) with its rewritten form on adversarial cases.

    own_sizes: also on inputs of the example's sizes; fixed: there are no others, so that failing on them refutes nothing.
    again: the rewriting was verified before, in another mode: fewer cases, and of very large blocks no gradients. The
    gradients of their large parameters are never compared here, but on the block's own weights (`moefx.api`).
    Returns the worst relative errors, {"forward": ..., "gradient": ...}. Raises Decline with the first case that differs.
    Cases that the original itself cannot run, or for which the rewritten form declares itself unfit (`skip`), are left out.
    """
    worst = {"forward": 0.0, "gradient": 0.0}
    compared = 0
    wanted = None
    heavy = sum(p.numel() for p in module.parameters()) > HEAVY
    if heavy:
        wanted = [n for n, p in module.named_parameters() if p.numel() <= LARGE]
    cases = adversarial_cases(example, again)
    if own_sizes:
        cases += [Case(example.token_sizes, tokens, True) for tokens in ("random", "alike", "near", "one")]
        few = torch.Size(example.token_sizes).numel() ** example.repeats  # tokens, which reach few experts at a time
        cases += [Case(example.token_sizes, "random", False)] * min(32, 2 * experts // max(1, few))
    for i, case in enumerate(cases):
        if heavy and (i or again):
            case = replace(case, gradients=False)
        args, kwargs = draw(example, case.token_shape, 1000 + i, experts, case.tokens, dtype_of(module))
        try:
            expected = run_once(lambda a, k: module.forward(*a, **k), module, args, kwargs, case.gradients, wanted)
        except Exception:  # noqa: BLE001 - the original cannot run this case: nothing to compare with
            continue
        try:
            actual = run_once(rewritten, module, args, kwargs, case.gradients, wanted)
        except skip:
            continue
        except Exception as error:
            if fixed and case.token_shape != example.token_sizes:
                continue
            raise failure(str(case), error) from error
        errors = compare(expected, actual, TOLERANCE[lowest], str(case))
        worst = {k: max(worst[k], errors[k]) for k in worst}
        compared += 1
    if compared < (2 if example.token_sizes and not again else 1):
        raise Decline("the block works for one token count only: too few cases could be compared")
    return worst


@dataclass(frozen=True)
class Outcome:
    outputs: list[Any]
    gradients: dict[str, Tensor | None]


def failure(where: str, error: Exception) -> Decline:
    """What keeps a block as it is when its rewritten form raises."""
    return Decline(f"the rewritten block fails on {where}: {type(error).__name__}: {str(error)[:160]}")


@contextlib.contextmanager
def no_failure(where: str) -> Iterator[None]:
    """Raises Decline where what is done inside raises something else."""
    try:
        yield
    except Decline:
        raise
    except Exception as error:
        raise failure(where, error) from error


def run_once(
    run: Run,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gradients: bool,
    wanted: list[str] | None = None,
) -> Outcome:
    """Outputs, and gradients of the parameters `wanted` (None: all) and of float inputs for fixed random cotangents."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
    differentiable = [
        t.requires_grad_() for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and gradients
    ]
    passed = [t * 1 if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
    a, k = pytree.tree_unflatten(passed, spec)
    named = dict(module.named_parameters()) if gradients else {}
    params = {n: p for n, p in named.items() if p.is_floating_point() and (wanted is None or n in wanted)}
    others = {n: p for n, p in named.items() if n not in params}
    on_cpu = all(p.device.type == "cpu" for p in module.parameters())
    emulated = Emulated() if on_cpu else contextlib.nullcontext()
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    with (
        _requires_grad(params, True),
        _requires_grad(others, False),
        torch.random.fork_rng(devices=_devices(module)),
        torch.set_grad_enabled(gradients),
        emulated,
    ):
        torch.manual_seed(7)
        flat, _ = taken_apart(run(a, k))
        outputs = [t for t in flat if isinstance(t, Tensor)]
        grads: dict[str, Tensor | None] = {}
        roots = [t for t in outputs if t.requires_grad]
        if roots:
            generators = {device: torch.Generator(device).manual_seed(3) for device in {t.device for t in roots}}
            cotangents = [torch.randn(t.shape, generator=generators[t.device], device=t.device).to(t.dtype) for t in roots]
            sources = {**params, **{f"input {i}": t for i, t in enumerate(differentiable)}}
            found = torch.autograd.grad(roots, list(sources.values()), cotangents, allow_unused=True)
            grads = dict(zip(sources, found))
    updated = [b.detach().clone() for b, _ in buffers]  # what a call writes into buffers is a result too
    with torch.no_grad():
        for b, before in buffers:
            if not torch.equal(b, before):
                b.copy_(before)
    return Outcome([*(t.detach() if isinstance(t, Tensor) else t for t in flat), *updated], grads)


@contextlib.contextmanager
def _requires_grad(params: dict[str, nn.Parameter], wanted: bool) -> Iterator[None]:
    before = {n: p.requires_grad for n, p in params.items()}
    for p in params.values():
        p.requires_grad_(wanted)
    try:
        yield
    finally:
        for n, p in params.items():
            p.requires_grad_(before[n])


def _devices(module: nn.Module) -> list[torch.device]:
    return list({p.device for p in module.parameters() if p.device.type == "cuda"})


def compare(
    expected: Outcome, actual: Outcome, tolerance: float, where: str, overflows: bool = False
) -> dict[str, float]:
    """Relative errors of outputs and gradients; raises Decline that says what differs on which case.

    overflows: elements that are not finite in `expected` are not compared (which of inf and NaN a sum that overflows
    becomes depends on its order, and the user's own weights may well be memory that nobody has written yet).
    """
    if len(expected.outputs) != len(actual.outputs):
        raise Decline(
            f"on {where} the block returns {len(expected.outputs)} values, the rewritten one {len(actual.outputs)}"
        )
    forward = 0.0
    for i, (a, b) in enumerate(zip(expected.outputs, actual.outputs)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b and not (a is None and b is None):
                raise Decline(f"on {where} output {i} is {a!r} in the original and {b!r} rewritten")
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Decline(
                f"on {where} output {i} is {a.dtype}{list(a.shape)} in the original and {b.dtype}{list(b.shape)} rewritten"
            )
        forward = max(forward, _checked(a, b, 0.0, tolerance, f"on {where} output {i}", overflows))
    sizes = [_largest(g) for g in expected.gradients.values() if g is not None]
    magnitude = max([n for n in sizes if math.isfinite(n)], default=0.0)
    gradient = 0.0
    for name, a in expected.gradients.items():
        b = actual.gradients.get(name)
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b
        allowed = max(tolerance, min(10 * tolerance, 0.25))
        gradient = max(gradient, _checked(a, b, 1e-3 * magnitude, allowed, f"on {where} the gradient of {name}", overflows))
    return {"forward": forward, "gradient": gradient}


def _checked(a: Tensor, b: Tensor, floor: float, tolerance: float, what: str, overflows: bool) -> float:
    error = relative_error(a, b, floor, overflows)
    if error > tolerance:
        raise Decline(f"{what} differs by {error:.1e} (allowed {tolerance:.0e})")
    return error


def relative_error(a: Tensor, b: Tensor, floor: float = 0.0, overflows: bool = False) -> float:
    """max|a - b| / (max|a| + floor); infinite when non-finite or integer elements differ. a is moved to b piece by piece.

    overflows: elements that are not finite in a are left out.
    """
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    difference = largest = 0.0
    for piece_a, piece_b in _pieces(a, b):
        piece_a = piece_a.to(b.device)
        apart, size = _largest(piece_a - piece_b), _largest(piece_a)
        if not math.isfinite(apart + size):
            finite = torch.isfinite(piece_a)
            if not overflows and not torch.equal(_marked(piece_a, finite), _marked(piece_b, torch.isfinite(piece_b))):
                return float("inf")
            apart, size = _largest((piece_a - piece_b)[finite]), _largest(piece_a[finite])
            if not math.isfinite(apart):
                return float("inf")
        difference, largest = max(difference, apart), max(largest, size)
    return difference / (largest + floor + 1e-30)


def _largest(t: Tensor) -> float:
    """max|t| without a copy; 0 for an empty tensor."""
    return float(torch.linalg.vector_norm(t, ord=math.inf)) if t.numel() else 0.0


def _marked(t: Tensor, finite: Tensor) -> Tensor:
    """0 for finite elements, another number for each of inf, -inf and nan."""
    return torch.where(finite, 0.0, t).nan_to_num(2.0, 1.0, -1.0)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors in pieces along dimension 0, small enough to compare without much memory."""
    if a.numel() <= PIECE or a.dim() == 0:
        if a.numel():
            yield a, b
        return
    step = max(1, PIECE * a.shape[0] // a.numel())
    yield from zip(a.split(step), b.split(step))
