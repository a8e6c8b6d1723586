"""Trained weights as what others open: a Hugging Face folder for transformers and vLLM, and a PEFT adapter folder.

Tensors are gathered, merged and written shard by shard; `config.json` (`adapter_config.json`) comes last, so a folder
that has it is complete. Paths may be URIs.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from itune_ray.data.storage import Folder
from itune_ray.model.merge import merged_tensors, stored_tensors
from itune_ray.model.peft.saved import CONFIG_FILE, adapter_settings, adapter_tensors, has_adapter, is_mergeable
from itune_ray.model.reward import HEAD, HEAD_WEIGHT, own_padding, reward_head
from itune_ray.model.sharding import full_shape, reshard, whole

SHARD_BYTES = 4 * 2**30


def export_trained(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    stage_dir: str,
    *,
    dtype: torch.dtype,
    is_main: bool,
    base_path: str | None,
) -> tuple[str | None, str | None]:
    """Write `model/` (adapter merged, where it can be) and, after adapter training, `adapter/`; returns both paths.
    Collective."""
    reshard(model)
    stage = Folder.at(stage_dir)
    model_path, adapter_path = None, None
    if has_adapter(model):
        adapter_path = (stage / "adapter").uri
        write_adapter(model, tokenizer, adapter_path, is_main=is_main, base_path=base_path)
    if is_mergeable(model):
        model_path = (stage / "model").uri
        write_model(model, tokenizer, model_path, dtype=dtype, is_main=is_main)
    return model_path, adapter_path


def write_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: str,
    *,
    dtype: torch.dtype,
    is_main: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the merged model in `dtype` with its config, tokenizer and chat template. Collective; rank 0 writes."""
    plain = plain_model(model)
    tensors: Iterator[tuple[str, Tensor]] = merged_tensors(model, dtype)
    sizes = {name: full_shape(tensor).numel() * dtype.itemsize for name, tensor in stored_tensors(model)}
    if _renames_on_save(plain):  # families whose experts transformers fuses in memory: undone on the whole
        gathered = revert_weight_conversion(plain, dict(tensors))
        tensors, sizes = iter(gathered.items()), {n: t.numel() * dtype.itemsize for n, t in gathered.items()}
    folder = _Folder(out) if is_main else None
    _write_shards(tensors, _shard_names(sizes, shard_bytes), folder)
    if folder is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        config = plain.config.__class__.from_dict(plain.config.to_dict())
        config.dtype, config.architectures = dtype, [_architecture(plain)]
        if reward_head(plain) is not None:
            config.pad_token_id = own_padding(tokenizer)
        config.save_pretrained(scratch)
        if getattr(plain, "generation_config", None) is not None:
            plain.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        folder.put_all(scratch, last="config.json")


def write_adapter(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    out: str,
    *,
    is_main: bool = True,
    base_path: str | None = None,
) -> None:
    """Write the adapter, fp32, with the tokenizer, in PEFT's format where the method is one of PEFT's; a reward model's
    comes with its head. Collective; rank 0 writes."""
    weights, config = adapter_tensors(model), adapter_settings(model, base_path)
    head = reward_head(plain_model(model))
    if head is not None and HEAD_WEIGHT not in weights:
        weights[f"base_model.model.{HEAD_WEIGHT}"] = whole(head.weight)
        # So that PEFT puts the head beside the adapter when it loads them.
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    if not is_main:
        return
    folder = _Folder(out)
    folder.write_tensors("adapter_model.safetensors", {n: t.float().contiguous() for n, t in weights.items()})
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
        tokenizer.save_pretrained(scratch)
        folder.put_all(scratch, last=CONFIG_FILE)


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "peft_config") else inner


def _architecture(model: nn.Module) -> str:
    """The class that transformers and vLLM know: `fully_shard` puts one of its own, FSDP..., in front of it."""
    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule)).__name__


def _renames_on_save(model: Any) -> bool:
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions)


def _shard_names(sizes: dict[str, int], shard_bytes: int) -> dict[str, str]:
    """Tensor name -> file, filled in order."""
    shard_of: dict[str, int] = {}
    shard, used = 0, 0
    for name, size in sizes.items():
        if used and used + size > shard_bytes:
            shard, used = shard + 1, 0
        shard_of[name], used = shard, used + size
    if shard == 0:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{s + 1:05d}-of-{shard + 1:05d}.safetensors" for name, s in shard_of.items()}


def _write_shards(tensors: Iterator[tuple[str, Tensor]], files: dict[str, str], folder: "_Folder | None") -> None:
    """Every rank runs through the tensors, which gathers them; rank 0 keeps one shard in memory at a time."""
    pending: dict[str, Tensor] = {}
    current = ""
    for name, tensor in tensors:
        if folder is None:
            continue
        if files[name] != current and pending:
            folder.write_tensors(current, pending)
            pending = {}
        current = files[name]
        pending[name] = tensor
    if folder is not None and pending:
        folder.write_tensors(current, pending)
        if len(set(files.values())) > 1:
            folder.write_text("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": files}))


class _Folder:
    """A target folder, local or remote, emptied of an earlier attempt's files that would contradict ours."""

    def __init__(self, out: str):
        self._folder = Folder.at(out)
        self._folder.delete()
        self._folder.fs.create_dir(self._folder.path, recursive=True)

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self._folder.is_local:
            save_file(tensors, (self._folder / name).path, metadata={"format": "pt"})
        else:
            self._folder.write_bytes(name, save(tensors, metadata={"format": "pt"}))

    def write_text(self, name: str, text: str) -> None:
        self._folder.write_bytes(name, text.encode())

    def put_all(self, scratch: str, last: str) -> None:
        files = sorted(Path(scratch).iterdir(), key=lambda f: (f.name == last, f.name))
        for file in files:
            self._folder.write_bytes(file.name, file.read_bytes())
