"""Schema of `itune bench`."""

from typing import Annotated, Any, cast

from pydantic import Field, model_validator

from itune_ray.config.base import Tree
from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import Job, Positive, ServedModel, VllmEngineConfig


class BenchJob(Job):
    """Measure a generate job against bare vLLM: same engine settings, prompts, sampling and seeds. The output ends in
    one JSON object; its `ratio` is output tokens per second of the whole stage, from prompts to Parquet,
    over those of the best of `runs` calls of `LLM.generate`. Engine starts count on neither side."""

    stage: GenerateJob
    """The generate job, without a name; recipe `respond`, one replica."""
    runs: Positive = 3
    """Calls of `LLM.generate`, the best of which counts."""
    warm_up: Annotated[int, Field(ge=0)] = 32
    """Prompts answered before either side is timed."""

    @property
    def teacher(self) -> ServedModel:
        """The model of both sides."""
        assert self.stage.teacher is not None
        return self.stage.teacher

    @model_validator(mode="before")
    @classmethod
    def _name_the_stage(cls, tree: object) -> object:
        if not isinstance(tree, dict):
            return tree
        given = cast(Tree, tree)
        stage: Any = given.get("stage")
        if not isinstance(stage, dict):
            return given
        named = {"name": given.get("name"), "seed": given.get("seed", 0), **cast(Tree, stage)}
        return {**given, "stage": named}

    @model_validator(mode="after")
    def _comparable(self) -> "BenchJob":
        if self.stage.recipe.type != "respond":
            raise ValueError("stage.recipe must be respond: LLM.generate makes one call per prompt")
        teacher = self.stage.teacher
        if teacher is None or not isinstance(teacher.engine, VllmEngineConfig):
            raise ValueError("stage.teacher.engine must be vllm")
        if teacher.pool.most != 1:
            raise ValueError("stage.teacher.pool.replicas must be 1: LLM.generate is one engine")
        return self
