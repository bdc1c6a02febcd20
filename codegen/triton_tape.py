"""The launches of a function at one size, written down once and run again as straight-line Python.

What an op of Triton decides on the host (which tile, is there a copy engine, how many stages) follows from the sizes, dtypes
and alignments of its tensors, and costs more there than the launch itself: for few thousand tokens a layer's GPU waits for
its host. So the second call with the same sizes is watched: memory that it takes, kernels that it launches, torch functions
that it calls; from then on those alone run. The source can be read: `tape.source`.

    tapes = Tapes()
    y = tapes.run(("forward",), (x, ids, w), lambda: body(x, ids, w))      # body's result: tensors, None, tuples of these

Not written down, and run as ever: sizes that come once, empty tensors, values that the host reads, tensors of other classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from moefx.codegen import triton_launch
from moefx.codegen import triton_relaunch as relaunch
from moefx.codegen.triton_launch import compiling, float32_precision, interpreted
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

T = TypeVar("T")

MOST_TAPES = 256  # of a region: those that ran last are kept; a server's batches have many sizes
aten = torch.ops.aten
ROOM = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


class NotOnTape(Exception):
    """What keeps a function from being written down."""


class Address:
    """What a descriptor asks of its tensor."""

    __slots__ = ("at",)

    def __init__(self, at: int) -> None:
        self.at = at

    def data_ptr(self) -> int:
        return self.at


def descriptor(
    at: int, shape: list[int], strides: list[int], block: list[int], padding: str, kind: Any = TensorDescriptor, layout: Any = None
) -> Any:
    """A descriptor of memory that starts at an address."""
    return triton_launch.descriptor(Address(at), shape, strides, block, padding, kind, layout)


class Tapes:
    """What has been written down of one function that depends on nothing but its arguments and the flags."""

    def __init__(self) -> None:
        self.seen: dict[Any, Tape | NotOnTape | None] = {}  # None: once

    def run(self, flags: tuple[Any, ...], inputs: Sequence[Tensor | None], body: Callable[[], T]) -> T:
        """What `body` gives, which reads `inputs` and no other tensors, and writes no others but its own."""
        key = _key(flags, inputs)
        if key is None:
            return body()
        found = self.seen.get(key)
        if isinstance(found, Tape):
            self.seen[key] = self.seen.pop(key, found)  # now the last one
            return found.replay(*inputs)  # type: ignore[no-any-return]
        if key not in self.seen:
            if len(self.seen) >= MOST_TAPES:
                self.seen.pop(list(self.seen)[0], None)  # threads may share a region
            self.seen[key] = None
            return body()
        if found is not None:
            return body()
        recorder = Recorder(inputs)
        result = recorder.watch(body)
        self.seen[key] = recorder.tape(result)
        return result


def _key(flags: tuple[Any, ...], inputs: Sequence[Tensor | None]) -> Any:
    """All that decides what is launched; None where nothing may be written down or run from a tape."""
    if compiling() or interpreted() or relaunch.hooked() or torch._C._len_torch_dispatch_stack():
        return None
    device = triton.runtime.driver.active.get_current_device()
    key: list[Any] = [*flags, device, float32_precision()]
    for t in inputs:
        if t is None:
            key.append(None)
            continue
        if (type(t) is not Tensor and type(t) is not torch.nn.Parameter) or t.get_device() not in (device, -1):
            return None
        key.append((t.dtype, t.shape, t.stride(), t.data_ptr() & 15 == 0))
    return tuple(key)


@dataclass(frozen=True)
class Tape:
    """replay: the function of `source`, which takes the inputs and gives the result."""

    source: str
    replay: Callable[..., Any]


class Place(NamedTuple):
    """Memory that a name of the tape stands for, until it is given back."""

    name: str
    start: int
    end: int
    geometry: tuple[Any, ...]
    storage: StorageWeakRef


@dataclass
class Step:
    """A line of the tape. uses: the names that it reads or writes; makes: those of the memory that it takes."""

    line: str
    uses: list[str] = field(default_factory=list)
    makes: list[str] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Watches one run."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.inputs = {f"i{n}": t for n, t in enumerate(inputs) if t is not None}
        self.names = [f"i{n}" for n in range(len(inputs))]
        self.places: list[Place] = []  # of memory taken meanwhile, the newest last
        self.steps: list[Step] = []
        self.pointed: set[str] = set()  # names whose address a kernel is given
        self.known: dict[str, Any] = {"empty": torch.empty, "empty_strided": torch.empty_strided, "descriptor": descriptor}
        self.problem = next(("an input is empty" for t in self.inputs.values() if not t.numel()), "")

    def watch(self, body: Callable[[], T]) -> T:
        with self, relaunch.watched_by(self.launched):
            return body()

    # ---------------------------------------------------------------------------------------- what is seen

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.problem:
            try:
                self._called(function, args, kwargs or {}, result)
            except NotOnTape as problem:
                self.problem = str(problem)
        return result

    def _called(self, function: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        several = isinstance(result, (tuple, list))
        made = [t for t in (result if several else [result]) if isinstance(t, Tensor)]
        if len(made) < (len(result) if several else 1) or torch.Tag.dynamic_output_shape in function.tags:
            raise NotOnTape(f"{function} gives what the host reads")
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise NotOnTape(f"{function} is random")
        if function in ROOM:
            name = self._place(result)
            self.steps.append(Step(self._room(name, result), [], [name]))
            return
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        old = {t.untyped_storage()._cdata in storages for t in made}
        if old == {True} and not function._schema.is_mutable:
            return  # a view
        if len(old) > 1:
            raise NotOnTape(f"{function} gives new memory and old")
        uses, names = list[str](), list[str]()
        text = ", ".join([*(self._value(a, uses) for a in args), *(f"{k}={self._value(v, uses)}" for k, v in kwargs.items())])
        call = f"{self._constant(function)}({text})"
        if old == {False}:
            names = [self._place(t) for t in made]
            call = f"{', '.join(names)}{',' if several else ''} = {call}"
        self.steps.append(Step(call, uses, names))

    def launched(self, ready: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """A kernel's launch; ready: None where Triton has to see every launch of it."""
        if self.problem:
            return
        try:
            if ready is None:
                raise NotOnTape("Triton has to see every launch of a kernel")
            uses: list[str] = []
            values = ", ".join(self._argument(a, uses) for a in (*args, *ready.rest))
            run, function, metadata = map(self._constant, (ready.run, ready.function, ready.metadata))
            head = f"{', '.join(map(str, grid))}, stream, {function}, {metadata}, None, None, None"
            self.steps.append(Step(f"{run}({head}, {values})", uses))
        except NotOnTape as problem:
            self.problem = str(problem)

    # ---------------------------------------------------------------------------------------- how it is written

    def _room(self, name: str, t: Tensor) -> str:
        how = f"dtype={self._constant(t.dtype)}, device={self._constant(t.device)}"
        if t.is_contiguous():
            return f"{name} = empty({tuple(t.shape)}, {how})"
        return f"{name} = empty_strided({tuple(t.shape)}, {t.stride()}, {how})"

    def _place(self, t: Tensor) -> str:
        """A name for new memory."""
        if t.storage_offset():
            raise NotOnTape("new memory that does not begin where it lies")
        name, start = f"a{len(self.places)}", t.data_ptr()
        storage = t.untyped_storage()
        self.places.append(Place(name, start, start + storage.nbytes(), _geometry(t), StorageWeakRef(storage)))
        return name

    def _constant(self, value: Any) -> str:
        """A name for a value that stays; equal ones, such as the shapes of descriptors, share it."""
        alike = (n for n, known in self.known.items() if known is value or repr(known) == repr(value) and not callable(value))
        name = next(alike, None)
        if name is None:
            name = f"c{len(self.known)}"
            self.known[name] = value
        return name

    def _where(self, t: Tensor) -> tuple[str, int]:
        """The name of the memory that a tensor lies in, and how many bytes behind its start."""
        at = t.data_ptr()
        if not t.numel():
            raise NotOnTape("an empty tensor")
        exact = [name for name, given in self.inputs.items() if given.data_ptr() == at]
        if len(exact) == 1:
            return exact[0], 0
        if not exact:
            for place in reversed(self.places):
                if place.start <= at < place.end and not place.storage.expired():
                    return place.name, at - place.start
        storage = t.untyped_storage()._cdata
        around = [n for n, given in self.inputs.items() if given.untyped_storage()._cdata == storage]
        if len(around) > 1:  # parameters that lie in one buffer
            around = [n for n in around if 0 <= at - self.inputs[n].data_ptr() < _reach(self.inputs[n])]
        if len(around) != 1:
            raise NotOnTape("memory that is no input's alone, and was not taken here")
        return around[0], at - self.inputs[around[0]].data_ptr()

    def _argument(self, value: Any, uses: list[str]) -> str:
        """An argument of a kernel."""
        if isinstance(value, Tensor):
            return self._pointer(value, uses)
        if hasattr(value, "block_shape"):
            lists = ", ".join(map(self._constant, (list(value.shape), list(value.strides), list(value.block_shape))))
            laid = ", ".join(map(self._constant, (type(value), value.layout))) if hasattr(value, "layout") else ""
            return f"descriptor({self._pointer(value.base, uses)}, {lists}, {value.padding!r}{laid and ', ' + laid})"
        return repr(value) if isinstance(value, (bool, int, str)) or value is None else self._constant(value)

    def _pointer(self, t: Tensor, uses: list[str]) -> str:
        name, behind = self._where(t)
        uses.append(name)
        self.pointed.add(name)
        return f"p{name} + {behind}" if behind else f"p{name}"

    def _value(self, value: Any, uses: list[str]) -> str:
        """An argument of a torch function, or a part of the result."""
        if isinstance(value, Tensor):
            return self._tensor(value, uses)
        if isinstance(value, (tuple, list)):
            inside = "".join(f"{self._value(v, uses)}, " for v in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if isinstance(value, (bool, int, str)) or value is None:
            return repr(value)
        return self._constant(value)

    def _tensor(self, t: Tensor, uses: list[str]) -> str:
        name, behind = self._where(t)
        uses.append(name)
        whole = self.inputs[name] if name in self.inputs else None
        geometry = next(p.geometry for p in self.places if p.name == name) if whole is None else _geometry(whole)
        if not behind and _geometry(t) == geometry:
            return name
        if t.dtype != geometry[0]:
            raise NotOnTape("memory that is read as another dtype")
        offset = f"{name}.storage_offset() + " if whole is not None else ""
        return f"{name}.as_strided({tuple(t.shape)}, {t.stride()}, {offset}{behind // t.element_size()})"

    def tape(self, result: Any) -> Tape | NotOnTape:
        """What was seen, as a function."""
        uses: list[str] = []
        try:
            if self.problem:
                raise NotOnTape(self.problem)
            answer = self._value(result, uses)
        except NotOnTape as problem:
            return NotOnTape(str(problem))  # without the frames of the one that was raised, which hold the run's tensors
        last = {name: n for n, step in enumerate(self.steps) for name in (*step.makes, *step.uses)}
        lines = [f"def replay({', '.join(self.names)}):", "stream = current_stream(device)"]
        lines += [f"p{name} = {name}.data_ptr()" for name in self.inputs if name in self.pointed]
        for n, step in enumerate(self.steps):
            lines.append(step.line)
            lines += [f"p{name} = {name}.data_ptr()" for name in step.makes if name in self.pointed]
            ended = dict.fromkeys(name for name in (*step.makes, *step.uses) if last[name] == n and name not in self.inputs)
            lines += [f"del {name}" for name in ended if name not in uses]  # no later than the function gave it back
        lines.append(f"return {answer}")
        source = "\n    ".join(lines) + "\n"
        driver = triton.runtime.driver.active
        names = {**self.known, "current_stream": driver.get_current_stream, "device": driver.get_current_device()}
        exec(compile(source, "<moefx tape>", "exec"), names)
        return Tape(source, names["replay"])


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, tuple(t.shape), t.stride()


def _reach(t: Tensor) -> int:
    """Bytes from a tensor's start to its end."""
    return t.element_size() * (1 + sum(stride * (size - 1) for size, stride in zip(t.shape, t.stride())))
