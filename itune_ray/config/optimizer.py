"""Optimizers and schedules of `itune train`."""

from typing import Annotated, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.shared import Fraction


class AdamwConfig(Schema):
    """AdamW (Loshchilov and Hutter 2019)."""

    type: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class MuonConfig(Schema):
    """Muon (Jordan et al. 2024) for hidden matrices, AdamW for embeddings, norms and the head. Strategy ddp only: it
    orthogonalises whole matrices."""

    type: Literal["muon"] = "muon"
    lr: Annotated[float, Field(gt=0)] = 0.02
    momentum: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adamw: AdamwConfig = AdamwConfig(lr=3e-3)


OptimizerConfig = Annotated[AdamwConfig | MuonConfig, Field(discriminator="type")]


class ScheduleConfig(Schema):
    """Learning-rate factor over the run: linear warm-up, then decay to `final`."""

    type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Fraction = 0.03
    """Share of all steps."""
    final: Fraction = 0.0
    """Factor at the last step; ignored by `constant`."""
