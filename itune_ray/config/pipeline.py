"""Schema of `itune pipeline`."""

from typing import Annotated, Any

from pydantic import Field

from itune_ray.config.shared import Job

StepTree = dict[str, Any]
StepName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Part of the name of the step's folder."""


class PipelineJob(Job):
    """Jobs chained by artifacts, in the order written."""

    steps: Annotated[dict[StepName, StepTree], Field(min_length=1)]
    """Step name -> the job's own keys plus `job: generate | curate | train | evaluate | report | ...`. A string
    `step://NAME/PAYLOAD` stands for a payload of an earlier step, `step://NAME` for its folder. `name` and `run` come
    from the pipeline, and `seed` where the step has none."""
