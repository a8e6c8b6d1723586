"""Fan-out of a training's steps to TensorBoard, Weights & Biases and MLflow.

A tracker has to work when the training starts: a missing package or key is an error before anything is done. From then
on it cannot stop the run: one that fails is told once and left out.
"""

import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from itune_ray.config.trackers import MlflowTracker, TensorboardTracker, TrackerConfig, WandbTracker
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError
from itune_ray.train.metrics import read_metrics
from itune_ray.train.wandb_file import wait_for_end

log = logging.getLogger(__name__)
Numbers = dict[str, float]
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""Tracker -> the module it writes by."""
INSTALL = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Tracker -> what pip calls it."""
KEYS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
"""Environment variables whose values are never repeated."""
TENSORBOARD = "tensorboard"
"""Folder of the event files in a stage."""
WANDB_END_S = 60.0
"""How long W&B's service may take to write the end of an offline run."""
LOSS = "loss"
"""A number that every row has."""


class Tracker(Protocol):
    """One place that shows steps."""

    shown: int
    """Newest step that an earlier opening of the same run has left there, 0 without one."""

    def log(self, step: int, numbers: Numbers) -> None:
        """The numbers of one step; steps only rise."""
        ...

    def close(self, failed: bool) -> None:
        """The run has ended, or this process goes."""
        ...


class Tracked:
    """All trackers of a run.

    Args:
        say: Tells people that a tracker was left out.
    """

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]):
        self._trackers, self._say = dict(trackers), say
        self.whole = True
        """Whether no tracker was left out."""
        self._last = {name: tracker.shown for name, tracker in trackers.items()}

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl; a step that is taken again after a failure is shown once."""
        step, values = int(row["step"]), numbers(row)

        def show(name: str, tracker: Tracker) -> None:
            if step > self._last[name]:
                self._last[name] = step
                tracker.log(step, values)

        self._each(show)

    def close(self, failed: bool = False) -> None:
        """Write what is still on its way, and how the run has ended."""
        self._each(lambda _, tracker: tracker.close(failed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _each(self, call: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(name, tracker)
            except Exception as error:  # noqa: BLE001  any error of any library; the training goes on
                self._trackers.pop(name, None)  # the end may close it while its last steps are shown
                self.whole = False
                log.warning("tracker %s failed: %s", name, without_keys(str(error)))
                self._say(f"tracker {name} is left out from now on: {type(error).__name__}; see the log")


def numbers(row: Mapping[str, Any]) -> Numbers:
    """The numbers of a row, those of sections as `section/name`."""
    found: Numbers = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[name] = float(value)
    return found


def without_keys(text: str) -> str:
    """The text with the values of `KEYS` left out."""
    for name in KEYS:
        if value := os.environ.get(name):
            text = text.replace(value, f"({name})")
    return text


def check_trackers(configs: Sequence[TrackerConfig]) -> None:
    """Raise `ConfigError` for a tracker whose package, key or server is missing, before any work is done."""
    for config in configs:
        try:
            importlib.import_module(PACKAGES[config.type])
        except ImportError:
            raise ConfigError(
                f"tracker {config.type} needs a package that is not installed",
                got=config.type,
                allowed=f"pip install {INSTALL[config.type]}",
                knob="trackers",
            ) from None
        if isinstance(config, WandbTracker) and not (_offline() or os.environ.get("WANDB_API_KEY")):
            raise ConfigError(
                "tracker wandb has no key",
                allowed="WANDB_API_KEY in the environment, or WANDB_MODE=offline",
                knob="WANDB_API_KEY",
            )
        if isinstance(config, MlflowTracker) and not (config.uri or os.environ.get("MLFLOW_TRACKING_URI")):
            raise ConfigError(
                "tracker mlflow has no server or folder to write to",
                allowed="a URI or a folder, there or in MLFLOW_TRACKING_URI",
                knob="trackers.N.uri",
            )


def _offline() -> bool:
    return os.environ.get("WANDB_MODE", "").lower() in ("offline", "disabled", "dryrun")


def open_trackers(
    configs: Sequence[TrackerConfig],
    *,
    folder: str,
    name: str,
    run_id: str,
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> Tracked:
    """Open every tracker. Steps of metrics.jsonl that one has not got, since the driver was killed before it told them
    or the tracker is new, are shown first.

    Args:
        folder: The stage's, path or URI.
        name: What people call the run.
        run_id: Names the run for good: asked again after a kill, a tracker goes on with the same run.
        settings: What the run was asked for, without anything secret.

    Raises:
        ConfigError: See `check_trackers`; or a tracker that does not open.
    """
    check_trackers(configs)
    opened: dict[str, Tracker] = {}
    for index, config in enumerate(configs):
        key = config.type if config.type not in opened else f"{config.type}-{index}"
        try:
            if isinstance(config, TensorboardTracker):
                opened[key] = _Tensorboard(folder)
            elif isinstance(config, WandbTracker):
                opened[key] = _Wandb(config, folder, name, run_id, settings)
            else:
                opened[key] = _Mlflow(config, name, run_id, settings)
        except Exception as error:  # noqa: BLE001  any error of any library, told in one line
            Tracked(opened, say).close(failed=True)
            reason = without_keys(next(iter(str(error).splitlines()), type(error).__name__))
            raise ConfigError(f"tracker {config.type} cannot be opened: {reason}", knob="trackers") from None
    tracked = Tracked(opened, say)
    for row in read_metrics(folder) if opened else ():
        tracked.log(row)
    return tracked


class _Tensorboard:
    """Event files, written anew by every opening; beside an object store they are written on this machine and copied
    when the run ends."""

    shown = 0

    def __init__(self, folder: str):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingTypeStubs]

        target = Folder.at(folder) / TENSORBOARD
        target.delete()
        self._target = None if target.is_local else target
        self._scratch = tempfile.TemporaryDirectory() if self._target is not None else None
        self._path = target.path if self._scratch is None else self._scratch.name
        self._writer = SummaryWriter(self._path)

    def log(self, step: int, numbers: Numbers) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()
        if self._target is not None and self._scratch is not None:
            _copy(Path(self._path), self._target)
            self._scratch.cleanup()


class _Wandb:
    """One run of a project; offline it is written below the stage's folder, for `wandb sync`, and each opening writes
    the whole run anew, into a folder of its own with the same run id. Beside an object store the files are written on
    this machine and, offline, copied when the run ends."""

    def __init__(self, config: WandbTracker, folder: str, name: str, run_id: str, settings: Mapping[str, Any]):
        wandb: Any = importlib.import_module("wandb")
        stage = Folder.at(folder)
        self._target = None if stage.is_local else stage
        self._scratch = tempfile.TemporaryDirectory() if self._target is not None else None
        self._run: Any = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            id=run_id,
            resume="allow",
            reinit="create_new",  # else a second run of this process would write into the first
            dir=stage.path if self._scratch is None else self._scratch.name,
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # the job's own output stays where it is
        )
        self.shown = max(0, int(self._run.step) - 1)  # it names the next step, 0 in a new run

    def log(self, step: int, numbers: Numbers) -> None:
        self._run.log(numbers, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        try:
            if self._run.offline:
                wait_for_end(Path(self._run.settings.sync_file), WANDB_END_S)
        finally:
            if self._target is not None and self._scratch is not None:
                if self._run.offline:
                    _copy(Path(self._scratch.name), self._target)
                self._scratch.cleanup()


def _copy(source: Path, target: Folder) -> None:
    """The files of a folder and of those in it, links left out."""
    for folder, _, names in os.walk(source):
        for file in (Path(folder) / name for name in sorted(names)):
            if not file.is_symlink():
                target.write_bytes(file.relative_to(source).as_posix(), file.read_bytes())


class _Mlflow:
    """One run of an experiment, found again by its tag."""

    TAG = "itune.run"

    def __init__(self, config: MlflowTracker, name: str, run_id: str, settings: Mapping[str, Any]):
        mlflow: Any = importlib.import_module("mlflow")
        self._client: Any = mlflow.MlflowClient(tracking_uri=config.uri or os.environ["MLFLOW_TRACKING_URI"])
        known = self._client.get_experiment_by_name(config.experiment)
        experiment = self._client.create_experiment(config.experiment) if known is None else known.experiment_id
        found = self._client.search_runs([experiment], filter_string=f"tags.`{self.TAG}` = '{run_id}'", max_results=1)
        self.shown = 0
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            self.shown = max((metric.step for metric in self._client.get_metric_history(self._id, LOSS)), default=0)
            return
        self._id = self._client.create_run(experiment, tags={self.TAG: run_id}, run_name=name).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, str(value)[:500])

    def log(self, step: int, numbers: Numbers) -> None:
        now = int(time.time() * 1000)
        metric: Any = importlib.import_module("mlflow.entities").Metric
        self._client.log_batch(self._id, metrics=[metric(name, value, now, step) for name, value in numbers.items()])

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, status="FAILED" if failed else "FINISHED")
