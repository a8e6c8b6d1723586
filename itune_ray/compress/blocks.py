"""Where a decoder keeps its attention heads and MLP channels, found by the names of its matrices.

Llama, Mistral, Qwen, Gemma, OLMo, SmolLM and their kin name them alike: q_proj, k_proj, v_proj, o_proj and gate_proj,
up_proj, down_proj. What stores them otherwise (fused matrices, experts) is refused by name.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from itune_ray.errors import CompressError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Block:
    """One decoder layer's prunable parts."""

    attention: Any
    """Module with the matrices of `ATTENTION`."""
    attention_name: str
    mlp: Any
    """Module with the matrices of `MLP`."""
    mlp_name: str


@dataclass(frozen=True)
class Shape:
    """What pruning changes, equal in every layer."""

    heads: int
    kv_heads: int
    head_dim: int
    channels: int

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks of a decoder, in order; raises `CompressError` where its layers are built otherwise."""
    attention = _with(model, ATTENTION)
    mlp = _with(model, MLP)
    layers = int(model.config.get_text_config().num_hidden_layers)  # type: ignore[union-attr,operator]
    if len(attention) != layers or len(mlp) != layers:
        seen = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise CompressError(
            f"structured pruning knows decoders with {', '.join(ATTENTION + MLP)} in every layer; this one has "
            f"{len(attention)} such attentions and {len(mlp)} such MLPs in {layers} layers",
            got=f"{type(model).__name__} with {', '.join(seen)}",
            allowed="dense decoders of the Llama kind",
            knob="model.path",
        )
    return [Block(a, a_name, m, m_name) for (a_name, a), (m_name, m) in zip(attention, mlp, strict=True)]


def shape_of(model: nn.Module) -> Shape:
    """Head and channel counts by the model's config."""
    return config_shape(model.config)


def config_shape(whole: Any) -> Shape:
    """Head and channel counts by a transformers config, without weights."""
    config = whole.get_text_config()
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Shape(heads, kv_heads, head_dim, int(config.intermediate_size))


def _with(model: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in names)
    ]
