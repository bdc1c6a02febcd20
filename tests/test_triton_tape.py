"""Tapes: random functions of kernels and torch functions give from their tapes what they give themselves. No GPU is needed:
kernels are compiled, and launching one computes with the addresses that it was given.

Triton's interpreter knows no launches, so this runs in a process of its own without it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("what", ["random", "not_on_tape", "golden"])
def test_tapes(what: str, golden: Callable[[str, str], None]) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if what == "random":
        taped, replays, flat = map(int, done.stdout.split())
        assert taped > 100 and replays > 200 and flat > 20  # of 150 functions, four calls each, the third and fourth from a tape
    if what == "golden":
        golden("tape", done.stdout)


def test_the_sizes_that_ran_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from moefx.codegen import triton_tape

    class Recorder:
        def __init__(self, inputs: Any) -> None:
            pass

        def watch(self, body: Callable[[], Any]) -> Any:
            return body()

        def tape(self, result: Any) -> triton_tape.Tape:
            return triton_tape.Tape("", lambda: "from the tape")

    monkeypatch.setattr(triton_tape, "MOST_TAPES", 3)
    monkeypatch.setattr(triton_tape, "_key", lambda flags, inputs: flags)
    monkeypatch.setattr(triton_tape, "Recorder", Recorder)
    tapes = triton_tape.Tapes()
    run = partial(tapes.run, inputs=(), body=lambda: "run")
    assert [run(("often",)) for _ in range(3)] == ["run", "run", "from the tape"]
    for size in range(10):  # such as prompts, each of another length
        assert run((size,)) == "run"
        assert run(("often",)) == "from the tape"
    assert list(tapes.seen) == [(8,), (9,), ("often",)]


class Paper:
    """Two kernels, by what they compute at the addresses that they are given: y = x * scale, and a block of rows copied."""

    def __init__(self) -> None:
        sys.path.insert(0, str(ROOT))
        import torch
        import triton
        import triton.language as tl
        import triton_on_paper
        from triton.tools.tensor_descriptor import TensorDescriptor

        triton_on_paper.use(self.launched)
        from moefx.codegen import triton_launch, triton_tape

        @triton.jit
        def scaled(x, y, n, scale, BLOCK: tl.constexpr):
            at = tl.arange(0, BLOCK)
            tl.store(y + at, tl.load(x + at, mask=at < n) * scale, mask=at < n)

        @triton.jit
        def copied(source, target, row):
            target.store([row, 0], source.load([row, 0]))

        self.torch, self.kernels, self.descriptor = torch, (scaled, copied), TensorDescriptor
        self.launch, self.tapes = triton_launch.launch, triton_tape.Tapes()

    def launched(self, name: str, grid: Any, stream: int, function: int, args: Any) -> None:
        assert (grid, stream) == ((1, 1, 1), 7)
        at = [a if isinstance(a, int) else a.base.data_ptr() if hasattr(a, "base") else a.data_ptr() for a in args[:2]]
        if name == "scaled":
            x, y = ((ctypes.c_float * args[2]).from_address(a) for a in at)
            y[:] = [value * args[3] for value in x]
        else:
            rows, columns = args[0].block_shape
            for row in range(args[2], args[2] + rows):
                ctypes.memmove(*(a + 4 * row * d.strides[0] for a, d in zip(at[::-1], args[1::-1])), 4 * columns)

    def scale(self, x: Any, y: Any, by: float) -> None:
        self.launch(self.kernels[0], (1,), x, y, min(x.numel(), y.numel()), by, BLOCK=64)

    def copy(self, x: Any, y: Any) -> None:
        rows = [1, 16] if min(len(x), len(y)) < 2 else [2, 16]
        self.launch(self.kernels[1], (1,), *(self.descriptor.from_tensor(t, rows) for t in (x, y)), 0)


def program(paper: Paper, draw: random.Random, inputs: int) -> Any:
    """A random function of rows of 16 numbers each: memory, views, kernels and torch functions, in place or not."""
    torch, lines, live = paper.torch, list[Any](), list(range(inputs))
    for n in range(inputs, inputs + draw.randint(3, 14)):
        a, b = draw.choice(live), draw.choice(live)
        rows = draw.randint(1, 4)
        kind = draw.choice(["room", "room", "zeros", "like", "sum", "view", "scale", "scale", "copy", "add_", "copy_", "free"])
        lines.append((kind, n, a, b, rows))
        if kind in ("room", "zeros", "like", "sum", "view"):
            live.append(n)
        elif kind == "free" and a >= inputs:
            live.remove(a)
    out = draw.sample(live, min(len(live), 3))

    def body(*given: Any) -> Any:
        has = dict(enumerate(given))
        for kind, n, a, b, rows in lines:
            x, y = has.get(a), has.get(b)
            if kind == "room":
                has[n] = torch.empty(rows, 16)
                paper.scale(given[0], has[n], 2.0)  # so that nothing is arbitrary
                if rows > len(given[0]):
                    has[n][len(given[0]) :].zero_()
            elif kind == "zeros":
                has[n] = x.new_zeros(rows, 16)
            elif kind == "like":
                has[n] = torch.empty_like(x)
                has[n].copy_(x)
            elif kind == "sum":
                has[n] = x.sum(0, keepdim=True)
            elif kind == "view":
                has[n] = x[len(x) // 2 :]
            elif kind == "scale":
                paper.scale(x, y, 0.5)
            elif kind == "copy" and x is not y:
                paper.copy(x, y)
            elif kind == "add_":
                y.add_(1)
            elif kind == "copy_" and len(x) == len(y) and x is not y:
                y.copy_(x)
            elif kind == "free" and a >= len(given):
                del has[a]
            del x, y
        return tuple(has[n] for n in out), None

    return body


def check_random() -> None:
    """Fresh inputs at every call. Some lie where earlier ones did, some in one buffer as a model's flat parameters do."""
    paper = Paper()
    torch = paper.torch
    taped = replays = flat = 0
    for seed in range(150):
        draw = random.Random(seed)
        rows = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))]
        body, kept, in_one = program(paper, draw, len(rows)), [], len(rows) > 1 and draw.random() < 0.5
        for call in range(4):
            torch.manual_seed(10 * seed + call)
            mine = list(torch.randn(sum(rows), 16).split(rows)) if in_one else [torch.randn(n, 16) for n in rows]
            theirs = [t.clone() for t in mine]
            expected, _ = body(*theirs)
            before = len(paper.tapes.seen)
            got, nothing = paper.tapes.run((seed,), mine, partial(body, *mine))
            assert nothing is None and len(paper.tapes.seen) <= max(before + 1, 64)
            for a, b in zip((*got, *mine), (*expected, *theirs)):
                assert torch.equal(a, b), (seed, call)
            kept += [mine] if draw.random() < 0.5 else []
        (found,) = (tape for key, tape in paper.tapes.seen.items() if key[0] == seed)
        taped += hasattr(found, "replay")
        replays += 2 * hasattr(found, "replay")
        flat += in_one and hasattr(found, "replay")
    print(taped, replays, flat)


def check_not_on_tape() -> None:
    """What cannot be written down runs as ever, each time."""
    from torch.utils.flop_counter import FlopCounterMode

    paper = Paper()
    torch = paper.torch
    elsewhere = torch.ones(4, 16)
    bodies = {
        "read by the host": lambda x: x * x.sum().item(),
        "random": lambda x: x + torch.rand(4, 16) * 0,
        "sizes that depend on values": lambda x: x[x > 0],
        "memory from elsewhere": lambda x: x + elsewhere,
        "another dtype": lambda x: x.view(torch.int32) + 0,
        "new and old memory": lambda x: torch.ops.aten._unsafe_view(x, [16, 4]),
    }
    gc.disable()
    for name, body in bodies.items():
        for _ in range(4):
            x = torch.randn(4, 16)
            assert torch.equal(paper.tapes.run((name,), (x,), lambda b=body, x=x: b(x)), body(x)), name
            given = weakref.ref(x)
            del x
            assert given() is None, f"{name}: what was watched is still held"
    gc.enable()
    written = {key[0] for key, tape in paper.tapes.seen.items() if hasattr(tape, "replay")}
    assert written <= {"new and old memory"}, written

    class Own(torch.Tensor):
        pass

    before = len(paper.tapes.seen)
    paper.tapes.run(("own class",), (torch.randn(4, 16).as_subclass(Own),), lambda: None)
    with FlopCounterMode(display=False):
        paper.tapes.run(("a mode that wants to see",), (torch.randn(4, 16),), lambda: None)
    assert len(paper.tapes.seen) == before
    for _ in range(4):
        empty = torch.randn(0, 16)
        assert paper.tapes.run(("empty",), (empty,), lambda e=empty: e + 1).shape == (0, 16)
    twice = torch.randn(4, 16)
    for _ in range(3):
        assert torch.equal(paper.tapes.run(("one tensor twice",), (twice, twice), lambda: twice + 1), twice + 1)


def check_golden() -> None:
    paper = Paper()
    torch = paper.torch

    def body(x: Any, y: Any) -> Any:
        room = torch.empty(4, 16)
        paper.scale(x, room[1:], 2.5)
        total = room.sum(0)
        y[:2].add_(1)
        paper.copy(room, y)
        return total, None, y

    for _ in range(3):
        x, y = torch.randn(4, 16), torch.randn(4, 16)
        paper.tapes.run((), (x, y), lambda x=x, y=y: body(x, y))
    (tape,) = paper.tapes.seen.values()
    print(tape.source, end="")


if __name__ == "__main__":
    {"random": check_random, "not_on_tape": check_not_on_tape, "golden": check_golden}[sys.argv[1]]()
