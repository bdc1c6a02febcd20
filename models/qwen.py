"""Qwen3-MoE: many small stacked SwiGLU experts; tokens sorted by expert, split, run, and put back in order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QwenMoE(nn.Module):
    """Separate gate, up and down stacks; the weighted slots of a token are summed after the inverse permutation."""

    def __init__(self, dim: int, hidden: int = 16, experts: int = 32, top_k: int = 4) -> None:
        super().__init__()
        self.num_experts = experts
        self.top_k = top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)
        self.up_proj = nn.Parameter(torch.randn(experts, hidden, dim) * dim**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)  # [T, K]
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)

        sorted_experts, order = chosen.flatten().sort(stable=True)
        sorted_tokens = tokens.index_select(0, order // self.top_k)  # [T * K, D]
        counts = sorted_experts.bincount(minlength=self.num_experts).tolist()
        outputs = [self.run_expert(rows, expert) for expert, rows in enumerate(sorted_tokens.split(counts))]
        by_slot = torch.cat(outputs)[order.argsort()].view(-1, self.top_k, x.shape[-1])  # [T, K, D]
        return (by_slot * weights.unsqueeze(-1)).sum(1).view_as(x)

    def run_expert(self, rows: Tensor, expert: int) -> Tensor:
        gate = F.silu(F.linear(rows, self.gate_proj[expert]))
        return F.linear(gate * F.linear(rows, self.up_proj[expert]), self.down_proj[expert])
