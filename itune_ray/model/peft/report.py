"""Counts what an adaptation costs (`itune_ray.model.costs`) on a model before it is sharded."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from itune_ray.model.costs import MatrixCost, ParameterReport
from itune_ray.model.nf4 import Nf4Linear
from itune_ray.model.peft.names import ADAPTER


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(plain module name, PEFT layer) of every matrix with a low-rank change."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix("module.").removeprefix("base_model.model."), module


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count parameters before sharding."""
    parameters = list(model.parameters())
    in_four_bits = [module for module in model.modules() if isinstance(module, Nf4Linear)]
    return ParameterReport(
        total=sum(p.numel() for p in parameters) + sum(m.in_features * m.out_features for m in in_four_bits),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        matrices=tuple(_cost(name, layer) for name, layer in lora_layers(model)),
    )


def _cost(name: str, layer: Any) -> MatrixCost:
    d, k, rank = int(layer.out_features), int(layer.in_features), int(layer.r[ADAPTER])
    extra = rank if ADAPTER in getattr(layer, "lora_E", ()) else 0
    if layer.lora_magnitude_vector:
        extra += d
    return MatrixCost(name, d, k, rank, extra)
