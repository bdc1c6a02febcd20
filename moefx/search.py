"""Which submodules may hold an MoE block: a cheap look at parameters and at one run of the model.

A candidate is a called module that (a) holds matrices that could be experts: a stack, repeats of one shape, or several in
all, and (b) makes a selection while it runs (top-k, argmax ...) or is given routing (integers and floats of one shape);
weaker signs, comparisons and integers, count where its matrices look alike. Candidates are tried
deepest first, so the smallest sufficient module wins; the search climbs no further than the first module that repeats.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from moefx.ops import topk_serves
from moefx.parametrized import class_of
from moefx.probe import Example, bind, eagerly

# what routers do and hardly anything else; and what routers and much else do
STRONG = frozenset("topk argmax argmin sort argsort nonzero one_hot multinomial kthvalue msort bincount".split())
WEAK = frozenset(
    "where max min amax gt lt ge le eq __gt__ __lt__ __ge__ __le__ __eq__ scatter scatter_ bucketize".split()
)


@dataclass(frozen=True)
class Choice:
    """A call of torch.topk that `moefx.ops.topk` makes too: by the innermost module that was running, from `scores` each."""

    module: str
    scores: int
    dtype: torch.dtype
    device: torch.device
    ids: Tensor  # on the CPU


@dataclass
class Observation:
    """What one run of the model showed of its modules."""

    examples: dict[str, Example] = field(default_factory=dict)
    selects: set[str] = field(default_factory=set)  # made a strong selection
    compares: set[str] = field(default_factory=set)  # made a weak one
    choices: list[Choice] = field(default_factory=list)
    before: dict[str, int] = field(default_factory=dict)  # how many choices there were when the example was taken


class _Selections(TorchFunctionMode):
    def __init__(self, seen: Observation, stack: list[str]) -> None:
        super().__init__()
        self.seen, self.stack = seen, stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in STRONG:
            self.seen.selects.update(self.stack)
        elif name in WEAK:
            self.seen.compares.update(self.stack)
        result = func(*args, **(kwargs or {}))
        if name == "topk" and self.stack and "out" not in (kwargs or {}):
            self._note(result, *args, **(kwargs or {}))
        return result

    def _note(
        self, result: Any, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
    ) -> None:
        with torch._C.DisableTorchFunction():
            if topk_serves(input, k, dim, largest):
                ids = result[1].detach().cpu()
                self.seen.choices.append(Choice(self.stack[-1], input.shape[-1], input.dtype, input.device, ids))


@contextlib.contextmanager
def observe(model: nn.Module, inside: bool = False) -> Iterator[Observation]:
    """While active, a run of `model` is observed: the first inputs of each plausible module, and who selects."""
    seen = Observation()
    stack: list[str] = [""] if inside else []  # inside: the call of the model itself has begun
    handles = []

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        stack.append(name)
        if name in plausible_names and name not in seen.examples:
            with torch._C.DisableTorchFunction():
                with contextlib.suppress(Exception):  # an argument that cannot be copied: no candidate
                    seen.examples[name] = Example.of(*bind(module, args, kwargs))
                    seen.before[name] = len(seen.choices)

    plausible_names = {n for n, m in model.named_modules() if plausible(m)}
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, n=name: enter(n, m, a, k), with_kwargs=True, prepend=True)
        )
        handles.append(
            module.register_forward_hook(lambda m, a, out: stack.pop() and None if stack else None, always_call=True)
        )
    try:
        with eagerly(), _Selections(seen, stack):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def chooser(seen: Observation, name: str) -> Choice | None:
    """The choice that the module of this name was given, the last one of those that are equal; None where it was given none."""
    leaves = pytree.tree_leaves((seen.examples[name].args, seen.examples[name].kwargs))
    given = [x.reshape(-1).long() for x in leaves if isinstance(x, Tensor) and not x.is_floating_point() and x.dim() >= 2]
    earlier = reversed(seen.choices[: seen.before.get(name, 0)])
    return next((c for c in earlier if any(torch.equal(ids, c.ids.reshape(-1)) for ids in given)), None)


def plausible(module: nn.Module) -> bool:
    """Whether its parameters could be experts: a stack [E, ., .], or at least two matrices of one shape or three of any."""
    matrices = [p for p in module.parameters() if p.dim() >= 2]
    if any(p.dim() >= 3 and p.shape[0] > 1 for p in matrices):
        return True
    repeated = Counter(tuple(p.shape) for p in matrices)
    return len(matrices) >= 3 or any(n >= 2 for n in repeated.values())


def candidates(model: nn.Module, seen: Observation) -> list[str]:
    """Names of candidate modules, deepest first."""
    modules = dict(model.named_modules())
    picked = []
    for name, example in seen.examples.items():
        alike = holds_alike(modules[name])
        routed = (
            name in seen.selects
            or _given_routing(example)
            or alike
            and (name in seen.compares or _given_integers(example))
        )
        if routed and not _repeats(modules[name], name, seen):
            picked.append(name)
    return sorted(picked, key=lambda n: (-n.count(".") - bool(n), list(modules).index(n)))


def holds_alike(module: nn.Module) -> bool:
    """Whether it holds a stack of matrices, or submodules of one structure with several matrices, or many matrices alike."""
    if any(p.dim() >= 3 and p.shape[0] > 1 for p in module.parameters()):
        return True
    shapes = Counter(tuple(p.shape) for p in module.parameters() if p.dim() >= 2)
    if any(n > 4 for n in shapes.values()):
        return True
    kinds = Counter(
        (type(m), matrices)
        for m in module.modules()
        if m is not module and len(matrices := tuple(tuple(p.shape) for p in m.parameters() if p.dim() >= 2)) >= 2
    )
    return any(n >= 2 for n in kinds.values())


def _given_integers(example: Example) -> bool:
    leaves = pytree.tree_leaves((example.args, example.kwargs))
    return any(isinstance(x, Tensor) and not x.is_floating_point() for x in leaves)


def _given_routing(example: Example) -> bool:
    """Integers and floats of one shape: expert ids and their weights."""
    tensors = [x for x in pytree.tree_leaves((example.args, example.kwargs)) if isinstance(x, Tensor) and x.dim() >= 2]
    floats = {tuple(t.shape) for t in tensors if t.is_floating_point()}
    return any(tuple(t.shape) in floats for t in tensors if not t.is_floating_point())


def _repeats(module: nn.Module, name: str, seen: Observation) -> bool:
    """A module that runs two or more submodules of one structure which select on their own: a stack of layers."""
    prefix = f"{name}." if name else ""
    inner = [
        m
        for n, m in module.named_modules()
        if n and prefix + n in seen.examples and prefix + n in seen.selects | seen.compares
    ]
    kinds = Counter((type(m), tuple(tuple(p.shape) for p in m.parameters())) for m in inner)
    return any(n >= 2 for n in kinds.values())


def structure_key(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that run the same code on parameters of the same shapes, so that they are analysed once."""

    def own(m: nn.Module) -> tuple[Any, ...]:
        simple = {k: v for k, v in vars(m).items() if isinstance(v, (int, float, str, bool, type(None), tuple))}
        other = {
            k: id(v)
            for k, v in vars(m).items()
            if k not in simple and not k.startswith("_") and k != "forward" and not isinstance(v, Tensor)
        }
        params = tuple((n, tuple(p.shape)) for n, p in m._parameters.items() if p is not None)
        buffers = tuple((n, tuple(b.shape)) for n, b in m._buffers.items() if b is not None)
        return (class_of(m), repr(sorted(simple.items())), tuple(sorted(other.items())), params, buffers)

    return tuple((n, own(m)) for n, m in module.named_modules())
