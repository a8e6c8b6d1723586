"""A saved LoRA adapter (PEFT's folder format) as the starting point of further training.

Scale, rank, matrices and trained token rows decide what an adapter computes, so a job that continues one must ask for
the same; everything else about its training (dropout, learning rate, data, objective) is free.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.errors import ModelError
from itune_ray.model.peft.names import ADAPTER, saved_name
from itune_ray.model.tokenizer import load_tokenizer

WEIGHTS = "adapter_model.safetensors"
_DECIDING = {
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "trainable_token_indices": "train_tokens",
    "rank_pattern": "rank",
    "alpha_pattern": "alpha",
    "use_dora": "dora",
}
"""PEFT's settings that decide what an adapter computes -> the field of `LoraConfig` that sets them."""


def check_adapter(model: nn.Module, folder: str) -> None:
    """Refuse to continue an adapter that is not shaped as the job's own; the error names the first difference.

    Args:
        model: The model as `apply_peft` left it, not placed yet.
        folder: An adapter folder as `write_adapter` and PEFT write it.

    Raises:
        ModelError: Another rank, scale, set of matrices or set of trained tokens, or no readable adapter.
    """
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise ModelError("the adapter folder holds no weights", got=folder, allowed=WEIGHTS, knob="model.adapter")
    wrapped: Any = model
    saved = json.loads((Path(folder) / "adapter_config.json").read_text())
    own = wrapped.peft_config[ADAPTER].to_dict()
    for field, knob in _DECIDING.items():
        if (saved.get(field) or None) != (own[field] or None):
            raise ModelError(
                f"the adapter to continue has another {field} than the job",
                got=own[field],
                allowed=f"{saved.get(field)}, as in {folder}",
                knob=f"model.peft.{knob}",
            )
    _check_matrices(model, file)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Refuse an adapter that was trained on other token ids; a folder without a tokenizer says nothing.

    Raises:
        ModelError: The first token whose ids differ.
    """
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return
    own, other = tokenizer.get_vocab(), load_tokenizer(folder).get_vocab()
    if own == other:
        return
    token = min(
        (t for t in own.keys() | other.keys() if own.get(t) != other.get(t)), key=lambda t: own.get(t, len(own))
    )
    raise ModelError(
        "the adapter to continue was trained with another tokenizer than the job's",
        got=f"token {token!r} with id {other.get(token)}",
        allowed=f"id {own.get(token)}, as in the job's tokenizer, and the same {len(own)} tokens",
        knob="model.tokenizer",
    )


def _check_matrices(model: nn.Module, file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        stored = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    wanted = {saved_name(name): tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if different := sorted(wanted.keys() ^ stored.keys()):
        raise ModelError(
            "the adapter to continue adapts other matrices than the job",
            got=f"{different[0]} only in the {'job' if different[0] in wanted else 'adapter'}",
            allowed=f"the {len(stored)} tensors of {file.parent}",
            knob="model.peft.target",
        )
    for name, shape in wanted.items():
        if stored[name] != shape:
            raise ModelError(
                f"the adapter to continue belongs to another model: {name} has another shape",
                got=stored[name],
                allowed=shape,
                knob="model.adapter",
            )
