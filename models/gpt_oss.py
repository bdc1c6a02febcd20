"""gpt-oss: top-k then softmax; stacked [E, D, 2F] experts with biases, interleaved gate and up, a clamped SwiGLU."""

import torch
from torch import Tensor, nn


class GptOssMoE(nn.Module):
    """The router and both layers of the experts have biases; gate and up take the even and the odd columns."""

    def __init__(
        self,
        dim: int,
        hidden: int = 32,
        experts: int = 8,
        top_k: int = 2,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.alpha = alpha
        self.limit = limit
        self.router = nn.Linear(dim, experts)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, dim, 2 * hidden) * dim**-0.5)
        self.gate_up_bias = nn.Parameter(torch.randn(experts, 2 * hidden) * 0.1)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.randn(experts, dim) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        best, chosen = self.router(tokens).topk(self.top_k, dim=-1)  # [T, K]
        weights = best.softmax(-1, dtype=torch.promote_types(best.dtype, torch.float32)).to(tokens.dtype)

        out = torch.zeros_like(tokens)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            routed = self.run_expert(tokens[token], expert)
            out.index_add_(0, token, routed * weights[token, slot, None])
        return out.view_as(x)

    def run_expert(self, rows: Tensor, expert: int) -> Tensor:
        gate_up = rows @ self.gate_up_proj[expert] + self.gate_up_bias[expert]
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(min=-self.limit, max=self.limit)
        activated = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        return activated @ self.down_proj[expert] + self.down_bias[expert]
