"""A kernel's later launches, without what Triton does anew at each one.

`kernel[grid](...)` binds the arguments, describes each as text, looks the compiled kernel up by that text, makes a record
for profilers' hooks, and asks the driver about every pointer: 50 to 70 us on the host, where a kernel for few tokens takes 10.
Here the compiled kernel that one launch used is remembered by what Triton specialises on, and called as Triton calls it.

    launch(kernel, grid, args, options)     Triton's way the first time, directly from the second on
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs

_watch = threading.local()  # who is told of this thread's launches


@contextlib.contextmanager
def watched_by(watcher: Callable[[Any, tuple[int, ...], tuple[Any, ...]], None]) -> Iterator[None]:
    """Inside, `watcher` is told of each launch of this thread: how it is done directly (None: it cannot), grid and arguments."""
    _watch.watcher = watcher
    try:
        yield
    finally:
        _watch.watcher = None


class Ready(NamedTuple):
    """A compiled kernel on one device. rest: the values of the parameters behind the positional ones."""

    run: Callable[..., None]
    function: int
    metadata: Any
    rest: tuple[Any, ...]


_ready: dict[Any, Ready | None] = {}  # None: of these arguments Triton has to see every launch
_constant: dict[int, tuple[Any, frozenset[int]]] = {}  # by id: the kernel, and where its constexpr arguments stand


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """As `kernel[grid](*args, **options)`, on the current device and stream.

    options: values of constexpr parameters and of Triton's own options, hashable all of them.
    """
    driver = triton.runtime.driver.active
    device = driver.get_current_device()
    number = id(kernel)  # whose own hash is that of its source; `_constant` keeps it alive
    if number not in _constant:
        _constant[number] = kernel, frozenset(p.num for p in kernel.params if p.is_constexpr)
    constant = _constant[number][1]
    given: list[Any] = []
    kinds: list[Any] = []
    for i, value in enumerate(args):
        sort = type(value)
        if i in constant:
            kinds.append(value)
        elif sort is int:
            # as Triton: 1 is compiled in, multiples of 16 are known as such, the width follows the size
            kinds.append(1 if value == 1 else (value & 15 == 0, value.bit_length() > 31, value.bit_length() > 63))
        elif isinstance(value, torch.Tensor):
            value = value.data_ptr()  # Triton's launcher takes addresses too, and asks nobody about them
            kinds.append((args[i].dtype, value & 15 == 0))
        elif hasattr(value, "block_shape"):  # a descriptor; Gluon's has a layout
            kinds.append((value.base.dtype, tuple(value.block_shape), value.padding, getattr(value, "layout", None)))
        else:
            kinds.append((sort, value))
        given.append(value)
    key = (number, device, *kinds, *options.items())
    ready = _ready.get(key)
    watcher = getattr(_watch, "watcher", None)
    if ready is None or hooked():
        compiled = kernel[grid](*args, **options)
        if key not in _ready:
            _ready[key] = _remembered(kernel, compiled, len(args), options)
        if watcher is not None:
            watcher(_ready[key], (*grid, 1, 1)[:3], args)
        return
    x, y, z = (*grid, 1, 1)[:3]
    if watcher is not None:
        watcher(ready, (x, y, z), args)
    stream = driver.get_current_stream(device)
    ready.run(x, y, z, stream, ready.function, ready.metadata, None, None, None, *given, *ready.rest)


def _remembered(kernel: Any, compiled: Any, given: int, options: dict[str, Any]) -> Ready | None:
    """None where a launch depends on more than the key holds: tensors among the options, hooks of the kernel's own, chips
    for which Triton specialises on more."""
    behind = kernel.params[given:]
    plain = triton.runtime.driver.active.get_current_target().backend == "cuda" and not kernel.pre_run_hooks
    if not plain or not all(p.is_constexpr for p in behind):
        return None
    rest = tuple(options.get(p.name, p.default) for p in behind)
    return Ready(compiled.run, compiled.function, compiled.packed_metadata, rest)


def hooked() -> bool:
    """Whether a profiler wants to know of launches."""
    return any(getattr(hook, "calls", hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))
