"""Structured pruning: which heads and channels stay, and the smaller model they make.

Counts are equal in every layer, because an ordinary checkpoint has one head count and one MLP width. With grouped
queries a key-value head goes together with all its query heads, so that the mapping between them stays (methods C2,
move A) and the KV cache shrinks too.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel

from itune_ray.compress.blocks import Block, Shape
from itune_ray.config.compress import StructuredConfig
from itune_ray.errors import CompressError
from itune_ray.model.load import parameters_on_meta

EQUIVALENTS = {"llama": "mistral"}
"""Model type whose config refuses head counts that do not divide the hidden size -> one with the same forward that
takes them; its sliding window is switched off."""


@dataclass(frozen=True)
class Kept:
    """What stays, per layer and in order."""

    kv_heads: list[list[int]]
    channels: list[list[int]]


def kept_counts(config: StructuredConfig, shape: Shape) -> tuple[int, int]:
    """Key-value heads and channels that stay in every layer.

    Raises:
        CompressError: The share of heads is no whole number of them, or nothing would be left.
    """
    share = config.sparsity if config.heads is None else config.heads
    heads_off = share * shape.kv_heads
    if abs(heads_off - round(heads_off)) > 1e-6:
        possible = ", ".join(f"{count / shape.kv_heads:g}" for count in range(shape.kv_heads))
        what = f"{share:g} of {shape.kv_heads} key-value heads is {heads_off:g} heads"
        raise CompressError(what, got=share, allowed=possible, knob="method.sparsity or method.heads")
    share = config.sparsity if config.channels is None else config.channels
    multiple = config.channel_multiple
    channels = shape.channels if share == 0 else int(shape.channels * (1 - share) / multiple + 0.5) * multiple
    if channels < 1:
        raise CompressError(
            f"no MLP channel would be left of {shape.channels}",
            got=share,
            allowed=f"at least {multiple} channels",
            knob="method.channels or method.channel_multiple",
        )
    return shape.kv_heads - round(heads_off), min(channels, shape.channels)


def choose(heads: Tensor, channels: Tensor, shape: Shape, config: StructuredConfig) -> Kept:
    """The most important, layer by layer; of equals the first.

    Args:
        heads: [L, H] scores; a key-value group's is the sum over its query heads.
        channels: [L, C].
    """
    num_heads, num_channels = kept_counts(config, shape)
    groups = heads.unflatten(1, (shape.kv_heads, shape.group)).sum(-1)
    return Kept(_top(groups, num_heads), _top(channels, num_channels))


def _top(scores: Tensor, count: int) -> list[list[int]]:
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return order.sort(dim=1).values.tolist()


def smaller_model(model: PreTrainedModel, blocks: Sequence[Block], shape: Shape, kept: Kept) -> PreTrainedModel:
    """A new model of the kept heads and channels, its other weights the same, in the dtype of the old one."""
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for layer, block in enumerate(blocks):
        queries, keys = _rows_of_heads(kept.kv_heads[layer], shape)
        channels = torch.tensor(kept.channels[layer])
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            _keep_rows(weights, f"{block.attention_name}.{name}", rows)
        _keep_columns(weights, f"{block.attention_name}.o_proj", queries)
        for name in ("gate_proj", "up_proj"):
            _keep_rows(weights, f"{block.mlp_name}.{name}", channels)
        _keep_columns(weights, f"{block.mlp_name}.down_proj", channels)
    config = smaller_config(model.config, len(kept.kv_heads[0]), len(kept.channels[0]), shape)
    with parameters_on_meta():
        small = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    problems = small.load_state_dict(weights, strict=False, assign=True)
    tied = {name for name in problems.missing_keys if name.endswith("lm_head.weight")}
    if set(problems.missing_keys) - tied or problems.unexpected_keys:
        raise CompressError(
            "the smaller model does not hold the same weights as the larger one",
            got=", ".join([*problems.missing_keys, *problems.unexpected_keys][:5]),
        )
    small.tie_weights()
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def smaller_config(config: Any, kv_heads: int, channels: int, shape: Shape) -> Any:
    """The config with the new counts, under an equivalent model type where its own refuses them."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("architectures", "transformers_version")}
    values |= {
        "num_attention_heads": kv_heads * shape.group,
        "num_key_value_heads": kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": channels,
    }
    kind = str(values.pop("model_type"))
    try:
        return _config(kind, values)
    except ValueError as error:
        if kind not in EQUIVALENTS:
            raise CompressError(
                f"{kind} models refuse this head count: {' '.join(str(error).split())[:200]}",
                got=f"{kv_heads * shape.group} heads",
                allowed=f"head counts that divide {values['hidden_size']}",
                knob="method.heads",
            ) from None
    if values.get("attention_bias") or values.get("mlp_bias"):
        raise CompressError(f"{kind} with biases has no equivalent that takes this head count", knob="method.heads")
    return _config(EQUIVALENTS[kind], values | {"sliding_window": None})


def _config(kind: str, values: dict[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:  # noqa: BLE001  transformers' validators raise several kinds
        raise ValueError(str(error)) from None


def _rows_of_heads(kv_heads: Sequence[int], shape: Shape) -> tuple[Tensor, Tensor]:
    """Rows of q_proj and of k_proj and v_proj that the kept key-value heads own."""
    dims = torch.arange(shape.head_dim)
    keys = torch.tensor(kv_heads)
    queries = (keys[:, None] * shape.group + torch.arange(shape.group)).flatten()
    return tuple((heads[:, None] * shape.head_dim + dims).flatten() for heads in (queries, keys))  # type: ignore[return-value]


def _keep_rows(weights: dict[str, Tensor], module: str, rows: Tensor) -> None:
    for name in (f"{module}.weight", f"{module}.bias"):
        if name in weights:
            weights[name] = weights[name][rows.to(weights[name].device)].contiguous()


def _keep_columns(weights: dict[str, Tensor], module: str, columns: Tensor) -> None:
    name = f"{module}.weight"
    weights[name] = weights[name][:, columns.to(weights[name].device)].contiguous()
