"""Adaptation: from a config of `model.peft` to a model whose trained parameters are there and alone trainable.

Low-rank adapters are W' = W0 + s B A (survey eq. 7), A [r, k] and B [d, r] for a matrix W [d, k] (d outputs, k inputs,
torch layout), s = alpha/r, or alpha/sqrt(r) with rsLoRA. Their weights start as a function of (seed, parameter name),
those of other methods as one of (seed, method), so that neither the strategy nor the number of ranks changes them.
"""

import math
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.adaptation import (
    BOTTLENECKS,
    AdaloraConfig,
    BitfitConfig,
    LlamaAdapterConfig,
    LlamaExcitorConfig,
    LoraConfig,
    LTuningConfig,
    PeftConfig,
    PeftLibraryConfig,
    QloraConfig,
    Targets,
)
from itune_ray.data.records import row_seed
from itune_ray.errors import ModelError, did_you_mean, first_line
from itune_ray.model.images import beside_language
from itune_ray.model.nf4 import quantise_linear_layers
from itune_ray.model.peft.biases import apply_bitfit
from itune_ray.model.peft.bottleneck import apply_bottlenecks
from itune_ray.model.peft.excitor import apply_excitor
from itune_ray.model.peft.l_tuning import apply_l_tuning
from itune_ray.model.peft.library import apply_library
from itune_ray.model.peft.llama_adapter import apply_llama_adapter
from itune_ray.model.peft.names import ADAPTER, base_name
from itune_ray.model.peft.prompts import apply_prompts
from itune_ray.model.reward import HEAD, reward_head
from itune_ray.model.router import EXPERT_LAYERS, has_fused_experts


def starts_by_name(config: PeftConfig) -> bool:
    """Whether every starting value follows from the base's weights in files, the seed and the parameter's name, so that
    the model can be placed while it is still empty. Otherwise each rank first loads the whole base on CPU."""
    return config.type == "full" or (config.type == "lora" and not config.dora)


def apply_peft(model: PreTrainedModel, config: PeftConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """Wrap a model for training, after the fused head is installed and before it is sharded.

    A reward model's head is trained whole beside any adapter. Trainable weights are fp32 whatever the base is stored
    in, since small updates vanish in bf16.
    """
    if config.type == "full":
        model.requires_grad_(True)
        return model
    head = reward_head(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(row_seed(seed, "train.adapter", config.name))
        wrapped = _adapted(model, config, tokenizer)
    if head is not None:
        head.requires_grad_(True)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if isinstance(config, LoraConfig | QloraConfig) and not parameter.is_meta:
                parameter.data.copy_(initial_adapter(name, tuple(parameter.shape), seed, fallback=parameter.data))
    own = [name for name, _ in wrapped.named_buffers() if base_name(name) is None]
    wrapped._ddp_params_and_buffers_to_ignore = own  # type: ignore[assignment]  equal on all ranks: nothing to send
    return wrapped


def _adapted(model: PreTrainedModel, config: Any, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if isinstance(config, LoraConfig | QloraConfig | AdaloraConfig):
        return _low_rank(model, config, tokenizer)
    if isinstance(config, PeftLibraryConfig):
        return apply_library(model, config)
    if isinstance(config, BitfitConfig):
        return apply_bitfit(model)
    if isinstance(config, BOTTLENECKS):
        return apply_bottlenecks(model, config)
    if isinstance(config, LlamaAdapterConfig):
        return apply_llama_adapter(model, config)
    if isinstance(config, LlamaExcitorConfig):
        return apply_excitor(model, config)
    if isinstance(config, LTuningConfig):
        return apply_l_tuning(model, config, tokenizer)
    return apply_prompts(model, config, tokenizer)


def _low_rank(
    model: PreTrainedModel, config: LoraConfig | QloraConfig | AdaloraConfig, tokenizer: PreTrainedTokenizerBase
) -> nn.Module:
    alpha: Any = config.alpha or 2 * config.rank
    scalar = reward_head(model) is not None
    shared: dict[str, Any] = {
        "task_type": None if scalar else peft.TaskType.CAUSAL_LM,
        "exclude_modules": [HEAD] if scalar and config.target == "all-linear" else beside_language(model),
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": _targets(model, config.target),
    }
    if isinstance(config, AdaloraConfig):  # the schedule is ours: see adalora.py
        settings = peft.AdaLoraConfig(**shared, init_r=config.rank, target_r=config.target_rank, total_step=1 << 30)
    elif isinstance(config, QloraConfig):
        settings = peft.LoraConfig(**shared, r=config.rank, use_rslora=config.rslora)
    else:
        settings = peft.LoraConfig(
            **shared,
            r=config.rank,
            use_rslora=config.rslora,
            use_dora=config.dora,
            trainable_token_indices=_trained_rows(model, config.train_tokens, tokenizer),
        )
    if isinstance(config, QloraConfig):
        quantise_linear_layers(model, keep=model.get_output_embeddings())
    try:
        return peft.get_peft_model(model, settings, adapter_name=ADAPTER)
    except ValueError as error:
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"LoRA cannot be applied: {first_line(error)}",
            got=config.target,
            allowed=f"all-linear or some of {', '.join(linear)}",
            knob="model.peft.target",
        ) from None


def _targets(model: PreTrainedModel, target: Targets) -> str | list[str]:
    """Names of the layers to adapt. Experts that are one tensor stay as they are: PEFT would adapt them under
    `all-linear`, router included, by tensors that vLLM refuses and that do not merge by layers.

    Raises:
        ModelError: A name that is no linear layer's, or one of such experts.
    """
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    experts = EXPERT_LAYERS if has_fused_experts(model) else frozenset[str]()
    if isinstance(target, str):
        head = {n.rpartition(".")[2] for n, m in model.named_modules() if m is model.get_output_embeddings()}
        return sorted(linear - head - experts) if experts else target
    paths = [f".{path}" for path, _ in model.named_modules()]
    for name in target:
        if name.rpartition(".")[2] in experts:
            why = "LoRA adapts linear layers, and this model's experts are one tensor per layer: type full trains them"
        elif any(path.endswith(f".{name}") for path in paths):
            continue
        else:
            why = "LoRA cannot be applied: the model has no layer of this name"
        allowed = f"all-linear or some of {', '.join(sorted(linear - experts))}"
        raise ModelError(why, got=name, allowed=allowed, knob="model.peft.target")
    return list(target)


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
