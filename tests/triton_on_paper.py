"""A driver for Triton without a GPU: kernels are compiled, and launching one calls a function of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


def use(launched: Callable[..., None]) -> Any:
    """Makes such a driver the active one. launched: given (name of the kernel, grid, stream, function, arguments)."""

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name = metadata.name

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
            launched(self.name, (x, y, z), stream, function, args[4:])

    class Utils:
        loaded = 0

        def load_binary(self, *_: Any) -> tuple[int, ...]:
            self.loaded += 1
            return 0, self.loaded, 0, 0, 1024

        def get_device_properties(self, _: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

    class Driver(DriverBase):
        utils, launcher_cls = Utils(), Launcher
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        map_python_to_cpp_type = get_benchmarker = get_active_torch_device = is_active = lambda self, *_: None

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    return driver
