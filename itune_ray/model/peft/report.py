"""What an adaptation costs: trained and total parameters, of the model and of every adapted matrix (survey eq. 8)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from itune_ray.model.nf4 import Nf4Linear
from itune_ray.model.peft.names import ADAPTER


@dataclass(frozen=True)
class MatrixCost:
    """One adapted matrix: trainable r(d+k) against d·k weights, ratio r(1/d + 1/k) (survey eq. 8)."""

    name: str
    out_features: int
    in_features: int
    rank: int
    extra: int = 0
    """Beside A and B: DoRA's d row lengths, AdaLoRA's r singular values. Not in eq. 8, and counted here."""

    @property
    def trainable(self) -> int:
        return self.rank * (self.out_features + self.in_features) + self.extra

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
