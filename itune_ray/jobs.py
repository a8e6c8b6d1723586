"""The jobs there are: name -> schema and function, resolved when asked for, so that naming them imports nothing."""

import importlib
from dataclasses import dataclass
from typing import Any

from itune_ray.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class JobType:
    """One job: where its schema and its function are, and what it does."""

    schema: str
    function: str
    help: str
    result: str | None = None
    """Payload of the artifact, JSON, that the command prints as its last line."""


JOBS = {
    "generate": JobType(
        "itune_ray.config.generate:GenerateJob",
        "itune_ray.generate.run:run",
        "stream prompts through a recipe into a pool of vLLM engines",
    ),
    "curate": JobType(
        "itune_ray.config.curate:CurateJob",
        "itune_ray.curate.run:run",
        "unite sources, deduplicate and filter, each rejected row with its reason",
    ),
    "train": JobType(
        "itune_ray.config.train:TrainJob",
        "itune_ray.train.run:run",
        "tune a model on rows with Ray Train (full or LoRA; ddp, fsdp2 or deepspeed)",
    ),
    "compress": JobType(
        "itune_ray.config.compress:CompressJob",
        "itune_ray.compress.run:run",
        "prune a model's heads and channels to a smaller ordinary model",
    ),
    "evaluate": JobType(
        "itune_ray.config.evaluate:EvaluateJob",
        "itune_ray.evaluate.run:run",
        "score models on benchmarks with intervals, every answer stored",
    ),
    "sweep": JobType(
        "itune_ray.config.sweep:SweepJob",
        "itune_ray.sweep.run:run",
        "try combinations of settings: compress, train an adapter, score it; stop the weak ones early",
    ),
    "report": JobType(
        "itune_ray.config.report:ReportJob",
        "itune_ray.report.run:run",
        "collect a run's artifacts into report.html, tables.csv and summary.json",
    ),
    "bench": JobType(
        "itune_ray.config.bench:BenchJob",
        "itune_ray.bench.run:run",
        "measure the generate stage against bare vLLM, or the training loop against TRL",
        result="bench.json",
    ),
    "pipeline": JobType(
        "itune_ray.config.pipeline:PipelineJob",
        "itune_ray.pipeline.run:run",
        "run jobs chained by artifacts",
    ),
}


def job_type(name: str) -> JobType:
    """The job of that name; an unknown one is a `ConfigError`."""
    if name not in JOBS:
        raise ConfigError(f"unknown job{did_you_mean(name, JOBS)}", got=name, allowed=", ".join(JOBS))
    return JOBS[name]


def resolve(location: str) -> Any:
    """The object at `package.module:name`."""
    module, _, name = location.partition(":")
    return getattr(importlib.import_module(module), name)
