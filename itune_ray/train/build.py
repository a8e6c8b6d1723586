"""From a job's model section to a model that is ready to train: load, fused head, adapter, placement, in this order.

Each step changes what the next one wraps: the head is looked up inside `forward`, PEFT wraps modules that the strategy
then shards, and pretrained weights are read last, each rank just what it holds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.config.adaptation import PROMPTS, AdaloraConfig
from itune_ray.config.base import digest
from itune_ray.config.objectives import SftConfig
from itune_ray.config.train import TrainedModel, TrainJob
from itune_ray.data.batches import Masking
from itune_ray.data.hub import local_model_folder, resolve, weights_fingerprint
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.adapter import check_adapter, check_vocabulary
from itune_ray.model.added_tokens import embed_new_tokens
from itune_ray.model.compiled import compile_layers
from itune_ray.model.costs import ParameterReport
from itune_ray.model.cpu import install_wide_products, wide
from itune_ray.model.documents import install_document_attention
from itune_ray.model.images import check_positions, choose_trained
from itune_ray.model.load import (
    can_pack,
    choose_attention,
    load_model,
    masking_for,
    model_from_config,
    new_model,
)
from itune_ray.model.logprobs import install_fused_head
from itune_ray.model.peft import apply_peft, parameter_report, starts_by_name
from itune_ray.model.peft.adalora import RankBudget
from itune_ray.model.pooling import install_pooling
from itune_ray.model.reward import initial_head, install_reward_head, reward_head
from itune_ray.model.router import router_loss_weight
from itune_ray.model.shards import covers, fill_from_adapter, fill_from_folder, has_reward_head
from itune_ray.model.tokenizer import load_tokenizer
from itune_ray.model.wide_blocks import install_wide_blocks
from itune_ray.train.renderer import tokenizer_folder
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World


@dataclass(frozen=True)
class Built:
    """A placed model and what the loop must know about it."""

    model: nn.Module
    masking: Masking
    dtype: torch.dtype
    """Compute dtype."""
    report: ParameterReport
    source: str | None
    """Folder the base weights came from; None for a fresh model."""
    origin: str
    """Identity of what training begins with: the content of base and adapter, or the settings of a fresh model."""
    budget: RankBudget | None = None
    """AdaLoRA's, which takes part in every step."""
    router_weight: float = 0.0
    """Of the load-balancing loss, for a mixture of experts."""
    compiled: bool = False
    """Whether its layers are compiled when they are first called."""


def _new_tokens(model: TrainedModel) -> list[str]:
    """Those of the added tokens that the model's own vocabulary lacks."""
    if not model.added_tokens or model.init is not None:
        return []
    vocabulary = load_tokenizer(tokenizer_folder(model).path, model.trust_remote_code).get_vocab()
    return [token for token in model.added_tokens if token not in vocabulary]


def build_model(job: TrainJob, tokenizer: PreTrainedTokenizerBase, strategy: Strategy, world: World) -> Built:
    """Build, adapt and place the model of a job on this rank."""
    folder = None if job.model.path is None else local_model_folder(job.model.reference()).path
    model, empty = _base_model(job, folder, tokenizer, strategy, world)
    if fresh := _new_tokens(job.model):
        embed_new_tokens(model, tokenizer, fresh)
    _check_vocabulary(model, tokenizer)
    if (job.packing or job.segments > 1) and not can_pack(model):
        raise TrainError(
            "one row holds several chats, which only attention layers keep apart, and this model has others",
            got=model.config.model_type,
            allowed="packing=false, and no pairs",
            knob="packing",
        )
    (install_reward_head if scalar(job) else install_fused_head)(model)
    if isinstance(job.objective, SftConfig) and job.objective.vision:
        install_pooling(model)
    router_weight = 0.0 if scalar(job) or job.images is not None else router_loss_weight(model, job.router_loss)
    masking = masking_for(model)
    if isinstance(job.model.peft, PROMPTS) and masking in ("varlen", "positions"):
        raise TrainError(
            "a trained prompt needs attention that takes an explicit mask, without a sliding window",
            got=f"{model.config.model_type} with attention {model.config._attn_implementation}",
            allowed="a model without sliding windows, with eager or sdpa",
            knob="model.attention",
        )
    if job.objective.type == "reward" and job.model.peft.type not in ("full", "lora"):
        raise TrainError(
            "a reward model's head is trained whole or beside LoRA",
            got=job.model.peft.type,
            allowed="full or lora",
            knob="model.peft.type",
        )
    if masking == "mask_4d_if_packed" and world.device.type == "cpu" and not isinstance(job.model.peft, PROMPTS):
        install_document_attention(model)
        masking = masking_for(model)
    adapted = apply_peft(model, job.model.peft, tokenizer, job.seed)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    compiled = job.compile and not wide(world.device, dtype)
    if compiled:
        compile_layers(adapted, job.pass_tokens)
    else:
        install_wide_products(adapted)
        if job.model.peft.type == "full":
            install_wide_blocks(adapted)
    if job.images is not None:
        check_positions(model)
        if job.model.peft.type == "full":
            choose_trained(model, job.images.trained)
    budget = RankBudget(adapted, job.model.peft) if isinstance(job.model.peft, AdaloraConfig) else None
    adapter = None if job.model.adapter is None else resolve(job.model.adapter, kind="adapter").path
    if adapter is not None:
        check_vocabulary(tokenizer, adapter)
        check_adapter(adapted, adapter)
    if job.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = parameter_report(adapted)
    placed = strategy.prepare(adapted)
    if empty:
        assert folder is not None
        fill_from_folder(placed, folder, seed=job.seed)
    if adapter is not None:
        fill_from_adapter(placed, adapter)
    began_with = [weights_fingerprint(Path(part)) for part in (folder, adapter) if part is not None]
    origin = digest([began_with, None if folder else _fresh(job)], length=16)
    return Built(placed.train(), masking, dtype, report, folder, origin, budget, router_weight, compiled)


def _fresh(job: TrainJob) -> list[Any]:
    return [job.seed, job.model.init and job.model.init.model_dump(mode="json")]


def _base_model(
    job: TrainJob, folder: str | None, tokenizer: PreTrainedTokenizerBase, strategy: Strategy, world: World
) -> tuple[Any, bool]:
    """(model, whether it still waits for its weights)."""
    attention = choose_attention(job.model.attention, world.device)
    frozen_bf16 = job.precision == "bf16" and job.model.peft.type != "full"
    dtype = torch.bfloat16 if frozen_bf16 else torch.float32
    if job.model.init is not None:
        model = new_model(
            job.model.init, tokenizer, seed=job.seed, dtype=dtype, attention=attention, scalar=scalar(job)
        )
        return _with_fresh_head(model, job), False
    assert folder is not None
    arguments: dict[str, Any] = {
        "dtype": dtype,
        "attention": attention,
        "trust_remote_code": job.model.trust_remote_code,
        "scalar": scalar(job),
        "sees": job.images is not None,
    }
    with strategy.init_context():
        model = model_from_config(folder, **arguments)
    if covers(folder, model) and starts_by_name(job.model.peft) and not job.model.added_tokens:
        return model, True
    model = load_model(folder, **arguments)
    return (model if has_reward_head(folder) else _with_fresh_head(model, job)), False


def scalar(job: TrainJob) -> bool:
    """Whether the job trains a scalar head in place of the language model's."""
    return job.objective.type in ("reward", "classify")


def _with_fresh_head(model: Any, job: TrainJob) -> Any:
    head = reward_head(model)
    if scalar(job) and head is not None:
        head.weight.data.copy_(initial_head(tuple(head.weight.shape), job.seed))
    return model


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            "the tokenizer has more tokens than the model has embeddings",
            got=len(tokenizer),
            allowed=f"at most {rows}",
            knob="model.tokenizer",
        )
