"""LLaMA-Adapter (Zhang et al. 2024) by the `peft` library: prompts seen by the attention of the upper layers."""

from typing import Any

import peft
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from itune_ray.config.adaptation import LlamaAdapterConfig
from itune_ray.errors import ModelError
from itune_ray.model.peft.names import ADAPTER

FAMILIES = ("llama", "mistral")
"""Of those that the library knows, the ones whose attention has a matrix each for queries, keys and values."""


def apply_llama_adapter(model: PreTrainedModel, config: LlamaAdapterConfig) -> nn.Module:
    """Wrap the model by the library's adaption prompts.

    Raises:
        ModelError: A family the library cannot do it for, heads of a width it does not expect, or too many layers.
    """
    text: Any = model.config.get_text_config()
    if model.config.model_type not in FAMILIES:
        raise ModelError(
            "LLaMA-Adapter is there for some families alone",
            got=model.config.model_type,
            allowed=f"{' or '.join(FAMILIES)}; for others llama_excitor or p_tuning_v2",
            knob="model.peft.type",
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if width * text.num_attention_heads != text.hidden_size:  # the library counts key heads by hidden_size
        raise ModelError(
            "LLaMA-Adapter needs heads that make up the hidden size together",
            got=f"{text.num_attention_heads} heads of {width}",
            allowed=f"{text.hidden_size} in all; else llama_excitor or p_tuning_v2",
            knob="model.peft.type",
        )
    layers = config.adapted_layers(text.num_hidden_layers)
    if layers > text.num_hidden_layers:
        raise ModelError(
            "the model has fewer layers than are to be adapted",
            got=layers,
            allowed=f"at most {text.num_hidden_layers}",
            knob="model.peft.layers",
        )
    settings = peft.AdaptionPromptConfig(
        task_type=peft.TaskType.CAUSAL_LM, adapter_len=config.tokens, adapter_layers=layers
    )
    return peft.get_peft_model(model, settings, adapter_name=ADAPTER)
