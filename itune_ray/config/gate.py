"""Schema of the export gate: whether what a training wrote says what the trained model says."""

from typing import Annotated

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.shared import PoolConfig, Positive, VllmEngineConfig

Nats = Annotated[float, Field(gt=0)]
TOLERANCES = {"fp32": 1e-3, "bf16": 0.1}
"""Default tolerance by precision, nats per token: what the export may round."""


class GateEngine(Schema):
    """The vLLM engine that the gate asks."""

    engine: VllmEngineConfig = VllmEngineConfig(max_adapters=1)
    pool: PoolConfig = PoolConfig()


class GateConfig(Schema):
    """The export gate. Log-probabilities of a few training documents, of the trained model in memory and of everything
    that was written from it, must agree, or the export is refused and deleted: the adapter over its base and the merged
    model, opened by transformers, by fp32 arithmetic on rank 0's CPU (whose memory must hold the model so), and, with
    `vllm`, both in vLLM."""

    prompts: Positive = 4
    """Documents of the training order that are scored."""
    longest: Annotated[int, Field(ge=2)] = 256
    """Tokens of each that are scored; the rest is cut off, but not of documents with images."""
    tolerance: Nats | None = None
    """Largest mean |Δ log p| per token, over the tokens of the worst document, in nats; default: 0.001 in fp32, 0.1 in
    bf16."""
    vllm: GateEngine | None = None
    """Ask vLLM too, once the workers have ended; the engine stays for later stages that use the same."""
