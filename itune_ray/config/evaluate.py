"""Schema of `itune evaluate`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.generate import CommitConfig
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import Job, Positive, SamplingConfig, ServedModel, Source

GREEDY = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=512)


class BenchmarkBase(Schema):
    """What every benchmark has."""

    name: str | None = None
    """Name in scores and reports; default: the type and its variant."""


class PlaygroundBenchmark(BenchmarkBase):
    """Exact match on fresh instances of the built-in world, per family."""

    type: Literal["playground"] = "playground"
    split: Literal["test", "test_paraphrase"] = "test"
    """test: seen wordings; test_paraphrase: wordings no training row had."""
    rows: Positive = 500
    seed: int = 777
    shots: Annotated[int, Field(ge=0)] = 0
    """Solved examples shown before the question."""
    options: dict[str, Any] = {}


class IfScoreBenchmark(BenchmarkBase):
    """IF-Score: mean similarity of responses and references (survey eq. 11); BLEU, ROUGE and exact match apart."""

    type: Literal["if_score"] = "if_score"
    source: Source
    """Rows whose last assistant turn is the reference."""
    metrics: Annotated[tuple[Literal["bleu", "rouge1", "rouge2", "rougeL", "chrf", "em"], ...], Field(min_length=1)] = (
        "bleu",
        "rougeL",
        "em",
    )


class PerplexityBenchmark(BenchmarkBase):
    """exp of the mean negative log-likelihood per supervised token of reference answers (or whole texts)."""

    type: Literal["perplexity"] = "perplexity"
    source: Source


BenchmarkConfig = Annotated[PlaygroundBenchmark | IfScoreBenchmark | PerplexityBenchmark, Field(discriminator="type")]


class EvaluatedModel(ServedModel):
    """A model under test. Entries that differ only in the adapter share one engine."""

    name: str
    """Name in scores and reports."""


class BootstrapConfig(Schema):
    """Percentile bootstrap over items."""

    samples: Positive = 2000
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95


class EvalWorkers(Holder):
    """Eval actors that send prompts to the pools and grade the replies."""

    role: ClassVar[Role] = "data"

    num: Positive = 2
    cpus_each: Annotated[float, Field(gt=0)] = 0.5


class EvaluateJob(Job):
    """Score models on benchmarks; writes scores.json and answers.parquet (every prompt, reply and grade)."""

    beside_identity = Job.beside_identity | {"workers", "commit"}

    models: Annotated[tuple[EvaluatedModel, ...], Field(min_length=1)]
    benchmarks: Annotated[tuple[BenchmarkConfig, ...], Field(min_length=1)]
    sampling: SamplingConfig = GREEDY
    bootstrap: BootstrapConfig = BootstrapConfig()
    workers: EvalWorkers = EvalWorkers()
    commit: CommitConfig = CommitConfig()

    @model_validator(mode="after")
    def _distinct_names(self) -> "EvaluateJob":
        names = [m.name for m in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models need distinct names, got {names}")
        return self
