"""Schema of `itune sweep`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import Field, JsonValue, model_validator

from itune_ray.config.adaptation import SUPPORT
from itune_ray.config.axes import AxisValues, check_axes, grid, of_section, told, with_values
from itune_ray.config.base import Schema, Tree, digest, validate
from itune_ray.config.compress import CompressJob
from itune_ray.config.evaluate import GREEDY, BenchmarkConfig, BootstrapConfig, EvalWorkers
from itune_ray.config.shared import (
    EngineConfig,
    Job,
    PoolConfig,
    Positive,
    SamplingConfig,
    ServedModel,
    VllmEngineConfig,
)
from itune_ray.config.train import TrainJob
from itune_ray.errors import ConfigError

J = TypeVar("J", bound=Job)

COMPRESSED = "{compressed}"
"""Stands in `train.model.path` for the model that the trial's `compress` makes."""

_EQUAL_BUDGET = ("train.steps", "train.epochs", "evaluate.benchmarks", "evaluate.bootstrap", "evaluate.pool")


class AshaConfig(Schema):
    """Asynchronous successive halving (Li et al. 2020): at steps grace, grace x reduction, ... a trial goes on only
    while its score is in the best 1 / reduction of those that got there before it."""

    type: Literal["asha"] = "asha"
    grace: Positive | None = None
    """Optimizer steps before a trial can be stopped; default: `train.steps` / reduction, rounded up."""
    reduction: Annotated[int, Field(ge=2)] = 4

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Steps at which a trial is scored, the last of which is its end."""
        rungs, rung = [steps], self.first_rung(steps)
        while rung < steps:
            rungs.append(rung)
            rung *= self.reduction
        return tuple(sorted(rungs))

    def first_rung(self, steps: int) -> int:
        """The grace period in steps."""
        return self.grace or -(-steps // self.reduction)


class FifoConfig(Schema):
    """Every trial runs to its end and is scored there."""

    type: Literal["fifo"] = "fifo"

    def rungs(self, steps: int) -> tuple[int, ...]:
        """Steps at which a trial is scored."""
        return (steps,)


SchedulerConfig = Annotated[AshaConfig | FifoConfig, Field(discriminator="type")]


class TrialEvaluation(Schema):
    """How trials are scored: by eval actors that stay, on one engine pool per distinct model."""

    beside_identity = frozenset({"pool", "workers"})

    benchmarks: Annotated[tuple[BenchmarkConfig, ...], Field(min_length=1)]
    sampling: SamplingConfig = GREEDY
    bootstrap: BootstrapConfig = BootstrapConfig()
    engine: EngineConfig = VllmEngineConfig()
    """Room for adapters is made as the trials need it: one per concurrent trial, of the largest rank."""
    pool: PoolConfig = PoolConfig()
    workers: EvalWorkers = EvalWorkers(num=1)

    def served(self, train: TrainJob) -> ServedModel:
        """The base model that serves a trial's adapter."""
        return ServedModel(model=train.model.reference(), engine=self.engine, pool=self.pool)


@dataclass(frozen=True)
class Point:
    """One trial: the values of its axes, and the jobs they make."""

    axes: AxisValues
    compress: CompressJob | None
    train: TrainJob
    evaluate: TrialEvaluation

    @property
    def key(self) -> str:
        """Identity of the trial within its sweep."""
        return digest(self.axes)


class SweepJob(Job):
    """Try every combination of some settings: compress, train an adapter, score it; writes sweep.json and trials.csv.

    Trials are compared after equal numbers of optimizer steps, on equal questions. Equal models are compressed once
    and served by one engine, which answers with each trial's adapter in turn.
    """

    beside_identity = Job.beside_identity | {"max_failures"}

    axes: Annotated[dict[str, Annotated[tuple[JsonValue, ...], Field(min_length=1)]], Field(min_length=1)]
    """Config path -> the values to try, e.g. {train.model.peft.rank: [2, 8, 16], compress.method.sparsity: [0, 0.5]}.
    A path begins with `compress.`, `train.` or `evaluate.`."""
    compress: CompressJob | None = None
    """A compress job without a name; left out, trials train on `train.model.path`."""
    train: TrainJob
    """A train job without a name, of a LoRA adapter and a number of steps. With `compress` it has no `model.path`."""
    evaluate: TrialEvaluation
    metric: str | None = None
    """The score that ranks the trials; default: the first one of the first benchmark."""
    scheduler: SchedulerConfig = AshaConfig()
    max_concurrent: Positive = 2
    """Trials at once. With several, asha's decisions depend on which gets to a rung first; with one they do not."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Times a trial whose worker died goes on from its checkpoint before the sweep gives up on it."""

    def points(self) -> list[Point]:
        """Every combination of the axes, each job of it valid."""
        return [self._point(values) for values in grid(self.axes)]

    def _point(self, values: AxisValues) -> Point:
        compress = None if self.compress is None else self._job(CompressJob, self.compress, "compress", values)
        train = self._job(TrainJob, self.train, "train", values)
        tree = with_values(self.evaluate.model_dump(mode="json"), "evaluate", values)
        return Point(values, compress, train, validate(TrialEvaluation, tree, where=told(values)))

    def _job(self, schema: type[J], base: Job, section: str, values: AxisValues) -> J:
        tree = with_values(base.model_dump(mode="json"), section, values)
        inherited = {"name": self.name, "run": self.run.model_dump(mode="json")}
        return validate(schema, {**tree, **inherited}, where=told(of_section(values, section)) or section)

    @model_validator(mode="before")
    @classmethod
    def _sections_are_jobs(cls, tree: object) -> object:
        """Give `compress` and `train` the name and seed of the sweep, and `train` the model that `compress` makes."""
        if not isinstance(tree, dict):
            return tree
        given = cast(Tree, tree).copy()
        for section in ("compress", "train"):
            if isinstance(given.get(section), dict):
                own: Tree = given[section]
                given[section] = {**own, "name": given.get("name"), "seed": own.get("seed", given.get("seed", 0))}
        if given.get("compress") is not None and isinstance(given.get("train"), dict):
            given["train"] = _on_compressed(given["train"])
        return given

    @model_validator(mode="after")
    def _comparable(self) -> "SweepJob":
        sections: dict[str, Schema] = {"compress": self.compress} if self.compress else {}
        check_axes(self.axes, {**sections, "train": self.train, "evaluate": self.evaluate})
        _check_budget(self)
        if self.compress is not None and self.compress.speed is not None:
            raise ConfigError(
                "a sweep measures speeds on the engines that score: leave `speed` out", knob="compress.speed"
            )
        if self.compress is not None and "train.model.path" in self.axes:
            raise ConfigError(
                "trials train on the model that `compress` makes: let compress.model.path be the axis",
                got="train.model.path",
                knob="axes",
            )
        for point in self.points():
            _check_adapter(point)
        return self


def _on_compressed(train: Tree) -> Tree:
    model: Any = train.get("model", {})
    if not isinstance(model, Mapping):
        return train
    path = cast(Tree, model).get("path", COMPRESSED)
    if path != COMPRESSED:
        raise ConfigError(
            "trials train on the model that `compress` makes",
            got=path,
            allowed="no path: name the model in compress.model.path",
            knob="train.model.path",
        )
    return {**train, "model": {**cast(Tree, model), "path": COMPRESSED}}


def _check_budget(job: SweepJob) -> None:
    """Scores are ranked only where the questions and the training budget are equal."""
    if job.train.steps is None:
        raise ConfigError(
            "a sweep is budgeted in optimizer steps, not in epochs", got=job.train.epochs, knob="train.steps"
        )
    unequal = [path for path in job.axes if path.startswith(_EQUAL_BUDGET)]
    if job.scheduler.type == "asha":
        unequal += [path for path in job.axes if path == "train.batch"]
    if unequal:
        fix = "; with scheduler.type=fifo it may be an axis" if unequal[0] == "train.batch" else ""
        raise ConfigError(
            f"axis `{unequal[0]}` would rank trials by unequal questions or budgets{fix}",
            allowed="other paths below compress., train. and evaluate.",
            knob="axes",
        )
    if isinstance(job.scheduler, AshaConfig) and job.scheduler.first_rung(job.train.steps) > job.train.steps:
        raise ConfigError(
            "trials end before the grace period does",
            got=job.scheduler.grace,
            allowed=f"at most train.steps, {job.train.steps}",
            knob="scheduler.grace",
        )


def _check_adapter(point: Point) -> None:
    if SUPPORT[point.train.model.peft.name].route != "adapter" or point.train.model.path is None:
        raise ConfigError(
            "trials are served as adapters of one engine per model",
            got=f"train.model.peft: {point.train.model.peft.name}",
            allowed="lora or rslora, on a pretrained model",
            knob="train.model.peft.type",
        )
