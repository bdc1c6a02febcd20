"""A whole training step against expert parallelism without moefx."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moefx
from moefx.block import Variant, rewritten
from moefx.parallel import expert_parameters
from moefx.parallel_region import ParallelRegion
from multi_gpu_parts.layers import profile_of
from multi_gpu_parts.plans import Layer, Spread, compile_kernels, own_weights, random_batch
from multi_gpu_parts.worker import Bench


def plain_experts() -> Any:
    """The class of plain expert parallelism, as torchtitan has it: no overlap, grouped_mm, the same stacked weights."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm

    class Exchange(torch.autograd.Function):
        """Rows to other ranks and their gradients back."""

        @staticmethod
        def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
            ctx.splits, ctx.group = (sent, received), group
            out = rows.new_empty(sum(received), rows.shape[1])
            dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
            return out

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
            sent, received = ctx.splits
            out = gradient.new_empty(sum(sent), gradient.shape[1])
            dist.all_to_all_single(out, gradient.contiguous(), sent, received, group=ctx.group)
            return out, None, None, None

    class PlainExperts(nn.Module):
        """Dispatch, experts and combine of a block of Transformers, with E / P of its experts here."""

        def __init__(self, experts: nn.Module, group: Any) -> None:
            super().__init__()
            self.group, self.experts = group, experts.gate_up_proj.shape[0]
            own = self.experts // group.size()
            first = own * group.rank()
            self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach()[first : first + own].clone())
            self.down_proj = nn.Parameter(experts.down_proj.detach()[first : first + own].clone())

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            ranks, top_k = self.group.size(), ids.shape[1]
            slots = ids.reshape(-1).argsort(stable=True)
            counts = torch.zeros(self.experts, dtype=torch.int64, device=x.device)
            counts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids.reshape(-1)))
            arriving = torch.empty_like(counts)
            dist.all_to_all_single(arriving, counts, group=self.group)
            both = torch.stack([counts, arriving]).view(2, ranks, -1).sum(2).tolist()  # the host waits
            sent, received = both
            rows = Exchange.apply(x[slots // top_k], sent, received, self.group)
            by_rank = arriving.view(ranks, -1)
            expert = torch.arange(by_rank.shape[1], device=x.device).repeat(ranks)
            expert = expert.repeat_interleave(arriving, output_size=rows.shape[0])
            order = expert.argsort(stable=True)  # by source rank and expert -> by expert
            ends = by_rank.sum(0).cumsum(0).int()
            hidden = self._product(rows[order], self.gate_up_proj, ends)
            gate, up = hidden.chunk(2, 1)
            made = self._product(torch.nn.functional.silu(gate) * up, self.down_proj, ends)
            back = Exchange.apply(torch.empty_like(made).index_copy(0, order, made), received, sent, self.group)
            y = torch.empty_like(back).index_copy(0, slots, back).view(*ids.shape, -1)
            return (y * weights.unsqueeze(2)).sum(1).to(x.dtype)

        @staticmethod
        def _product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
            if rows.is_cuda:
                return grouped_mm(rows, weights.transpose(1, 2), offs=ends)
            edges = [0, *ends.tolist()]
            return torch.cat([rows[a:b] @ weight.t() for a, b, weight in zip(edges, edges[1:], weights)])

    return PlainExperts


def make_model(bench: Bench) -> Any:
    """A few layers of Qwen3-30B-A3B with random weights, the same on all ranks, and a small vocabulary."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 2048, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    }  # fmt: skip
    if bench.toy:
        sizes = {
            "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
            "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        }  # fmt: skip
    config = transformers.Qwen3MoeConfig(
        **sizes, num_hidden_layers=2 if bench.toy else bench.options.model_layers, norm_topk_prob=True, vocab_size=1024,
        max_position_embeddings=4096, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(bench.device):
        return transformers.Qwen3MoeForCausalLM(config).to(torch.float32 if bench.toy else torch.bfloat16)


def ready(bench: Bench, layer: Layer) -> None:
    """The kernels that `optimize` checks a layer with: one number of rows an expert for each tile."""
    began, spread = time.time(), Spread(bench, layer, own_weights(bench, layer, torch.bfloat16))
    for tokens in (rows * layer.experts // (layer.top_k * bench.world) for rows in (16, 32, 64, 256)):
        region, _ = spread.plan(moefx.Options(degree=1, policy="fifo"), tokens)
        compile_kernels([region], spread.params, random_batch(bench, layer, tokens, torch.bfloat16))
    bench.log(f"{layer}: kernels ready in {time.time() - began:.1f} s")


class Trainee:
    """A model and its training step: forward, backward, gradients of the mean loss on all ranks, AdamW."""

    def __init__(self, bench: Bench, model: Any, experts: set[int], ids: Tensor) -> None:
        self.bench, self.model, self.ids, self.experts = bench, model, ids, experts
        groups = [[p for p in model.parameters() if (id(p) in experts) == mine] for mine in (True, False)]
        self.optimizers = [torch.optim.AdamW(g, lr=1e-4, fused=bench.cuda) for g in groups]
        self.loss = 0.0 * ids.sum()

    def step(self) -> None:
        self.loss = self.model(input_ids=self.ids, labels=self.ids).loss
        self.loss.backward()
        rest = [p for p in self.model.parameters() if id(p) not in self.experts and p.grad is not None]
        flat = torch.cat([p.grad.reshape(-1) for p in rest])
        dist.all_reduce(flat)
        flat /= self.bench.world
        for p, piece in zip(rest, flat.split([p.numel() for p in rest])):
            p.grad = piece.view_as(p)
        for p in self.model.parameters():
            if id(p) in self.experts and p.grad is not None:
                p.grad /= self.bench.world
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def model(bench: Bench) -> None:
    sizes = [(2, 64)] if bench.toy else [(1, 4096), (4, 4096)]
    names = ("plain, grouped_mm", "moefx r=1", "moefx auto")

    def run(batch: int, length: int) -> dict[str, Any]:
        profile_of(bench)  # so that optimize finds it
        if bench.cuda:
            ready(bench, Layer(2048, 768, 128, 8))
        torch.manual_seed(1 + bench.rank)
        ids = torch.randint(0, 1024, (batch, length), device=bench.device)
        trainees: dict[str, Trainee] = {}
        chosen = ""
        for name in names:
            made, began = make_model(bench), time.time()
            if name.startswith("plain"):
                plain = plain_experts()
                for layer in made.model.layers:
                    layer.mlp.experts = plain(layer.mlp.experts, bench.group)
                experts = {id(p) for m in made.modules() if isinstance(m, plain) for p in m.parameters()}
            else:
                options = moefx.Options(degree=1, policy="fifo") if name.endswith("r=1") else moefx.Options()
                moefx.optimize(made, {"input_ids": ids}, options, mesh=bench.group)
                report = moefx.explain(made)
                if len(report.found) != len(made.model.layers):
                    raise RuntimeError(f"blocks were not found: {report}")
                experts = {id(p) for _, p in expert_parameters(made)}
                regions = [forward for m in made.modules() if (forward := rewritten(m))]
                compiled = [v.compiled for f in regions for v in f.variants.values() if isinstance(v, Variant)]
                assert all(isinstance(c, ParallelRegion) for c in compiled)
                chosen = "/".join(map(str, compiled[0].degrees))
                bench.log(f"{name}: optimised in {time.time() - began:.1f} s, r {chosen}")
            trainees[name] = Trainee(bench, made, experts, ids)
        losses: dict[str, list[float]] = {n: [] for n in names}
        for _ in range(3):  # from the same weights on the same batch: the same losses
            for n, t in trainees.items():
                t.step()
                losses[n].append(float(t.loss.detach()))
        apart = max(abs(a / b - 1) for n in names[1:] for a, b in zip(losses[n], losses[names[0]]))
        seconds = bench.in_turns({n: t.step for n, t in trainees.items()}, 2 if bench.toy else bench.options.rounds)
        cells = {f"{n} ms": f"{1e3 * s:.1f}" for n, s in seconds.items()} | {
            "r": chosen, "plain / auto": f"{seconds[names[0]] / seconds[names[2]]:.2f}",
            "r=1 / auto": f"{seconds[names[1]] / seconds[names[2]]:.2f}",
            "tokens/s": f"{ids.numel() * bench.world / seconds[names[2]]:,.0f}",
            "losses apart": f"{apart:.1e}", "_seconds": seconds, "_losses": losses,
        }  # fmt: skip
        return bench.judged("model", f"{batch} x {length}", cells, apart < (1e-3 if bench.toy else 2e-2))

    for batch, length in sizes:
        layers_of = "2 toy layers" if bench.toy else f"{bench.options.model_layers} layers of Qwen3-30B-A3B"
        bench.row("model", f"{layers_of}, {batch} x {length} tokens a rank", lambda b=batch, n=length: run(b, n), reserve_s=40)
