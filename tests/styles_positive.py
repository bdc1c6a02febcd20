"""The many ways in which people write a Mixture-of-Experts block.

`POSITIVE` maps a name to a function that builds a `Style`: a module of that style and how to call it. Every style is
plain user code: nothing here knows moefx. Letters: T tokens, D model width, H expert hidden width, E experts, K
experts per token, C capacity.
"""

import importlib
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

D, E, K, H = 64, 8, 2, 32

Inputs = tuple[Any, ...]
TokenShape = tuple[int, int]  # batch, sequence
MakeInputs = Callable[[TokenShape, int], Inputs]
Expectation = Literal["found", "declined", "found_or_declined"]


@dataclass(frozen=True)
class Style:
    """One way of writing a block, and what the engine has to say about it."""

    module: nn.Module
    example_inputs: Inputs
    make_inputs: MakeInputs
    note: str
    expect: Expectation = "found"
    train: Expectation = "found"  # the same question for a copy that is optimized in training mode
    dtype: torch.dtype = torch.float64  # what to compare in: float32 for styles that go through float32 on the way

    @property
    def tolerance(self) -> float:
        """The largest error allowed, relative to the largest value of the tensor."""
        return {torch.float64: 1e-9, torch.float32: 1e-5}[self.dtype]


Registry = dict[str, Callable[[], Style]]
POSITIVE: Registry = {}


def registrar(registry: Registry, default: Expectation) -> Callable[..., Callable[[Any], Any]]:
    """A decorator maker: `@add("note", **options)` puts a module class, or a function that makes a module, on record.

    Keyword arguments that it does not know go to the class, so that one class can stand for several styles.
    """

    def add(
        note: str,
        *,
        name: str = "",
        make_inputs: MakeInputs = hidden_states,
        expect: Expectation = default,
        train: Expectation | None = None,
        training: bool = False,
        dtype: torch.dtype = torch.float64,
        **arguments: Any,
    ) -> Callable[[Any], Any]:
        def register(factory: Any) -> Any:
            def build() -> Style:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    module = factory(**arguments).train(training)
                return Style(
                    module=module,
                    example_inputs=make_inputs((2, 29), 0),
                    make_inputs=make_inputs,
                    note=note,
                    expect=expect,
                    train=train or expect,
                    dtype=dtype,
                )

            key = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", factory.__name__).lower()
            if key in registry:
                raise ValueError(f"two styles are called {key}")
            registry[key] = build
            return factory

        return register

    return add


# ---------------------------------------------------------------------------------------------------------- inputs


def hidden_states(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D]"""
    return (torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed)),)


def flat_tokens(shape: TokenShape, seed: int) -> Inputs:
    """x [T, D]"""
    return (hidden_states(shape, seed)[0].flatten(0, 1),)


def sequence_first(shape: TokenShape, seed: int) -> Inputs:
    """x [S, B, D]"""
    return (hidden_states(shape, seed)[0].transpose(0, 1).contiguous(),)


def images(shape: TokenShape, seed: int) -> Inputs:
    """x [B, D, S, 2], channels first"""
    return (torch.randn(shape[0], D, shape[1], 2, generator=torch.Generator().manual_seed(seed)),)


def small_images(shape: TokenShape, seed: int) -> Inputs:
    """x [B, 16, S, 8], channels first"""
    return (torch.randn(shape[0], 16, shape[1], 8, generator=torch.Generator().manual_seed(seed)),)


def with_token_ids(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D] and the ids of its tokens [B, S]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator), torch.randint(0, 97, shape, generator=generator)


def with_padding_mask(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D] and a mask [B, S], True at real tokens; the first token of a sequence is always real"""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) > 0.25
    mask[:, 0] = True
    return torch.randn(*shape, D, generator=generator), mask


def with_condition(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D] and a conditioning vector for every token [B, S, 16]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator), torch.randn(*shape, 16, generator=generator)


def with_task(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D] and a task number for every sequence [B]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator), torch.randint(0, 5, shape[:1], generator=generator)


def with_router_state(shape: TokenShape, seed: int) -> Inputs:
    """x [B, S, D] and the router logits of the layer before [B, S, E]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator), torch.randn(*shape, E, generator=generator)


positive = registrar(POSITIVE, "found")

# --------------------------------------------------------------------------------------------------- common parts

Activation = Callable[[Tensor], Tensor]


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.15)


class Mlp(nn.Module):
    def __init__(
        self, activation: Activation = F.gelu, hidden: int = H, d_in: int = D, d_out: int = D, bias: bool = True
    ) -> None:
        super().__init__()
        self.up = nn.Linear(d_in, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_out, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class SwiGlu(nn.Module):
    def __init__(self, activation: Activation = F.silu) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, H, bias=False)
        self.up_proj = nn.Linear(D, H, bias=False)
        self.down_proj = nn.Linear(H, D, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def softmax_top_k(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Normalised over the K chosen ones; a single expert keeps its probability, or the router would learn nothing."""
    weights, chosen = logits.softmax(-1).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights, chosen


def run_experts(experts: Iterable[nn.Module], tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Loop over the experts: tokens [T, D], weights and chosen [T, K]."""
    out = torch.zeros_like(tokens)
    for index, expert in enumerate(experts):
        token, slot = torch.where(chosen == index)
        out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
    return out


class ListParts(nn.Module):
    """Experts in a ModuleList and a linear router; `route` is what many styles change."""

    def __init__(self, experts: int = E, top_k: int = K, make_expert: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.top_k = top_k
        self.router: nn.Module = nn.Linear(D, experts)
        self.experts = nn.ModuleList(make_expert() for _ in range(experts))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.router(tokens), self.top_k)


class ListMoe(ListParts):
    """The router inline and a loop over the experts."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


class StackMoe(nn.Module):
    """Stacked experts: w1 [E, D, H] and w2 [E, H, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1 = weight(E, D, H)
        self.w2 = weight(E, H, D)


class StackedExperts(nn.Module):
    """The module that most model zoos have: experts(tokens, chosen, weights) over stacked SwiGLU weights."""

    def __init__(self, experts: int = E) -> None:
        super().__init__()
        self.gate_up = weight(experts, 2 * H, D)
        self.down = weight(experts, D, H)

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        mask = F.one_hot(chosen, len(self.down)).permute(2, 1, 0)  # [E, K, T]
        for hit in mask.sum(dim=(-1, -2)).gt(0).nonzero():
            expert = int(hit)
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(tokens[token], self.gate_up[expert]).chunk(2, dim=-1)
            routed = F.linear(F.silu(gate) * up, self.down[expert]) * weights[token, slot, None]
            out.index_add_(0, token, routed.to(out.dtype))
        return out


class ModularMoe(nn.Module):
    """Router and experts are submodules: router(tokens) gives weights and chosen, experts(tokens, chosen, weights)."""

    def __init__(self, router: nn.Module, experts: int = E) -> None:
        super().__init__()
        self.router = router
        self.experts = StackedExperts(experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens)
        return self.experts(tokens, chosen, weights).view_as(x)


class SoftmaxRouter(nn.Module):
    def __init__(self, experts: int = E, top_k: int = K) -> None:
        super().__init__()
        self.proj = nn.Linear(D, experts, bias=False)
        self.top_k = top_k

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.proj(tokens), self.top_k)


# ------------------------------------------------------------------------------------------- published packages


@positive("st-moe-pytorch: the dispatch tensor carries a straight-through gradient", expect="found_or_declined")
def st_moe_pytorch() -> nn.Module:
    package = importlib.import_module("st_moe_pytorch")
    return package.MoE(
        dim=D,
        num_experts=E,
        gating_top_n=K,
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=8.0,
        capacity_factor_eval=8.0,
    )


@positive("mixture-of-experts: einsum dispatch, room for every token", train="found_or_declined")
def lucidrains_moe() -> nn.Module:
    package = importlib.import_module("mixture_of_experts")
    return package.MoE(dim=D, num_experts=E, hidden_dim=64, second_policy_eval="all", capacity_factor_eval=8.0)


@positive("mixture-of-experts with a capacity that drops tokens", train="found_or_declined")
def lucidrains_moe_dropping() -> nn.Module:
    package = importlib.import_module("mixture_of_experts")
    return package.MoE(
        dim=D,
        num_experts=E,
        hidden_dim=64,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=1.0,
        capacity_factor_eval=1.0,
    )


@positive("mixture-of-experts: two levels of routing, four-dimensional stacks", expect="found_or_declined")
def lucidrains_hierarchical_moe() -> nn.Module:
    package = importlib.import_module("mixture_of_experts")
    return package.HeirarchicalMoE(
        dim=D,
        num_experts=(2, 4),
        hidden_dim=64,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=8.0,
        capacity_factor_eval=8.0,
    )


@positive("pytorch-mixtures: top-k on the logits, an assertion on the values, `out[token] += ...`")
def pytorch_mixtures_topk() -> nn.Module:
    configs = importlib.import_module("pytorch_mixtures.configs")
    config = configs.MoEConfig(
        hidden_dim=D,
        intermediate_dim=H,
        num_experts=E,
        expert_fn="ff",
        expert_act="gelu",
        router_fn="topk",
        topk=K,
        capacity_factor=None,
        dtype=None,
    )
    return importlib.import_module("pytorch_mixtures.topk_moe").TopkMoE(config)


@positive(
    "esmoe: convolutional experts, one routing decision an image",
    make_inputs=small_images,
    expect="found_or_declined",
    dtype=torch.float32,
)
def esmoe_block() -> nn.Module:
    package = importlib.import_module("esmoe")
    return package.ESMoE(num_experts=4, top_k=2, channels=16, expert_kernel_sizes=[3, 3, 3, 3])


@positive(
    "as in litgpt: masks from a comparison with arange, `out[token] += ...`, softmax in float32",
    dtype=torch.float32,
)
class LitgptLlamaMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(SwiGlu() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        x = x.view(-1, width)
        probs, indices = torch.topk(self.gate(x), K)
        probs = probs.softmax(dim=1, dtype=torch.float).to(dtype=x.dtype)
        masks = (indices.unsqueeze(-1) == torch.arange(E, device=x.device)).permute(2, 0, 1)
        out = torch.zeros_like(x)
        for mask, expert in zip(masks, self.experts):
            token, slot = torch.where(mask)
            out[token] += probs[token, slot, None] * expert(x[token])
        return out.view(batch, length, width)


@positive("as in torchtitan: counts kept in a buffer, stable argsort, grouped_mm in float32", dtype=torch.float32)
class TorchtitanMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.w1 = weight(E, H, D)
        self.w2 = weight(E, D, H)
        self.w3 = weight(E, H, D)
        self.tokens_per_expert: Tensor
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        scores = torch.softmax(self.gate(tokens).to(torch.float32), dim=1)
        top_scores, selected = torch.topk(scores, k=K, dim=1)
        counts = torch.histc(selected.float().view(-1), bins=E, min=0, max=E)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        order = torch.argsort(selected.view(-1), stable=True)
        token = order // K
        routed = self.run_grouped(tokens[token], counts).to(x.dtype)
        routed = routed * top_scores.view(-1)[order].reshape(-1, 1).to(x.dtype)
        return torch.zeros_like(tokens).scatter_add(0, token.reshape(-1, 1).expand(-1, D), routed).view_as(x)

    def run_grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        rows = rows.to(torch.float32)
        gate = F.grouped_mm(rows, self.w1.to(torch.float32).transpose(-2, -1), offs=ends)
        up = F.grouped_mm(rows, self.w3.to(torch.float32).transpose(-2, -1), offs=ends)
        return F.grouped_mm(F.silu(gate) * up, self.w2.to(torch.float32).transpose(-2, -1), offs=ends)


@positive("as in switch-transformers: gates normalised over the TOKENS, every expert run on every token")
class ColumnNormalisedGates(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        probs = self.router(tokens).softmax(-1)
        mask = torch.zeros_like(probs).scatter_(1, probs.topk(1, dim=-1).indices, 1)
        masked = probs * mask
        gates = masked / (masked.sum(0, keepdim=True) + 1e-6) * int(tokens.size(0))
        outputs = torch.stack([expert(tokens) for expert in self.experts], dim=-1)  # [T, D, E]
        if torch.isnan(outputs).any():
            outputs[torch.isnan(outputs)] = 0
        return torch.sum(gates.unsqueeze(-2) * outputs, dim=-1).view_as(x)


# ------------------------------------------------------------------------------------- loops over separate experts


@positive("boolean masks; a softmax over logits that are -inf outside the top k")
class BooleanMaskLoop(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best, chosen = logits.topk(K, -1)
        gates = torch.full_like(logits, float("-inf")).scatter_(-1, chosen, best).softmax(-1).view(-1, E)
        tokens = x.view(-1, D)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            mask = (chosen == index).any(-1).view(-1)
            if mask.any():
                out[mask] += expert(tokens[mask]) * gates[mask, index].unsqueeze(1)
        return out.view_as(x)


@positive("tokens repeated K times, outputs written by mask into an empty buffer, then summed over the slots")
class RepeatInterleave(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = softmax_top_k(self.router(x.view(-1, D)), K)
        flat = chosen.view(-1)
        repeated = x.view(-1, D).repeat_interleave(K, dim=0)
        out = torch.empty_like(repeated)
        for index, expert in enumerate(self.experts):
            out[flat == index] = expert(repeated[flat == index])
        return (out.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1).view_as(x)


@positive("argsort, counts on the host, scatter_add per expert, shared expert (DeepSeek's moe_infer)")
class ArgsortSliceScatter(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.shared = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        order = chosen.view(-1).argsort()
        ends = chosen.view(-1).bincount(minlength=E).cpu().numpy().cumsum(0)
        out = torch.zeros_like(tokens)
        for index, end in enumerate(ends):
            start = 0 if index == 0 else ends[index - 1]
            if start == end:
                continue
            token = order[start:end] // K
            routed = self.experts[index](tokens[token]).mul_(weights.view(-1, 1)[order[start:end]])
            out.scatter_add_(0, token.view(-1, 1).repeat(1, D), routed)
        return (out + self.shared(tokens)).view_as(x)


@positive("every expert on every token, then a gather of the K outputs")
class DenseStackGather(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        best, chosen = self.router(x).topk(K, -1)
        weights = best.softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)  # [B, S, E, D]
        picked = outputs.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, D))
        return (picked * weights.unsqueeze(-1)).sum(-2)


@positive("every expert on every token, multiplied by a gate that is mostly zero, summed by a Python sum")
class DenseMaskedSum(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        kth = probs.topk(K, dim=-1).values[..., -1:]
        gates = torch.where(probs >= kth, probs, torch.zeros_like(probs))
        return sum(expert(x) * gates[..., index : index + 1] for index, expert in enumerate(self.experts))


@positive("loop over the slots, then over the experts", name="slots_then_experts")
@positive("one expert a token", name="top_1_loop", top_k=1)
@positive("four experts a token", name="top_4_loop", top_k=4)
@positive("sixteen of thirty-two experts", name="top_16_of_32", top_k=16, experts=32)
@positive("two experts, one a token", name="two_experts", top_k=1, experts=2)
@positive("three experts", name="three_experts", top_k=2, experts=3)
@positive("more experts than an example of 58 tokens reaches evenly", name="sixty_four_experts", experts=64)
class SlotLoop(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for slot in range(self.top_k):
            for index, expert in enumerate(self.experts):
                mask = chosen[:, slot] == index
                if mask.any():
                    out[mask] += weights[mask, slot].unsqueeze(-1) * expert(tokens[mask])
        return out.view_as(x)


@positive("Python loops over tokens and slots, one row at a time")
class TokenByToken(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        rows = []
        for t in range(tokens.shape[0]):
            row = torch.zeros_like(tokens[t])
            for k in range(K):
                expert = self.experts[int(chosen[t, k])]
                row = row + weights[t, k] * expert(tokens[t])
            rows.append(row)
        return torch.stack(rows).view_as(x)


@positive("Python loops over batch and sequence, written into the output in place, one expert")
class BatchSequenceLoop(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for b in range(x.shape[0]):
            for s in range(x.shape[1]):
                out[b, s] = self.experts[chosen[b, s].item()](x[b, s].unsqueeze(0)).squeeze(0) * gate[b, s]
        return out


@positive("Python buckets of token numbers, filled from ids.tolist()")
class PythonBuckets(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        buckets: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for t, ids in enumerate(chosen.tolist()):
            for k, index in enumerate(ids):
                buckets[index].append((t, k))
        out = torch.zeros_like(tokens)
        for index, places in buckets.items():
            token = torch.tensor([t for t, _ in places], device=x.device)
            slot = torch.tensor([k for _, k in places], device=x.device)
            out = out.index_add(0, token, self.experts[index](tokens[token]) * weights[token, slot].unsqueeze(1))
        return out.view_as(x)


@positive("the choice itself is made in Python, on probs.tolist()", expect="found_or_declined")
class PythonTopK(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.router(tokens).softmax(-1)
        ids = [sorted(range(E), key=lambda index: -row[index])[:K] for row in probs.tolist()]
        chosen = torch.tensor(ids, device=tokens.device)
        return probs.gather(1, chosen), chosen


@positive("two-dimensional coordinates from torch.where, index_put_ with accumulation")
class IndexPutCoordinates(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = softmax_top_k(self.router(x), K)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            b, s, slot = torch.where(chosen == index)
            out.index_put_((b, s), expert(x[b, s]) * weights[b, s, slot, None], accumulate=True)
        return out


@positive("nonzero(as_tuple=True), index_select, index_add out of place")
class NonzeroIndexAdd(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        out = tokens.new_zeros(tokens.shape)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            if token.numel() == 0:
                continue
            routed = expert(torch.index_select(tokens, 0, token))
            out = torch.index_add(out, 0, token, routed * weights[token, slot].unsqueeze(-1))
        return out.reshape(x.shape)


@positive("masked_select and masked_scatter")
class MaskedScatter(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = (chosen == index).expand_as(x)
            rows = x.masked_select(mask).view(-1, D)
            out = out.masked_scatter(mask, expert(rows))
        return out * gate


@positive("tokens sorted by expert, split by counts, cat, unsort by scatter")
class SortSplitUnsort(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        flat, order = chosen.reshape(-1).sort()
        counts = torch.bincount(flat, minlength=E).tolist()
        parts = tokens[torch.div(order, K, rounding_mode="floor")].split(counts, dim=0)
        routed = torch.cat([expert(part) for expert, part in zip(self.experts, parts)], dim=0)
        unsorted = torch.zeros_like(routed).scatter(0, order.unsqueeze(-1).expand_as(routed), routed)
        return torch.einsum("tk,tkd->td", weights, unsorted.view(-1, K, D)).view_as(x)


@positive("slices of a sorted buffer overwritten in place, borders found by searchsorted")
class SortedSlicesInPlace(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        flat, order = torch.sort(chosen.flatten(), stable=True)
        borders = torch.searchsorted(flat, torch.arange(E + 1, device=x.device)).tolist()
        source = tokens[order // K]
        buffer = torch.empty_like(source)
        for index, expert in enumerate(self.experts):
            start, stop = borders[index], borders[index + 1]
            if stop > start:
                buffer[start:stop] = expert(source[start:stop])
        buffer = buffer * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add_(0, order // K, buffer).view_as(x)


@positive("experts in a ModuleDict under string keys, gates from a one-hot product")
class ModuleDictExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleDict({f"expert_{index}": Mlp(F.relu) for index in range(E)})

    def forward(self, x: Tensor) -> Tensor:
        probs = self.classifier(x).softmax(-1)
        mask = F.one_hot(probs.argmax(-1), E)  # [B, S, E]
        gate = (probs * mask).sum(-1, keepdim=True)
        out = x.new_zeros(x.shape)
        for index, expert in enumerate(self.experts.values()):
            picked = mask[..., index].bool()
            out[picked] = expert(x[picked])
        return out * gate


@positive("nn.Sequential experts put in with add_module and found with getattr")
class SequentialExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, E))
        for index in range(E):
            self.add_module(f"net{index}", nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(K, sorted=False)
        out = torch.zeros_like(x)
        for index in range(E):
            gate = (weights * (chosen == index)).sum(-1)  # [B, S]
            picked = gate.nonzero(as_tuple=True)
            routed = getattr(self, f"net{index}")(x[picked]) * gate[picked].unsqueeze(-1)
            out = out + torch.zeros_like(x).index_put(picked, routed)
        return out


@positive("each call of an expert under activation checkpointing", expect="found_or_declined")
class CheckpointedExperts(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            routed = checkpoint(expert, tokens[token], use_reentrant=False)
            out = out.index_add(0, token, routed * weights[token, slot, None])
        return out.view_as(x)


# ------------------------------------------------------------------------------------- stacked and batched experts


@positive("einsum over all experts, gates scattered into [B, S, E]")
class DenseEinsum(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weights, chosen = probs.topk(K, -1)
        gates = torch.zeros_like(probs).scatter(-1, chosen, weights)
        hidden = F.gelu(torch.einsum("bsd,edh->besh", x, self.w1))
        outputs = torch.einsum("besh,ehd->besd", hidden, self.w2)
        return torch.einsum("besd,bse->bsd", outputs, gates)


@positive("one einsum per layer with the gate inside the last one")
class EinsumGateInside(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best, chosen = logits.topk(K, -1)
        gates = torch.zeros_like(logits).scatter_(-1, chosen, best.softmax(-1))
        hidden = torch.einsum("bsd,edf->bsef", x, self.w1).relu()
        return torch.einsum("bsef,efd,bse->bsd", hidden, self.w2, gates)


@positive("weights gathered per token and slot (gpt-fast)")
class GatherWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.w1 = weight(E, H, D)
        self.w2 = weight(E, D, H)
        self.w3 = weight(E, H, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        weights, chosen = softmax_top_k(self.gate(tokens), K)
        gate = F.silu(torch.einsum("ti,taoi->tao", tokens, self.w1[chosen]))
        up = torch.einsum("ti,taoi->tao", tokens, self.w3[chosen])
        outputs = torch.einsum("tao,taio->tai", gate * up, self.w2[chosen])
        return torch.einsum("tai,ta->ti", outputs, weights).view_as(x)


@positive("one expert a token, its weights gathered by index_select, bmm")
class GatherWeightsBmm(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 1, D)
        probs = torch.sigmoid(self.router(tokens.squeeze(1)))
        chosen = probs.argmax(-1)
        hidden = F.silu(torch.bmm(tokens, self.w1.index_select(0, chosen)))
        routed = torch.bmm(hidden, self.w2.index_select(0, chosen)).squeeze(1)
        return (routed * probs.gather(1, chosen.unsqueeze(-1))).view_as(x)


@positive("bmm over all experts on expanded tokens, slots gathered afterwards")
class BmmExpand(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        everywhere = tokens.unsqueeze(0).expand(E, -1, -1)
        outputs = torch.bmm(F.gelu(torch.bmm(everywhere, self.w1), approximate="tanh"), self.w2)  # [E, T, D]
        picked = outputs[chosen.t(), torch.arange(tokens.shape[0], device=x.device)]  # [K, T, D]
        return (picked * weights.t().unsqueeze(-1)).sum(0).view_as(x)


@positive("baddbmm with biases on both layers, dense gates as the batch of a last matmul")
class BaddbmmBiases(StackMoe):
    def __init__(self) -> None:
        super().__init__()
        self.b1 = weight(E, 1, H)
        self.b2 = weight(E, 1, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        logits = self.router(tokens)
        best, chosen = logits.topk(K, -1)
        gates = torch.zeros_like(logits).scatter(1, chosen, best.softmax(-1))  # [T, E]
        everywhere = tokens.expand(E, *tokens.shape)
        hidden = F.relu(torch.baddbmm(self.b1, everywhere, self.w1))
        outputs = torch.baddbmm(self.b2, hidden, self.w2)
        return (gates.unsqueeze(1) @ outputs.transpose(0, 1)).squeeze(1).view_as(x)


@positive("input scaled by the sigmoid score before dense experts, sum over experts (llama4)")
class ScaledInputsDense(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        best, chosen = self.router(tokens).topk(1, dim=-1)
        logits = torch.full((len(tokens), E), float("-inf"), dtype=x.dtype, device=x.device)
        scores = logits.scatter_(1, chosen, best).transpose(0, 1).sigmoid()  # [E, T]
        routed_in = tokens.repeat(E, 1) * scores.reshape(-1, 1)
        hidden = F.silu(torch.bmm(routed_in.view(E, -1, D), self.w1))
        return torch.bmm(hidden, self.w2).sum(0).view_as(x)


@positive("grouped_mm in float32 over tokens sorted by expert", dtype=torch.float32)
class GroupedMm(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        order = chosen.flatten().argsort()
        ends = chosen.flatten().bincount(minlength=E).cumsum(0).to(torch.int32)
        rows = tokens[order // K].float()
        hidden = F.gelu(F.grouped_mm(rows, self.w1.float(), offs=ends))
        routed = F.grouped_mm(hidden, self.w2.float(), offs=ends).to(x.dtype)
        routed = routed[order.argsort()].view(-1, K, D)
        return (routed * weights.unsqueeze(-1)).sum(1).view_as(x)


@positive("groups padded to whole blocks of eight rows, one bmm over blocks (as MegaBlocks pads)")
class PaddedBlocks(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        block = 8
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        flat, order = chosen.flatten().sort(stable=True)
        counts = flat.bincount(minlength=E)
        blocks = (counts + block - 1) // block
        first_row = (blocks.cumsum(0) - blocks) * block
        within = torch.arange(len(flat), device=x.device) - (counts.cumsum(0) - counts)[flat]
        place = first_row[flat] + within
        padded = tokens.new_zeros(int(blocks.sum()) * block, D).index_copy(0, place, tokens[order // K])
        owner = torch.repeat_interleave(torch.arange(E, device=x.device), blocks)
        hidden = F.silu(torch.bmm(padded.view(-1, block, D), self.w1[owner]))
        routed = torch.bmm(hidden, self.w2[owner]).view(-1, D)[place]
        routed = routed * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, order // K, routed).view_as(x)


@positive("a square one-hot permutation matrix sorts the tokens and puts them back")
class PermutationMatrix(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        permutation = F.one_hot(order, len(tokens)).to(x.dtype)  # [T, T]
        rows = permutation @ tokens
        parts = []
        for index, part in enumerate(rows.split(chosen.bincount(minlength=E).tolist())):
            parts.append(torch.tanh(part @ self.w1[index]) @ self.w2[index])
        return (permutation.t() @ torch.cat(parts) * gate.unsqueeze(-1)).view_as(x)


@positive("dispatch and combine as one-hot einsums with room for every token (GShard without drops)")
class OneHotDispatchDropless(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        capacity = len(tokens)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, -1)
        assigned = F.one_hot(chosen, E).to(x.dtype)  # [T, K, E]
        position = (assigned.view(-1, E).cumsum(0) - 1).view_as(assigned) * assigned
        kept = (position < capacity) & (assigned > 0)
        slots = F.one_hot(position.long(), capacity).to(x.dtype)
        combine = (weights[..., None, None] * assigned[..., None] * slots * kept[..., None]).sum(1)  # [T, E, C]
        dispatch = (combine > 0).to(x.dtype)
        buffers = torch.einsum("td,tec->ecd", tokens, dispatch)
        routed = torch.einsum("ech,ehd->ecd", F.relu(torch.einsum("ecd,edh->ech", buffers, self.w1)), self.w2)
        return torch.einsum("ecd,tec->td", routed, combine).view_as(x)


@positive("functional_call under vmap over parameters that are stacked on the fly")
class VmapExperts(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        names = [name for name, _ in self.experts[0].named_parameters()]
        stacked = {name: torch.stack([expert.get_parameter(name) for expert in self.experts]) for name in names}
        template = self.experts[0]

        def call(parameters: dict[str, Tensor], rows: Tensor) -> Tensor:
            return torch.func.functional_call(template, parameters, (rows,))

        outputs = torch.vmap(call, in_dims=(0, None))(stacked, tokens)  # [E, T, D]
        gates = torch.zeros(len(tokens), E, dtype=x.dtype, device=x.device).scatter(1, chosen, weights)
        return torch.einsum("etd,te->td", outputs, gates).view_as(x)


@positive("vmap over the tokens with gathered weights")
class VmapTokens(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)

        def one_token(row: Tensor, gate: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            hidden = F.gelu(torch.einsum("d,kdh->kh", row, w1))
            return gate @ torch.einsum("kh,khd->kd", hidden, w2)

        return torch.vmap(one_token)(tokens, weights, self.w1[chosen], self.w2[chosen]).view_as(x)


# -------------------------------------------------------------------------------------------------- weight layouts


@positive("[E, H, D] and [E, D, H] for F.linear, gate and up apart")
class SeparateGateUpStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = weight(E, D)
        self.gate_proj = weight(E, H, D)
        self.up_proj = weight(E, H, D)
        self.down_proj = weight(E, D, H)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(F.linear(tokens, self.router), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            gate = F.silu(F.linear(tokens[token], self.gate_proj[index]))
            routed = F.linear(gate * F.linear(tokens[token], self.up_proj[index]), self.down_proj[index])
            out = out.index_add(0, token, weights[token, slot, None] * routed)
        return out.view_as(x)


@positive("interleaved gate and up, biases, clamps, x * sigmoid(alpha x) * (up + 1) (gpt-oss)")
class InterleavedClamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.gate_up_proj = weight(E, D, 2 * H)
        self.gate_up_bias = weight(E, 2 * H)
        self.down_proj = weight(E, H, D)
        self.down_bias = weight(E, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        best, chosen = self.router(tokens).topk(K, -1)
        gates = torch.zeros(len(tokens), E, dtype=x.dtype, device=x.device).scatter(1, chosen, best.softmax(-1))
        everywhere = tokens.repeat(E, 1).view(E, -1, D)
        gate_up = torch.bmm(everywhere, self.gate_up_proj) + self.gate_up_bias[:, None]
        gate, up = gate_up[..., ::2].clamp(max=1.5), gate_up[..., 1::2].clamp(min=-1.5, max=1.5)
        hidden = (up + 1) * gate * torch.sigmoid(gate * 1.702)
        outputs = torch.bmm(hidden, self.down_proj) + self.down_bias[:, None]
        return (outputs * gates.t().unsqueeze(-1)).sum(0).view_as(x)


@positive("experts on the middle axis: [D, E, H] and [H, E, D]")
class ExpertsOnMiddleAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.w_in = weight(D, E, H)
        self.w_out = weight(H, E, D)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weights, chosen = probs.topk(K, -1)
        gates = (F.one_hot(chosen, E).to(x.dtype) * weights.unsqueeze(-1)).sum(-2)
        hidden = F.gelu(torch.einsum("bsd,deh->bseh", x, self.w_in))
        return torch.einsum("bseh,hed->bsd", hidden * gates.unsqueeze(-1), self.w_out)


@positive("all experts summed in one product: bseh,ehd->bsd")
@positive("the same with the experts innermost: bshe,ehd->bsd", name="experts_innermost", order="bshe")
class SummedInOneProduct(nn.Module):
    def __init__(self, order: str = "bseh") -> None:
        super().__init__()
        self.order = order
        self.router = nn.Linear(D, E, bias=False)
        self.w1, self.w2 = weight(E, D, H), weight(E, H, D)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = softmax_top_k(self.router(x), K)
        gates = torch.zeros_like(x[..., :E]).scatter(-1, chosen, weights)
        hidden = F.gelu(torch.einsum(f"bsd,edh->{self.order}", x, self.w1))
        gates = gates.unsqueeze(2 if self.order == "bshe" else 3)
        return torch.einsum(f"{self.order},ehd->bsd", hidden * gates, self.w2)


@positive("experts on the last axis, selected by w[..., e]")
class ExpertsOnLastAxis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w_in = weight(D, H, E)
        self.w_out = weight(H, D, E)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            hidden = F.relu(tokens[token] @ self.w_in[..., index])
            out = out.index_add(0, token, hidden @ self.w_out[..., index] * weights[token, slot, None])
        return out.view_as(x)


@positive("one Linear(D, E*H) and one Linear(E*H, D) are all the experts; gates multiply the hidden units")
class FusedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.up = nn.Linear(D, E * H)
        self.down = nn.Linear(E * H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        weights, chosen = probs.topk(K, -1)
        gates = torch.zeros_like(probs).scatter(-1, chosen, weights)
        hidden = F.silu(self.up(x)).unflatten(-1, (E, H)) * gates.unsqueeze(-1)
        return self.down(hidden.flatten(-2))


@positive("two-dimensional [E*H, D] weights viewed as experts (DBRX, Jamba)")
class FusedRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.w1 = weight(E * H, D)
        self.v1 = weight(E * H, D)
        self.w2 = weight(E * H, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        probs = self.router(tokens).softmax(dim=-1)
        weights, chosen = torch.topk(probs, K, dim=-1)
        weights = weights / torch.norm(weights, p=1, dim=-1, keepdim=True)
        mask = F.one_hot(chosen, E).permute(2, 1, 0)
        w1, v1, w2 = (matrix.view(E, H, D).chunk(E, dim=0) for matrix in (self.w1, self.v1, self.w2))
        out = torch.zeros_like(tokens)
        for index in range(E):
            slot, token = torch.where(mask[index])
            if token.shape[0] == 0:
                continue
            rows = tokens[None, token].reshape(-1, D)
            hidden = F.silu(rows.matmul(w1[index].squeeze(0).t())) * rows.matmul(v1[index].squeeze(0).t())
            out.index_add_(0, token, hidden.matmul(w2[index].squeeze(0)) * weights[token, slot, None])
        return out.reshape(x.shape)


@positive("slices of [E*H, D] taken by arithmetic on the expert number")
class SlicedRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.up = weight(E * H, D)
        self.down = weight(D, E * H)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            rows = slice(index * H, (index + 1) * H)
            routed = F.linear(F.gelu(F.linear(tokens[token], self.up[rows])), self.down[:, rows])
            out.index_add_(0, token, routed * weights[token, slot, None])
        return out.view_as(x)


@positive("all weights of all experts in one flat vector", expect="found_or_declined")
class FlatVectorWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.flat = weight(E * 2 * D * H)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            first, second = self.flat[index * 2 * D * H : (index + 1) * 2 * D * H].split(D * H)
            token, slot = torch.where(chosen == index)
            routed = F.relu(tokens[token] @ first.view(D, H)) @ second.view(H, D)
            out.index_add_(0, token, routed * weights[token, slot, None])
        return out.view_as(x)


@positive("two ParameterLists")
class ParameterLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.ups = nn.ParameterList(weight(D, H) for _ in range(E))
        self.downs = nn.ParameterList(weight(H, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index, (up, down) in enumerate(zip(self.ups, self.downs)):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, F.gelu(tokens[token] @ up) @ down * weights[token, slot, None])
        return out.view_as(x)


@positive("pointwise grouped convolutions are the experts: Conv1d(E*D, E*H, 1, groups=E)", expect="found_or_declined")
class GroupedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.up = nn.Conv1d(E * D, E * H, 1, groups=E)
        self.down = nn.Conv1d(E * H, E * D, 1, groups=E)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = softmax_top_k(self.router(x), K)
        gates = torch.zeros(*x.shape[:2], E, dtype=x.dtype, device=x.device).scatter(-1, chosen, weights)
        channels = x.transpose(1, 2).repeat(1, E, 1)  # [B, E * D, S]
        outputs = self.down(F.gelu(self.up(channels))).unflatten(1, (E, D))
        return torch.einsum("beds,bse->bsd", outputs, gates)


@positive(
    "weight normalisation computes the weights of each expert from a direction and a length", expect="found_or_declined"
)
class WeightNormExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            parametrizations.weight_norm(expert.get_submodule("up"))


@positive("weights multiplied by a constant at run time (equalised learning rate)", expect="found_or_declined")
class EqualisedWeights(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        w1, w2 = self.w1 * math.sqrt(2 / D), self.w2 * math.sqrt(2 / H)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            out = out.index_add(0, token, F.gelu(tokens[token] @ w1[index]) @ w2[index] * weights[token, slot, None])
        return out.view_as(x)


@positive("all experts share their first layer", expect="found_or_declined")
class SharedFirstLayer(ListMoe):
    def __init__(self) -> None:
        super().__init__(make_expert=lambda: nn.Linear(H, D))
        self.up = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, expert(F.gelu(self.up(tokens[token]))) * weights[token, slot, None])
        return out.view_as(x)


@positive("low-rank experts beside a dense layer (mixture of LoRA)")
class LoraExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.base = nn.Linear(D, D)
        self.lora_a = weight(E, 8, D)
        self.lora_b = weight(E, D, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        best, chosen = self.router(tokens).topk(K, -1)
        weights = best.softmax(-1)
        delta = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            low_rank = F.linear(F.linear(tokens[token], self.lora_a[index]), self.lora_b[index])
            delta.index_add_(0, token, low_rank * weights[token, slot, None])
        return self.base(x) + delta.view_as(x)


# --------------------------------------------------------------------------------------------- inside the experts


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def clamped_silu(x: Tensor) -> Tensor:
    return F.silu(x).clamp(-0.2, 0.5)


positive("squared ReLU", name="relu_squared_experts", make_expert=lambda: Mlp(relu_squared))(ListMoe)
positive("GELU by tanh", name="tanh_gelu_experts", make_expert=lambda: Mlp(tanh_gelu))(ListMoe)
positive("x * sigmoid(1.702 x)", name="quick_gelu_experts", make_expert=lambda: Mlp(quick_gelu))(ListMoe)
positive("tanh", name="tanh_experts", make_expert=lambda: Mlp(torch.tanh))(ListMoe)
positive("Mish without biases", name="mish_experts", make_expert=lambda: Mlp(F.mish, bias=False))(ListMoe)
positive("leaky ReLU", name="leaky_relu_experts", make_expert=lambda: Mlp(F.leaky_relu))(ListMoe)
positive("softplus", name="softplus_experts", make_expert=lambda: Mlp(F.softplus))(ListMoe)
positive("SwiGLU", name="swiglu_experts", make_expert=SwiGlu)(ListMoe)
positive("GeGLU", name="geglu_experts", make_expert=lambda: SwiGlu(F.gelu))(ListMoe)
positive("gated by a plain sigmoid", name="glu_experts", make_expert=lambda: SwiGlu(torch.sigmoid))(ListMoe)
positive("clamped activation", name="clamped_experts", make_expert=lambda: SwiGlu(clamped_silu))(ListMoe)
positive("no gate function at all", name="bilinear_experts", make_expert=lambda: SwiGlu(nn.Identity()))(ListMoe)
positive("one linear layer", name="single_linear_experts", make_expert=lambda: nn.Linear(D, D))(ListMoe)
positive(
    "one linear layer without a bias",
    name="single_matrix_experts",
    make_expert=lambda: nn.Linear(D, D, bias=False),
)(ListMoe)
positive("wider than the model", name="wide_experts", make_expert=lambda: Mlp(hidden=4 * D))(ListMoe)


class ThreeLayerExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.SiLU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class NormedExpert(nn.Module):
    """A normalisation of each row with its own parameters in every expert."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm_in = norm(D)
        self.mlp = Mlp()
        self.norm_out = norm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_out(self.mlp(self.norm_in(x)))


class ManualRmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class Float32RmsNorm(nn.Module):
    """As in Llama: in float32 up to the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class UnitNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale


class Shifted(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)


class ScaledExpert(nn.Module):
    """A learned number multiplies what the expert says."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.scale = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * self.scale


class ResidualExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class PReluExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.slope = nn.PReLU(H)
        self.down = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.slope(self.up(x)))


class SoftmaxExpert(nn.Module):
    """A row-wise softmax over the hidden units: a small memory read."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(D, H, bias=False)
        self.values = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.values(self.keys(x).softmax(-1))


class SplitHeadsExpert(nn.Module):
    """Works on four pieces of the row with the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D // 4, D // 4)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.mix(x.unflatten(-1, (4, D // 4)))).flatten(-2))


class BatchNormExpert(nn.Module):
    """Row-wise in eval mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.norm = nn.BatchNorm1d(H)
        self.norm.running_mean = torch.randn(H) * 0.1
        self.down = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if len(x) > 1 or not self.training:
            hidden = self.norm(hidden)
        return self.down(F.relu(hidden))


class DropoutExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Dropout(0.1), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


positive("three layers", name="three_layer_experts", make_expert=ThreeLayerExpert)(ListMoe)
positive("LayerNorm", name="layer_norm_experts", make_expert=lambda: NormedExpert(nn.LayerNorm))(ListMoe)
positive("RMSNorm", name="rms_norm_experts", make_expert=lambda: NormedExpert(ManualRmsNorm))(ListMoe)
positive("torch's RMSNorm", name="rms_norm_module_experts", make_expert=lambda: NormedExpert(nn.RMSNorm))(ListMoe)
positive(
    "an RMSNorm in float32", name="float32_rms_norm_experts", make_expert=lambda: NormedExpert(Float32RmsNorm), dtype=torch.float32
)(ListMoe)
positive("unit vectors, scaled", name="unit_norm_experts", make_expert=lambda: NormedExpert(UnitNorm))(ListMoe)
positive("scaled and shifted tokens", name="shifted_experts", make_expert=lambda: NormedExpert(Shifted))(ListMoe)
positive(
    "LayerNorm without a bias", name="bias_free_norm_experts", make_expert=lambda: NormedExpert(partial(nn.LayerNorm, bias=False))
)(ListMoe)
positive("a learned scalar in every expert", name="scaled_experts", make_expert=ScaledExpert)(ListMoe)
positive("residual connection inside the expert", name="residual_experts", make_expert=ResidualExpert)(ListMoe)
positive("learned slopes of a PReLU", name="prelu_experts", make_expert=PReluExpert)(ListMoe)
positive("softmax over the hidden units", name="softmax_experts", make_expert=SoftmaxExpert)(ListMoe)
positive(
    "rows reshaped into heads", name="split_head_experts", make_expert=SplitHeadsExpert, expect="found_or_declined"
)(ListMoe)
positive(
    "BatchNorm: row-wise in eval, not in train",
    name="batch_norm_experts",
    make_expert=BatchNormExpert,
    expect="found_or_declined",
    train="declined",
)(ListMoe)
positive("dropout in the experts", name="dropout_experts", make_expert=DropoutExpert, train="declined")(ListMoe)


@positive("output width differs from input width", name="narrower_output", d_out=48)
@positive("output width larger than input width", name="wider_output", d_out=96)
class OtherOutputWidth(ListMoe):
    def __init__(self, d_out: int) -> None:
        super().__init__(make_expert=lambda: Mlp(d_out=d_out))
        self.d_out = d_out

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = tokens.new_zeros(len(tokens), self.d_out)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, expert(tokens[token]) * weights[token, slot, None])
        return out.view(*x.shape[:-1], self.d_out)


@positive("experts take a second per-token input", make_inputs=with_condition, expect="found_or_declined")
class ConditionedExperts(ListParts):
    def __init__(self) -> None:
        super().__init__(make_expert=lambda: Mlp(d_in=D + 16))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        tokens, extra = x.flatten(0, 1), condition.flatten(0, 1)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            rows = torch.cat((tokens[token], extra[token]), dim=-1)
            out = out.index_add(0, token, expert(rows) * weights[token, slot, None])
        return out.view_as(x)


@positive("experts that are blocks of experts themselves", expect="found_or_declined")
class NestedBlocks(ListMoe):
    def __init__(self) -> None:
        super().__init__(experts=2, top_k=1, make_expert=lambda: InnerMoe(experts=4))


class InnerMoe(ListMoe):
    """A block over rows [T, D]."""


# ------------------------------------------------------------------------------------- where the weight is applied


@positive("the score scales the input of a nonlinear expert")
class WeightBeforeExperts(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        gate, chosen = self.router(tokens).sigmoid().max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token = (chosen == index).nonzero().squeeze(-1)
            out = out.index_copy(0, token, expert(tokens[token] * gate[token, None]))
        return out.view_as(x)


@positive("the score multiplies the hidden layer", name="weight_in_hidden_layer")
@positive(
    "the score multiplies the hidden layer, but not the bias of the layer after it",
    name="weight_in_hidden_layer_bias",
    expect="found_or_declined",
    bias=True,
)
class WeightInHiddenLayer(ListMoe):
    def __init__(self, bias: bool = False) -> None:
        super().__init__(make_expert=lambda: Mlp(bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            hidden = F.gelu(expert.get_submodule("up")(tokens[token])) * weights[token, slot, None]
            out.index_add_(0, token, expert.get_submodule("down")(hidden))
        return out.view_as(x)


@positive("no score at all: the chosen expert answers as it is, the router gets no gradient")
class Unweighted(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.empty_like(x)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(x[chosen == index])
        return out


@positive("scores in (-1, 1): the top k by magnitude")
class SignedWeights(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.tanh(self.router(tokens))
        chosen = scores.abs().topk(K, dim=-1).indices
        return scores.gather(1, chosen), chosen


@positive("the plain mean of the chosen experts, the choice without gradient")
class MeanOfChosen(ListMoe):
    @torch.no_grad()
    def choose(self, tokens: Tensor) -> Tensor:
        return self.router(tokens).topk(K, dim=-1).indices

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.choose(tokens)
        return run_experts(self.experts, tokens, tokens.new_full(chosen.shape, 1 / K), chosen).view_as(x)


@positive("a linear layer after the weighted sum")
class OutputProjection(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))


# ------------------------------------------------------------------------------------------------------- capacity


def capacity_of(tokens: int, factor: float, experts: int = E, top_k: int = K) -> int:
    return max(1, math.ceil(factor * top_k * tokens / experts))


@positive("buffers [E, C, D] filled by index, place in the queue by cumsum, overflow dropped", name="padded_capacity")
@positive("the same, with room to spare", name="padded_capacity_roomy", factor=4.0)
@positive("the same, the factor in a config that the block holds", name="padded_capacity_config", held=True)
class PaddedCapacity(StackMoe):
    def __init__(self, factor: float = 1.0, held: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(factor=factor)
        self.factor = None if held else factor

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        capacity = capacity_of(len(tokens), self.config.factor if self.factor is None else self.factor)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        flat = chosen.flatten()
        queue = F.one_hot(flat, E).cumsum(0).gather(1, flat.unsqueeze(1)).squeeze(1) - 1
        kept = queue < capacity
        token = torch.arange(len(tokens), device=x.device).repeat_interleave(K)[kept]
        buffers = tokens.new_zeros(E, capacity, D)
        buffers[flat[kept], queue[kept]] = tokens[token]
        routed = torch.bmm(F.gelu(torch.bmm(buffers, self.w1)), self.w2)
        rows = routed[flat[kept], queue[kept]] * weights.flatten()[kept].unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, token, rows).view_as(x)


@positive("one-hot einsums per sequence with a capacity per sequence, [B, S, E, C]")
class CapacityPerSequence(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        capacity = capacity_of(x.shape[1], 1.0)
        weights, chosen = softmax_top_k(self.router(x), K)
        assigned = F.one_hot(chosen, E)  # [B, S, K, E]
        queue = assigned.flatten(1, 2).cumsum(1).view_as(assigned) - 1
        kept = (assigned * (queue < capacity)).to(x.dtype)
        slots = F.one_hot(queue.clamp(0, capacity - 1), capacity).to(x.dtype)
        dispatch = torch.einsum("bske,bskec->bsec", kept, slots)
        combine = torch.einsum("bsk,bske,bskec->bsec", weights, kept, slots)
        buffers = torch.einsum("bsec,bsd->ebcd", dispatch, x)
        hidden = torch.relu(torch.einsum("ebcd,edh->ebch", buffers, self.w1))
        routed = torch.einsum("ebch,ehd->ebcd", hidden, self.w2)
        return torch.einsum("bsec,ebcd->bsd", combine, routed)


@positive("when an expert is full, the most confident tokens have precedence (V-MoE)")
class BatchPrioritised(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        capacity = capacity_of(len(tokens), 0.75, top_k=1)
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            mine = torch.where(chosen == index, gate, torch.zeros_like(gate))
            best, token = mine.topk(min(capacity, len(tokens)))
            token = token[best > 0]
            out[token] = expert(tokens[token]) * gate[token].unsqueeze(-1)
        return out.view_as(x)


@positive("a dropped token passes through, and everything is scaled by the score (HF's Switch)")
@positive("the same with a factor of the module's", name="dropped_tokens_pass_by_factor", factor=1.0)
@positive("the same with room for three tokens", name="dropped_tokens_pass_by_number", room=3)
class DroppedTokensPass(ListMoe):
    def __init__(self, factor: float | None = None, room: int | None = None) -> None:
        super().__init__()
        self.factor, self.room = factor, room

    def capacity(self, tokens: int) -> int:
        if self.room is not None:
            return self.room
        return capacity_of(tokens, 1.0 if self.factor is None else self.factor, top_k=1)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        mask = F.one_hot(probs.argmax(-1), E)
        mask = mask * (mask.cumsum(1) <= self.capacity(x.shape[1]))  # [B, S, E]
        out = x.clone()
        for index, expert in enumerate(self.experts):
            picked = mask[..., index].bool()
            out[picked] = expert(x[picked])
        return out * probs.max(-1, keepdim=True).values


@positive("experts that a group does not allow, by the smallest number of the scores' dtype")
class SmallestNumber(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        scores = self.router(tokens)
        best = scores.view(-1, 2, E // 2).amax(-1).argmax(-1, keepdim=True)  # the group of a token
        other = torch.arange(E) // (E // 2) != best
        gates, chosen = scores.masked_fill(other, torch.finfo(scores.dtype).min).softmax(-1).topk(K)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(tokens[token]) * gates[token, slot, None])
        return out.view_as(x)


@positive("a capacity of 24 tokens that ordinary inputs do not reach", expect="found_or_declined")
class UnreachedCapacity(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        assigned = F.one_hot(chosen, E)
        assigned = assigned * (assigned.cumsum(0) <= 24)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token = assigned[:, index].nonzero().flatten()
            out = out.index_add(0, token, expert(tokens[token]) * gate[token, None])
        return out.view_as(x)


# -------------------------------------------------------------------------------------------------------- routers


@positive("noisy top-k, noise in train mode only", train="found_or_declined")
class NoisyTopK(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(D, E, bias=False)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(tokens)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(tokens))
        else:
            logits = logits + 0 * self.noise(tokens)
        best, chosen = logits.topk(K, dim=-1)
        return best.softmax(-1), chosen


@positive("the router sees jittered tokens in train mode", train="found_or_declined")
class JitteredRouter(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            tokens = tokens * torch.empty_like(tokens).uniform_(0.98, 1.02)
        return softmax_top_k(self.router(tokens), K)


@positive("dropout on the router input", train="found_or_declined")
class RouterDropout(ModularMoe):
    def __init__(self) -> None:
        super().__init__(SoftmaxRouter())
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(self.dropout(tokens))
        return self.experts(tokens, chosen, weights).view_as(x)


@positive("the second expert is dropped at random in train mode (GShard)", train="found_or_declined")
class RandomSecondExpert(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = softmax_top_k(self.router(tokens), K)
        if self.training:
            keep = torch.rand_like(weights[:, 1]) < 2 * weights[:, 1]
            weights = torch.stack((weights[:, 0], weights[:, 1] * keep), dim=1)
        return weights, chosen


@positive("sigmoid scores, correction bias in a buffer, group-limited, normalised, scaled (DeepSeek-V3)")
class GroupLimitedSigmoid(ModularMoe):
    def __init__(self) -> None:
        super().__init__(GroupLimitedRouter())


class GroupLimitedRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = weight(E, D)
        self.bias: Tensor
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, E))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.linear(tokens, self.weight).sigmoid()
        biased = (scores + self.bias).view(-1, 4, E // 4)
        groups = biased.topk(2, dim=-1).values.sum(-1).topk(2, dim=-1).indices
        allowed = torch.zeros_like(biased[..., 0]).scatter_(1, groups, 1).bool().unsqueeze(-1)
        chosen = biased.masked_fill(~allowed, 0.0).flatten(1).topk(K, dim=-1).indices
        weights = scores.gather(1, chosen)
        return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


@positive("softmax scores, best expert of each group decides (DeepSeek-V2), router inline")
class GroupLimitedSoftmax(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.router(tokens).softmax(-1)
        groups = scores.view(-1, 4, E // 4).max(-1).values.topk(2, dim=-1).indices
        allowed = torch.zeros(len(tokens), 4, device=tokens.device).scatter_(1, groups, 1.0)
        mask = allowed.unsqueeze(-1).expand(-1, -1, E // 4).reshape(len(tokens), -1)
        weights, chosen = scores.masked_fill(~mask.bool(), 0.0).topk(K, dim=-1, sorted=False)
        return weights * 16.0, chosen


@positive("load counted into a buffer in train mode, bias moved by it")
class LoadTrackingRouter(ModularMoe):
    def __init__(self) -> None:
        super().__init__(LoadTracker())


class LoadTracker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(D, E, bias=False)
        self.load: Tensor
        self.bias: Tensor
        self.register_buffer("load", torch.zeros(E))
        self.register_buffer("bias", torch.zeros(E))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(tokens).sigmoid()
        chosen = (scores + self.bias).topk(K, dim=-1).indices
        if self.training:
            with torch.no_grad():
                self.load += chosen.flatten().bincount(minlength=E)
                self.bias += 1e-3 * torch.sign(self.load.mean() - self.load)
        return scores.gather(1, chosen), chosen


@positive("cosine similarity with expert embeddings, learned temperature")
class CosineRouter(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = weight(E, 16)
        self.reduce = nn.Linear(D, 16, bias=False)
        self.temperature = nn.Parameter(torch.tensor(0.2))
        del self.router

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        similarity = F.normalize(self.reduce(tokens), dim=-1) @ F.normalize(self.embeddings, dim=-1).t()
        return softmax_top_k(similarity / self.temperature.clamp(min=0.01), K)


@positive("a router of two linear layers")
class TwoLayerRouter(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, E))


@positive("router in float32 whatever the model has, float32 softmax", dtype=torch.float32)
class Float32Router(ModularMoe):
    def __init__(self) -> None:
        super().__init__(WideRouter())


class WideRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = weight(E, D)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(tokens.type(torch.float32), self.weight.type(torch.float32))
        weights, chosen = F.softmax(logits, dim=-1, dtype=torch.float32).topk(K, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True)).type_as(tokens), chosen


@positive("chosen without gradient, weights by a gather from the straight softmax")
class NoGradSelection(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.router(tokens).softmax(-1)
        with torch.no_grad():
            chosen = probs.topk(K, dim=-1)[1]
        return torch.gather(probs, 1, chosen), chosen


@positive("the router detached from the tokens")
class DetachedRouter(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.router(tokens.detach()), K)


@positive("the whole router under no_grad")
class NoGradRouter(ModularMoe):
    def __init__(self) -> None:
        super().__init__(SoftmaxRouter())

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        with torch.no_grad():
            weights, chosen = self.router(tokens)
        return self.experts(tokens, chosen, weights).view_as(x)


@positive("two argmaxes, the first masked out for the second")
class TwoArgmaxes(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        probs = self.router(tokens).softmax(-1)
        first = probs.argmax(-1)
        second = probs.masked_fill(F.one_hot(first, E).bool(), -1.0).argmax(-1)
        chosen = torch.stack((first, second), dim=-1)
        weights = probs.gather(-1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-9), chosen


@positive("a full sort instead of a top-k, int32 ids")
class FullSort(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = self.router(tokens).sort(dim=-1, descending=True)
        return scores[:, :K].sigmoid(), ids[:, :K].int()


@positive("every slot has a router of its own: a token may get the same expert twice")
class IndependentSlots(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, K * E)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(tokens).view(-1, K, E).softmax(-1).max(-1)
        return weights, chosen


@positive("hash of the token id, no score", make_inputs=with_token_ids)
class HashRouting(ListParts):
    def __init__(self) -> None:
        super().__init__()
        del self.router

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        chosen = (ids * 2654435761 % 97) % E
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            out[mask] = expert(x[mask])
        return out


@positive("a table in a buffer maps token ids to K experts, scores from a router", make_inputs=with_token_ids)
class TableRouting(ListParts):
    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.stack([torch.randperm(E)[:K] for _ in range(97)]))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = self.table[ids.flatten()]
        weights = self.router(tokens).softmax(-1).gather(1, chosen)
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


@positive("nearest of fixed centroids, no score")
class CentroidRouting(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        del self.router
        self.centroids: Tensor
        self.register_buffer("centroids", torch.randn(E, D))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        chosen = torch.cdist(tokens, self.centroids).argmin(-1)
        out = torch.empty_like(tokens)
        for index, expert in enumerate(self.experts):
            token = (chosen == index).nonzero().flatten()
            out = out.index_copy(0, token, expert(tokens[token]))
        return out.view_as(x)


@positive("experts choose their tokens from the whole batch")
class ExpertChoice(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        capacity = max(1, 2 * len(tokens) // E)
        gates, token = self.router(tokens).softmax(-1).t().topk(capacity, dim=-1)  # [E, C]
        routed = torch.bmm(F.gelu(torch.bmm(tokens[token], self.w1)), self.w2) * gates.unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, token.reshape(-1), routed.reshape(-1, D)).view_as(x)


@positive("experts choose their tokens within each sequence, one-hot einsums")
class ExpertChoicePerSequence(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        capacity = max(1, 2 * x.shape[1] // E)
        gates, token = self.router(x).softmax(-1).transpose(1, 2).topk(capacity, dim=-1)  # [B, E, C]
        dispatch = F.one_hot(token, x.shape[1]).to(x.dtype)  # [B, E, C, S]
        buffers = torch.einsum("becs,bsd->becd", dispatch, x)
        hidden = F.gelu(torch.einsum("becd,edh->bech", buffers, self.w1))
        routed = torch.einsum("bech,ehd->becd", hidden, self.w2)
        return torch.einsum("becs,bec,becd->bsd", dispatch, gates, routed)


@positive("experts choose their tokens within each sequence, gathered and scattered")
class ExpertChoiceGathered(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        capacity = max(1, 2 * x.shape[1] // E)
        probs = self.router(x).softmax(-1)
        gates, token = probs.topk(capacity, dim=1)  # [B, C, E]
        place = token.flatten(1).unsqueeze(-1).expand(-1, -1, D)
        rows = x.gather(1, place).view(len(x), capacity, E, D)
        hidden = F.gelu(torch.einsum("bced,edh->bceh", rows, self.w1))
        routed = torch.einsum("bceh,ehd->bced", hidden, self.w2) * gates.unsqueeze(-1)
        return torch.zeros_like(x).scatter_add(1, place, routed.flatten(1, 2))


@positive("every expert whose probability passes a threshold")
class ThresholdRouting(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        probs = self.router(x).softmax(-1)
        gates = torch.where(probs > 0.15, probs, torch.zeros_like(probs))
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = gates[..., index] > 0
            out[mask] = out[mask] + expert(x[mask]) * gates[..., index][mask].unsqueeze(-1)
        return out


@positive("the smallest set of experts with half of the probability (top-p)")
class TopPRouting(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        probs, ids = self.router(tokens).softmax(-1).sort(dim=-1, descending=True)
        kept = torch.where(probs.cumsum(-1) - probs < 0.5, probs, torch.zeros_like(probs))
        gates = torch.zeros_like(probs).scatter(1, ids, kept / kept.sum(-1, keepdim=True))
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token = gates[:, index].nonzero().flatten()
            out.index_add_(0, token, expert(tokens[token]) * gates[token, index, None])
        return out.view_as(x)


@positive("gates are the ReLU of the logits: sparse without any top-k (ReMoE)")
class ReluGates(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        gates = F.relu(self.router(tokens))
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token = gates[:, index].nonzero().flatten()
            if len(token):
                out[token] += gates[token, index, None] * expert(tokens[token])
        return out.view_as(x)


@positive("a group first, then an expert of the group")
class TwoLevelRouting(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4)
        self.inner = weight(4, D, E // 4)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        outer, group = self.router(tokens).softmax(-1).max(-1)
        logits = torch.einsum("td,tde->te", tokens, self.inner[group])
        inner, member = logits.softmax(-1).max(-1)
        return (outer * inner).unsqueeze(-1), (group * (E // 4) + member).unsqueeze(-1)


@positive("Sinkhorn-balanced choice in train mode, scores by sigmoid (Megatron)")
class SinkhornRouting(ListMoe):
    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(tokens)
        with torch.no_grad():
            cost = logits.detach()
            if self.training:
                cost = cost.exp()
                for _ in range(4):
                    cost = cost / (cost.sum(0, keepdim=True) * E)
                    cost = cost / (cost.sum(1, keepdim=True) * len(tokens))
            chosen = cost.topk(1, dim=-1).indices
        return logits.sigmoid().gather(1, chosen), chosen


@positive("hard Gumbel softmax in train mode, one-hot argmax in eval", train="found_or_declined")
class GumbelRouting(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            gates = F.gumbel_softmax(logits, hard=True)
        else:
            gates = F.one_hot(logits.argmax(-1), E).to(x.dtype)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mask = gates[..., index] > 0
            out[mask] += expert(x[mask]) * gates[..., index][mask].unsqueeze(-1)
        return out


@positive("straight-through one-hot gates: hard forward, soft backward", expect="found_or_declined")
class StraightThroughGates(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        soft = self.router(x).softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, soft.topk(K, dim=-1).indices, 1 / K)
        gates = hard + soft - soft.detach()
        hidden = F.gelu(torch.einsum("bsd,edh->bseh", x, self.w1))
        return torch.einsum("bseh,ehd,bse->bsd", hidden, self.w2, gates)


@positive("scores of the layer before are carried on and returned", make_inputs=with_router_state)
class RecurrentRouter(ListParts):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(x) + 0.5 * state
        weights, chosen = softmax_top_k(logits.flatten(0, 1), K)
        return run_experts(self.experts, x.flatten(0, 1), weights, chosen).view_as(x), logits


@positive("the router adds an embedding of the task", make_inputs=with_task)
class TaskRouter(ListParts):
    def __init__(self) -> None:
        super().__init__()
        self.tasks = nn.Embedding(5, D)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        logits = self.router(x + self.tasks(task).unsqueeze(1))
        weights, chosen = softmax_top_k(logits.flatten(0, 1), K)
        return run_experts(self.experts, x.flatten(0, 1), weights, chosen).view_as(x)


@positive("one decision for a whole sequence, from its mean", expect="found_or_declined")
class SequenceRouting(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = softmax_top_k(self.router(x.mean(1)), K)  # [B, K]
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            sample, slot = torch.where(chosen == index)
            if len(sample):
                out = out.index_add(0, sample, expert(x[sample]) * weights[sample, slot, None, None])
        return out


@positive(
    "two experts chosen by a mask of the caller (text or image), no router",
    make_inputs=with_padding_mask,
    expect="found_or_declined",
)
class ModalityRouting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = Mlp()
        self.image = Mlp()

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[is_text] = self.text(x[is_text])
        out[~is_text] = self.image(x[~is_text])
        return out


@positive("experts zero in the choice beyond six: two are never used", expect="found_or_declined")
class PrunedExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.pruned: Tensor
        self.register_buffer("pruned", torch.arange(E) >= 6)

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return softmax_top_k(self.router(tokens).masked_fill(self.pruned, float("-inf")), K)


@positive("two of ten choices are no expert: the token itself with its score (zero-computation experts)")
class IdentityExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E + 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.router(tokens).softmax(-1).topk(K, dim=-1)
        skipped = (weights * (chosen >= E)).sum(-1, keepdim=True)
        return (run_experts(self.experts, tokens, weights, chosen) + tokens * skipped).view_as(x)


@positive("the last choice means no expert: such slots vanish")
class NullExpert(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E + 1)


@positive("padding tokens are left out of the routing", make_inputs=with_padding_mask)
class PaddingMask(ListParts):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = x[mask]
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(x)
        out[mask] = run_experts(self.experts, tokens, weights, chosen)
        return out


# ------------------------------------------------------------------------------------ shared experts and residues


@positive("shared expert, added")
class SharedExpert(ModularMoe):
    def __init__(self) -> None:
        super().__init__(SoftmaxRouter())
        self.shared = SwiGlu()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


@positive("shared expert of the same shape as the routed ones, behind a sigmoid gate of its own")
class GatedSharedExpert(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.shared = Mlp()
        self.shared_gate = nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.sigmoid(self.shared_gate(x)) * self.shared(x)


@positive("LayerNorm before and a residual connection around the experts")
class ResidualBlock(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


@positive("router on the raw tokens, experts on normalised ones, another norm after the sum")
class DifferentNorms(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.before = nn.RMSNorm(D)
        self.after = nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        return x + self.after(run_experts(self.experts, self.before(tokens), weights, chosen)).view_as(x)


@positive("experts in a narrower latent space, router on the full width")
class LatentExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__(make_expert=lambda: Mlp(d_in=24, d_out=24))
        self.reduce = nn.Linear(D, 24, bias=False)
        self.restore = nn.Linear(24, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        return self.restore(run_experts(self.experts, self.reduce(tokens), weights, chosen)).view_as(x)


@positive("tokens cut into four sub-tokens that are routed apart (multi-head MoE)")
class SubTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split = nn.Linear(D, D)
        self.router = nn.Linear(D // 4, E)
        self.experts = nn.ModuleList(Mlp(d_in=D // 4, d_out=D // 4) for _ in range(E))
        self.merge = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.split(x).view(-1, D // 4)
        weights, chosen = softmax_top_k(self.router(pieces), K)
        return self.merge(run_experts(self.experts, pieces, weights, chosen).view_as(x))


@positive("two banks of experts with routers of their own, added")
class TwoBanks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine = ListMoe(experts=8)
        self.coarse = ListMoe(experts=4, top_k=1, make_expert=lambda: Mlp(F.relu, hidden=48))

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(x) + self.coarse(x)


@positive("experts compute the values of an attention (SwitchHead)")
class SwitchHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = weight(E, D, D)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).sigmoid().topk(K, -1)
        gathered = self.value[chosen.reshape(-1)].view(*chosen.shape, D, D)
        value = (torch.einsum("bsd,bskdo->bsko", x, gathered) * weights.unsqueeze(-1)).sum(-2)
        query, key = self.query(x).unsqueeze(1), self.key(x).unsqueeze(1)
        return F.scaled_dot_product_attention(query, key, value.unsqueeze(1)).squeeze(1)


# ---------------------------------------------------------------------------------------- interfaces of the block


def balance_loss(logits: Tensor, chosen: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    load = F.one_hot(chosen, E).to(probs.dtype).mean(dim=(0, 1))
    return E * (load * probs.mean(0)).sum()


@positive("returns (output, auxiliary loss)", name="returns_tuple", kind="tuple")
@positive("returns a dict", name="returns_dict", kind="dict")
@positive("returns a dataclass", name="returns_dataclass", kind="dataclass")
@positive("returns a named tuple with a list in it", name="returns_namedtuple", kind="namedtuple")
class ReturnsMore(ListParts):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        tokens = x.reshape(-1, D)
        logits = self.router(tokens)
        weights, chosen = softmax_top_k(logits, K)
        out = run_experts(self.experts, tokens, weights, chosen).view_as(x)
        loss = balance_loss(logits, chosen)
        if self.kind == "tuple":
            return out, loss
        if self.kind == "dict":
            return {"hidden_states": out, "losses": {"balance": loss}, "chosen": chosen}
        if self.kind == "dataclass":
            return BlockOutput(out, loss, logits)
        return BlockTuple(out, [loss, chosen])


@dataclass
class BlockOutput:
    hidden_states: Tensor
    loss: Tensor
    router_logits: Tensor


class BlockTuple(NamedTuple):
    hidden_states: Tensor
    extras: list[Tensor]


class AddAuxiliaryLoss(torch.autograd.Function):
    """Passes its input on and gives the loss a gradient of one, so that nobody has to add it to the total."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_dtype = loss.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones(1, dtype=ctx.loss_dtype, device=grad.device).squeeze()


@positive("the auxiliary loss enters by a custom autograd function in train mode (DeepSeek)")
class InjectedLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.experts = StackedExperts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        logits = self.router(tokens)
        weights, chosen = softmax_top_k(logits, K)
        out = self.experts(tokens, chosen, weights)
        if self.training:
            out = AddAuxiliaryLoss.apply(out, balance_loss(logits, chosen))
        return out.view_as(x)


@positive("keyword arguments with defaults, one of which changes what is returned")
class KeywordArguments(ListParts):
    def forward(
        self, x: Tensor, *, temperature: float = 1.0, top_k: int | None = None, return_logits: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, D)
        logits = self.router(tokens) / temperature
        weights, chosen = softmax_top_k(logits, top_k or self.top_k)
        out = run_experts(self.experts, tokens, weights, chosen).view_as(x)
        return (out, logits) if return_logits else out


@positive("tokens [T, D]", make_inputs=flat_tokens)
class FlatTokens(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(x)
        return run_experts(self.experts, x, weights, chosen)


@positive("sequence first [S, B, D], not contiguous after a transpose", make_inputs=sequence_first)
class SequenceFirst(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


@positive("images [B, D, height, width], channels first", make_inputs=images)
class ChannelsFirst(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def double_logits(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


@positive("a forward hook on the router changes its logits")
class HookedRouter(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router.register_forward_hook(double_logits)


@positive("a forward pre-hook on the block changes its input")
class HookedBlock(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(halve_input)


def halve_input(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] / 2,)


@positive("router and experts are submodules, wired by the parent", name="wired_by_parent")
def wired_by_parent() -> nn.Module:
    return ModularMoe(SoftmaxRouter())


@positive("router and experts live in different branches of the module tree")
class FarApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.routing = nn.ModuleDict({"norm": nn.LayerNorm(D), "gate": nn.Linear(D, E)})
        self.body = nn.ModuleDict({"feed_forward": nn.ModuleDict({"bank": nn.ModuleList(Mlp() for _ in range(E))})})

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.routing["gate"](self.routing["norm"](tokens)), K)
        bank = self.body.get_submodule("feed_forward.bank")
        return run_experts(bank.children(), tokens, weights, chosen).view_as(x)


@positive("three modules deep, the loop in a helper function outside of any module")
class DeeplyNested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.Identity(), ListMoe()), nn.LayerNorm(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


@positive("the same block called twice")
class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ModularMoe(SoftmaxRouter())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x + self.block(x))


@positive("a block called on chunks of sixteen tokens")
class CalledOnChunks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ListMoe()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(chunk) for chunk in x.split(16, dim=1)], dim=1)


@positive("two blocks one after the other")
class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = ListMoe()
        self.second = ModularMoe(SoftmaxRouter())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


@positive("one bank of experts serves two layers with routers of their own")
class SharedBank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = StackedExperts()
        self.routers = nn.ModuleList(SoftmaxRouter() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for router in self.routers:
            tokens = x.reshape(-1, D)
            weights, chosen = router(tokens)
            x = x + self.bank(tokens, chosen, weights).view_as(x)
        return x


# ----------------------------------------------------------------------------------- states of the parameters


@positive("sparse upcycling: all experts still equal")
class UpcycledExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        for expert in self.experts:
            expert.load_state_dict(self.experts[0].state_dict())


@positive("an untrained router: all logits tied")
class ZeroRouter(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        for parameter in self.router.parameters():
            nn.init.zeros_(parameter)


@positive("output layers still zero")
class ZeroOutputLayers(StackMoe):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.w2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            out = out.index_add(
                0, token, F.gelu(tokens[token] @ self.w1[index]) @ self.w2[index] * weights[token, slot, None]
            )
        return out.view_as(x)


@positive("experts frozen, router trained")
class FrozenExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.experts.requires_grad_(False)


@positive("router frozen, every second expert frozen")
class HalfFrozen(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.router.requires_grad_(False)
        for expert in self.experts[::2]:
            expert.requires_grad_(False)


# ------------------------------------------------------------------------------------- casts on purpose, rare experts


@positive("every expert runs on every token, top-1 of them counts: in a small batch some expert may have no token")
class DenseSwitch(ListMoe):
    factor = 1.0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        tokens = x.reshape(-1, D)
        scores = self.router(tokens).softmax(-1)
        mask = torch.zeros_like(scores).scatter_(1, scores.topk(1, dim=-1).indices, 1)
        share = scores * mask / (1.0 + (scores * mask).sum(0, keepdim=True))
        capacity = int(self.factor * tokens.shape[0])
        outputs = torch.stack([expert(tokens) for expert in self.experts], -1)
        return ((share * capacity).unsqueeze(-2) * outputs).sum(-1).view_as(x), None


@positive("one-hot masks cast to float32: the block runs in float32 only", dtype=torch.float32)
class FloatMasks(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        combine = torch.einsum("tk,tke->te", weights, F.one_hot(chosen, E).float())
        dispatched = torch.einsum("td,te->etd", tokens, (combine > 0).float())
        hidden = F.relu(torch.bmm(dispatched, self.w1))
        return torch.einsum("etd,te->td", torch.bmm(hidden, self.w2), combine).view_as(x)


@positive("experts cast to bfloat16, whatever the model's dtype", dtype=torch.float32)
class HalfPrecisionExperts(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=E).tolist()
        rows = tokens[order // K].bfloat16()
        parts = [
            F.gelu(part @ self.w1[e].bfloat16()) @ self.w2[e].bfloat16() for e, part in enumerate(rows.split(counts))
        ]
        routed = (torch.cat(parts).float() * weights.flatten()[order, None]).to(x.dtype)
        return torch.zeros_like(tokens).index_add(0, order // K, routed).view_as(x)


@positive("another number of tokens per expert where T is odd")
class ParityChoice(StackMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        count = tokens.shape[0]
        taken = count // 2 if count % 2 == 0 else count
        gates, chosen = self.router(tokens).softmax(-1).t().topk(taken, -1)  # [E, C]
        out = torch.bmm(F.gelu(torch.bmm(tokens[chosen], self.w1)), self.w2) * gates.unsqueeze(-1)
        return torch.zeros_like(tokens).index_add(0, chosen.flatten(), out.reshape(-1, D)).view_as(x)
