"""[Ray] The sweep stage: the driver holds engines, eval actors and the ledger; Tune runs the trials.

Whatever is killed, the ledger, the trials' training artifacts and their stored scores say how far the sweep is. A new
driver replays the ledger, leaves ended trials alone and lets the others go on from their checkpoints.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray import tune

from itune_ray.benchmarks import benchmarks
from itune_ray.benchmarks.base import Benchmark, Item
from itune_ray.cluster import connect
from itune_ray.compress.run import version as compress_version
from itune_ray.config.axes import told
from itune_ray.config.sweep import Point, SweepJob
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, ITuneError, TrainError, did_you_mean
from itune_ray.evaluate.score import score_names
from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress, Task
from itune_ray.sweep.ledger import Entry, SweepLedger
from itune_ray.sweep.plans import Planned, planned
from itune_ray.sweep.results import sweep_result, trial_result, trials_csv
from itune_ray.sweep.room import make_room, trial_resources
from itune_ray.sweep.scheduler import Rule, SweepScheduler
from itune_ray.sweep.scorer import Scorers
from itune_ray.sweep.shapes import Shapes, check_compressible, on_compressed_models, shapes_of, speeds, start_pools
from itune_ray.sweep.tracking import shown_rows, track_trial
from itune_ray.sweep.trial import Trial
from itune_ray.train.metrics import read_metrics
from itune_ray.train.run import version as train_version
from itune_ray.train.trackers import check_trackers

SPEEDS = "speeds.json"
"""Shape -> generated tokens per second."""
TUNE = "tune"
"""Folder that Tune writes its own files to while trials run; nothing reads them."""
_TUNE_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupt ends the command as it does everywhere else
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a job file mean the job's working directory
}


def run(job: SweepJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Try every combination of the axes.

    Writes sweep.json, trials.csv and, per trial and rung, trials/<key>/at-<step>/ with answers and scores; each trial's
    training is an artifact of the run beside it. Ended trials are never run again.

    Raises:
        ConfigError: The metric is none of the benchmarks' scores, or a tracker of the training cannot work.
        CompressError: A sparsity does not fit the model.
        ClusterError: The cluster cannot hold engines, eval actors and trials together.
        TrainError: No trial could be scored, or a trial's workers died more often than `max_failures` allows.
    """
    points, measures = job.points(), benchmarks(job.evaluate.benchmarks)
    metric, higher_is_better = _metric(job, measures)
    artifact = runs.artifact(stage, "sweep", job, _version(points, measures))
    if artifact.complete:
        return artifact
    check_compressible(points)
    for point in points:
        check_trackers(point.train.trackers)
    connect(job.run.ray, progress.say, meanwhile=["itune_ray.train.renderer"])
    points = on_compressed_models(points, runs, engines, progress)
    shapes = shapes_of(job, points)
    trials = planned(job, points, shapes.of_trial, metric, runs, artifact)
    sweep = _Sweep(job, artifact, trials, shapes, SweepLedger(artifact.folder), metric, higher_is_better)
    starts = engines.starts
    if sweep.todo:
        _run_trials(sweep, measures[0].items(), engines, progress)
    for key in sweep.ledger.ends():  # those that an earlier driver or a server that was away left out
        _track(sweep, key, progress)
    _publish(sweep, engines.starts - starts)
    return artifact


@dataclass(frozen=True)
class _Sweep:
    """What all parts of the stage look at."""

    job: SweepJob
    artifact: Artifact
    trials: Sequence[Planned]
    shapes: Shapes
    ledger: SweepLedger
    metric: str
    higher_is_better: bool

    @property
    def todo(self) -> list[Planned]:
        """Trials that have not ended, in the order of the grid."""
        return [trial for trial in self.trials if trial.point.key not in self.ledger.ends()]

    def axes_of(self, key: str) -> str:
        """A trial's axes, for messages."""
        return next(told(trial.point.axes) for trial in self.trials if trial.point.key == key)


def _metric(job: SweepJob, measures: Sequence[Benchmark]) -> tuple[str, bool]:
    """The ranking score's name, and whether more of it is better."""
    known = {name: metric for measure in measures for name, metric in score_names(measure).items()}
    name = job.metric or next(iter(known))
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(f"no benchmark gives such a score{hint}", got=name, allowed=", ".join(known), knob="metric")
    return name, known[name].higher_is_better


def _version(points: Sequence[Point], measures: Sequence[Benchmark]) -> dict[str, Any]:
    """Versions of benchmarks and methods, and the commits that Hub ids mean now."""
    compress = {str(p.compress.model): compress_version(p.compress) for p in points if p.compress}
    train = {str(p.train.model.path): train_version(p.train) for p in points if not p.compress}
    versions = {measure.name: measure.version for measure in measures}
    return {"benchmarks": versions, "compress": list(compress.values()), "train": list(train.values())}


def _run_trials(sweep: _Sweep, asked: Sequence[Item], engines: EngineHost, progress: Progress) -> None:
    """Run what has not ended, on engines and eval actors that live as long as the trials do.

    Args:
        asked: Questions on whose prompts speeds are measured, before any trial keeps the machine busy.
    """
    job, shapes, folder = sweep.job, sweep.shapes, sweep.artifact.folder
    make_room(job, shapes, engines, progress)
    try:
        start_pools(shapes, engines)
        if not folder.exists(SPEEDS):
            folder.write_json(SPEEDS, speeds(shapes, asked))
        clients = {name: pool.client for name, pool in shapes.pools.items()}
        with (
            Scorers(clients, job.evaluate, job.seed, job.evaluate.workers) as scorers,
            progress.task(sweep.artifact.stage, len(sweep.trials), "trials") as task,
            ThreadPoolExecutor(1, "trackers") as apart,
        ):
            _tune(sweep, scorers, _Shown(sweep, task, progress, apart))
    finally:
        for served in shapes.served.values():
            engines.release(served)


def _tune(sweep: _Sweep, scorers: Scorers, shown: "_Shown") -> None:
    """Let Tune run the trials."""
    for name, value in _TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    job, folder = sweep.job, sweep.artifact.folder
    folder.delete(TUNE)
    plans = {trial.point.key: trial.plan for trial in sweep.todo}
    rule = Rule(job.scheduler, job.train.steps or 0, sweep.higher_is_better)
    trainable = tune.with_parameters(Trial, plans=plans, scorers=scorers.handles)
    results = tune.Tuner(
        tune.with_resources(trainable, trial_resources(job.train.workers)),
        param_space={"trial": tune.grid_search(list(plans))},
        tune_config=tune.TuneConfig(
            scheduler=SweepScheduler(rule, sweep.ledger, shown),
            max_concurrent_trials=job.max_concurrent,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=folder.uri,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=job.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials keep their own
        ),
    ).fit()
    folder.delete(TUNE)
    for result in results:
        if result.error is not None:
            _raise_failure(sweep.axes_of((result.config or {})["trial"]), result.error)


def _raise_failure(trial: str, error: Any) -> None:
    cause = getattr(error, "cause", None)
    if isinstance(cause, ITuneError):
        raise cause
    reason = str(error).strip().splitlines()[-1]
    raise TrainError(f"trial {trial} failed too often; last: {reason}", knob="max_failures")


class _Shown:
    """Progress of the trials: how many have ended and run, the best score so far, a line for each end.

    Called between Tune's own steps, so trackers, whose servers may be slow, are told `apart`.
    """

    def __init__(self, sweep: _Sweep, task: Task, progress: Progress, apart: Executor):
        self._sweep, self._task, self._progress, self._apart = sweep, task, progress, apart
        self._dirs = {trial.point.key: trial.plan.stage_dir for trial in sweep.trials}
        self._counted: dict[str, int] = defaultdict(int)
        """Trial -> the step up to which its tokens are counted."""
        for entry in sweep.ledger.entries:
            self._counted[entry.trial] = entry.steps
        self._update()

    def __call__(self, entry: Entry) -> None:
        after, self._counted[entry.trial] = self._counted[entry.trial], entry.steps
        rows = read_metrics(self._dirs[entry.trial])
        tokens = sum(int(row["tokens"]) for row in rows if after < row["step"] <= entry.steps)
        metrics.count("itune_tokens_total", tokens, kind="trained")
        if entry.ended is not None:
            score = entry.cause if entry.score is None else f"{entry.score:.4g}"
            axes = self._sweep.axes_of(entry.trial)
            self._progress.say(f"  {axes}: {score} ({entry.ended} at step {entry.steps})")
            self._apart.submit(_track, self._sweep, entry.trial, self._progress)
        self._update()

    def _update(self) -> None:
        sweep = self._sweep
        scores = [entry.score for entry in sweep.ledger.entries if entry.score is not None]
        best = max if sweep.higher_is_better else min
        self._task.update(
            len(sweep.ledger.ends()),
            None,
            None,
            running=min(sweep.job.max_concurrent, len(sweep.todo)),
            best=best(scores, default="none yet"),
        )


def _track(sweep: _Sweep, key: str, progress: Progress) -> None:
    trial = next(trial for trial in sweep.trials if trial.point.key == key)
    track_trial(
        trial.plan.train,
        trial.point.axes,
        shown_rows(read_metrics(trial.plan.stage_dir), sweep.ledger.of(key), sweep.metric),
        sweep=sweep.job.name,
        run_id=f"{sweep.job.name}-{sweep.artifact.stage}-{sweep.artifact.id}-{key}",
        folder=sweep.artifact.folder / "trials" / key,
        say=progress.say,
    )


def _publish(sweep: _Sweep, engine_starts: int) -> None:
    rates: dict[str, float | None] = sweep.artifact.folder.read_json(SPEEDS)
    made = [trial_result(t, sweep.ledger, rates[sweep.shapes.of_trial[t.point.key]]) for t in sweep.trials]
    for trial, result in zip(sweep.trials, made, strict=True):
        if not trial.artifact.complete:
            facts = {name: result[name] for name in ("steps", "tokens", "ended")}
            trial.artifact.finish(rows=trial.plan.prepared.accepted, **facts)
    size_of = {sweep.shapes.of_trial[trial["key"]]: trial["parameters"] for trial in made if trial["parameters"]}
    models = [
        {"model": served.model.path, "parameters": size_of.get(name), "tokens_per_s": rates[name]}
        for name, served in sweep.shapes.served.items()
    ]
    result = sweep_result(sweep.metric, sweep.higher_is_better, list(sweep.job.axes), made, models, engine_starts)
    sweep.artifact.folder.write_bytes("trials.csv", trials_csv(result).encode())
    sweep.artifact.folder.write_json("sweep.json", result)
    sweep.artifact.finish(
        rows=sum(len(trial["rungs"]) for trial in made),
        tokens=sum(trial["tokens"] for trial in made),
        trials=dict(Counter(trial["ended"] for trial in made)),
        metric=sweep.metric,
        best=result["best"],
        pareto=result["pareto"],
        engine_starts=engine_starts,
    )
