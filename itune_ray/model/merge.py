"""Adapters merged into their base, layer by layer, so that no rank ever holds a whole sharded model.

Everything is computed in fp32 whatever the base is stored in, and rounded once. PEFT merges a gathered copy of each
adapted layer by the method's own formula, W' = W + s B A for LoRA. Trained token rows replace theirs.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from itune_ray.model.nf4 import Nf4Linear
from itune_ray.model.peft.names import ADAPTER, base_name
from itune_ray.model.sharding import whole, whole_copy


def merged_tensors(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, full merged tensor in `dtype`) of every weight, tied ones once.

    Collective over ranks when the model is sharded: every rank must run through it.
    """
    layers, rows = _tuned_layers(model), _token_rows(model)
    changed: tuple[str, dict[str, Tensor]] = ("", {})  # of the layer whose tensors come now: they come together
    for name, tensor in stored_tensors(model):
        module, _, kind = name.rpartition(".")
        if module in layers and changed[0] != module:
            changed = module, _merged_layer(layers[module])
        weight = changed[1][kind] if module in layers else whole(tensor)
        if weight.is_floating_point():
            if module in rows:
                ids, values = rows[module]
                weight = weight.float().index_copy(0, torch.tensor(ids), whole(values).float())
            weight = weight.to(dtype)
        yield name, weight.contiguous()


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters (4-bit ones rounded) and persistent buffers of the base model under their checkpoint names, adapters
    left out."""
    for name, parameter in model.named_parameters():
        if (plain := base_name(name)) is not None:
            yield plain, parameter
    for prefix, module in model.named_modules():
        if isinstance(module, Nf4Linear):
            plain = base_name(f"{prefix}.weight")
            assert plain is not None
            yield plain, module.weight
        for name, buffer in module.named_buffers(recurse=False):
            plain = base_name(f"{prefix}.{name}" if prefix else name)
            if name not in module._non_persistent_buffers_set and plain is not None:
                yield plain, buffer


def _tuned_layers(model: nn.Module) -> dict[str, Any]:
    """Plain module name -> PEFT layer, of every layer that a mergeable method has changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and ADAPTER in _adapters_of(module):
            plain = base_name(name + ".")
            assert plain is not None
            layers[plain.rstrip(".")] = module
    return layers


def _adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that a PEFT layer has and merges; trained token rows are merged by themselves."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    if isinstance(layer, TrainableTokensLayer):
        return set()
    return {adapter for attribute in layer.adapter_layer_names for adapter in getattr(layer, attribute, ())}


def _merged_layer(layer: Any) -> dict[str, Tensor]:
    """Tensors of the base layer after the adapter is merged into it, fp32, on CPU. Collective when sharded."""
    copied = whole_copy(layer)
    if isinstance(copied.base_layer, Nf4Linear):
        copied.base_layer = copied.base_layer.plain()
    with torch.no_grad():
        copied.merge(adapter_names=[ADAPTER])
    return dict(copied.get_base_layer().state_dict())


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
    from itune_ray.model.load import load_model
    from itune_ray.model.tokenizer import load_tokenizer

    base = load_model(model_folder, dtype=torch.float32, attention="eager")
    adapted = PeftModel.from_pretrained(base, adapter_folder, adapter_name=ADAPTER)
    write_model(adapted, load_tokenizer(model_folder), out, dtype=dtype)
    return out
