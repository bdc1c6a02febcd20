"""Small plain-torch MoE models, one routing style each, for tests, demos and benchmarks.

A block takes x [B, S, D] and returns the same shape; `BLOCKS[name](d_model)` makes one with small sizes, and
`TinyMoELM(BLOCKS[name])` a causal language model around it.
"""

from collections.abc import Callable

from torch import nn

from .causal_lm import TinyMoELM
from .deepseek import DeepseekMoE
from .expert_choice import ExpertChoiceMoE
from .gpt_oss import GptOssMoE
from .gshard import GShardMoE
from .mixtral import MixtralMoE
from .qwen import QwenMoE
from .switch import SwitchMoE
from .threshold import ThresholdMoE

BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "mixtral": MixtralMoE,
    "deepseek": DeepseekMoE,
    "gpt_oss": GptOssMoE,
    "switch": SwitchMoE,
    "qwen": QwenMoE,
    "expert_choice": ExpertChoiceMoE,
    "threshold": ThresholdMoE,
    "gshard": GShardMoE,
}

__all__ = [
    "BLOCKS",
    "DeepseekMoE",
    "ExpertChoiceMoE",
    "GShardMoE",
    "GptOssMoE",
    "MixtralMoE",
    "QwenMoE",
    "SwitchMoE",
    "ThresholdMoE",
    "TinyMoELM",
]
