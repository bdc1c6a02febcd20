"""The Triton kernels on a CUDA machine: checks, then timings.   python tests/gpu_kernels.py [--small] [--no-timing]

Checks, for bf16, fp16 and fp32: every op against float64, bit equality over five runs, NaN in all rows that nobody may
read, no host synchronisation, CUDA-graph replay after the routing changed, no new compilation when only the number of
tokens changes, tensors of more than 2^31 elements. Then a table of times at two real shapes. Exit code 1 on failure.
With --small and TRITON_INTERPRET=1 the checks that need no GPU run on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import regions
from moefx.codegen.triton_launch import supports
from moefx.codegen.triton_ops import OPS
from moefx.codegen.triton_pointwise import Pointwise, compile_pointwise
from moefx.passes.simplify import simplify

from moefx import ops
from moefx.ir import Instr, Leaf, LeafRef, Ref, Template
from moefx.segments import Segment, steps

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAN = float("nan")
# Relative Frobenius error against float64: about twice the rounding of a result in the dtype.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 4e-6}
TF32_TOLERANCE = 2e-3

failures: list[str] = []
worst: dict[tuple[str, str], float] = {}  # by op and dtype


# ------------------------------------------------------------------------------------------------ helpers


def expect(condition: bool, message: str) -> None:
    if not condition:
        failures.append(message)
        print(f"FAILED {message}", flush=True)


def relative(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; infinite where something is not a number."""
    difference, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return float("inf") if difference != difference else difference / max(size, 1e-30)


def compare(op: str, what: str, dtype: torch.dtype, got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    if got.shape != want.shape:
        expect(False, f"{op} {what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        return
    error = relative(got, want)
    key = op, "tf32" if tolerance == TF32_TOLERANCE else str(dtype).removeprefix("torch.")
    worst[key] = max(worst.get(key, 0.0), error)
    expect(error <= (tolerance or TOLERANCE[dtype]), f"{op} {what} {dtype}: relative error {error:.1e}")


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    if not CUDA:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def run(op: str, what: str, function: Callable[[], Sequence[Tensor]], n: Sequence[int | None]) -> list[Tensor]:
    """The results (the first n[i] rows of result i), the same bit for bit five times, without host synchronisation."""
    first: list[Tensor] = []
    for i in range(5 if CUDA else 2):
        with no_host_sync():
            results = list(function())
        results = [t[:rows] for t, rows in zip(results, n)]
        if i == 0:
            first = [t.clone() for t in results]
        same = all(torch.equal(a, b) for a, b in zip(first, results))
        finite = all(not t.isnan().any() for t in first)
        expect(same or not finite, f"{op} {what}: run {i + 1} differs from the first")
    return first


@dataclass
class Case:
    """One routing with its tensors; rows from n on are NaN."""

    name: str
    x: Tensor
    w: Tensor
    gy: Tensor
    rows: Tensor  # [R, D]
    h: Tensor  # [R, F]
    weight: Tensor  # [E, D, F]
    ids: Tensor
    order: Tensor
    offsets: Tensor
    position: Tensor
    n: int

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    def by_expert(self) -> list[tuple[int, slice]]:
        edges = self.offsets.tolist()
        return [(e, slice(a, b)) for e, (a, b) in enumerate(zip(edges, edges[1:])) if a < b]


def case(
    tokens: int, top_k: int, experts: int, d: int, f: int, routing: str, dtype: torch.dtype, transposed: bool = True
) -> Case:
    if routing == "skew":  # half of all slots on one expert, some outside, the rest anywhere
        ids = torch.randint(-1, experts + 1, (tokens, top_k), device=DEVICE)
        ids[torch.rand(tokens, top_k, device=DEVICE) < 0.5] = experts // 2
    elif routing == "one":
        ids = torch.full((tokens, top_k), experts - 1, device=DEVICE)
    else:
        ids = torch.randint(0, experts, (tokens, top_k), device=DEVICE)
    order, offsets, position = ops.route(ids, experts)
    n = int(offsets[-1])

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)

    rows, h = randn(tokens * top_k, d), randn(tokens * top_k, f)
    rows[n:], h[n:] = NAN, NAN
    weight = randn(experts, f, d).transpose(1, 2) if transposed else randn(experts, d, f)
    w = torch.rand(tokens, top_k, device=DEVICE)
    name = f"T={tokens} K={top_k} E={experts} D={d} F={f} {routing}"
    return Case(name, randn(tokens, d), w, randn(tokens, f), rows, h, weight, ids, order, offsets, position, n)


# ------------------------------------------------------------------------------------------------ checks


def check_route(small: bool) -> None:
    shapes = [(0, 2, 3), (1, 1, 1), (17, 3, 5), (300, 8, 128)]
    if not small:
        shapes += [(4096, 8, 128), (4097, 10, 512), (65536, 8, 512), (65536, 8, 8)]
    for tokens, top_k, experts in shapes:
        for low, high in ((-1, experts + 1), (0, 1)):
            ids = torch.randint(low, high, (tokens, top_k), device=DEVICE)
            got = run(
                "route",
                f"T={tokens} K={top_k} E={experts}",
                lambda ids=ids, e=experts: OPS["route"](ids, e),
                [None] * 3,
            )
            for a, b in zip(got, ops.route(ids, experts)):
                expect(a.dtype == b.dtype and torch.equal(a, b), f"route T={tokens} K={top_k} E={experts} {low, high}")


def check_ops(c: Case, dtype: torch.dtype, tolerance: float | None = None) -> None:
    """Every op of the table against float64."""
    slots, n, k = c.order[: c.n], c.n, c.top_k
    tokens = slots // k
    w_rows = c.w.flatten()[slots].double()[:, None]
    x64, h64, rows64, gy64 = c.x.double(), c.h[:n].double(), c.rows[:n].double(), c.gy.double()

    exactly_rounded = ("gather_rows", "combine", "combine_backward", "rows_backward", "expert_rows", "expert_sum")

    def per_token(rows: Tensor) -> Tensor:
        return rows.new_zeros(c.x.shape[0], rows.shape[1]).index_add_(0, tokens, rows)

    def per_slot(values: Tensor) -> Tensor:
        return values.new_zeros(c.order.numel()).index_copy_(0, slots, values).view(-1, k)

    def one(
        op: str, want: Sequence[Tensor], function: Callable[[], Sequence[Tensor]], rows: Sequence[int | None]
    ) -> None:
        for got, expected in zip(run(op, c.name, function, rows), want):
            compare(op, c.name, dtype, got, expected, None if op in exactly_rounded else tolerance)

    for w, scale in ((None, 1.0), (c.w, w_rows)):
        route = (c.order, k, c.offsets)
        one("gather_rows", [x64[tokens] * scale], lambda w=w, r=route: [OPS["gather_rows"](c.x, *r, w)], [n])
        one("combine", [per_token(h64 * scale)], lambda w=w: [OPS["combine"](c.h, c.position, w, dtype)], [None])
        products = [] if w is None else [per_slot((gy64[tokens] * h64).sum(1))]
        back = (c.order, c.position, c.offsets)
        one(
            "combine_backward",
            [gy64[tokens] * scale, *products],
            lambda w=w, b=back: [t for t in OPS["combine_backward"](c.gy, c.h, *b, w) if t is not None],
            [n, None],
        )
        products = [] if w is None else [per_slot((x64[tokens] * rows64).sum(1))]
        one(
            "rows_backward",
            [per_token(rows64 * scale), *products],
            lambda w=w: [
                t for t in OPS["rows_backward"](c.rows, c.x, c.position, c.order, c.offsets, w) if t is not None
            ],
            [None, None],
        )

    vectors = torch.randn(c.experts, c.h.shape[1], device=DEVICE).to(dtype)
    expert_of = torch.searchsorted(c.offsets[1:].contiguous(), torch.arange(n, device=DEVICE), right=True)
    sums = h64.new_zeros(c.experts, h64.shape[1]).index_add_(0, expert_of, h64)
    total = c.order.numel()
    one("expert_rows", [vectors[expert_of].double()], lambda: [OPS["expert_rows"](vectors, c.offsets, total)], [n])
    one("expert_sum", [sums], lambda: [OPS["expert_sum"](c.h, c.offsets)], [None])

    for rows_n64, linear, wgrad, given in (
        (rows64, "grouped_linear", "grouped_wgrad", (c.rows,)),
        (x64[tokens], "gather_linear", "gather_wgrad", (c.x, c.order, k)),
    ):
        product = h64.new_empty(n, c.weight.shape[2])
        matrix = h64.new_zeros(c.weight.shape)
        for e, rows in c.by_expert():
            product[rows] = rows_n64[rows] @ c.weight[e].double()
            matrix[e] = rows_n64[rows].t() @ h64[rows]
        one(linear, [product], lambda f=linear, g=given: [OPS[f](*g, c.weight, c.offsets)], [n])
        for out in (torch.empty_like(c.weight), torch.empty(c.weight.shape, dtype=dtype, device=DEVICE)):

            def written(f: str = wgrad, g: Sequence = given, out: Tensor = out) -> list[Tensor]:
                out.fill_(NAN)
                OPS[f](*g, c.h, c.offsets, out)
                return [out]

            one(wgrad, [matrix], written, [None])
    dgrad64 = rows64.new_empty(n, c.weight.shape[1])
    for e, rows in c.by_expert():
        dgrad64[rows] = h64[rows] @ c.weight[e].double().t()
    one("dgrad", [dgrad64], lambda: [OPS["grouped_linear"](c.h, c.weight.transpose(1, 2), c.offsets)], [n])


def evaluate(template: Template, segment: Segment, inputs: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    """The segment in torch; `rows` are its leaves spread over the rows."""
    values, spread = dict(zip(segment.inputs, inputs)), dict(zip(segment.leaves, rows))

    def argument(value: object) -> object:
        if isinstance(value, Ref):
            return values[value.index]
        return spread[value.index] if isinstance(value, LeafRef) else value

    for i in segment.body:
        instr = template.instrs[i]
        if instr.kind == "columns":
            source, start, stop, step = instr.args
            values[i] = values[source.index][:, start:stop:step]
        else:
            target = torch.ops
            for part in instr.target.split("."):
                target = getattr(target, part)
            values[i] = target(*map(argument, instr.args), **{key: argument(v) for key, v in instr.kwargs})
    return [values[i] for i in segment.outputs]


def swiglu(d: int, f: int, form: str) -> tuple[Template, tuple[Leaf, ...]]:
    """form: "side by side", "alternating" (one linear of 2f columns), "two linears"."""
    x, silu, mul = Instr("x", width=d), regions.op("silu.default", Ref(2), width=f), None
    if form == "two linears":
        silu, mul = regions.op("silu.default", Ref(1), width=f), regions.op("mul.Tensor", Ref(3), Ref(2), width=f)
        return Template((x, regions.linear(0, 0, f), regions.linear(0, 1, f), silu, mul)), ()
    halves = [(0, f, 1), (f, 2 * f, 1)] if form == "side by side" else [(0, 2 * f, 2), (1, 2 * f, 2)]
    gate, up = (regions.columns(1, *bounds) for bounds in halves)
    mul = regions.op("mul.Tensor", Ref(4), Ref(3), width=f)
    return Template((x, regions.linear(0, 0, 2 * f), gate, up, silu, mul)), ()


def check_segment(
    name: str, template: Template, leaves: Sequence[Leaf], c: Case, dtype: torch.dtype, tolerance: float | None = None
) -> None:
    """A segment behind linears: forward, vjp, and the fused epilogue."""
    segment = next(step for step in steps(template) if isinstance(step, Segment))
    pointwise = compile_pointwise(template, segment, leaves)
    if not isinstance(pointwise, Pointwise) or pointwise.why_not_linear:
        expect(False, f"{name}: {getattr(pointwise, 'reason', '') or pointwise.why_not_linear}")
        return
    n, d = c.n, c.x.shape[1]
    widths = [template.instrs[i].width for i in segment.inputs]
    weights = [(torch.randn(c.experts, wide, d, device=DEVICE) / d**0.5).to(dtype).transpose(1, 2) for wide in widths]
    vectors = [torch.randn(c.experts, *leaves[i].shape, device=DEVICE).to(dtype) for i in segment.leaves]
    pre64 = []
    for weight in weights:
        product = torch.empty(n, weight.shape[2], device=DEVICE, dtype=torch.float64)
        for e, rows in c.by_expert():
            product[rows] = c.rows[rows].double() @ weight[e].double()
        pre64.append(product)

    pre = [torch.full((c.order.numel(), wide), NAN, device=DEVICE, dtype=dtype) for wide in widths]
    for t, exact in zip(pre, pre64):
        t[:n] = exact.to(dtype)
    held = [t[:n].double().requires_grad_() for t in pre]
    own = [v.double().requires_grad_() for v in vectors]
    expert_of = torch.searchsorted(c.offsets[1:].contiguous(), torch.arange(n, device=DEVICE), right=True)
    want = evaluate(template, segment, held, [v[expert_of] for v in own])
    grads = [torch.full((c.order.numel(), t.shape[1]), NAN, device=DEVICE, dtype=dtype) for t in want]
    for g in grads:
        g[:n] = torch.randn(n, g.shape[1], device=DEVICE).to(dtype)
    expected = torch.autograd.grad(want, [*held, *own], [g[:n].double() for g in grads], materialize_grads=True)

    forward = run(name, "forward", lambda: pointwise.forward(pre, vectors, c.offsets), [n] * len(want))
    for got, t in zip(forward, want):
        compare("act", f"{name} {c.name}", dtype, got, t.detach())
    both = [n] * (len(want) + len(pre)) + [None] * len(vectors)
    back = run(name, "vjp", lambda: [t for part in pointwise.vjp(pre, vectors, c.offsets, grads) for t in part], both)
    for got, t in zip(back, [*want, *expected]):
        compare("act_vjp", f"{name} {c.name}", dtype, got, t.detach(), 3 * TOLERANCE[dtype])  # sums of rounded rows

    exact = evaluate(template, segment, pre64, [v.double()[expert_of] for v in vectors])
    results = [n] * (len(pre) + len(want))
    fused = run(
        name, "linear", lambda: [t for p in pointwise.linear(c.rows, weights, vectors, c.offsets) for t in p], results
    )
    for got, t in zip(fused, [*pre64, *exact]):
        compare("linear_act", f"{name} {c.name}", dtype, got, t, tolerance)


def check_graph_replay(dtype: torch.dtype) -> None:
    """A captured forward replays right after the routing and the values changed."""
    c = case(200, 4, 16, 128, 96, "uniform", dtype)
    ids, x, w = c.ids.clone(), c.x.clone(), c.w.clone()

    def layer() -> Tensor:
        order, offsets, position = OPS["route"](ids, 16)
        rows = OPS["gather_rows"](x, order, 4, offsets, None)
        return OPS["combine"](OPS["grouped_linear"](rows, c.weight, offsets), position, w, dtype)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for high in (16, 3):
        ids.copy_(torch.randint(-1, high, ids.shape, device=DEVICE))
        x.copy_(torch.randn_like(x))
        w.copy_(torch.rand_like(w))
        graph.replay()
        expect(torch.equal(y, layer()), f"CUDA graph replay with other routing, {dtype}")


def check_no_recompile(dtype: torch.dtype) -> None:
    """Only the first of several token counts of one tile size compiles anything."""
    import triton

    compiled: list[str] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **kwargs: compiled.append(str(kwargs.get("repr", "?")))
    try:
        for tokens in (1024, 1025, 1500, 2048, 2047):
            c = case(tokens, 2, 4, 192, 160, "uniform", dtype)
            if tokens == 1024:
                compiled.clear()
            before = len(compiled)
            OPS["route"](c.ids, 4)
            rows = OPS["gather_rows"](c.x, c.order, 2, c.offsets, c.w)
            h = OPS["grouped_linear"](rows, c.weight, c.offsets)
            OPS["combine"](h, c.position, c.w, dtype)
            OPS["combine_backward"](c.gy, h, c.order, c.position, c.offsets, c.w)
            OPS["grouped_wgrad"](rows, h, c.offsets, torch.empty_like(c.weight))
            new = compiled[before:]
            expect(tokens == 1024 or not new, f"T={tokens} after T=1024 compiled {new}")
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None


def check_large_tensors() -> None:
    """Offsets beyond 2^31 elements, in the weights and in the rows."""
    weight = torch.zeros(40, 8192, 8192, dtype=torch.bfloat16, device=DEVICE)  # 2.7e9 elements
    weight[39].copy_(torch.randn(8192, 8192, device=DEVICE) / 90)
    x = torch.randn(64, 8192, device=DEVICE).bfloat16()
    order, offsets, position = OPS["route"](torch.full((64, 1), 39, device=DEVICE), 40)
    got = OPS["grouped_linear"](x, weight, offsets)
    compare("grouped_linear", "weights of 2.7e9 elements", torch.bfloat16, got, x.double() @ weight[39].double())
    weight.fill_(NAN)
    OPS["grouped_wgrad"](x, got, offsets, weight)
    compare("grouped_wgrad", "weights of 2.7e9 elements", torch.bfloat16, weight[39], x.double().t() @ got.double())
    expect(not weight[38].any(), "grouped_wgrad: an expert without rows gets zeros")
    del weight
    x = torch.randn(140_000, 1, device=DEVICE).bfloat16().expand(-1, 16384).contiguous()  # 2.3e9 elements
    order, offsets, position = OPS["route"](torch.randint(0, 4, (140_000, 1), device=DEVICE), 4)
    rows = OPS["gather_rows"](x, order, 1, offsets, None)
    expect(torch.equal(rows[-1], x[order[-1]]), "gather_rows: rows of 2.3e9 elements")
    y = OPS["combine"](rows, position, None, torch.bfloat16)
    expect(torch.equal(y[-1], x[-1]) and torch.equal(y[0], x[0]), "combine: rows of 2.3e9 elements")


def check_all(small: bool) -> None:
    check_route(small)
    dtypes = [d for d in (torch.bfloat16, torch.float16, torch.float32) if not supports(d)]
    for dtype in dtypes:
        start = time.perf_counter()
        shapes = [(1, 1, 1, 48, 40, "one"), (17, 3, 5, 48, 40, "skew"), (60, 2, 5, 40, 56, "uniform")]
        if not small:
            shapes += [
                (255, 3, 5, 200, 136, "skew"),
                (2000, 4, 16, 512, 320, "skew"),
                (3000, 2, 3, 256, 512, "uniform"),
            ]
            shapes += [
                (512, 8, 128, 256, 192, "uniform"),
                (64, 8, 128, 256, 192, "skew"),
                (1000, 1, 4, 130, 258, "one"),
            ]
        for i, shape in enumerate(shapes):
            check_ops(case(*shape, dtype, transposed=i % 2 == 0), dtype)
        c = case(33 if small else 700, 2, regions.E, 48, 40, "skew", dtype)
        for form in ("side by side", "alternating", "two linears"):
            check_segment(f"SwiGLU {form}", *swiglu(48, 40, form), c, dtype)
            if not small:
                big = case(3000, 2, 4, 256, 320, "skew", dtype)
                check_segment(f"SwiGLU {form}", *swiglu(256, 320, form), big, dtype)
        region = simplify(regions.region("interleaved_bias"))
        narrow = case(33 if small else 700, 2, regions.E, regions.D, 40, "skew", dtype)
        check_segment("clamped SwiGLU with bias", region.template, region.leaves, narrow, dtype)
        for act in ("relu", "gelu", "tanh", "mish", "softplus", "elu"):
            template = Template(
                (Instr("x", width=48), regions.linear(0, 0, 40), regions.op(f"{act}.default", Ref(1), width=40))
            )
            check_segment(act, template, (), c, dtype)
        if CUDA:
            check_graph_replay(dtype)
            check_no_recompile(dtype)
        print(f"checked {dtype} in {time.perf_counter() - start:.0f} s", flush=True)
    if CUDA and not small:
        torch.backends.cuda.matmul.allow_tf32 = True
        check_ops(case(700, 2, 5, 256, 192, "skew", torch.float32), torch.float32, TF32_TOLERANCE)
        torch.backends.cuda.matmul.allow_tf32 = False
        check_large_tensors()


# ------------------------------------------------------------------------------------------------ timings

# name, E, D, F, K, T
SHAPES = [
    ("Qwen3", 128, 2048, 768, 8, 4096),
    ("Qwen3", 128, 2048, 768, 8, 16384),
    ("Mixtral", 8, 4096, 14336, 2, 4096),
]


def seconds(function: Callable[[], object]) -> float:
    """Median time on the device."""
    import triton

    return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median") * 1e-3


@dataclass
class Row:
    shape: str
    what: str
    seconds: float
    flops: float = 0.0
    nbytes: float = 0.0
    against: float = 0.0  # seconds of torch's own, where there is one

    def __str__(self) -> str:
        rate = f"{self.flops / self.seconds / 1e12:7.0f} TFLOP/s" if self.flops else ""
        rate = rate or f"{self.nbytes / self.seconds / 1e12:7.2f} TB/s   "
        other = f"  torch {self.against * 1e3:7.3f} ms" if self.against else ""
        return f"{self.shape:8s} {self.what:34s} {self.seconds * 1e3:8.3f} ms {rate}{other}"


def timings() -> list[Row]:
    rows: list[Row] = []
    a = torch.randn(8192, 8192, device=DEVICE).bfloat16()
    rows.append(Row("ceiling", "matmul 8192^3", seconds(lambda: a @ a), flops=2 * 8192**3))
    big = torch.empty(1 << 29, device=DEVICE, dtype=torch.bfloat16)
    rows.append(Row("ceiling", "copy 1 GiB", seconds(lambda: big.clone()), nbytes=4 * big.numel()))
    for shape in (
        ("Qwen3", 128, 2048, 768, 8, 4096),
        ("Qwen3", 128, 2048, 768, 8, 16384),
        ("Mixtral", 8, 4096, 14336, 2, 4096),
    ):
        name, experts, d, f, k, tokens = shape
        rows += layer_timings(f"{name}{tokens // 1024}k", experts, d, f, k, tokens)
        torch.cuda.empty_cache()
    return rows


def layer_timings(label: str, experts: int, d: int, f: int, k: int, tokens: int) -> list[Row]:
    dtype, total = torch.bfloat16, tokens * k
    ids = torch.rand(tokens, experts, device=DEVICE).topk(k).indices
    w = torch.rand(tokens, k, device=DEVICE)
    x = torch.randn(tokens, d, device=DEVICE).to(dtype)
    up = (torch.randn(experts, 2 * f, d, device=DEVICE, dtype=dtype) / d**0.5).transpose(1, 2)
    down = (torch.randn(experts, d, f, device=DEVICE, dtype=dtype) / f**0.5).transpose(1, 2)
    order, offsets, position = OPS["route"](ids, experts)
    template, leaves = swiglu(d, f, "side by side")
    act = compile_pointwise(template, next(s for s in steps(template) if isinstance(s, Segment)), leaves)
    assert isinstance(act, Pointwise)
    rows_x = OPS["gather_rows"](x, order, k, offsets, None)
    pre = OPS["grouped_linear"](rows_x, up, offsets)
    (hidden,) = act.forward([pre], [], offsets)
    h = OPS["grouped_linear"](hidden, down, offsets)
    gy = torch.randn_like(x)
    g_up, g_down = torch.empty_like(up), torch.empty_like(down)
    gh, _ = OPS["combine_backward"](gy, h, order, position, offsets, w)

    def torch_mm(rows: Tensor, other: Tensor) -> float:
        """torch's own grouped product, where this torch has it for these."""
        grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)
        try:
            return seconds(lambda: grouped_mm(rows, other, offs=offsets[1:])) if grouped_mm else 0.0
        except RuntimeError:
            return 0.0

    flops_up, flops_down, item = 2.0 * total * d * 2 * f, 2.0 * total * f * d, 2
    row_bytes, hidden_bytes, token_bytes = total * d * item, total * f * item, x.numel() * item
    up_t, down_t = up.transpose(1, 2), down.transpose(1, 2)
    back = (order, position, offsets)
    made: list[Row] = []

    def product(what: str, flops: float, function: Callable[[], object], *torch_operands: Tensor) -> None:
        against = torch_mm(*torch_operands) if torch_operands else 0.0
        made.append(Row(label, what, seconds(function), flops=flops, against=against))

    def moved(what: str, nbytes: float, function: Callable[[], object]) -> None:
        made.append(Row(label, what, seconds(function), nbytes=nbytes))

    moved("route", total * 24, lambda: OPS["route"](ids, experts))
    moved("gather_rows", 2 * row_bytes, lambda: OPS["gather_rows"](x, order, k, offsets, None))
    product("grouped_linear up", flops_up, lambda: OPS["grouped_linear"](rows_x, up, offsets), rows_x, up)
    product("gather_linear up", flops_up, lambda: OPS["gather_linear"](x, order, k, up, offsets))
    moved("act", 3 * hidden_bytes, lambda: act.forward([pre], [], offsets))
    product("linear_act up", flops_up, lambda: act.linear(rows_x, [up], [], offsets))
    product("linear_act up, gathered", flops_up, lambda: act.linear(x, [up], [], offsets, order, k))
    product("grouped_linear down", flops_down, lambda: OPS["grouped_linear"](hidden, down, offsets), hidden, down)
    moved("combine", row_bytes + token_bytes, lambda: OPS["combine"](h, position, w, dtype))

    moved("combine_backward", 3 * row_bytes, lambda: OPS["combine_backward"](gy, h, *back, w))
    product("dgrad down", flops_down, lambda: OPS["grouped_linear"](gh, down_t, offsets), gh, down_t)
    product("wgrad down", flops_down, lambda: OPS["grouped_wgrad"](hidden, gh, offsets, g_down), hidden.t(), gh)
    moved("act_vjp", 6 * hidden_bytes, lambda: act.vjp([pre], [], offsets, [hidden]))
    product("dgrad up", flops_up, lambda: OPS["grouped_linear"](pre, up_t, offsets), pre, up_t)
    product("wgrad up", flops_up, lambda: OPS["grouped_wgrad"](rows_x, pre, offsets, g_up), rows_x.t(), pre)
    product("wgrad up, gathered", flops_up, lambda: OPS["gather_wgrad"](x, order, k, pre, offsets, g_up))
    moved(
        "rows_backward",
        row_bytes + token_bytes,
        lambda: OPS["rows_backward"](rows_x, x, position, order, offsets, None),
    )

    def layer() -> Tensor:
        order, offsets, position = OPS["route"](ids, experts)
        _, (hidden,) = act.linear(OPS["gather_rows"](x, order, k, offsets, None), [up], [], offsets, save=True)
        return OPS["combine"](OPS["grouped_linear"](hidden, down, offsets), position, w, dtype)

    product("layer forward: copy, fused act", flops_up + flops_down, layer)
    return made


# ------------------------------------------------------------------------------------------------ main


def main() -> int:
    small = "--small" in sys.argv
    if not CUDA and not small:
        print("no CUDA device (TRITON_INTERPRET=1 ... --small checks on the CPU)")
        return 2
    import triton

    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if CUDA else "interpreter"
    print(f"{where}, torch {torch.__version__}, triton {triton.__version__}")
    check_all(small)
    table = timings() if CUDA and "--no-timing" not in sys.argv else []
    print("\nworst relative error against float64")
    names = sorted({op for op, _ in worst})
    dtypes = sorted({dtype for _, dtype in worst})
    print(f"{'':20s}" + "".join(f"{d:>10s}" for d in dtypes))
    for op in names:
        cells = (f"{worst[op, d]:10.1e}" if (op, d) in worst else f"{'-':>10s}" for d in dtypes)
        print(f"{op:20s}" + "".join(cells))
    if table:
        print()
        print("\n".join(map(str, table)))
    print(f"\n{len(failures)} failures" + "".join(f"\n  {f}" for f in failures[:30]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
