"""Threshold routing: a token goes to every expert whose probability passes a threshold, so K differs by token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GeluExpert(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class ThresholdMoE(nn.Module):
    """A token below the threshold everywhere leaves the block as zero."""

    def __init__(self, dim: int, hidden: int = 32, experts: int = 8, threshold: float = 0.15) -> None:
        super().__init__()
        self.threshold = threshold
        self.router = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(GeluExpert(dim, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # [B, S, E]
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = probs[..., index] > self.threshold  # [B, S]
            out[mask] += expert(x[mask]) * probs[..., index][mask].unsqueeze(-1).to(x.dtype)
        return out
