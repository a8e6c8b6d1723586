"""Schema of `itune bench`."""

from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from itune_ray.config.base import Schema, Tree
from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import Job, Positive, ServedModel, VllmEngineConfig

Part = Literal["sft", "lora", "dpo", "ray", "memory"]


class TrainBench(Schema):
    """The training loop against a peer, in turns: same random model, documents, dtype, threads and tokens per step, no
    gradient checkpointing. Documents are chats of random words, their lengths log-normal."""

    peer: str = "jobs/bench/train_trl.py"
    """The peer's side, a script that takes turns as `itune_ray.bench.turns` says."""
    peer_micro_batches: dict[Literal["sft", "lora", "dpo"], Annotated[tuple[Positive, ...], Field(min_length=1)]] = {
        "sft": (1, 2),
        "lora": (1, 2),
        "dpo": (8, 16),
    }
    """Packed rows, or pairs, of a forward pass that the peer tries; its best counts."""
    parts: tuple[Part, ...] = ("sft", "lora", "dpo", "ray", "memory")
    """sft: full tuning on packed rows; lora; dpo: full tuning on pairs, the reference computed ahead on both sides;
    ray: the stage on one Ray worker against the loop alone; memory: a step at a large vocabulary against the peer's
    head and against all logits."""
    config: dict[str, Any]
    """The model: `model_type` and the architecture's own fields, the vocabulary among them."""
    documents: Positive = 1024
    prompt_tokens: Annotated[float, Field(gt=0)] = 20.0
    """Median; the logarithm's standard deviation is 0.5."""
    answer_tokens: Annotated[float, Field(gt=0)] = 45.0
    pack_length: Positive = 1024
    rows_per_step: Positive = 4
    """Packed rows that a step's documents fill."""
    micro_batch: Positive = 1
    """Packed rows of one forward pass of our side."""
    rank: Positive = 16
    """Of the LoRA adapter."""
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    """Compile our side's layers, before the turns; see `TrainJob.compile`."""
    peer_compile: bool = False
    """Compile the peer's model, in steps that are not timed."""
    threads: Positive = 2
    """Of each side, one of which works at a time."""
    rounds: Positive = 3
    steps: Positive = 2
    """Steps of our turn."""
    peer_steps: Positive = 1
    """Steps of the peer's turn."""
    ray_steps: Positive = 8
    """Steps of each run of the part `ray`, of which there are two on each side."""
    vocabulary: Positive = 128_256
    """Of the part `memory`."""
    tokens: Positive = 4096
    """Supervised tokens of the part `memory`."""


class BenchJob(Job):
    """Measure a stage against its peer. The output ends in one JSON object with `ratio`.

    With `stage`, a generate job against bare vLLM: same engine settings, prompts, sampling and seeds. `ratio` is output
    tokens per second of the whole stage, from prompts to Parquet, over those of the best of `runs` calls of
    `LLM.generate`. Engine starts count on neither side. With `train`, see `TrainBench`; `ratio` is that of the first of
    its parts, tokens per second of the best turn over the peer's."""

    stage: GenerateJob | None = None
    """The generate job, without a name; recipe `respond`, one replica."""
    train: TrainBench | None = None
    runs: Positive = 3
    """Calls of `LLM.generate`, the best of which counts."""
    warm_up: Annotated[int, Field(ge=0)] = 32
    """Prompts answered before either side is timed, by the same path that is timed."""

    @property
    def generation(self) -> GenerateJob:
        """`stage` of a bench that has one."""
        assert self.stage is not None
        return self.stage

    @property
    def teacher(self) -> ServedModel:
        """The model of both sides."""
        assert self.generation.teacher is not None
        return self.generation.teacher

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
        if (self.stage is None) == (self.train is None):
            raise ValueError("give exactly one of `stage` (generation) and `train`")
        if self.stage is None:
            return self
        if self.stage.recipe.type != "respond":
            raise ValueError("stage.recipe must be respond: LLM.generate makes one call per prompt")
        teacher = self.stage.teacher
        if teacher is None or not isinstance(teacher.engine, VllmEngineConfig):
            raise ValueError("stage.teacher.engine must be vllm")
        if teacher.pool.most != 1:
            raise ValueError("stage.teacher.pool.replicas must be 1: LLM.generate is one engine")
        return self
