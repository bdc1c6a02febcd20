"""Mixtral: softmax, top-k, renormalised weights; stacked SwiGLU experts, a loop over the experts that were hit."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MixtralMoE(nn.Module):
    """Every token goes to its `top_k` most probable experts; nothing is dropped."""

    def __init__(self, dim: int, hidden: int = 32, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts = experts
        self.top_k = top_k
        self.router = nn.Linear(dim, experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * hidden, dim) * dim**-0.5)
        self.down_proj = nn.Parameter(torch.randn(experts, dim, hidden) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)  # [T, K]
        weights = (weights / weights.sum(-1, keepdim=True)).to(tokens.dtype)

        out = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, self.num_experts).permute(2, 1, 0)  # [E, K, T]
        for expert in mask.sum(dim=(1, 2)).nonzero().flatten().tolist():
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(tokens[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            routed = F.linear(F.silu(gate) * up, self.down_proj[expert])
            out.index_add_(0, token, routed * weights[token, slot, None])
        return out.view_as(x)
