"""Schema of `itune report`."""

from typing import Annotated

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.shared import Job, Positive


class Continual(Schema):
    """Models that learned one task after another, and what the later ones still know of the earlier tasks."""

    models: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of scored models: after the first stage, after the second, ..."""
    tasks: Annotated[tuple[str, ...], Field(min_length=2)]
    """Names of benchmarks: of what the first stage taught, of what the second taught, ... Every model needs a score on
    each."""

    @model_validator(mode="after")
    def _one_task_each(self) -> "Continual":
        if len(self.models) != len(self.tasks):
            raise ValueError(f"each stage has its task: {len(self.models)} models, {len(self.tasks)} tasks")
        return self


class ReportJob(Job):
    """Collect the artifacts of a run into report.html, tables.csv and summary.json."""

    silent_at_default = frozenset({"continual"})

    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    """Artifact folders or URIs, in the order of the pipeline; in a pipeline `step://NAME`."""
    title: str | None = None
    before: str | None = None
    """Name of the model to compare from; default: the first one scored."""
    after: str | None = None
    """Name of the model to compare with it; default: the last one scored."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Further pairs of model names, earlier and later, whose paired differences are stated."""
    continual: Continual | None = None
    """Accuracy, backward transfer and forgetting over stages."""
    samples: Positive = 12
    """Prompts shown side by side, before and after."""
