"""Descriptors for the copy engine: those of Triton's own constructors, made without them."""

import inspect
from typing import Any

import pytest
import torch
from moefx.codegen import triton_launch, triton_route
from moefx.codegen.triton_launch import cdiv, described, described_rows
from triton.runtime._async_compile import active_mode
from triton.runtime.errors import OutOfResources
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor


@pytest.fixture(autouse=True)
def _with_a_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefx.codegen.triton_launch.has_copy_engine", lambda device: True)


def test_a_descriptor_is_the_one_that_triton_makes() -> None:
    weight = torch.zeros(4, 64, 48, dtype=torch.bfloat16)
    for tensor, block in ((weight, [1, 32, 16]), (weight[1:, 8:], [1, 16, 16]), (weight[0], [32, 16])):
        assert described(tensor, block) == TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def test_a_descriptor_of_rows_is_the_one_that_triton_makes() -> None:
    rows = torch.zeros(100, 48, dtype=torch.float16)
    for tensor in (rows, rows[:, 16:], rows[4:]):
        assert described_rows(tensor, (64, 16)) == create_ragged_descriptor(tensor, [64, 16])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, 16),  # 32 bits
        torch.zeros(8, 20, dtype=torch.bfloat16),  # rows begin at no multiple of 16 bytes
        torch.zeros(8, 32, dtype=torch.bfloat16)[:, 1:],  # an address in between
        torch.zeros(16, 8, dtype=torch.bfloat16).T,  # features apart
        torch.zeros(0, 16, dtype=torch.bfloat16),
        torch.zeros(1, 16, dtype=torch.bfloat16).expand(8, 16),  # all rows in one place
    ],
)
def test_what_the_copy_engine_does_not_take(tensor: torch.Tensor) -> None:
    assert described(tensor, (8, 16)) is None
    assert described_rows(tensor, (8, 16)) is None


def test_rounding_up() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_rows_exist_while_kernels_are_only_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan's own indexing runs then too, by numbers that no kernel has written."""
    monkeypatch.setattr(triton_launch, "_builder", triton_launch._Builder())
    monkeypatch.setattr(triton_route, "launch", lambda *_, **__: None)
    taken = [torch.full((99,), 1 << 40) for _ in range(8)]
    del taken  # memory that is likely to be given next
    order, offsets, position = triton_route.route(torch.zeros(33, 3, dtype=torch.int64), 5)
    rows = torch.arange(99)
    assert not (rows[order].any() or rows[position.reshape(-1)].any() or offsets.any())
    assert (order.shape, offsets.shape, position.shape) == ((99,), (6,), (33, 3))


class Kernel:
    """What Triton makes; one that asks for more of the chip than there is says so when it is loaded."""

    def __init__(self, fits: bool) -> None:
        self.fits, self.loaded = fits, False

    @property
    def run(self) -> None:
        if not self.fits:
            raise OutOfResources(300, 227, "shared memory")
        self.loaded = True


@pytest.mark.parametrize("before", [False, True])
def test_kernels_are_loaded_where_they_are_compiled(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side, and those that were compiled before. One too large is an error unless its launcher takes another form then."""
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)

    class Launched:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def warmup(self, *, grid: tuple[int, ...]) -> Any:
            if before:
                return self.kernel
            mode = active_mode.get()
            assert mode is not None
            told = len(inspect.signature(mode.submit).parameters) - 2  # when it is made; in newer releases, too, when it is not
            return mode.submit(id(self), lambda: self.kernel, *[lambda _: None] * told)

    fits, too_large = Kernel(True), Kernel(False)
    with triton_launch.only_compiling():
        triton_launch.launch(Launched(fits), (1,))
        triton_launch.launch(Launched(too_large), (1,), shrinks=True)
        triton_launch.launch(Launched(again := Kernel(True)), (1,))
    assert fits.loaded and again.loaded and not too_large.loaded
    with pytest.raises(OutOfResources), triton_launch.only_compiling():
        triton_launch.launch(Launched(too_large), (1,))
    assert not triton_launch.compiling()
