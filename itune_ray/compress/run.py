"""[Ray] The compress stage: one actor measures and cuts, the engine pools say how fast both models are."""

import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from itune_ray import cluster
from itune_ray.compress.speed import compare_speed
from itune_ray.config.compress import CompressJob, SpeedConfig
from itune_ray.config.shared import ModelRef, ServedModel
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.hub import local_model_folder
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.engine.host import EngineHost
from itune_ray.errors import CompressError, ITuneError
from itune_ray.observe.progress import Progress

VERSION = 1
"""Of the method: part of the artifact's identity."""


def run(job: CompressJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Prune a model; a finished artifact is returned without touching Ray.

    Writes model/ and compression.json: method, shape, parameters by part, bytes and tokens per second before and after.

    Raises:
        CompressError: The method cannot be applied to this model, or no calibration row can be used.
    """
    artifact = runs.artifact(stage, "compress", job, version(job))
    if artifact.complete:
        return artifact
    records = [record for source in job.calibration.data for record in read_source(source).records]
    cluster.connect(job.run.ray, progress.say)
    facts, asked = _pruned(job, records, artifact.path("model"), stage, engines, progress)
    facts["tokens_per_s"] = None
    if job.speed is not None and asked:
        facts["tokens_per_s"] = _speeds(job, job.speed, artifact.path("model"), asked, engines)
    artifact.folder.write_json("compression.json", facts)
    artifact.finish(
        rows=facts["calibration"]["rows"],
        tokens=facts.pop("calibration_tokens"),
        parameters={"total": facts["parameters"]["after"]["total"], "before": facts["parameters"]["before"]["total"]},
        removed_share=facts["parameters"]["removed_share"],
        tokens_per_s=facts["tokens_per_s"],
    )
    return artifact


def version(job: CompressJob) -> dict[str, Any]:
    """What else decides the content: the method's version, and the commit that a Hub id means now."""
    if "://" in job.model.path or os.path.exists(job.model.path):
        return {"compress": VERSION}
    return {"compress": VERSION, "revision": local_model_folder(job.model).revision}


def _pruned(
    job: CompressJob, records: Sequence[Record], out: str, stage: str, engines: EngineHost, progress: Progress
) -> tuple[dict[str, Any], list[Record]]:
    """The facts, and the rows to measure speeds on."""
    from itune_ray.compress.pruner import Pruner  # torch and transformers: not where the artifact is complete

    workers = job.workers
    what, knob = "the pruning actor", "workers.cpus_each or workers.gpus_each"
    engines.make_room(workers.each, workers.each, 1, what, knob, progress.say)
    as_actor: Any = ray.remote(Pruner)
    actor = as_actor.options(
        num_cpus=workers.cpus_each, num_gpus=workers.gpus_each, resources=workers.resources_each
    ).remote(job, records)
    try:
        batches, tokens = _result(actor.prepare.remote()), 0
        with progress.task(stage, batches, "batches") as task:
            for index in range(batches):
                tokens += _result(actor.measure.remote(index))
                task.update(index + 1, tokens)
        facts: dict[str, Any] = _result(actor.cut.remote(out))
        asked: list[Record] = _result(actor.prompts.remote(job.speed.prompts)) if job.speed else []
    finally:
        ray.kill(actor)
    return {**facts, "calibration_tokens": tokens}, asked


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ITuneError):
            raise error.cause from None
        raise
    except RayActorError as error:
        last = str(error).strip().splitlines()[-1]
        raise CompressError(f"the pruning actor died: {last}", knob="workers") from None


def _speeds(
    job: CompressJob, speed: SpeedConfig, smaller: str, asked: Sequence[Record], engines: EngineHost
) -> dict[str, Any]:
    after = ModelRef(
        path=smaller,
        chat_template=job.model.chat_template,
        dtype=job.model.dtype,
        thinking=job.model.thinking,
    )
    before = job.model.model_copy(update={"adapter": None})
    models = {"before": before, "after": after}
    pools = {n: engines.pool(ServedModel(model=m, engine=speed.engine, pool=speed.pool)) for n, m in models.items()}
    return compare_speed({n: pool.client for n, pool in pools.items()}, asked, speed.tokens, speed.rounds)
