"""The record of one run of a block: Values, Calls, ModuleCalls. Made by capture, read by find and canonicalise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moefx import sizes

HOST_READS = frozenset(
    "item tolist __bool__ __int__ __float__ __index__ __complex__ numpy __array__ is_nonzero equal allclose __contains__".split()
)


def user_line() -> str:
    """file:line of the innermost frame that belongs to the user (neither torch nor moefx)."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "moefx.")) and name not in ("torch", "contextlib"):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


PRECISION = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # falling


def precision(tensors: Iterable[Tensor]) -> torch.dtype:
    """The least precise floating dtype among them."""
    floats = [t.dtype for t in tensors if t.dtype in PRECISION]
    return max(floats, key=PRECISION.index, default=torch.float64)


@dataclass(eq=False)
class Value:
    """A tensor at one version of its storage.

    origin: "call" (made by `producer`), "input", "param", "buffer", "attr" (a plain tensor attribute; `path` names it)
    or "unseen" (made outside of torch functions). `root` is the Value at which the tensor *object* first appeared:
    in-place writes make new Values of the same object.
    """

    index: int
    tensor: Tensor  # the concrete value at this version (a private copy)
    storage: int
    version: int
    origin: str
    path: str = ""
    producer: Call | None = None
    root: Value | None = None
    tainted: bool = False  # computed from the experts' parameters

    @property
    def object(self) -> Value:
        return self.root or self

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def line(self) -> str:
        """file:line of the user's code that made it; "?" for what came from outside."""
        return self.producer.location if self.producer is not None else "?"

    def __repr__(self) -> str:
        return f"%{self.path or self.index}"


@dataclass(eq=False)
class Call:
    """One torch function call: `result = func(*args, **kwargs)`, with Values and Sizes inside the structures."""

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: tuple[ModuleCall, ...]
    grad_enabled: bool
    location: str
    result: Any = None
    writes: tuple[Value, ...] = ()

    @property
    def name(self) -> str:
        owner = getattr(self.func, "__self__", None)
        return owner.__name__ if inspect.isgetsetdescriptor(owner) else getattr(self.func, "__name__", str(self.func))

    @property
    def reads_host(self) -> bool:
        return self.name in HOST_READS

    def reads(self) -> list[Value]:
        return values_in((self.args, self.kwargs))

    def makes(self) -> list[Value]:
        return [*values_in(self.result), *self.writes]

    def __str__(self) -> str:
        args = ", ".join([str(a) for a in self.args] + [f"{k}={v}" for k, v in self.kwargs.items()])
        return f"{self.result} = {self.name}({args})  # {self.location}"


@dataclass(eq=False)
class ModuleCall:
    """One call of a submodule: the Calls start <= index < stop happened inside."""

    path: str
    start: int
    scope: tuple[ModuleCall, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    stop: int = -1
    result: Any = None


@dataclass(frozen=True)
class Trace:
    """What one run of a block did."""

    inputs: tuple[Any, ...]  # the flattened inputs: Values and constants
    inputs_after: tuple[Value, ...]  # the input tensors as the run left them (another Value where it wrote to one)
    result: Any
    calls: tuple[Call, ...]
    module_calls: tuple[ModuleCall, ...]
    values: tuple[Value, ...]
    log: sizes.Log
    side_effects: tuple[tuple[str, str], ...]  # (module path, what it changed on itself)
    module: nn.Module = field(repr=False)

    def release(self) -> None:
        """Lets Values and Calls no longer refer to each other: else tensors of a probe copy stay until garbage is collected."""
        for value in self.values:
            value.producer = None

    def __str__(self) -> str:
        return "\n".join([f"inputs {list(self.inputs)}", *map(str, self.calls), f"return {self.result}"])


def values_in(structure: Any) -> list[Value]:
    """Every Value inside nested tuples, lists, dicts and slices, in order."""
    if isinstance(structure, Value):
        return [structure]
    if isinstance(structure, dict):
        return [v for s in structure.values() for v in values_in(s)]
    if isinstance(structure, (tuple, list)):
        return [v for s in structure for v in values_in(s)]
    if isinstance(structure, slice):
        return values_in((structure.start, structure.stop, structure.step))
    return []


def rebuild(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """The structure with `leaf` applied to everything that is not a tuple, list, dict or slice."""
    if isinstance(structure, torch.Size):
        return tuple(rebuild(s, leaf) for s in structure)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(rebuild(s, leaf) for s in structure))
    if isinstance(structure, (tuple, list)):
        rebuilt = [rebuild(s, leaf) for s in structure]
        if type(structure) in (tuple, list):
            return type(structure)(rebuilt)
        return tuple(rebuilt)  # torch.return_types: a tuple by another name
    if type(structure) is dict:
        return {k: rebuild(v, leaf) for k, v in structure.items()}
    if isinstance(structure, slice):
        return slice(*(rebuild(s, leaf) for s in (structure.start, structure.stop, structure.step)))
    return leaf(structure)
