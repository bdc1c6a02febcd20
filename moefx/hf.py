"""A tiny model with random weights from the name of any Hugging Face configuration; nothing is downloaded.

    model = tiny_model("qwen3_moe")             # the architecture of Qwen3-MoE, some 10^5 parameters
    model(**example_inputs(model, tokens=64))

A configuration class says how large its model is in fields such as `hidden_size`; `SIZES` lists every spelling of them.
A name that stands for a model of several modalities gives its language model alone.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moefx.errors import InputError

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCABULARY, POSITIONS = 64, 2, 8, 2, 256, 4096
FIRST_TOKEN_ID = 3  # the ids below are padding, begin and end of text

SIZES: dict[str, int] = {
    # width and depth
    **dict.fromkeys(("hidden_size", "d_model"), HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len"), POSITIONS),
    "hidden_size_per_layer_input": 0,
    # feed-forward
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    **dict.fromkeys(("ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size", "share_expert_dim"), 32),
    **dict.fromkeys(("moe_latent_size", "latent_size", "hc_lowrank"), 16),
    **dict.fromkeys(("moe_hidden_size", "router_hidden_size"), 32),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_routed_experts", "expert_num"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_experts_per_tok"), TOP_K),
    **dict.fromkeys(("moe_top_k", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts"), TOP_K),
    "n_group": 2,
    "topk_group": 1,
    "expert_capacity": POSITIONS,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers"), 0),
    # attention
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "swa_head_dim", "d_kv", "kv_channels", "v_head_dim"), 16),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
    "sliding_window": 32,
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("o_lora_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank",), 32),
    "qk_head_dim": 24,
    "index_n_heads": 2,
    "index_topk": 4,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    # special tokens
    **dict.fromkeys(("pad_token_id", "decoder_start_token_id"), 0),
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # latent attention reads head_dim as the size of its rotary part
_SPARSE = {"mlp_layer_types": ["sparse"] * LAYERS}


def _rope(sections: list[int], **more: float) -> dict[str, Any]:
    """Return rotary parameters whose sections share out half the head size between time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, **more}}


# What the sizes alone do not say, by model_type (of the language model where there are several modalities).
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "mistral4", "mistral_large4_text"), _LATENT),
    **dict.fromkeys(("beam", "step3p5"), _SPARSE),
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K, "hidden_size": HIDDEN},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    },
    "deepseek_ocr2_text": {"n_shared_experts": 1, **_SPARSE},
    "doge": {"is_moe": True, "num_experts": 16},  # the number of experts must be a square
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32], **_rope([2, 2, 4])},  # text and vision experts
    "flint": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "gemma4_text": {"enable_moe_block": True, "num_kv_shared_layers": 0},
    "glm4v_moe_text": _rope([2, 3, 3], partial_rotary_factor=1.0),
    # no rotary part; index_topk counts whole pools
    "glm5_next_text": {
        **_SPARSE,
        "num_key_value_heads": 4,
        "head_dim": 0,
        "qk_rope_head_dim": 0,
        "index_topk": 32,
        "index_kpool": 16,
    },
    "hy_v4_vl_text": _rope([2, 1, 1]),
    "jamba": {"attn_layer_offset": 0, "attn_layer_period": 2, "expert_layer_offset": 0, "expert_layer_period": 1},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
    "llama4_text": {"interleave_moe_layer_step": 1},
    "nemotron_h": {"layers_block_type": ["mamba", "moe"], "n_group": 1},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "switch_transformers": {
        **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    },
    "unlimited_ocr_text": {"num_key_value_heads": 4, "n_shared_experts": 1, **_SPARSE},
    "vitpose_backbone": {"num_experts": 6, "part_features": 16, "image_size": [32, 32], "patch_size": [16, 16]},
    "zaya": {"num_experts_per_tok": 1, "moe_top_k": 1},  # its router supports top-1 only
}


def tiny_model(name: str, seed: int = 0) -> nn.Module:
    """Return the architecture of the configuration `name`, tiny, in evaluation mode, with weights drawn from `seed`."""
    config_class = _config_class(name)
    config = tiny_config(config_class)
    model_class = next(_model_classes(config_class), None)
    if model_class is None:
        raise InputError(
            f"transformers has no model for {config_class.__name__}; write a function that returns a model"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = model_class._from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_config(config_class: Any) -> Any:
    """Return a configuration with every size that it knows made small; sizes that follow from others stay derived."""
    defaults = config_class()
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if _is_size(defaults, name)}
    aliases = getattr(config_class, "attribute_map", {})
    sizes = {name: size for name, size in sizes.items() if aliases.get(name) not in sizes}
    config = config_class(**sizes | OVERRIDES.get(config_class.model_type, {}))
    config.use_cache = False  # one pass needs no cache, and a model without attention layers cannot have one
    return config


def example_inputs(model: nn.Module, tokens: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Return keyword arguments of one call of a Hugging Face model: one text of `tokens` tokens, or images."""
    config: Any = getattr(model, "config", None)
    main_input = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    if config is None or main_input not in ("input_ids", "pixel_values"):
        raise InputError(f"no example inputs are known for {type(model).__name__}; give them with the model")
    if main_input == "pixel_values":
        return _images(model, config, generator)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise InputError(f"{type(model).__name__} takes at most {limit} tokens here; got {tokens}")
    ids = torch.randint(FIRST_TOKEN_ID, config.vocab_size, (1, tokens), generator=generator)
    inputs = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs


def _images(model: nn.Module, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    batch = 2
    inputs = {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
    if "dataset_index" in inspect.signature(model.forward).parameters:
        inputs["dataset_index"] = torch.arange(batch)
    return inputs


def _config_class(name: str) -> Any:
    """Return the configuration class of `name`, of the language model where there are several modalities."""
    from transformers import CONFIG_MAPPING

    known = {key.replace("-", "_"): key for key in CONFIG_MAPPING}
    key = known.get(name.replace("-", "_"))
    if key is None:
        near = [known[match] for match in difflib.get_close_matches(name.replace("-", "_"), known, n=5, cutoff=0.5)]
        hint = f"near matches: {', '.join(near)}" if near else "transformers.CONFIG_MAPPING lists the names"
        raise InputError(f"{name!r} is neither a Hugging Face configuration nor module:callable; {hint}")
    config_class = CONFIG_MAPPING[key]
    while (part := _language_part(config_class)) is not None:
        config_class = part
    return config_class


def _language_part(config_class: Any) -> Any:
    """Return the configuration class of the language model inside a model of several modalities, or None."""
    from transformers import PretrainedConfig

    for name in ("thinker_config", "text_config"):
        if name in getattr(config_class, "sub_configs", {}):
            part = getattr(config_class(), name)
            return type(part) if isinstance(part, PretrainedConfig) else None
    return None


def _model_classes(config_class: Any) -> Iterator[Any]:
    """Yield the models that take this configuration, the most complete language model first."""
    from transformers import PreTrainedModel

    modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    models = [
        cls
        for cls in vars(modeling).values()
        if inspect.isclass(cls)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == modeling.__name__
        and getattr(cls, "config_class", None) is config_class
        and not cls.__name__.endswith("PreTrainedModel")
    ]
    for suffix in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "TextModel", "Model", "Backbone"):
        yield from (cls for cls in models if cls.__name__.endswith(suffix))


def _is_size(config: Any, name: str) -> bool:
    """Tell whether the configuration has a field of this name that holds a number or nothing, and can be set."""
    accessor = getattr(type(config), name, None)
    if isinstance(accessor, property) and accessor.fset is None:
        return False
    try:
        return hasattr(config, name) and not isinstance(getattr(config, name), (bool, list, dict))
    except RuntimeError:  # some configurations refuse to name one number for layers that differ
        return True
