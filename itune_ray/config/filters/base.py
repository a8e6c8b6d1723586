"""What filter configs share: which rows they see, what they read of them, how texts become vectors."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import Positive, ServedModel, VllmEngineConfig


class FilterConfig(Schema):
    """What every filter has."""

    only: tuple[str, ...] = ()
    """Apply only to rows of these sources; default: to all."""


Reference = Annotated[str, Field(pattern=r"^(length|(meta|score)\.[\w.-]+)$")]
"""A number of each row: `length` (characters of its answer), `meta.NAME`, or `score.NAME`, the score of an earlier
filter of the job by the filter's name (its type; `judge_1`, `judge_2` where there are two)."""


TextKey = Literal["full", "prompt", "response"]


class HashedEmbedder(Schema):
    """A hashed bag of words: no model, and blind to synonyms."""

    type: Literal["hashed"] = "hashed"
    dimensions: Annotated[int, Field(ge=2)] = 1024
    ngram: Positive = 2
    """Longest run of words that is a feature."""


class ModelEmbedder(Schema):
    """A pool that serves an embedding model."""

    beside_identity = frozenset({"batch"})

    type: Literal["model"] = "model"
    served: ServedModel
    """A vLLM engine needs `extra: {runner: pooling, convert: embed}`."""
    batch: Positive = 64
    """Texts per call."""

    @model_validator(mode="after")
    def _engine_embeds(self) -> "ModelEmbedder":
        engine = self.served.engine
        if isinstance(engine, VllmEngineConfig) and engine.extra.get("runner") != "pooling":
            raise ValueError("a vLLM engine embeds only with served.engine.extra={runner: pooling, convert: embed}")
        return self


Embedder = Annotated[HashedEmbedder | ModelEmbedder, Field(discriminator="type")]
