"""Switch Transformer: one expert a token, and a capacity: tokens beyond an expert's capacity are dropped."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReluExpert(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.wi = nn.Linear(dim, hidden)
        self.wo = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.relu(self.wi(x)))


class SwitchMoE(nn.Module):
    """A dropped token leaves the block as zero; earlier tokens have precedence."""

    def __init__(self, dim: int, hidden: int = 32, experts: int = 8, capacity_factor: float = 1.0) -> None:
        super().__init__()
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(dim, experts, bias=False)
        self.experts = nn.ModuleList(ReluExpert(dim, hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        capacity = math.ceil(self.capacity_factor * len(tokens) / len(self.experts))
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weight, chosen = probs.max(-1)  # [T]
        assigned = F.one_hot(chosen, len(self.experts))  # [T, E]
        position = (assigned.cumsum(0) * assigned).sum(-1)  # place in the queue of the chosen expert, from 1
        kept = position <= capacity

        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            mask = (chosen == index) & kept
            if mask.any():
                out[mask] = expert(tokens[mask]) * weight[mask, None].to(tokens.dtype)
        return out.view_as(x)
