"""Schema of `itune report`."""

from typing import Annotated

from pydantic import Field

from itune_ray.config.shared import Job, Positive


class ReportJob(Job):
    """Collect the artifacts of a run into report.html, tables.csv and summary.json."""

    inputs: Annotated[tuple[str, ...], Field(min_length=1)]
    """Artifact folders or URIs, in the order of the pipeline; in a pipeline `step://NAME`."""
    title: str | None = None
    before: str | None = None
    """Name of the model to compare from; default: the first one scored."""
    after: str | None = None
    """Name of the model to compare with it; default: the last one scored."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Further pairs of model names, earlier and later, whose paired differences are stated."""
    samples: Positive = 12
    """Prompts shown side by side, before and after."""
