"""L-Tuning's prefix (Kowsher et al. 2024): a text is read behind keys and values that are made from a label's words.

    p_y = Z(F(M(y))),   F(H) = softmax(H Q)ᵀ H,   s(x, y) = w · M(x; p_y)

M is the frozen model, H [N, h] its last states over the N tokens of label y, Q [h, P] learned queries (softmax over the
tokens), Z a two-layer network to the keys and values of all layers, as in prefix tuning, and w a scalar head at the
text's last token. M(y) never changes, so it is computed once and kept. In a packed row all labels' virtual tokens
stand at the beginning, and a segment sees those of its own label alone.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.adaptation import LTuningConfig
from itune_ray.errors import ModelError
from itune_ray.model.peft.names import OWN_CONFIG
from itune_ray.model.peft.prompts import causal_mask, prefix_cache

NAME = "label_prefix"
"""Of the submodule that the model gets."""


class LabelPrefix(nn.Module):
    """Keys and values [Y · P, 2 · layers · kv width] of Y labels with P virtual tokens each, label after label.

    Args:
        states: M(y) [Y, N, h], padded on the right.
        lengths: Tokens [Y] of each label.
    """

    states: Tensor
    present: Tensor

    def __init__(self, states: Tensor, lengths: Tensor, tokens: int, hidden: int, width: int):
        super().__init__()
        self.register_buffer("states", states)
        self.register_buffer("present", torch.arange(states.shape[1]) < lengths[:, None])
        self.queries = nn.Linear(states.shape[-1], tokens, bias=False)
        self.inner, self.outer = nn.Linear(states.shape[-1], hidden), nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        """See the class."""
        states = self.states.to(self.queries.weight.dtype)
        scores = self.queries(states).masked_fill(~self.present[..., None], float("-inf"))
        pooled = scores.softmax(1).mT @ states  # [Y, P, h]
        return self.outer(torch.tanh(self.inner(pooled))).flatten(0, 1)


def apply_l_tuning(model: PreTrainedModel, config: LTuningConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Freeze a sequence classifier with one label and let its scores be those of (text, label), in place.

    `model(..., token_scores=True, value_at=places, label_at=labels)` then takes the label [B, T] that each token is
    read behind, -1 for none.
    """
    model.requires_grad_(False)
    text: Any = model.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    states, lengths = _label_states(model, config, tokenizer)
    width = 2 * text.num_hidden_layers * heads * head_width
    model.add_module(NAME, LabelPrefix(states, lengths, config.tokens, config.hidden, width))
    original: Any = model.forward

    def forward(self: Any, *args: Any, token_scores: bool = False, **kwargs: Any) -> Any:
        if not token_scores:
            return original(*args, **kwargs)
        prefix = getattr(self, NAME)()
        cache = prefix_cache(prefix, text.num_hidden_layers, heads, kwargs["input_ids"].shape[0])
        return original(**_behind(prefix, config.tokens, cache, **kwargs))

    model.forward = MethodType(forward, model)
    setattr(model, OWN_CONFIG, config)
    return model


@torch.no_grad()
def _label_states(model: Any, config: LTuningConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """M(y) of every label, [Y, N, h] fp32 padded on the right, and the labels' tokens [Y]."""
    found: list[Tensor] = []
    for label in config.labels:
        ids: Any = tokenizer(label, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError("a label has no token", got=label, knob="model.peft.labels")
        asked = torch.tensor([ids], device=model.device)
        found.append(model.base_model(input_ids=asked, use_cache=False).last_hidden_state[0].float())
    lengths = torch.tensor([len(states) for states in found])
    return nn.utils.rnn.pad_sequence(found, batch_first=True), lengths


def _behind(
    prefix: Tensor,
    tokens: int,
    cache: Any,
    *,
    label_at: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The inputs of the plain model: a segment sees its own label's virtual tokens, and itself."""
    if attention_mask is None:
        attention_mask = causal_mask(input_ids.shape[1], prefix)
    own = torch.arange(len(prefix), device=prefix.device) // tokens == label_at[..., None]  # [B, T, Y · P]
    seen = torch.zeros(own.shape, dtype=attention_mask.dtype, device=own.device)
    seen = seen.masked_fill_(~own, torch.finfo(attention_mask.dtype).min)[:, None]
    whole = attention_mask.expand(len(input_ids), -1, -1, -1)
    return {
        **kwargs,
        "token_scores": True,
        "input_ids": input_ids,
        "position_ids": position_ids + tokens,
        "attention_mask": torch.cat([seen, whole], -1),
        "past_key_values": cache,
    }
