"""L-Tuning (Kowsher et al. 2024): a text is read behind what is made from a label's words, as a prefix or as a prompt.

    prefix: s(x, y) = w · M(x; p_y),   p_y = Z(F(M(y))),   F(H) = softmax(H Q)ᵀ H
    prompt: s(x, y) = w · M(G(M(y)) ⊕ e(x))

M is the frozen model, H [N, h] its last states over the N tokens of label y, Q [h, P] learned queries (softmax over the
tokens), Z a two-layer network to the keys and values of all layers, as in prefix tuning, G one from each state to an
embedding, ⊕ concatenation and w a scalar head at the text's last token. M(y) never changes, so it is computed once and
kept. In a packed row all labels' virtual tokens stand at the beginning, and a segment sees those of its own label
alone.
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

NAME, PROMPT = "label_prefix", "label_prompt"
"""Of the submodule that the model gets, by the form."""


class _Labels(nn.Module):
    """What a network of two layers, which a subclass has, makes of the frozen model's states of Y labels.

    Args:
        states: M(y) [Y, N, h], padded on the right.
        lengths: Tokens [Y] of each label.
    """

    states: Tensor
    present: Tensor
    inner: nn.Linear
    outer: nn.Linear

    def __init__(self, states: Tensor, lengths: Tensor):
        super().__init__()
        self.register_buffer("states", states)
        self.register_buffer("present", torch.arange(states.shape[1]) < lengths[:, None])

    def _of(self, values: Tensor) -> Tensor:
        """[Y, n, h] -> [Y · n, width], label after label."""
        return self.outer(torch.tanh(self.inner(values))).flatten(0, 1)


class LabelPrefix(_Labels):
    """Keys and values [Y · P, 2 · layers · kv width] of Y labels with P virtual tokens each, label after label."""

    def __init__(self, states: Tensor, lengths: Tensor, tokens: int, hidden: int, width: int):
        super().__init__(states, lengths)
        self.queries = nn.Linear(states.shape[-1], tokens, bias=False)
        self.inner, self.outer = nn.Linear(states.shape[-1], hidden), nn.Linear(hidden, width)

    def forward(self) -> Tensor:
        """See the class."""
        states = self.states.to(self.queries.weight.dtype)
        scores = self.queries(states).masked_fill(~self.present[..., None], float("-inf"))
        return self._of(scores.softmax(1).mT @ states)  # of [Y, P, h]


class LabelPrompt(_Labels):
    """Embeddings [Y · N, h] of Y labels, label after label: G of each state; N is the longest label's length."""

    def __init__(self, states: Tensor, lengths: Tensor, hidden: int):
        super().__init__(states, lengths)
        self.inner, self.outer = nn.Linear(states.shape[-1], hidden), nn.Linear(hidden, states.shape[-1])

    def forward(self) -> Tensor:
        """See the class."""
        return self._of(self.states.to(self.inner.weight.dtype))


def apply_l_tuning(model: PreTrainedModel, config: LTuningConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Freeze a sequence classifier with one label and let its scores be those of (text, label), in place.

    `model(..., token_scores=True, value_at=places, label_at=labels)` then takes the label [B, T] that each token is
    read behind, -1 for none.
    """
    model.requires_grad_(False)
    states, lengths = _label_states(model, config, tokenizer)
    (_add_prompt if config.form == "prompt" else _add_prefix)(model, config, states, lengths)
    setattr(model, OWN_CONFIG, config)
    return model


def _add_prefix(model: PreTrainedModel, config: LTuningConfig, states: Tensor, lengths: Tensor) -> None:
    text: Any = model.config.get_text_config()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
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


def _add_prompt(model: PreTrainedModel, config: LTuningConfig, states: Tensor, lengths: Tensor) -> None:
    model.add_module(PROMPT, LabelPrompt(states, lengths, config.hidden))
    original: Any = model.forward

    def forward(self: Any, *args: Any, token_scores: bool = False, **kwargs: Any) -> Any:
        return original(**_after(self, **kwargs)) if token_scores else original(*args, **kwargs)

    model.forward = MethodType(forward, model)


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
    seen = _additive(own, attention_mask.dtype)[:, None]
    whole = attention_mask.expand(len(input_ids), -1, -1, -1)
    return {
        **kwargs,
        "token_scores": True,
        "input_ids": input_ids,
        "position_ids": position_ids + tokens,
        "attention_mask": torch.cat([seen, whole], -1),
        "past_key_values": cache,
    }


def _after(
    model: Any,
    *,
    label_at: Tensor,
    value_at: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """The inputs of the plain model: V = Y · N embeddings of labels, then the T words of the row. A label's embeddings
    see those of their label before them, a segment its own label's, and itself; its positions go on from there."""
    own = getattr(model, PROMPT)
    words, prompt = model.get_input_embeddings()(input_ids), own()
    (size, width), (labels, longest) = input_ids.shape, own.present.shape
    if attention_mask is None:
        attention_mask = causal_mask(width, words)
    label = torch.arange(labels, device=words.device).repeat_interleave(longest)  # [V]
    place = torch.arange(longest, device=words.device).repeat(labels)
    before = (label[:, None] == label) & (place <= place[:, None])
    seen = (label == label_at[..., None]) & own.present.flatten()  # [B, T, V]
    above = torch.cat([before, before.new_zeros(len(label), width)], 1)
    above = _additive(above, attention_mask.dtype)[None, None].expand(size, -1, -1, -1)
    below = torch.cat([_additive(seen, attention_mask.dtype)[:, None], attention_mask.expand(size, -1, -1, -1)], -1)
    begun = torch.where(label_at < 0, 0, own.present.sum(1)[label_at.clamp(min=0)])
    row, column = value_at // width, value_at % width
    return {
        **kwargs,
        "token_scores": True,
        "inputs_embeds": torch.cat([prompt.to(words.dtype).expand(size, -1, -1), words], 1),
        "position_ids": torch.cat([place.expand(size, -1), position_ids + begun], 1),
        "attention_mask": torch.cat([above, below], -2),
        "value_at": row * (len(label) + width) + len(label) + column,
    }


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to attention scores: 0 where something is seen, the lowest number elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
