"""Later launches of a kernel against Triton's own, on a driver that writes down what it is given: no GPU is needed.

Triton's interpreter knows no launches, so this runs in a process of its own without it.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def test_later_launches_are_those_of_triton() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    directly, kernels = map(int, done.stdout.split())
    assert directly > 200 and kernels > 30  # of 300 launches


def main() -> None:
    """Random calls, each one twice: by `relaunch.launch` and by Triton."""
    sys.path.insert(0, str(ROOT))
    import torch
    import triton
    import triton.language as tl
    import triton_on_paper
    from triton.tools.tensor_descriptor import TensorDescriptor

    given: list[Any] = []

    def launched(name: str, grid: tuple[int, ...], stream: int, function: int, args: Any) -> None:
        given.append((name, grid, stream, function, [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]))

    driver = triton_on_paper.use(launched)
    from moefx.codegen import triton_relaunch as relaunch

    @triton.jit(do_not_specialize=["free"])
    def add(x, y, n, free, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < n) * scale + free
        tl.store(y + at, value + value if TWICE else value, mask=at < n)

    @triton.jit
    def copy(source, target, row):
        target.store([row, 0], source.load([row, 0]))

    pool = {d: torch.zeros(64, 16, dtype=d) for d in (torch.float32, torch.bfloat16)}
    counted, draw = 0, random.Random(0)
    original = type(add).run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return original(self, *args, **kwargs)

    type(add).run = run
    for _ in range(300):
        dtype = draw.choice(list(pool))
        if draw.random() < 0.3:
            a, b = (TensorDescriptor.from_tensor(pool[dtype][start:], [draw.choice([8, 16]), 16]) for start in (0, 8))
            b.block_shape = a.block_shape
            kernel, args, options = copy, (a, b, draw.choice([1, 8, 16, 33])), {"num_warps": 4}
        else:
            flat, start = pool[dtype].flatten(), draw.choice([0, 8, 1])
            kernel, args = add, (flat[start:], flat, draw.choice([1, 16, 40, 57]), draw.choice([1, 3, 2**35]), 0.5)
            options = {"BLOCK": 64} if draw.random() < 0.7 else {"BLOCK": 64, "TWICE": True}
        grid = draw.choice([(3,), (2, 5)])
        relaunch.launch(kernel, grid, args, options)
        mine = given.pop()
        kernel[grid](*args, **options)
        assert given.pop() == mine, (kernel, grid, args, options)
    direct = 600 - counted
    enter = triton.knobs.runtime.launch_enter_hook
    hooks = []
    enter.add(hooks.append)
    relaunch.launch(kernel, grid, args, options)  # a profiler that listens is told: Triton launches
    assert 600 - counted == direct - 1
    print(direct, driver.utils.loaded)


if __name__ == "__main__":
    main()
