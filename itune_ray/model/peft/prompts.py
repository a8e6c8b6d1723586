"""Prompt tuning, P-tuning, prefix tuning and P-tuning v2 over packed documents.

A packed row gets its P virtual tokens once, at its beginning, and every document sees them and itself alone. That is
exact: virtual tokens see no document, so one copy serves all. Positions of documents start at P, as they do when PEFT
opens the saved adapter. An explicit 4-D mask is what makes it exact, so attention has to take one.
"""

from types import MethodType
from typing import Any

import peft
import torch
from peft.peft_model import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.adaptation import PrefixTuningConfig, PromptTuningConfig, PTuningConfig, PTuningV2Config
from itune_ray.errors import ModelError
from itune_ray.model.peft.names import ADAPTER
from itune_ray.model.sharding import whole_copy

PromptConfig = PromptTuningConfig | PTuningConfig | PrefixTuningConfig | PTuningV2Config


def apply_prompts(model: PreTrainedModel, config: PromptConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The model in PEFT's wrapper, whose forward pass is ours where scores of tokens are asked for."""
    wrapped: Any = peft.get_peft_model(model, _settings(model, config), adapter_name=ADAPTER)
    if isinstance(config, PromptTuningConfig):
        _start_from_words(wrapped, config, tokenizer)
    original = wrapped.forward

    def forward(self: Any, *args: Any, token_scores: bool = False, **kwargs: Any) -> Any:
        return _scores(self, **kwargs) if token_scores else original(*args, **kwargs)

    wrapped.forward = MethodType(forward, wrapped)
    return wrapped


def is_prompted(model: nn.Module) -> bool:
    """Whether the model has a trained prompt or prefix."""
    return isinstance(getattr(model, "module", model), PeftModelForCausalLM) and hasattr(
        getattr(model, "module", model), "prompt_encoder"
    )


@torch.no_grad()
def trained_prompt(model: Any) -> Tensor:
    """What is saved: [P, H] embeddings, or [P, 2 · layers · kv width] keys and values. Collective when sharded."""
    encoder = whole_copy(model.prompt_encoder[ADAPTER])
    return encoder(torch.arange(model.peft_config[ADAPTER].num_virtual_tokens)[None])[0]


def _settings(model: Any, config: PromptConfig) -> Any:
    text = model.config.get_text_config()
    shared: dict[str, Any] = {"task_type": peft.TaskType.CAUSAL_LM, "num_virtual_tokens": config.tokens}
    if isinstance(config, PromptTuningConfig):
        return peft.PromptTuningConfig(**shared)
    if isinstance(config, PTuningConfig):
        kind = "MLP" if config.encoder == "mlp" else "LSTM"
        return peft.PromptEncoderConfig(
            **shared,
            encoder_reparameterization_type=kind,
            encoder_hidden_size=config.hidden,
            encoder_dropout=0.0,
            encoder_num_layers=2,
        )
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    shared |= {  # PEFT takes the heads' width to be hidden_size / heads, which it need not be
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "token_dim": width * text.num_attention_heads,
    }
    if isinstance(config, PTuningV2Config):
        return peft.PrefixTuningConfig(**shared)
    return peft.PrefixTuningConfig(**shared, prefix_projection=True, encoder_hidden_size=config.hidden)


@torch.no_grad()
def _start_from_words(wrapped: Any, config: PromptTuningConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Start as words do: rows of N(0, 1) are far longer than embeddings."""
    table = wrapped.get_base_model().get_input_embeddings().weight
    if config.text is None:
        ids = torch.randint(len(tokenizer), (config.tokens,))
    else:
        words = tokenizer(config.text, add_special_tokens=False)["input_ids"]
        if not words:
            raise ModelError("the text to start from has no token", got=config.text, knob="model.peft.text")
        ids = torch.tensor(words).repeat(-(-config.tokens // len(words)))[: config.tokens]  # type: ignore[arg-type]
    wrapped.prompt_encoder[ADAPTER].embedding.weight.copy_(table[ids])


def _scores(
    self: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    config = self.peft_config[ADAPTER]
    base, tokens = self.get_base_model(), config.num_virtual_tokens
    words = base.get_input_embeddings()(input_ids)
    size, width = input_ids.shape
    prompt = self.prompt_encoder[ADAPTER](torch.arange(tokens, device=input_ids.device)[None]).to(words.dtype)
    if attention_mask is None:
        attention_mask = causal_mask(width, words)
    seen = attention_mask.new_zeros(*attention_mask.shape[:2], width, tokens)
    below = torch.cat([seen, attention_mask], -1)
    shared: dict[str, Any] = {"token_scores": True, **kwargs}
    if config.peft_type == peft.PeftType.PREFIX_TUNING:
        cache = prefix_cache(prompt[0], config.num_layers, config.num_attention_heads, size)
        return base(
            inputs_embeds=words,
            attention_mask=below,
            position_ids=position_ids + tokens,
            past_key_values=cache,
            labels=labels,
            **shared,
        )
    hidden = attention_mask.new_full((*attention_mask.shape[:2], tokens, width), torch.finfo(words.dtype).min)
    above = torch.cat(
        [causal_mask(tokens, words).expand(*attention_mask.shape[:2], -1, -1), hidden.to(below.dtype)], -1
    )
    own = torch.arange(tokens, device=input_ids.device).expand(size, -1)
    if "router_tokens" in shared:  # virtual tokens are padding to the router loss
        shared["router_tokens"] = torch.nn.functional.pad(shared["router_tokens"], (tokens, 0))
    return base(
        inputs_embeds=torch.cat([prompt.expand(size, -1, -1), words], 1),
        attention_mask=torch.cat([above.to(below.dtype), below], -2),
        position_ids=torch.cat([own, position_ids + tokens], 1),
        labels=torch.cat([labels.new_full((size, tokens), -100), labels], 1),
        **shared,
    )


def causal_mask(width: int, like: Tensor) -> Tensor:
    """Additive mask [1, 1, T, T] of one document, in the dtype and on the device of a tensor."""
    lowest = torch.finfo(like.dtype).min
    return torch.full((width, width), lowest, dtype=like.dtype, device=like.device).triu(1)[None, None]


def prefix_cache(prefix: Tensor, layers: int, heads: int, size: int) -> DynamicCache:
    """[P, 2 · layers · kv width] as the keys and values that every layer finds already there, for `size` rows."""
    parts = prefix.view(len(prefix), layers * 2, heads, -1).permute(1, 2, 0, 3)
    cache = DynamicCache()
    for layer in range(layers):
        keys, values = (parts[2 * layer + i].expand(size, -1, -1, -1) for i in (0, 1))
        cache.update(keys, values, layer)
    return cache
