"""Trained embedding rows as vLLM can serve them: PEFT's trainable tokens rewritten as LoRA of the embedding and head.

PEFT stores whole rows R of the tokens t_1..t_k. With the base's rows R0, the change of the embedding matrix is
sum_j e_{t_j} (R_j - R0_j)^T: exactly a LoRA of rank k whose one factor is one-hot. vLLM knows no trainable tokens, but
it knows LoRA on the embedding and on the head.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune_ray.data.hub import read_config, weight_files
from itune_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX, _SUFFIX = "base_model.model.", ".token_adapter.trainable_tokens_delta"
HEAD = "lm_head"


def servable_adapter(adapter: Path, base: Path, scratch: Path, max_rank: int) -> Path:
    """The adapter's folder, or a rewritten copy in `scratch` where it holds trained token rows.

    Args:
        adapter: PEFT adapter folder.
        base: Folder of the base model, whose rows the trained ones are compared with.
        scratch: Where to write the copy.
        max_rank: What the engine was started with; each trained token takes one rank.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if not config.get("trainable_token_indices"):
        return adapter
    weights = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in weights if name.endswith(_SUFFIX)]:
        module = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        ids = _token_ids(config["trainable_token_indices"], module)
        if len(ids) > max_rank:
            raise ModelError(
                "the adapter trains more token rows than the engine has ranks",
                got=len(ids),
                allowed=f"at most {max_rank}",
                knob="engine.max_adapter_rank",
            )
        if max(ids) >= _vocabulary(base):
            raise ModelError(
                "the adapter trains tokens that its base has no embeddings for",
                got=f"token {max(ids)} of {_vocabulary(base)}",
                allowed="the merged model of the same training (model/)",
                knob="model.adapter",
            )
        change = weights.pop(name).float() - base_rows(base, f"{module}.weight", ids).float()
        weights |= _as_lora(module, ids, change / _scaling(config), _vocabulary(base), _is_tied(base))
    scratch.mkdir(parents=True)
    shutil.copytree(adapter, scratch, dirs_exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, scratch / "adapter_model.safetensors")
    (scratch / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": None}))
    return scratch


def base_rows(base: Path, name: str, ids: list[int]) -> "Tensor":
    """Rows of one of the base's matrices, without reading the rest of it."""
    import torch
    from safetensors import safe_open

    for file in weight_files(base):
        with safe_open(file, "pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                rows = tensors.get_slice(name)
                return torch.stack([rows[i : i + 1][0] for i in ids])
    raise ModelError("the base model has no such matrix, which the adapter trains rows of", got=name)


def _as_lora(module: str, ids: list[int], change_KD: "Tensor", vocabulary: int, tied: bool) -> dict[str, "Tensor"]:
    """LoRA factors: K trained tokens, D the width, V the vocabulary."""
    import torch

    chosen_KV = torch.zeros(len(ids), vocabulary)
    chosen_KV[torch.arange(len(ids)), torch.tensor(ids)] = 1.0
    head = {f"{_PREFIX}{HEAD}.lora_A.weight": change_KD, f"{_PREFIX}{HEAD}.lora_B.weight": chosen_KV.T}
    if module.rpartition(".")[2] == HEAD:
        return head
    embedding = {f"{_PREFIX}{module}.lora_embedding_A": chosen_KV, f"{_PREFIX}{module}.lora_embedding_B": change_KD.T}
    return embedding | (head if tied else {})


def _token_ids(indices: list[int] | Mapping[str, list[int]], module: str) -> list[int]:
    return list(indices[module.rpartition(".")[2]] if isinstance(indices, Mapping) else indices)


def _scaling(config: Mapping[str, Any]) -> float:
    """What PEFT and vLLM multiply B A with."""
    rank = config["r"]
    return config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _text_config(base: Path) -> Mapping[str, Any]:
    config = read_config(base)
    return config.get("text_config", config)


def _vocabulary(base: Path) -> int:
    return int(_text_config(base)["vocab_size"])


def _is_tied(base: Path) -> bool:
    config = read_config(base)
    return bool(_text_config(base).get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
