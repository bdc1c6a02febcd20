"""Look-alikes and near misses: modules that the engine has to decline, or at least must never get wrong.

`NEGATIVE` maps a name to a function that builds a `Style`, as `POSITIVE` of styles_positive does.
"""

import importlib

import torch
import torch.nn.functional as F
from styles_positive import (
    D,
    DropoutExpert,
    E,
    H,
    Inputs,
    K,
    ListMoe,
    ListParts,
    Mlp,
    Registry,
    TokenShape,
    images,
    registrar,
    run_experts,
    softmax_top_k,
    weight,
)
from torch import Tensor, nn

NEGATIVE: Registry = {}
negative = registrar(NEGATIVE, "declined")


def token_ids(shape: TokenShape, seed: int) -> Inputs:
    """ids [B, S]"""
    return (torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed)),)


# ------------------------------------------------------------------------------------------- no routing to experts


@negative("attention over the four best keys")
class TopKAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        scores = query @ key.transpose(1, 2)
        best, index = scores.topk(min(4, x.shape[1]), dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, index, best)
        return self.out(scores.softmax(-1) @ value)


@negative("soft-moe-pytorch: slots are soft mixtures of all tokens")
def soft_moe_pytorch() -> nn.Module:
    return importlib.import_module("soft_moe_pytorch").SoftMoE(dim=D, seq_len=64, num_experts=E)


@negative("soft MoE by hand: dispatch and combine are softmaxes, nothing is selected")
class SoftMoe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slots = weight(D, E, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bsd,dep->bsep", x, self.slots)
        dispatch = logits.softmax(1)
        combine = logits.flatten(2).softmax(-1).view_as(logits)
        inputs = torch.einsum("bsep,bsd->bepd", dispatch, x)
        outputs = torch.stack([expert(inputs[:, index]) for index, expert in enumerate(self.experts)], dim=1)
        return torch.einsum("bsep,bepd->bsd", combine, outputs)


@negative("dense mixture: every expert on every token with a softmax weight")
class DenseMixture(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        return sum(gates[..., index : index + 1] * expert(x) for index, expert in enumerate(self.experts))


class NormOfTokens(nn.Module):
    """Standardises each feature over the tokens that it is given, with its own scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mlp = nn.Parameter(torch.ones(D)), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp((x - x.mean(0)) / (x.pow(2).mean(0) + 1e-3).sqrt() * self.scale) if len(x) else x


@negative("experts that standardise features over the tokens that they are given")
class NormsOverTokens(ListMoe):
    def __init__(self) -> None:
        super().__init__(make_expert=NormOfTokens)


@negative("mean of an ensemble")
class EnsembleMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members]).mean(0)


@negative("the experts are averaged, the router's choice is only returned")
class RouterIgnored(ListParts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.router(x).topk(K, -1).indices
        return sum(expert(x) for expert in self.experts) / E, chosen


@negative("weights of the experts are averaged by the router, then used once (SMEAR, CondConv)")
class MergedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1 = weight(E, D, H)
        self.w2 = weight(E, H, D)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x.mean(1)).softmax(-1)  # [B, E]
        w1 = torch.einsum("be,edh->bdh", gates, self.w1)
        w2 = torch.einsum("be,ehd->bhd", gates, self.w2)
        return F.gelu(x @ w1) @ w2


@negative("a language model head that returns its five best tokens")
class TopKHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.head = nn.Linear(D, 100)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best, index = self.head(F.gelu(self.body(x))).topk(5, dim=-1)
        return best.softmax(-1), index


@negative("embedding lookup", make_inputs=token_ids)
class EmbeddingLookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, D)
        self.out = nn.Linear(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embedding(ids))


@negative("adaptive embedding: ids of two ranges go to tables of different widths", make_inputs=token_ids)
class AdaptiveEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frequent = nn.Embedding(20, D)
        self.rare = nn.Embedding(30, 16)
        self.widen = nn.Linear(16, D, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        out = torch.empty(*ids.shape, D, dtype=self.widen.weight.dtype)
        out[ids < 20] = self.frequent(ids[ids < 20])
        out[ids >= 20] = self.widen(self.rare(ids[ids >= 20] - 20))
        return out


@negative("vector-quantize-pytorch: nearest entry of a codebook")
def vector_quantize_pytorch() -> nn.Module:
    package = importlib.import_module("vector_quantize_pytorch")
    return package.VectorQuantize(dim=D, codebook_size=32, codebook_dim=D)


@negative("vector quantisation by hand, straight-through")
class VectorQuantisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(32, D))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        code = self.codebook[torch.cdist(x, self.codebook).argmin(-1)]
        return self.out(x + (code - x).detach())


@negative("product-key memory: values of the best keys, a weighted sum of rows")
class ProductKeyMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(D, 32)
        self.keys = weight(2, 12, 16)
        self.values = nn.Embedding(144, D)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.query(x).chunk(2, dim=-1)
        best_a, index_a = (first @ self.keys[0].t()).topk(4, dim=-1)
        best_b, index_b = (second @ self.keys[1].t()).topk(4, dim=-1)
        scores = (best_a.unsqueeze(-1) + best_b.unsqueeze(-2)).flatten(-2)
        index = (index_a.unsqueeze(-1) * 12 + index_b.unsqueeze(-2)).flatten(-2)
        best, place = scores.topk(4, dim=-1)
        return (self.values(index.gather(-1, place)) * best.softmax(-1).unsqueeze(-1)).sum(-2)


@negative("nearest neighbours in a fixed memory")
class NeighbourMemory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory: Tensor
        self.register_buffer("memory", torch.randn(40, D))
        self.mix = nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        index = (x @ self.memory.t()).topk(3, dim=-1).indices
        return self.mix(torch.cat((x, self.memory[index].mean(-2)), dim=-1))


@negative("per-head weights: all heads on all tokens")
class MultiHeadWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in = weight(8, D, 16)
        self.w_out = weight(8, 16, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bhse,hed->bsd", torch.einsum("bsd,hde->bhse", x, self.w_in).relu(), self.w_out)


@negative("two heads, always both")
class TwoTaskHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Mlp()
        self.second = Mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x) + self.second(x), x.argmax(-1)


@negative("the k largest hidden units survive (sparse autoencoder)")
class SparseActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, 128)
        self.down = nn.Linear(128, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        best, index = hidden.topk(8, dim=-1)
        return self.down(torch.zeros_like(hidden).scatter(-1, index, best))


@negative("mixture of depths: the best tokens go through the one block")
class MixtureOfDepths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 1)
        self.block = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        best, index = self.router(x).squeeze(-1).topk(min(8, x.shape[1]), dim=-1)
        index = index.unsqueeze(-1).expand(-1, -1, D)
        return x.scatter_add(1, index, self.block(x.gather(1, index)) * best.unsqueeze(-1))


@negative("an MLP on the tokens that a mask lets through, the rest passes")
class MaskedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        mask = x.mean(-1) > 0
        out = x.clone()
        out[mask] = self.mlp(x[mask])
        return out


@negative("early exit: layers go on with the tokens that are not done")
class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(4))
        self.halt = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        active = torch.arange(len(tokens))
        for layer in self.layers:
            if not len(active):
                break
            rows = tokens[active]
            tokens = tokens.index_copy(0, active, rows + layer(rows))
            active = active[self.halt(tokens[active]).squeeze(-1) < 0.2]
        return tokens.view_as(x)


@negative("LoRA on a linear layer, no routing")
class PlainLora(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D)
        self.lora_a = weight(D, 8)
        self.lora_b = weight(8, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_a @ self.lora_b


@negative("MLP-mixer: one MLP over channels, a pool over tokens")
class MlpMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels = Mlp()
        self.tokens = weight(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        groups = F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4))
        mixed = torch.einsum("bgsd,st->bgtd", groups, self.tokens).flatten(1, 2)[:, : x.shape[1]]
        return x + self.channels(x + mixed)


@negative("maxout: the largest of several linear maps, unit by unit")
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Linear(D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces(x).unflatten(-1, (4, D)).max(-2).values


@negative("a recurrent cell over the sequence")
class RecurrentCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], D)
        states = []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, dim=1)


@negative("depthwise and pointwise convolutions", make_inputs=images)
class SeparableConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.pointwise = nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(F.silu(self.depthwise(x)))


@negative("squeeze and excitation: channels scaled by a sigmoid", make_inputs=images)
class SqueezeExcitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D), nn.Sigmoid())
        self.conv = nn.Conv2d(D, D, 1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.gate(x.mean((2, 3)))[..., None, None]


# -------------------------------------------------------------------------------- routed, but not a row-wise MoE


@negative("an expert subtracts the mean of its tokens: what a token gets depends on the others")
class CrossTokenExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1 = weight(E, D, H)
        self.w2 = weight(E, H, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token = (chosen == index).nonzero().squeeze(-1)
            if token.numel():
                hidden = tokens[token] @ self.w1[index]
                hidden = F.relu(hidden - hidden.mean(0, keepdim=True))
                out.index_add_(0, token, hidden @ self.w2[index] * gate[token, None])
        return out.view_as(x)


class BatchNormTrained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(D, H)
        self.norm = nn.BatchNorm1d(H)
        self.down = nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if len(x) > 1:
            hidden = self.norm(hidden)
        return self.down(F.relu(hidden))


@negative("BatchNorm in the experts, in train mode", training=True, name="batch_norm_train")
def batch_norm_train() -> nn.Module:
    return ListMoe(make_expert=BatchNormTrained)


class AttentiveExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        return (query @ key.t() / D**0.5).softmax(-1) @ value


@negative("the tokens of an expert attend to each other")
def attention_experts() -> nn.Module:
    return ListMoe(make_expert=AttentiveExpert)


@negative("dropout in the experts, in train mode", training=True)
def dropout_experts_train() -> nn.Module:
    return ListMoe(make_expert=DropoutExpert)


class NoisyExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + 0.1 * torch.randn_like(x))


@negative("random noise inside the experts, in every mode")
def noisy_experts() -> nn.Module:
    return ListMoe(make_expert=NoisyExpert)


@negative("experts of four different widths")
class DifferentWidths(ListMoe):
    def __init__(self) -> None:
        super().__init__(experts=4)
        self.experts = nn.ModuleList(Mlp(hidden=hidden) for hidden in (8, 16, 32, 48))


@negative("experts of four different activations")
class DifferentActivations(ListMoe):
    def __init__(self) -> None:
        super().__init__(experts=4)
        self.experts = nn.ModuleList(Mlp(activation) for activation in (F.gelu, F.relu, torch.tanh, F.silu))


@negative("experts of different kinds: nothing, a matrix, an MLP, a normalisation")
class DifferentKinds(ListMoe):
    def __init__(self) -> None:
        super().__init__(experts=4)
        self.experts = nn.ModuleList([nn.Identity(), nn.Linear(D, D), Mlp(), nn.LayerNorm(D)])


@negative("the expert with the largest output wins: the choice needs all outputs")
class LargestOutputWins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)  # [B, S, E, D]
        chosen = outputs.norm(dim=-1).argmax(-1)
        return outputs.gather(-2, chosen[..., None, None].expand(*chosen.shape, 1, D)).squeeze(-2)


@negative("the router reads what the experts say (self-consistency gate)")
class OutputsDecide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.probes = weight(E, D)
        self.experts = nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-2)
        scores = (self.probes * outputs).sum(-1)  # [B, S, E]
        best, chosen = scores.topk(K, dim=-1)
        picked = outputs.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, D))
        return (picked * best.softmax(-1).unsqueeze(-1)).sum(-2)


@negative("experts applied again and again, until every token has halted")
class IteratedExperts(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.halt = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        for _ in range(4):
            running = (self.halt(tokens).squeeze(-1) < 0.3).nonzero().flatten()
            if not len(running):
                break
            rows = tokens[running]
            weights, chosen = self.route(rows)
            tokens = tokens.index_add(0, running, run_experts(self.experts, rows, weights, chosen))
        return tokens.view_as(x)


@negative("the outputs of the selected experts run on, nothing brings them back to their tokens")
class DispatchWithoutCombine(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.route(tokens)
        rows = []
        for index, expert in enumerate(self.experts):
            token = torch.where((chosen == index) & (weights > 0.45))[0]
            rows.append(expert(tokens[token]))
        return torch.cat(rows)


@negative("only the tokens of one expert come out: the shape depends on the data")
class DataDependentShape(ListParts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        gate, chosen = self.router(tokens).softmax(-1).max(-1)
        token = torch.where(chosen == 0)[0]
        return self.experts[0](tokens[token]) * gate[token, None], token


@negative("experts of complex numbers")
class ComplexExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E)
        self.w1 = nn.Parameter(torch.randn(E, D, H, dtype=torch.complex64) * 0.1)
        self.w2 = nn.Parameter(torch.randn(E, H, D, dtype=torch.complex64) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = softmax_top_k(self.router(tokens), K)
        out = torch.zeros_like(tokens)
        for index in range(E):
            token, slot = torch.where(chosen == index)
            hidden = (tokens[token].to(self.w1.dtype) @ self.w1[index]).tanh()
            routed = (hidden @ self.w2[index]).real.to(x.dtype)
            out = out.index_add(0, token, routed * weights[token, slot, None])
        return out.view_as(x)


@negative("convolutional experts, one decision an image", make_inputs=images)
class ConvolutionalExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 4)
        self.experts = nn.ModuleList(nn.Conv2d(D, D, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        gate, chosen = self.router(x.mean((2, 3))).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            sample = (chosen == index).nonzero().flatten()
            if len(sample):
                out = out.index_add(0, sample, expert(x[sample]) * gate[sample, None, None, None])
        return out


# ----------------------------------------------------------------------------------- effects that must not be lost


@negative("experts add to their input in place: a later expert sees what an earlier one wrote")
class InPlaceOnInput(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, D)
        weights, chosen = self.route(tokens.clone())
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            tokens[token] += expert(tokens[token]) * weights[token, slot, None]
        return x


@negative("the input is normalised in place before it is routed")
class ScalesItsInput(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x)


@negative("counts its calls")
class CountsCalls(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@negative("appends its load to a list")
class AppendsToList(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        self.history.append(chosen.flatten().bincount(minlength=E).tolist())
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


@negative("leaves its auxiliary loss in an attribute")
class AttributeLoss(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        logits = self.router(tokens)
        self.aux_loss = logits.logsumexp(-1).square().mean()
        weights, chosen = softmax_top_k(logits, K)
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


@negative("writes the last output of every expert into a dict of the module")
class CachesOutputs(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            self.cache[index] = expert(tokens[token])
            out = out.index_add(0, token, self.cache[index] * weights[token, slot, None])
        return out.view_as(x)


@negative("routes by the call: the experts of even and odd calls differ")
class AlternatesByCall(ListMoe):
    def __init__(self) -> None:
        super().__init__()
        self.parity = 0

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        chosen = (chosen + self.parity) % E
        self.parity = 1 - self.parity
        return run_experts(self.experts, tokens, weights, chosen).view_as(x)


@negative("an expert's hidden units are returned as well, for a penalty on them")
class ReturnsHidden(ListParts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        penalty = tokens.new_zeros(())
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            hidden = F.gelu(expert.get_submodule("up")(tokens[token]))
            penalty = penalty + hidden.square().sum()
            out = out.index_add(0, token, expert.get_submodule("down")(hidden) * weights[token, slot, None])
        return out.view_as(x), penalty


@negative("experts that change with the amount of tokens they get")
class CountDependentExperts(ListMoe):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        weights, chosen = self.route(tokens)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            routed = expert(tokens[token]) / (1 + len(token)) ** 0.5
            out = out.index_add(0, token, routed * weights[token, slot, None])
        return out.view_as(x)
