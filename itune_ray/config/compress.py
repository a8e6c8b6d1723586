"""Schema of `itune compress`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import EngineConfig, Job, ModelRef, PoolConfig, Positive, Source, VllmEngineConfig

Share = Annotated[float, Field(ge=0, lt=1)]


class StructuredConfig(Schema):
    """Structured pruning: whole MLP channels and whole groups of attention heads, equally many in every layer, so that
    what is left is an ordinary smaller model (survey eq. 24 to 26, corrected as in methods C2 and C3)."""

    type: Literal["structured"] = "structured"
    sparsity: Share = 0.25
    """Share of every layer's MLP channels and of its attention heads that is removed."""
    channels: Share | None = None
    """Of MLP channels alone; default: `sparsity`."""
    heads: Share | None = None
    """Of attention heads alone; default: `sparsity`. With grouped queries whole key-value groups go."""
    importance: Literal["gate_gradient", "taylor_abs"] = "gate_gradient"
    """Of heads: `gate_gradient` is E_x |sum_t o . dL/do|, the gradient of a gate on the head (Michel et al. 2019);
    `taylor_abs` is E_x sum_t |o| . |dL/do|, as the survey prints eq. 25."""
    channel_multiple: Positive = 1
    """Keep a multiple of so many channels; 64 suits tensor cores."""


MethodConfig = StructuredConfig
"""A union on `type` once there is a second method."""


class CalibrationConfig(Schema):
    """The answered rows on which importance is measured."""

    data: Annotated[tuple[Source, ...], Field(min_length=1)]
    rows: Positive = 128
    """The first so many usable rows by the hash of their keys."""
    max_length: Positive = 2048
    """Longer rows are left out."""
    micro_batch: Positive = 8
    """Rows of one forward and backward pass; cannot move the result beyond rounding."""


class SpeedConfig(Schema):
    """Tokens per second of vLLM before and after, over the same prompts, greedy."""

    prompts: Positive = 64
    """Calibration prompts that are answered."""
    tokens: Positive = 64
    """Longest answer."""
    rounds: Positive = 3
    """Times each model answers them, taking turns; the median counts."""
    engine: EngineConfig = VllmEngineConfig()
    pool: PoolConfig = PoolConfig()


class CompressWorkers(Holder):
    """The one actor that measures importance and cuts."""

    role: ClassVar[Role] = "train"


class CompressJob(Job):
    """Make a smaller model of a trained one; writes model/ (an ordinary Hugging Face folder) and compression.json."""

    beside_identity = Job.beside_identity | {"workers", "speed"}

    model: ModelRef
    """The model to compress; with `adapter`, merged first."""
    method: MethodConfig = StructuredConfig()
    calibration: CalibrationConfig
    speed: SpeedConfig | None = None
    """Measure speeds too: two engines start, which later steps with the same engine section go on using."""
    workers: CompressWorkers = CompressWorkers()
