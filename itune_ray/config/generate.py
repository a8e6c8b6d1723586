"""Schema of `itune generate`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.shared import Job, Positive, SamplingConfig, ServedModel, Source


class RespondConfig(Schema):
    """Distillation: the teacher answers each prompt, D = {(x, M_teacher(x))} (survey eq. 2)."""

    type: Literal["respond"] = "respond"
    samples: Positive = 1
    """Answers per prompt; all are kept, each as a row of its own."""
    system: str | None = None
    """System message put before prompts that have none."""
    template: str | None = None
    """A Jinja file that renders the last user turn from {{ prompt }} and {{ meta }}; default: the prompt as it is."""


class CustomRecipeConfig(Schema):
    """Your own recipe: a class like those of `itune_ray.generate.recipes`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:Class`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}


RecipeConfig = Annotated[RespondConfig | CustomRecipeConfig, Field(discriminator="type")]


class CommitConfig(Schema):
    """How often finished rows become durable: whichever bound comes first."""

    rows: Positive = 256
    seconds: Annotated[float, Field(gt=0)] = 5.0


class RecipeWorkers(Schema):
    """Ray Data actors that run the recipe and talk to the pool."""

    num: Positive = 2
    cpus_each: Annotated[float, Field(gt=0)] = 0.5
    rows_per_block: Positive = 32
    """Rows a worker takes at a time."""
    blocks_in_flight: Positive = 4
    """Blocks one worker works on at once; a block that ends late never holds the others up."""


class GenerateJob(Job):
    """Stream prompts through a recipe into a pool of engines; writes accepted/, rejected/ and failed/."""

    beside_identity = Job.beside_identity | {"workers", "commit", "max_attempts"}

    prompts: Annotated[tuple[Source, ...], Field(min_length=1)]
    teacher: ServedModel
    recipe: RecipeConfig = RespondConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_attempts: Positive = 3
    """Times a failed row is driven before it stays failed."""
    workers: RecipeWorkers = RecipeWorkers()
    commit: CommitConfig = CommitConfig()
