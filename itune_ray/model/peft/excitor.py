"""LLaMA-Excitor (Zou et al. 2024), survey eq. 27 corrected: learned prompts move attention, and no value.

    softmax((Q Kᵀ + g Q K_Eᵀ) / √d) V = softmax(Q (K + g K_E)ᵀ / √d) V,   K_E(t) = softmax(x_t A B Pᵀ / √d_P) P

The second form is what is computed: an edit of the keys. K_E(t) follows from token t alone, so causality, packed rows,
caches and every attention kernel stay as they are; the edited key is what a cache keeps. It is added after rotation,
so it has no position. As a survey prints it, E would be a free matrix over pairs of positions, which cannot exist.

Shapes: B rows, T tokens, h hidden size, K prompts, H key heads of width d, d_P = H d; A [h, r], B [r, d_P], P [K, d_P],
g [H]. How K_E comes from the prompts is inferred from descriptions and the published number of parameters: one pair
A, B per layer, 30 layers, 30 prompts and rank 16 give 7.62 million for 7B.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from itune_ray.config.adaptation import LlamaExcitorConfig
from itune_ray.errors import ModelError
from itune_ray.model.peft.bottleneck import decoder_layers
from itune_ray.model.peft.names import OWN_CONFIG

NAME = "excitor"
"""Of the submodule that attention gets."""
LOGITS = 3.0
"""Standard deviation, at the start, of the logits by which a token chooses among prompts. With linear layers' usual
start it is 0.3: all tokens then get nearly the same key, which a softmax over keys ignores."""


class Excitor(nn.Module):
    """g K_E of one layer: K d_P + r (h + d_P) + H parameters; g is zero at the start."""

    def __init__(self, hidden: int, heads: int, head_width: int, prompts: int, rank: int):
        super().__init__()
        keys = heads * head_width
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, keys, bias=False)
        nn.init.normal_(self.down.weight, std=hidden**-0.5)
        nn.init.normal_(self.up.weight, std=LOGITS * rank**-0.5)
        self.prompts = nn.Parameter(torch.randn(prompts, keys))
        self.gate = nn.Parameter(torch.zeros(heads))

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] -> [B, H, T, d], in the dtype of the parameters."""
        queries = self.up(self.down(x.to(self.prompts.dtype)))
        weights = (queries @ self.prompts.T / math.sqrt(self.prompts.shape[1])).softmax(-1)
        extra = (weights @ self.prompts).unflatten(-1, (len(self.gate), -1)).transpose(1, 2)
        return extra * self.gate[:, None, None]


class _EditedKeys:
    """Stands before a cache, or where none is: attention hands new keys to it, after rotation, and gets all back."""

    def __init__(self, cache: Any, edit: Tensor):
        self._cache, self._edit, self.used = cache, edit, False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.used = True
        keys = keys + self._edit.to(keys.dtype)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def apply_excitor(model: PreTrainedModel, config: LlamaExcitorConfig) -> nn.Module:
    """Freeze the model and give the attention of its upper layers excitors, in place.

    Raises:
        ModelError: Fewer layers than are to be adapted, or attention without a matrix for keys.
    """
    model.requires_grad_(False)
    layers = decoder_layers(model)
    count = config.adapted_layers(len(layers))
    if count > len(layers):
        raise ModelError(
            "the model has fewer layers than are to be adapted",
            got=count,
            allowed=f"at most {len(layers)}",
            knob="model.peft.layers",
        )
    for layer in layers[-count:]:
        attention: Any = getattr(layer, "self_attn", None)
        keys = getattr(attention, "k_proj", None)
        if keys is None or not hasattr(attention, "head_dim"):
            raise ModelError(
                "this family's layers have no `self_attn.k_proj` whose keys could be changed",
                got=model.config.model_type,
                knob="model.peft.type",
            )
        heads = keys.out_features // attention.head_dim
        made = Excitor(keys.in_features, heads, attention.head_dim, config.tokens, config.rank)
        attention.add_module(NAME, made.to(keys.weight.device))
        attention.register_forward_pre_hook(_edit_keys, with_kwargs=True)
        attention.register_forward_hook(_check_edited, with_kwargs=True)
    setattr(model, OWN_CONFIG, config)
    return model


def _edit_keys(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    edit = getattr(attention, NAME)(hidden)
    return args, {**kwargs, "past_key_values": _EditedKeys(kwargs.get("past_key_values"), edit)}


def _check_edited(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if not kwargs["past_key_values"].used:
        raise ModelError("this attention hands its keys to no cache, where they could be changed", got=type(attention))
