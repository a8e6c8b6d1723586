"""Adaptation: every weight, or low-rank adapters W' = W0 + s B A (survey eq. 7), and what either costs (eq. 8).

Shapes: A [r, k] and B [d, r] for a matrix W [d, k] (d outputs, k inputs, torch layout); s = alpha/r, or alpha/sqrt(r)
with rsLoRA. Adapter weights start as a function of (seed, parameter name), so that neither the strategy nor the number
of ranks changes them; B starts at zero, so the adapted model starts equal to its base.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.train import LoraConfig, PeftConfig
from itune_ray.data.records import row_seed
from itune_ray.errors import ModelError, did_you_mean
from itune_ray.model.reward import HEAD, reward_head

ADAPTER = "default"
_WRAPPED_SEGMENTS = (".base_layer", ".token_adapter", ".original_module")


@dataclass(frozen=True)
class MatrixCost:
    """One adapted matrix: trainable r(d+k) against d·k weights, ratio r(1/d + 1/k) (survey eq. 8)."""

    name: str
    out_features: int
    in_features: int
    rank: int

    @property
    def trainable(self) -> int:
        return self.rank * (self.out_features + self.in_features)

    @property
    def ratio(self) -> float:
        return self.trainable / (self.out_features * self.in_features)


@dataclass(frozen=True)
class ParameterReport:
    """Trainable and total parameters of a model, and per adapted matrix; eq. 8 holds per matrix, not per model."""

    total: int
    """Base parameters plus adapters; tied weights counted once."""
    trainable: int
    matrices: tuple[MatrixCost, ...] = ()

    @property
    def ratio(self) -> float:
        """Share of all parameters that is trained."""
        return self.trainable / self.total


def apply_peft(model: PreTrainedModel, config: PeftConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """Wrap a model for training, after the fused head is installed and before it is sharded.

    A reward model's head is trained whole beside any adapter. Trainable weights are fp32 whatever the base is stored
    in, since small updates vanish in bf16.
    """
    if config.type == "full":
        model.requires_grad_(True)
        return model
    head = reward_head(model)
    wrapped = _lora(model, config, tokenizer)
    if head is not None:
        head.requires_grad_(True)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if not parameter.is_meta:
                parameter.data.copy_(initial_adapter(name, tuple(parameter.shape), seed, fallback=parameter.data))
    return wrapped


def _lora(model: PreTrainedModel, config: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    tokens = _trained_rows(model, config.train_tokens, tokenizer)
    target: Any = config.target if isinstance(config.target, str) else list(config.target)
    scalar = reward_head(model) is not None
    settings = peft.LoraConfig(
        task_type=None if scalar else peft.TaskType.CAUSAL_LM,
        exclude_modules=[HEAD] if scalar and target == "all-linear" else None,
        r=config.rank,
        lora_alpha=config.alpha or 2 * config.rank,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=target,
        use_rslora=config.rslora,
        trainable_token_indices=tokens,
    )
    try:
        return peft.get_peft_model(model, settings, adapter_name=ADAPTER)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"LoRA cannot be applied: {str(error).splitlines()[0]}",
            got=config.target,
            allowed=f"all-linear or some of {', '.join(linear)}",
            knob="model.peft.target",
        ) from None


def _trained_rows(
    model: PreTrainedModel, tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]] | None:
    """Embedding rows to train, and the head's rows too where it has its own matrix."""
    if not tokens:
        return None
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ModelError(
                f"train_tokens names no token of the vocabulary{did_you_mean(token, vocabulary)}",
                got=token,
                knob="model.peft.train_tokens",
            )
    ids = [vocabulary[token] for token in tokens]
    tables: list[Any] = [model.get_input_embeddings()]
    if not model.config.get_text_config().tie_word_embeddings:
        tables.extend(table for table in (model.get_output_embeddings(),) if table is not None)
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)].rpartition(".")[2]: ids for table in tables}


def initial_adapter(name: str, shape: tuple[int, ...], seed: int, fallback: Tensor) -> Tensor:
    """Starting value of an adapter parameter: A uniform in ±1/sqrt(k) (Kaiming with a = sqrt 5), B zero.

    Anything else that is trained, such as token rows, keeps `fallback`.
    """
    if ".lora_B." in name or ".lora_embedding_A." in name:
        return torch.zeros(shape)
    if ".lora_A." in name or ".lora_embedding_B." in name:
        generator = torch.Generator().manual_seed(row_seed(seed, "train.adapter", name))
        uniform = torch.rand(shape, generator=generator) * 2 - 1
        return uniform / math.sqrt(shape[-1])
    return fallback


def base_name(name: str) -> str | None:
    """The name a parameter has in the plain checkpoint, or None for an adapter's own parameter."""
    if ".lora_" in name or "trainable_tokens" in name:
        return None
    name = name.removeprefix("module.").removeprefix("base_model.model.")
    for segment in _WRAPPED_SEGMENTS:
        name = name.replace(segment, "")
    return name


def saved_name(name: str) -> str:
    """The name an adapter's parameter has in a saved adapter, as PEFT writes it: the adapter's own name left out."""
    return name.removeprefix("module.").replace(f".{ADAPTER}", "")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(plain module name, PEFT layer) of every adapted matrix."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("module.").removeprefix("base_model.model."), module


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count parameters before sharding."""
    matrices = tuple(
        MatrixCost(name, int(layer.out_features), int(layer.in_features), int(layer.r[ADAPTER]))
        for name, layer in lora_layers(model)
    )
    parameters = list(model.parameters())
    return ParameterReport(
        total=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        matrices=matrices,
    )
