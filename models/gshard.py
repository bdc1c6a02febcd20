"""GShard: top-2 with a capacity, dispatch and combine as einsums with one-hot tensors of shape [T, E, C]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GShardMoE(nn.Module):
    """First choices fill the experts before second choices do; what does not fit is dropped."""

    def __init__(
        self, dim: int, hidden: int = 32, experts: int = 8, top_k: int = 2, capacity_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.top_k = top_k
        self.capacity_factor = capacity_factor
        self.router = nn.Linear(dim, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        dispatch, combine = self.route(tokens)
        buffers = torch.einsum("tec,td->ecd", dispatch, tokens)
        hidden = F.relu(torch.einsum("ecd,edf->ecf", buffers, self.w1))
        routed = torch.einsum("ecf,efd->ecd", hidden, self.w2)
        return torch.einsum("tec,ecd->td", combine, routed).view_as(x)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        capacity = math.ceil(self.capacity_factor * self.top_k * len(tokens) / self.num_experts)
        logits = self.router(tokens)
        probs = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = probs.topk(self.top_k, dim=-1)  # [T, K]
        weights = weights / weights.sum(-1, keepdim=True)
        assigned = F.one_hot(chosen, self.num_experts)  # [T, K, E]
        queue = assigned.transpose(0, 1).flatten(0, 1).cumsum(0) - 1  # first choices of all tokens come first
        position = queue.view(self.top_k, -1, self.num_experts).transpose(0, 1)  # [T, K, E]
        kept = (assigned * (position < capacity)).to(tokens.dtype)
        slots = F.one_hot(position.clamp(0, capacity - 1), capacity).to(tokens.dtype)  # [T, K, E, C]
        dispatch = torch.einsum("tke,tkec->tec", kept, slots)
        combine = torch.einsum("tk,tke,tkec->tec", weights.to(tokens.dtype), kept, slots)
        return dispatch, combine
