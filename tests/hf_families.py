"""Tiny random models of every Mixture-of-Experts family of the installed Transformers release.

``build("mixtral")`` gives a two-layer model of some 10^5 parameters; no download is needed. The table ``_MODELS`` lists
the families; one which the installed release lacks is left out of ``FAMILIES``. ``python tests/hf_families.py
[families...]`` builds and runs them all.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")

HIDDEN = 64
LAYERS = 2
EXPERTS = 8
TOP_K = 2
VOCABULARY = 128

# The class to build of each family: the language model where it stands alone, else the text tower of a larger model.
_MODELS: dict[str, str] = {
    "afmoe": "AfmoeForCausalLM",
    "aria": "AriaTextForCausalLM",
    "axk1": "AXK1ForCausalLM",
    "axk2": "AXK2ForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "beam": "BeamForCausalLM",
    "cohere2_moe": "Cohere2MoeForCausalLM",
    "dbrx": "DbrxForCausalLM",
    "deepseek_ocr2": "DeepseekOcr2TextModel",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v32": "DeepseekV32ForCausalLM",
    "deepseek_v4": "DeepseekV4ForCausalLM",
    "diffusion_gemma": "DiffusionGemmaEncoderTextModel",
    "doge": "DogeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "dots3_note": "Dots3NoteForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM",
    "ernie4_5_vl_moe": "Ernie4_5_VLMoeTextModel",
    "exaone_moe": "ExaoneMoeForCausalLM",
    "flex_olmo": "FlexOlmoForCausalLM",
    "flint": "FlintForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
    "glm4v_moe": "Glm4vMoeTextModel",
    "glm5_next": "Glm5NextTextModel",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "granitemoe_swa": "GraniteMoeSWAForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
    "hunyuan_v1_moe": "HunYuanMoEV1ForCausalLM",
    "hy_v3": "HYV3ForCausalLM",
    "hy_v4": "HYV4ForCausalLM",
    "hy_v4_vl": "HYV4VLTextModel",
    "inkling": "InklingForCausalLM",
    "inkling2": "Inkling2ForCausalLM",
    "inkling2_loop": "Inkling2LoopForCausalLM",
    "jamba": "JambaForCausalLM",
    "jetmoe": "JetMoeForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "kolibri1": "Kolibri1ForCausalLM",
    "laguna": "LagunaForCausalLM",
    "lara_mini": "LaraMiniForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "longcat_flash": "LongcatFlashForCausalLM",
    "mellum": "MellumForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "minimax_m2": "MiniMaxM2ForCausalLM",
    "minimax_m3_vl": "MiniMaxM3VLForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "mistral_large4": "MistralLarge4TextModel",
    "mixtral": "MixtralForCausalLM",
    "muse_spark": "MuseSparkTextModel",
    "nemotron_h": "NemotronHForCausalLM",
    "nllb_moe": "NllbMoeForConditionalGeneration",
    "olmoe": "OlmoeForCausalLM",
    "openai_privacy_filter": "OpenAIPrivacyFilterModel",
    "phimoe": "PhimoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerTextModel",
    "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "qwen4_exp": "Qwen4ExpForCausalLM",
    "solar_open": "SolarOpenForCausalLM",
    "step3p7": "Step3p7TextModel",
    "switch_transformers": "SwitchTransformersForConditionalGeneration",
    "unlimited_ocr": "UnlimitedOcrTextModel",
    "vitpose_backbone": "VitPoseBackbone",
    "zaya": "ZayaForCausalLM",
}

# Every spelling of a size which the families use; a configuration receives those which it knows.
_SIZES: dict[str, float] = {
    "initializer_range": 0.1,  # the usual 0.02 is for wide models: here the experts would add next to nothing
    # width and depth
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 256),
    "hidden_size_per_layer_input": 0,
    # feed-forward
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("moe_latent_size", "latent_size"), 16),
    **dict.fromkeys(("moe_hidden_size", "router_hidden_size"), 32),
    "hc_lowrank": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_routed_experts", "expert_num"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_experts_per_tok"), TOP_K),
    **dict.fromkeys(("moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts"), TOP_K),
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "v_head_dim"), 16),
    "sliding_window": 32,
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    "swa_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 512),  # compiled code compares sequences with it: longer than any
    # special tokens: inputs never contain ids 0 to 2
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}

# Latent attention: the generic head size would be read as the size of the rotary part.
_LATENT: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 4}
_SPARSE = ["sparse"] * LAYERS


def _rope(sections: list[int], **more: Any) -> dict[str, Any]:
    """Return rotary parameters whose sections share out the halved head size between time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}


_OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "axk1": _LATENT,
    "axk2": _LATENT,
    "beam": {"mlp_layer_types": _SPARSE},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": HIDDEN},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_ocr2": {"n_shared_experts": 1, "mlp_layer_types": _SPARSE},
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "first_k_dense_replace": 1},
    "deepseek_v32": _LATENT,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "diffusion_gemma": {"global_head_dim": 16},
    "doge": {"is_moe": True, "num_experts": 16},  # the number of experts must be a square
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [32, 32], "rope_parameters": _rope([2, 2, 4])},  # text, vision
    "flint": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "gemma4": {"enable_moe_block": True, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "glm4_moe_lite": _LATENT,
    "glm4v_moe": {"rope_parameters": _rope([2, 3, 3], partial_rotary_factor=1.0)},
    "glm5_next": {
        "mlp_layer_types": _SPARSE,
        "num_key_value_heads": 4,
        "head_dim": 0,  # no rotary part
        "qk_rope_head_dim": 0,
        "index_topk": 32,  # counts whole pools
        "index_kpool": 16,
    },
    "glm_moe_dsa": _LATENT,
    "hy_v4_vl": {"rope_parameters": _rope([2, 1, 1])},
    "jamba": {
        "attn_layer_offset": 0,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["full_attention"] * LAYERS},
    "llama4": {"interleave_moe_layer_step": 1},
    "longcat_flash": {**_LATENT, "zero_expert_num": 4},
    "mistral4": _LATENT,
    "mistral_large4": _LATENT,
    "nemotron_h": {"layers_block_type": ["mamba", "moe"], "n_group": 1},
    "nllb_moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "step3p7": {"mlp_layer_types": _SPARSE},
    "switch_transformers": {
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "encoder_sparse_step": 1,
        "decoder_sparse_step": 1,
    },
    "unlimited_ocr": {"num_key_value_heads": 4, "n_shared_experts": 1, "mlp_layer_types": _SPARSE},
    "vitpose_backbone": {"num_experts": 6, "part_features": 16, "image_size": [32, 32], "patch_size": [16, 16]},
    "zaya": {"num_experts_per_tok": 1, "moe_top_k": 1},  # its router supports top-1 only
}

# The class of the modules which hold the experts, where its name does not end in "Experts".
_BLOCKS = {
    "doge": "DogeCDMoE",
    "inkling": "InklingExperts",  # not InklingSharedExperts
    "jetmoe": "JetMoeMoE",  # not the experts of its attention
    "vitpose_backbone": "VitPoseBackboneMoeMLP",
}
# Doge with experts fails in older releases, which do not take the block's tuple of outputs apart.
_NEEDS = {"doge": "hidden_states = hidden_states[0]"}
_TOP_1 = frozenset({"switch_transformers", "zaya"})
_IMAGE = 32


def _source(family: str) -> str:
    """Return the text of the family's modeling file, or "" where the installed release has none."""
    spec = importlib.util.find_spec("transformers")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(root, "models", family, f"modeling_{family}.py")
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return ""


def _is_available(family: str) -> bool:
    """Tell whether the installed release has the family's model, in a version which runs."""
    source = _source(family)
    return f"class {_MODELS[family]}(" in source and _NEEDS.get(family, "") in source


FAMILIES: tuple[str, ...] = tuple(family for family in _MODELS if _is_available(family))


def has_implementation(family: str) -> bool:
    """Tell whether the family honours ``experts_implementation`` (else it has one form, named "eager" here)."""
    return "@use_experts_implementation" in _source(family)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model with random parameters.

    ``blocks`` names the modules which hold the routed experts, one per MoE block; each block has ``experts`` experts
    with weights of their own, of which ``top_k`` see a token.
    """

    family: str
    model: Any
    config: Any
    blocks: tuple[str, ...]
    experts: int
    top_k: int

    def inputs(self, batch: int, seq: int, seed: int = 0) -> dict[str, Any]:
        """Return keyword arguments of ``model``: ids of shape (batch, seq), or for VitPose ``batch`` images."""
        generator = torch.Generator().manual_seed(seed)
        if self.family == "vitpose_backbone":
            pixels = torch.randn(batch, 3, _IMAGE, _IMAGE, generator=generator)
            return {"pixel_values": pixels, "dataset_index": torch.arange(batch) % self.experts}
        ids = torch.randint(3, VOCABULARY, (batch, seq), generator=generator)
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if getattr(self.config, "is_encoder_decoder", False):
            arguments["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, seq), generator=generator)
        if self.family == "ernie4_5_vl_moe":  # every third token is an image token, for the second set of experts
            arguments["moe_mm_token_type_ids"] = (torch.arange(seq) % 3 == 2).int().expand(batch, seq)
        return arguments


def build(family: str, implementation: str = "eager", seed: int = 0) -> TinyModel:
    """Build the family's tiny model in evaluation mode, in float32, with parameters which depend on ``seed`` only."""
    if implementation != "eager" and not has_implementation(family):
        raise ValueError(f"{family} has no experts_implementation {implementation!r}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    model_class = getattr(modeling, _MODELS[family])
    config = _config(model_class.config_class, _OVERRIDES.get(family, {}))
    options: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    if has_implementation(family):
        options["experts_implementation"] = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class._from_config(config, **options)
        _randomise(model)
    blocks = tuple(name for name, module in model.named_modules() if _is_block(family, type(module).__name__))
    experts = _OVERRIDES.get(family, {}).get("num_experts", EXPERTS)
    return TinyModel(family, model.eval(), config, blocks, experts, 1 if family in _TOP_1 else TOP_K)


def _config(config_class: Any, overrides: dict[str, Any]) -> Any:
    """Return a configuration with every size it knows from ``_SIZES`` made small, and with the overrides."""
    defaults = config_class()
    sizes = {name: size for name, size in _SIZES.items() if _is_size(defaults, name)}
    aliases = getattr(config_class, "attribute_map", {})
    sizes = {name: size for name, size in sizes.items() if aliases.get(name) not in sizes}
    return config_class(**{**sizes, **overrides})


def _is_size(config: Any, name: str) -> bool:
    """Tell whether the attribute holds a number or nothing, and not a flag or a list."""
    try:
        return hasattr(config, name) and not isinstance(getattr(config, name), (bool, list, dict))
    except RuntimeError:  # the default configuration has a different number in each layer
        return True


def _is_block(family: str, class_name: str) -> bool:
    return class_name == _BLOCKS[family] if family in _BLOCKS else class_name.endswith("Experts")


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Make constant parameters and the table of a hash router random in place, so that a wrong use of them shows.

    A fresh model has biases of zero, norms of one and, in AFMoE, a router of zero.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # DeepSeek V4: token id -> the ids of its experts, distinct in a row
            table.copy_(torch.rand(len(table), EXPERTS).argsort(dim=1)[:, : table.shape[1]])


def _main(families: list[str]) -> int:
    """Build and run each family in each implementation, one line per case; return the number of failures."""
    torch.set_num_threads(1)
    failures = 0
    for family in families or FAMILIES:
        for implementation in IMPLEMENTATIONS if has_implementation(family) else ("eager",):
            start = time.perf_counter()
            try:
                tiny = build(family, implementation)
                tiny.model(**tiny.inputs(2, 9))
                parameters = sum(parameter.numel() for parameter in tiny.model.parameters())
                text = f"OK    {len(tiny.blocks)} blocks, {parameters / 1e6:.2f} M parameters"
            except Exception as error:  # noqa: BLE001 - one family must not stop the others
                failures += 1
                text = f"FAIL  {type(error).__name__}: {str(error)[:200]}"
            print(f"{family:22} {implementation:10} {text}, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{failures} failures")
    return failures


if __name__ == "__main__":
    sys.exit(bool(_main(sys.argv[1:])))
