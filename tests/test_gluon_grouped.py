"""Warp-specialised products: where they run, what is compiled and launched, and what they compute on a GPU.

Without a GPU kernels are compiled for sm_90 and launched on paper, in a process of its own without Triton's interpreter.
"""

from __future__ import annotations

from triton_here import DEVICE, needs_triton  # first: it chooses Triton's interpreter

# isort: split

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from moefx.codegen import gluon_grouped, triton_tiles
from moefx.codegen.triton_tiles import Choice, Measured, Tile
from torch import Tensor

from moefx import ops

pytestmark = needs_triton

ROOT = Path(__file__).resolve().parent.parent
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAN = float("nan")


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    gluon_grouped.why_not.cache_clear()
    triton_tiles.forget()


# ------------------------------------------------------------------------------------------------ where they run


def on_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    gluon_grouped.why_not.cache_clear()
    monkeypatch.setattr(gluon_grouped, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)


def known(module: Any = None, error: Exception | None = None) -> Any:
    if error is not None:
        raise error
    return module


class Absent:
    @staticmethod
    def absent() -> list[str]:
        return ["tma.store_wait"]


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hopper(monkeypatch, (10, 0))
    assert "9.x, and this is 10.0" in gluon_grouped.why_not(GPU)
    assert "no CUDA device" in gluon_grouped.why_not(CPU)
    on_hopper(monkeypatch)
    for release in ("3.5.1", "3.10.0", "4.0"):
        monkeypatch.setattr(gluon_grouped.triton, "__version__", release)
        assert f"3.6 to 3.9, and this is {release}" in gluon_grouped.without_kernels()
    monkeypatch.setattr(gluon_grouped.triton, "__version__", "3.7.0+git1")
    for error in (ImportError("no module"), AttributeError("no barrier")):
        monkeypatch.setattr(gluon_grouped, "kernels", partial(known, error=error))
        assert str(error) in gluon_grouped.without_kernels()
    monkeypatch.setattr(gluon_grouped, "kernels", partial(known, Absent))
    assert "has no tma.store_wait" in gluon_grouped.why_not(GPU)
    monkeypatch.setattr(gluon_grouped, "interpreted", lambda: True)
    gluon_grouped.why_not.cache_clear()
    assert "interpreter" in gluon_grouped.why_not(GPU)


def test_the_reason_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    on_hopper(monkeypatch, (8, 0))
    with caplog.at_level(logging.INFO, "moefx.codegen.gluon_grouped"):
        reasons = {gluon_grouped.why_not(GPU) for _ in range(3)}
    assert len(reasons) == len(caplog.records) == 1
    assert "cuda:0" in caplog.text and "8.0" in caplog.text


def test_the_rule_and_its_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights' gradients, and many rows times weights but for the longest sums."""
    cases = {
        ("linear", 256, 768, 2048): 4,
        ("linear", 255, 768, 2048): None,  # few rows
        ("linear", 4096, 2048, 1536): 4,
        ("linear", 4096, 4096, 14336): 4,
        ("linear", 4096, 14336, 4096): None,
        ("linear", 4096, 2048, 192): None,  # narrower than a tile
        ("wgrad", 4096, 4096, 14336): 16,
        ("wgrad", 1, 4096, 14336): 16,
        ("wgrad", 512, 2048, 192): None,
        ("act", 4096, 2048, 768): None,
        ("pointer", 4096, 2048, 768): None,
    }
    for of, group in cases.items():
        rule, plain = triton_tiles.rule(*of), triton_tiles.rule(*of, specialised=False)
        assert rule.specialised == (group is not None) and not plain.specialised
        assert rule == (plain if group is None else Tile(128, 256, 64, 8, 4, group, 1, specialised=True))
        for reason, chosen in (("", rule), ("no Gluon", plain)):
            monkeypatch.setattr(triton_tiles, "why_not", lambda device, reason=reason: reason)
            triton_tiles.forget()
            if of[1] & (of[1] - 1) == 0:  # rows are rounded up
                assert triton_tiles.tiles_for(CPU, *of) == [chosen]


def test_both_are_candidates() -> None:
    for kind, rows, columns in product(("linear", "wgrad"), (64, 4096), (256, 14336)):
        compared = triton_tiles.candidates(kind, rows, 4096, columns)
        assert {triton_tiles.rule(kind, rows, 4096, columns, specialised=s) for s in (True, False)} <= set(compared)
        assert sum(tile.specialised for tile in compared) == 1
        assert not any(tile.specialised for tile in triton_tiles.candidates(kind, rows, 4096, columns, specialised=False))
        assert not any(tile.specialised for tile in triton_tiles.candidates(kind, rows, 4096, 192))


def test_a_file_of_another_release_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = replace(specialised("linear"), group=7)
    found = Measured("a GPU", (Choice("linear", 1024, 4096, 4096, tile, 1.1),))
    assert "warp-specialised" in str(found)
    monkeypatch.setattr(triton_tiles, "measured_on", lambda device: found)
    of = ("linear", 1024, 4096, 4096)
    for reason, chosen in (("", tile), ("no Gluon", triton_tiles.rule(*of, specialised=False))):
        monkeypatch.setattr(triton_tiles, "why_not", lambda device, reason=reason: reason)
        triton_tiles._choose.cache_clear()
        assert triton_tiles.tiles_for(GPU, *of) == [chosen]


def test_other_tiles_are_left_to_the_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_grouped, "why_not", lambda device: "")
    rows, weight, offsets = torch.zeros(8, 256), torch.zeros(1, 256, 256), torch.tensor([0, 8])
    tile = replace(specialised("linear"), columns=128)
    assert not gluon_grouped.launch_linear(rows, None, 1, weight, offsets, rows, tile)
    assert not gluon_grouped.launch_wgrad(rows, rows, offsets, weight, False, tile)


# ------------------------------------------------------------------------------------------------ on paper


@pytest.mark.parametrize("what", ["compiled", "launched"])
def test_on_paper(what: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, what], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def on_paper(launched: Callable[..., None]) -> None:
    """Products on the CPU are launched as if it were a Hopper GPU."""
    import triton_on_paper
    from moefx.codegen import triton_launch

    triton_on_paper.use(launched)
    if reason := gluon_grouped.without_kernels():
        print(reason)  # a release that is not known yet
        sys.exit()
    triton_launch.has_copy_engine = lambda device: True
    gluon_grouped.why_not = triton_tiles.why_not = lambda device: ""


def check_compiled() -> None:
    """Every combination of flags is made ready, and no warp's registers overflow."""
    from moefx.codegen.triton_launch import only_compiling

    on_paper(lambda *_: None)
    experts, inner, columns, rows = 3, 192, 264, 640
    offsets, order = torch.arange(experts + 1, dtype=torch.int32) * 200, torch.zeros(rows, dtype=torch.int64)

    def linear(dtype: torch.dtype, gathers: bool, last: bool, inner: int = inner) -> bool:
        x, weight, out = (torch.zeros(*of, dtype=dtype) for of in ((rows, inner), (experts, inner, columns), (rows, columns)))
        weight = weight.mT.contiguous().mT if last else weight
        return gluon_grouped.launch_linear(x, order if gathers else None, 4, weight, offsets, out, specialised("linear"))

    def wgrad(dtype: torch.dtype, add: bool, out: torch.dtype) -> bool:
        x, grad = torch.zeros(rows, inner, dtype=dtype), torch.zeros(rows, columns, dtype=dtype)
        made = torch.zeros(experts, inner, columns, dtype=out)
        return gluon_grouped.launch_wgrad(x, grad, offsets, made, add, specialised("wgrad"))

    bf16, fp16 = torch.bfloat16, torch.float16
    with only_compiling():
        assert linear(fp16, False, True) and wgrad(fp16, True, fp16)
        assert all(linear(bf16, *flags) for flags in product((False, True), repeat=2))
        assert all(wgrad(bf16, add, bf16) for add in (False, True))
        assert not linear(bf16, True, True, 136), "rows are gathered in whole steps only"
        assert not wgrad(bf16, False, torch.float32) and not wgrad(bf16, True, fp16), "what is added to is moved as operands are"
    kernels = gluon_grouped.kernels()
    made = [list(kernel.device_caches[0][0].values()) for kernel in (kernels.linear_kernel, kernels.wgrad_kernel)]
    assert [len(of_kernel) for of_kernel in made] == [5, 3], made
    for ready in sum(made, []):
        text = ready.asm["ptx"]
        assert all(what in text for what in ("wgmma.mma_async", "setmaxnreg", "cp.async.bulk.tensor", "mbarrier"))
        assert ready.metadata.shared <= 232448 and ".local" not in text
        given_back(text)


def given_back(ptx: str) -> None:
    """One thread of a consumer gives a stage back: only behind a barrier of all four warps, whose products may still run."""
    before, found = "", 0
    for line in ptx.splitlines():
        if match := re.search(r"\b(mbarrier\.arrive\.shared|bar\.sync|wgmma\.|mbarrier\.try_wait|ld\.shared)", line):
            if match[0] == "mbarrier.arrive.shared":
                assert before == "bar.sync", line
                found += 1
            before = match[0]
    assert found >= 4, "two consumers, in a tile's loop and behind it"


FAR = 1 << 20  # addresses are beyond, and numbers that are no sizes of descriptors are not


def check_launched() -> None:
    """What Triton launches first, what is launched directly then, and what a tape launches is the same."""
    given: list[Any] = []

    def launched(name: str, grid: tuple[int, ...], stream: int, function: int, args: Any) -> None:
        given.append((name, grid, stream, function, [seen(a) for a in args]))

    def seen(value: Any) -> Any:
        if hasattr(value, "block_shape"):
            lists = (list(value.shape), list(value.strides), list(value.block_shape))
            return type(value), seen(value.base), *lists, value.layout, value.padding
        at = value.data_ptr() if hasattr(value, "data_ptr") else value if type(value) is int and value > FAR else None
        return value if at is None else places.get(at, "new")

    on_paper(launched)
    from moefx.codegen import triton_grouped, triton_relaunch
    from moefx.codegen.triton_tape import Tapes

    dtype, offsets = torch.bfloat16, torch.arange(5, dtype=torch.int32) * 512
    x, gy, weight = (torch.zeros(*of, dtype=dtype) for of in ((2048, 256), (2048, 512), (4, 256, 512)))
    inputs = (x, gy, weight, offsets, torch.zeros(2048, dtype=torch.int64), torch.zeros_like(weight))
    places = {t.data_ptr(): f"input {n}" for n, t in enumerate(inputs)}

    def body() -> tuple[Tensor, Tensor]:
        x, gy, weight, offsets, order, out = inputs
        y = triton_grouped.grouped_linear(x, weight, offsets)
        z = triton_grouped.gather_linear(gy, order, 1, weight.mT, offsets)
        triton_grouped.grouped_wgrad(x, gy, offsets, out)
        triton_grouped.grouped_wgrad_add(x, gy, offsets, out)
        return y, z

    tapes, runs = Tapes(), []
    for _ in range(4):
        tapes.run((), inputs, body)
        runs.append(list(given))
        given.clear()
    (tape,) = tapes.seen.values()
    assert hasattr(tape, "replay"), tape
    assert [launch[0] for launch in runs[0]] == ["linear_kernel", "linear_kernel", "wgrad_kernel", "wgrad_kernel"]
    for run in runs[1:]:
        assert run == runs[0], (run, runs[0])
    assert "descriptor(" in tape.source and "layout" not in tape.source, "a layout is a constant of the tape"

    # Two layouts of one block are two kernels.
    kernels, before = gluon_grouped.kernels(), len(triton_relaunch._ready)
    a, b = (gluon_grouped.laid_out(gluon_grouped.described(x, (64, 64))) for _ in range(2))
    b.layout = kernels.gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    none = kernels.gluon.jit(nothing)
    for made, count in ((a, 1), (a, 1), (b, 2), (b, 2)):
        triton_relaunch.launch(none, (1,), (made,), {})
        assert len(triton_relaunch._ready) == before + count


def nothing(rows):
    pass


# ------------------------------------------------------------------------------------------------ on a GPU


def specialised(kind: str) -> Tile:
    (tile,) = (tile for tile in triton_tiles.candidates(kind, 512, 2048, 768) if tile.specialised)
    return tile


def offsets_of(rows: int, experts: int, routing: str) -> Tensor:
    """All rows but a few behind offsets[E], which are no expert's: of all experts, of every third one, or most of one."""
    held = rows - rows // 16
    e = torch.arange(experts)
    share = {"even": torch.ones(experts), "some": (e % 3 == 1) + 0.0 if experts > 1 else torch.ones(1), "skew": 8.0 ** -e.double()}
    part = share[routing].double().cumsum(0)
    ends = (part / part[-1] * held).round().long()
    return torch.cat([torch.zeros(1, dtype=torch.long), ends]).int().to(DEVICE)


def among_poison(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Random numbers with NaN behind each row and after the last one: what is read there shows."""
    *lead, rows, columns = shape
    whole = torch.full((*lead, rows + 3, columns + 8), NAN, dtype=dtype, device=DEVICE)
    part = whole[..., :rows, :columns]
    part.copy_(torch.randn(*shape, device=DEVICE) * scale)
    return part


def same(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Each number is right up to its rounding; `want` is in float32."""
    assert got.shape == want.shape
    allowed = want.abs() * (2**-8 if dtype is torch.bfloat16 else 2**-10) + 1e-3 * want.square().mean().sqrt()
    wrong = ~((got.float() - want).abs() <= allowed)
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong, the first at {wrong.nonzero()[0].tolist()}"


def untouched(part: Tensor, count: int) -> None:
    """Nothing was written behind a row's end, nor behind the first `count` rows."""
    whole = part.as_strided((*part.shape[:-2], part.shape[-2] + 3, part.stride(-2)), part.stride())
    assert whole[..., part.shape[-1] :].isnan().all() and whole[..., count:, :].isnan().all()


def check_linear(experts: int, rows: int, inner: int, columns: int, routing: str, dtype: torch.dtype) -> None:
    """Both layouts of weights, rows given or gathered."""
    offsets = offsets_of(rows, experts, routing)
    held = int(offsets[-1])
    for last, gathers in product((False, True), (False, True)):
        n_in = -(-inner // 64) * 64 if gathers else inner  # gathered in whole steps only
        weight = among_poison(experts, *((columns, n_in) if last else (n_in, columns)), dtype=dtype, scale=n_in**-0.5)
        weight[offsets[1:] == offsets[:-1]] = NAN  # of experts without rows: no other one may see them
        weight = weight.mT if last else weight
        order, top_k = None, 1
        x = given = among_poison(rows, n_in, dtype=dtype)
        if gathers:
            top_k = 3
            order = torch.randperm(rows, device=DEVICE)
            given = x[: -(-rows // top_k)]
            x = given[order // top_k]
        else:
            x[held:] = NAN
        out = among_poison(rows, columns, dtype=dtype).fill_(NAN)
        assert gluon_grouped.launch_linear(given, order, top_k, weight, offsets, out, specialised("linear"))
        want = ops.grouped_linear(x[:held].float(), weight.float(), offsets)
        same(out[:held], want, dtype)
        untouched(out, held)


def check_wgrad(experts: int, rows: int, inner: int, columns: int, routing: str, dtype: torch.dtype) -> None:
    """Written, and added to what is there."""
    offsets = offsets_of(rows, experts, routing)
    held = int(offsets[-1])
    x, grad = among_poison(rows, inner, dtype=dtype), among_poison(rows, columns, dtype=dtype)
    x[held:], grad[held:] = NAN, NAN
    want = torch.empty(experts, inner, columns, device=DEVICE)
    ops.grouped_wgrad(x[:held].float(), grad[:held].float(), offsets, want)
    out = among_poison(experts, inner, columns, dtype=dtype).fill_(NAN)
    assert gluon_grouped.launch_wgrad(x, grad, offsets, out, False, specialised("wgrad"))
    same(out, want, dtype)
    untouched(out, inner)
    old = torch.randn_like(want).to(dtype)
    out.copy_(old)
    assert gluon_grouped.launch_wgrad(x, grad, offsets, out, True, specialised("wgrad"))
    same(out, old.float() + want, dtype)
    untouched(out, inner)


SIZES = [
    # E, R, I, O
    (1, 1, 136, 264),
    (1, 17, 2056, 264),
    (1, 4096, 264, 2056),
    (3, 1, 264, 136),
    (3, 17, 136, 2056),
    (3, 255, 2056, 136),
    (3, 4096, 264, 264),
    (128, 17, 264, 264),
    (128, 255, 136, 136),
    (128, 4096, 136, 264),
    (600, 4096, 136, 264),  # a longer table of tiles
]
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize("routing", ["even", "some", "skew"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_on_a_gpu(sizes: tuple[int, int, int, int], routing: str, dtype: torch.dtype) -> None:
    if reason := gluon_grouped.why_not(GPU):
        pytest.skip(reason)
    check_linear(*sizes, routing, dtype)
    check_wgrad(*sizes, routing, dtype)


@pytest.mark.gpu
def test_no_rows_on_a_gpu() -> None:
    """No expert has any: gradients are zeros, and nothing else is written."""
    if reason := gluon_grouped.why_not(GPU):
        pytest.skip(reason)
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    x, grad, out = (torch.full(of, NAN, dtype=torch.bfloat16, device=DEVICE) for of in ((64, 256), (64, 512), (3, 256, 512)))
    for order in (None, torch.arange(64, device=DEVICE)):
        y = torch.full_like(grad, NAN)
        assert gluon_grouped.launch_linear(x, order, 1, out, offsets, y, specialised("linear"))
        assert y.isnan().all()
    assert gluon_grouped.launch_wgrad(x, grad, offsets, out, False, specialised("wgrad"))
    assert not out.any()
    out.fill_(3)
    assert gluon_grouped.launch_wgrad(x, grad, offsets, out, True, specialised("wgrad"))
    assert (out == 3).all()


if __name__ == "__main__":
    {"compiled": check_compiled, "launched": check_launched}[sys.argv[1]]()
