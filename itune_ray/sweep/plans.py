"""[Ray] Trials made ready to run: a training artifact each, one training order for all of equal tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from itune_ray.config.base import digest
from itune_ray.config.sweep import Point, SweepJob
from itune_ray.config.train import LoraConfig, TrainJob
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.fingerprint import content_identity
from itune_ray.data.storage import Folder
from itune_ray.sweep.scorer import Scoring
from itune_ray.sweep.trial import TrialPlan
from itune_ray.train.prepare import PreparedData, preparation_digest, renderer_for
from itune_ray.train.rows import VALIDATION, read_held_out, read_rows, validation_job
from itune_ray.train.run import prepare, version

TRIAL_STAGE = "trial"
"""First part of the names of the trials' training artifacts."""


@dataclass(frozen=True)
class Planned:
    """A trial with all that is decided before it runs."""

    point: Point
    plan: TrialPlan
    artifact: Artifact
    """Its training, an artifact of the run: another sweep with the same trial goes on from it."""


def planned(
    job: SweepJob, points: Sequence[Point], shape_of: Mapping[str, str], metric: str, runs: RunStore, artifact: Artifact
) -> list[Planned]:
    """Every point as a trial.

    Args:
        points: With the models they train on in place.
        shape_of: Key of a point -> the shape that serves it.
        metric: Name of the score that ranks.
        artifact: Of the sweep; training orders and scores go there.
    """
    orders: dict[str, PreparedData] = {}
    made: list[Planned] = []
    for point in points:
        rungs = job.scheduler.rungs(point.train.steps or 0)
        trained = runs.artifact(TRIAL_STAGE, "train", point.train, {**version(point.train), "rungs": list(rungs)})
        scoring = Scoring(
            trial=point.key,
            shape=shape_of[point.key],
            base=point.train.model.reference(),
            evaluate=point.evaluate,
            folder=artifact.path(f"trials/{point.key}"),
        )
        order = _order(point.train, artifact.folder / "data", orders)
        if point.train.validation is not None:
            held_out, unread = read_held_out(point.train.validation)
            prepare(validation_job(point.train), held_out, trained.path(VALIDATION), unread)
        plan = TrialPlan(point.train, order, trained.path(), rungs, scoring, metric)
        made.append(Planned(point, plan, trained))
    return made


def _order(job: TrainJob, folder: Folder, orders: dict[str, PreparedData]) -> PreparedData:
    """The training order of a trial, tokenised once for all whose rows, settings, tokenizer and template are equal."""
    plain = job.model.model_copy(update={"peft": LoraConfig(), "adapter": None})  # what a renderer does not depend on
    settings = preparation_digest(job, renderer_for(plain.model_dump_json()))
    identity = job.identity()
    replayed = [identity["replay"]] if job.replay is not None else []
    key = digest([content_identity(identity["data"]), settings, *content_identity(replayed)])
    if key not in orders:
        records, unread = read_rows(job)
        orders[key] = prepare(job, records, (folder / key).uri, unread)
    return orders[key]
