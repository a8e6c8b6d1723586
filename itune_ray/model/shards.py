"""Pretrained weights straight from safetensors into a placed model: each rank reads what it holds, shard by shard.

Used when the names in the files are the model's own. Where transformers converts names while loading (fused experts,
for one), `covers` says so and the model is loaded the ordinary way before it is sharded.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from itune_ray.data.hub import weight_files
from itune_ray.errors import ModelError
from itune_ray.model.peft import base_name, initial_adapter, saved_name
from itune_ray.model.reward import HEAD_WEIGHT, initial_head
from itune_ray.model.sharding import full_shape, held

_Slices = tuple[slice, ...]


def covers(folder: str, model: Any) -> bool:
    """Whether the files hold every parameter of the model under its own name (tied weights once), a scalar head apart:
    where they have none, it starts anew."""
    present = set(_index(folder))
    wanted = {name for name, _ in model.named_parameters(remove_duplicate=True)}
    return bool(present) and wanted <= present | {HEAD_WEIGHT}


def has_reward_head(folder: str) -> bool:
    """Whether a folder holds the weights of a reward model."""
    return HEAD_WEIGHT in _index(folder)


def fill_from_folder(model: nn.Module, folder: str, *, seed: int) -> None:
    """Fill every parameter of a placed model: base weights from the files, adapters with their starting values."""
    index = _index(folder)
    rows = _trained_token_rows(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = base_name(name)
            if source == HEAD_WEIGHT and source not in index:
                start = initial_head(tuple(full_shape(parameter)), seed)
                _copy(parameter, lambda slices, w=start: w[slices])
            elif source is not None:
                _copy(parameter, lambda slices, s=source: _read(index, s, slices))
            elif name in rows:
                table, ids = rows[name]
                whole = _read_rows(index, table, ids)
                _copy(parameter, lambda slices, w=whole: w[slices])
            else:
                shape = full_shape(parameter)
                plain = name.removeprefix("module.")  # DDP's; a start must not depend on the number of ranks
                start = initial_adapter(plain, tuple(shape), seed, fallback=torch.zeros(shape))
                _copy(parameter, lambda slices, w=start: w[slices])


def fill_from_adapter(model: nn.Module, folder: str) -> None:
    """Fill the trained parameters of a placed model from a saved adapter (see `model.adapter.check_adapter`)."""
    index = _index(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                saved = saved_name(name)
                _copy(parameter, lambda slices, s=saved: _read(index, s, slices))


def _copy(parameter: Tensor, read: Any) -> None:
    for offsets, local in held(parameter):
        local.copy_(read(tuple(slice(start, start + n) for start, n in zip(offsets, local.shape, strict=True))))


def _index(folder: str) -> dict[str, Path]:
    index: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            index |= dict.fromkeys(tensors.keys(), file)
    return index


def _read(index: dict[str, Path], name: str, slices: _Slices) -> Tensor:
    if name not in index:
        raise ModelError("the checkpoint lacks a weight of the model", got=name)
    with safe_open(index[name], framework="pt") as tensors:
        return tensors.get_slice(name)[slices]


def _read_rows(index: dict[str, Path], name: str, rows: list[int]) -> Tensor:
    with safe_open(index[name], framework="pt") as tensors:
        table = tensors.get_slice(name)
        return torch.cat([table[row : row + 1] for row in rows])


def _trained_token_rows(model: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """Parameter name -> (table in the checkpoint, rows) of trainable token rows."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    rows: dict[str, tuple[str, list[int]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
            table = base_name(f"{name}.weight")
            assert table is not None
            for adapter, ids in module.token_indices.items():
                rows[f"{name}.trainable_tokens_delta.{adapter}"] = (table, list(ids))
    return rows
