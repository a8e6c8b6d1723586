"""Schema of `itune generate`."""

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.recipes import RecipeConfig, RespondConfig, TeacherTopkConfig
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import Job, Positive, SamplingConfig, ServedModel, Source, VllmEngineConfig


class CommitConfig(Schema):
    """How often finished rows become durable: whichever bound comes first."""

    rows: Positive = 256
    seconds: Annotated[float, Field(gt=0)] = 5.0


class RecipeWorkers(Holder):
    """Ray Data actors that run the recipe and talk to the pool."""

    role: ClassVar[Role] = "data"

    num: Positive = 2
    cpus_each: Annotated[float, Field(gt=0)] = 0.5
    rows_per_block: Positive = 32
    """Rows a worker takes at a time."""
    blocks_in_flight: Positive = 4
    """Blocks one worker works on at once; a block that ends late never holds the others up."""


class GenerateJob(Job):
    """Stream prompts through a recipe into a pool of engines; writes accepted/, rejected/ and failed/."""

    beside_identity = Job.beside_identity | {"workers", "commit", "max_attempts", "min_rows"}

    prompts: Annotated[tuple[Source, ...], Field(min_length=1)]
    teacher: ServedModel | None = None
    """The model that recipes ask; left out for a recipe that asks none (`templates`)."""
    recipe: RecipeConfig = RespondConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_attempts: Positive = 3
    """Times a failed row is driven before it stays failed."""
    min_rows: Annotated[int, Field(ge=0)] = 1
    """The job fails when fewer rows are made: no training on an empty table, hours later."""
    workers: RecipeWorkers = RecipeWorkers()
    commit: CommitConfig = CommitConfig()

    @model_validator(mode="after")
    def _teacher_is_asked(self) -> "GenerateJob":
        if self.recipe.needs_teacher and self.teacher is None:
            raise ValueError(f"recipe {self.recipe.type} needs a model: name it under teacher")
        if not self.recipe.needs_teacher and self.teacher is not None:
            raise ValueError(f"recipe {self.recipe.type} asks no model: leave teacher out")
        return self

    @model_validator(mode="after")
    def _enough_logprobs(self) -> "GenerateJob":
        engine = self.teacher and self.teacher.engine
        if isinstance(self.recipe, TeacherTopkConfig) and isinstance(engine, VllmEngineConfig):
            asked = self.recipe.k
            if asked > engine.max_logprobs:
                raise ValueError(
                    f"recipe.k {asked} is more than the engine gives: set teacher.engine.max_logprobs={asked}"
                )
        return self
