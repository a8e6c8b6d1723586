"""Adapters merged into their base, tensor by tensor, so that no rank ever holds a whole sharded model.

W' = W + s B A, computed in fp32 whatever W is stored in, and rounded once. Trained token rows replace theirs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from itune_ray.model.peft import ADAPTER, base_name, lora_layers
from itune_ray.model.sharding import whole


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, full merged tensor in `dtype`) of every weight, tied ones once.

    Collective over ranks when the model is sharded: every rank must run through it.
    """
    layers, rows = dict(lora_layers(model)), _token_rows(model)
    for name, tensor in stored_tensors(model):
        weight = whole(tensor)
        module = name.removesuffix(".weight")
        if weight.is_floating_point():
            if module in layers:
                weight = weight.float() + _delta(layers[module])
            if module in rows:
                ids, values = rows[module]
                weight = weight.float().index_copy(0, torch.tensor(ids), whole(values).float())
            weight = weight.to(dtype)
        yield name, weight.contiguous()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the base model under their checkpoint names, adapters left out."""
    for name, parameter in model.named_parameters():
        if (plain := base_name(name)) is not None:
            yield plain, parameter
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            plain = base_name(f"{prefix}.{name}" if prefix else name)
            if name not in module._non_persistent_buffers_set and plain is not None:
                yield plain, buffer


def _delta(layer: Any) -> Tensor:
    scale = float(layer.scaling[ADAPTER])
    if ADAPTER in layer.lora_embedding_A:
        a, b = whole(layer.lora_embedding_A[ADAPTER]).float(), whole(layer.lora_embedding_B[ADAPTER]).float()
        return (b @ a).T * scale
    a, b = whole(layer.lora_A[ADAPTER].weight).float(), whole(layer.lora_B[ADAPTER].weight).float()
    delta = (b @ a) * scale
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta


def _token_rows(model: nn.Module) -> dict[str, tuple[list[int], Tensor]]:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    rows: dict[str, tuple[list[int], Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter:
            plain = base_name(name + ".")
            assert plain is not None
            rows[plain.rstrip(".")] = (list(module.token_indices[ADAPTER]), module.trainable_tokens_delta[ADAPTER])
    return rows


def merge_adapter(model_folder: str, adapter_folder: str, out: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """Write base plus adapter as a plain Hugging Face folder; returns `out`."""
    from peft import PeftModel

    from itune_ray.model.export import write_model
    from itune_ray.model.load import load_model, load_tokenizer

    base = load_model(model_folder, dtype=torch.float32, attention="eager")
    adapted = PeftModel.from_pretrained(base, adapter_folder, adapter_name=ADAPTER)
    write_model(adapted, load_tokenizer(model_folder), out, dtype=dtype)
    return out
