"""The session in which jobs run: one output root, one lock, one Ray, one set of engines, one summary."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from itune_ray.config.base import sections
from itune_ray.config.pipeline import PipelineJob
from itune_ray.config.roles import Holder, placed
from itune_ray.config.shared import Job, RunSettings, ServedModel
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.lock import RunLock
from itune_ray.engine.host import EngineHost
from itune_ray.engine.timeshare import check_shares
from itune_ray.jobs import job_type, resolve
from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress
from itune_ray.observe.watch import Watch, explained_by
from itune_ray.pipeline.budget import Purse
from itune_ray.pipeline.meter import Meter, record_stage
from itune_ray.pipeline.output import output_root, receivers
from itune_ray.pipeline.step import Step, plan
from itune_ray.report.summary import write_summary


def run(job_name: str, job: Job, progress: Progress) -> RunStore:
    """Run a job, or the steps of a pipeline, to the end; finished stages are skipped.

    Args:
        job_name: A name in `JOBS`.

    Raises:
        BudgetError: The run has spent what it was given.

    Returns:
        The run, whose `opened` lists the artifacts in order; its folder holds summary.json.
    """
    steps = plan(job) if isinstance(job, PipelineJob) else [Step(job_name, job_name, job.model_dump(mode="json"))]
    if job.run.placement == "timeshare":
        _check_shares(steps)
    store = RunStore(output_root(job.run), job.name)
    metrics.in_context(run=job.name)
    for line in receivers(job):
        progress.say(line)
    with RunLock(store.folder, job.run.lock_ttl_s, progress.say):
        purse = Purse(store.folder, job.run.budget)
        engines = EngineHost(job.run.placement, job.name, purse.check, progress.say)
        with (
            metrics.sent_to(purse),
            Watch(progress, job.run.stall_s),
            explained_by(engines.describe),
            Meter(job.run.prices, purse, engines.count),
        ):
            try:
                _run_steps(steps, store, engines, job.run, purse, progress)
            except (KeyboardInterrupt, SystemExit):
                purse.check()
                raise
            finally:
                purse.close()
                engines.close()
    return store


def _check_shares(steps: Sequence[Step]) -> None:
    """Devices are shared one to one by whatever engines and trainers the steps name, or nothing is begun."""
    holders = [holder for step in steps for holder in sections(step.resolve(_paths({})), Holder)]
    engines, workers = ({h.gpus_each for h in holders if h.role == role} for role in ("infer", "train"))
    for engine in sorted(engines):
        for worker in sorted(workers):
            check_shares(engine, worker)


def _run_steps(
    steps: Sequence[Step],
    store: RunStore,
    engines: EngineHost,
    settings: RunSettings,
    purse: Purse,
    progress: Progress,
) -> None:
    artifacts: dict[str, Artifact] = {}
    skipped: set[str] = set()
    for number, step in enumerate(steps, start=1):
        job = placed(step.resolve(_paths(artifacts)), settings.ray.roles)
        started, spent = time.time(), purse.cost
        metrics.in_context(stage=step.name, job_type=step.job)
        artifact = resolve(job_type(step.job).function)(job, store, step.name, engines, progress)
        artifacts[step.name] = artifact
        if number < len(steps):
            engines.count()  # under this stage's name
        if artifact.manifest["finished"] < started:
            skipped.add(step.name)
        else:
            record_stage(artifact, purse.cost - spent if settings.prices else None)
        verb = "skipped (finished before)" if step.name in skipped else f"done in {time.time() - started:.1f} s"
        progress.say(f"[{number}/{len(steps)}] {step.name}: {verb}  {artifact.path()}")
        write_summary(list(artifacts.values()), store, skipped)
        engines.keep(_asked_later(steps[number:], artifacts))


def _asked_later(steps: Sequence[Step], artifacts: Mapping[str, Artifact]) -> Iterator[ServedModel]:
    """Models that later steps name, but for those that a step in between has yet to make."""
    for step in steps:
        for served in sections(step.resolve(_paths(artifacts)), ServedModel):
            if not served.model.path.startswith("step://"):
                yield served


def _paths(artifacts: Mapping[str, Artifact]) -> Callable[[str, str], str]:
    """Where payloads of finished steps are; those of later ones keep their reference."""

    def path_of(step: str, payload: str) -> str:
        return artifacts[step].path(payload) if step in artifacts else f"step://{step}/{payload}"

    return path_of
