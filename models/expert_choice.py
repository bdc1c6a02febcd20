"""Expert choice: every expert takes the tokens it likes best, so the load is even and a token may get 0..E experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertChoiceMoE(nn.Module):
    """Batched GELU experts over a [E, C, D] buffer of chosen tokens."""

    def __init__(self, dim: int, hidden: int = 32, experts: int = 8, capacity_factor: float = 2.0) -> None:
        super().__init__()
        self.num_experts = experts
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        capacity = max(1, int(self.capacity_factor * len(tokens) / self.num_experts))
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probs.t().topk(capacity, dim=-1)  # [E, C]
        hidden = F.gelu(torch.bmm(tokens[chosen], self.w1))
        routed = torch.bmm(hidden, self.w2) * weights.unsqueeze(-1).to(tokens.dtype)  # [E, C, D]
        out = torch.zeros_like(tokens).index_add(0, chosen.flatten(), routed.flatten(0, 1))
        return out.view_as(x)
