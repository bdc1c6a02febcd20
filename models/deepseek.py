"""DeepSeek-V3: sigmoid scores, a correction bias that steers the choice only, group-limited top-k, a shared expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGluExpert(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupLimitedRouter(nn.Module):
    """Choose `top_k` experts out of the best `top_groups` groups of experts.

    The correction bias (a buffer that a training loop moves to balance the load) enters the choice, not the weights.
    """

    def __init__(self, dim: int, experts: int, top_k: int, groups: int, top_groups: int, scaling_factor: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.groups = groups
        self.top_groups = top_groups
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.correction_bias: Tensor
        self.register_buffer("correction_bias", torch.linspace(-0.05, 0.05, experts))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        scores = F.linear(tokens.to(wide), self.weight.to(wide)).sigmoid()  # [T, E]
        with torch.no_grad():
            biased = scores + self.correction_bias
            grouped = biased.view(len(tokens), self.groups, -1)
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            best_groups = group_scores.topk(self.top_groups, dim=-1).indices
            allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, best_groups, True)
            candidates = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
            chosen = candidates.topk(self.top_k, dim=-1).indices  # [T, K]
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling_factor
        return chosen, weights.to(tokens.dtype)


class DeepseekMoE(nn.Module):
    """Routed experts in a ModuleList, run on the slices of the tokens sorted by expert, plus one shared expert."""

    def __init__(
        self,
        dim: int,
        hidden: int = 32,
        experts: int = 8,
        top_k: int = 2,
        groups: int = 4,
        top_groups: int = 2,
        scaling_factor: float = 2.5,
    ) -> None:
        super().__init__()
        self.router = GroupLimitedRouter(dim, experts, top_k, groups, top_groups, scaling_factor)
        self.experts = nn.ModuleList(SwiGluExpert(dim, hidden) for _ in range(experts))
        self.shared_expert = SwiGluExpert(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [T, D]
        chosen, weights = self.router(tokens)
        top_k = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        sorted_tokens = tokens[order // top_k]  # [T * K, D]
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()

        outputs = []
        start = 0
        for expert, count in zip(self.experts, counts):
            if count:
                outputs.append(expert(sorted_tokens[start : start + count]))
                start += count
        by_slot = torch.empty_like(sorted_tokens)
        by_slot[order] = torch.cat(outputs)
        routed = (by_slot.view(-1, top_k, x.shape[-1]) * weights.unsqueeze(-1)).sum(1)
        return (routed + self.shared_expert(tokens)).view_as(x)
