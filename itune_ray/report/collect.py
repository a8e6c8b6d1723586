"""Reading a run: everything the report shows, taken from the artifacts and from nowhere else."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from itune_ray.data.artifact import Artifact
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError
from itune_ray.report.summary import Scores, shown_name, total_tokens

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """One finished artifact."""

    name: str
    job: str
    id: str
    path: str
    seconds: float
    rows: int | None
    tokens: int | None
    skipped: bool
    """Whether it was complete before this command."""
    funnel: Row | None
    """`{in, accepted, rejected: {reason: n}, failed: {cause: n}}`."""
    manifest: Row
    config: Row
    config_yaml: str
    metrics: tuple[Row, ...] = ()
    """Lines of metrics.jsonl, in order."""
    mix: Any = None
    """mix_report.json of a curate stage."""
    validation: tuple[Row, ...] = ()
    """Lines of validation.jsonl, in order."""
    compression: Row | None = None
    """compression.json of a compress stage."""
    sweep: Row | None = None
    """sweep.json of a sweep stage."""


@dataclass(frozen=True)
class Model:
    """A model that some stage used, and what pins it."""

    role: str
    path: str
    fingerprint: str
    """What its path stood for when the stage ran: a content hash, an artifact id or a Hub name."""


@dataclass(frozen=True)
class Run:
    """What the artifacts of a report say together."""

    stages: tuple[Stage, ...]
    scores: Scores
    answers: Mapping[tuple[str, str], Sequence[Row]]
    """(model, benchmark) -> rows of answers.parquet, in item order."""
    packages: dict[str, str]
    models: tuple[Model, ...] = field(default=())

    def of_job(self, job: str) -> list[Stage]:
        """The stages of one job type, in order."""
        return [stage for stage in self.stages if stage.job == job]


def collect(artifacts: Sequence[Artifact], skipped: Collection[str]) -> Run:
    """Read the artifacts.

    Raises:
        DataError: An artifact is not complete, so its figures would mislead.
    """
    stages = tuple(_stage(artifact, artifact.stage in skipped) for artifact in artifacts)
    scores: Scores = {}
    answers: dict[tuple[str, str], list[Row]] = {}
    for artifact in artifacts:
        if artifact.folder.exists("scores.json"):
            _take_scores(artifact, scores, answers)
    packages = {name: version for stage in stages for name, version in stage.manifest.get("packages", {}).items()}
    return Run(stages, scores, answers, packages, tuple(_models(stages)))


def _take_scores(artifact: Artifact, scores: Scores, answers: dict[tuple[str, str], list[Row]]) -> None:
    names: dict[str, str] = {}
    for model, per in artifact.folder.read_json("scores.json").items():
        names[model] = shown_name(scores, model, artifact.stage, per)
        scores.setdefault(names[model], {}).update(per)
    for row in artifact.folder.read_table("answers.parquet").to_pylist():
        row["sums"] = json.loads(row["sums"])
        answers.setdefault((names[row["model"]], row["benchmark"]), []).append(row)


def _stage(artifact: Artifact, skipped: bool) -> Stage:
    if not artifact.complete:
        raise DataError("a report needs finished stages", got=artifact.path(), knob="inputs")
    manifest, folder = artifact.manifest, artifact.folder
    text = folder.read_bytes("config.yaml").decode()
    return Stage(
        name=artifact.stage,
        job=artifact.job_type,
        id=artifact.id,
        path=artifact.path(),
        seconds=float(manifest["seconds"]),
        rows=manifest.get("rows"),
        tokens=total_tokens(manifest),
        skipped=skipped,
        funnel=manifest.get("funnel"),
        manifest=manifest,
        config=yaml.safe_load(text),
        config_yaml=text,
        metrics=_lines(folder, "metrics.jsonl"),
        mix=_json(folder, "mix_report.json"),
        validation=_lines(folder, "validation.jsonl"),
        compression=_json(folder, "compression.json"),
        sweep=_json(folder, "sweep.json"),
    )


def _lines(folder: Folder, name: str) -> tuple[Row, ...]:
    lines = folder.read_bytes(name).decode().splitlines() if folder.exists(name) else []
    return tuple(json.loads(line) for line in lines if line.strip())


def _json(folder: Folder, name: str) -> Any:
    return folder.read_json(name) if folder.exists(name) else None


def _models(stages: Sequence[Stage]) -> list[Model]:
    """Every model reference of every stage's config, with what its identity says the path stands for."""
    found: dict[tuple[str, str], Model] = {}
    for stage in stages:
        for path, fingerprint, adapter in _references(stage.config, stage.manifest.get("identity", {})):
            shown = f"{path} + {adapter}" if adapter else path
            found.setdefault((stage.name, shown), Model(stage.name, shown, fingerprint))
    return list(found.values())


def _references(config: Any, identity: Any, key: str = "") -> list[tuple[str, str, str | None]]:
    if isinstance(config, list):
        pairs = zip(config, identity if isinstance(identity, list) else [{}] * len(config), strict=False)
        return [reference for node, pinned in pairs for reference in _references(node, pinned, key)]
    if not isinstance(config, dict):
        return []
    pinned = identity if isinstance(identity, dict) else {}
    here: list[tuple[str, str, str | None]] = []
    if key == "model" and isinstance(config.get("path"), str):
        marks = [pinned.get("path"), config.get("revision"), pinned.get("adapter")]
        here = [(config["path"], " · ".join(str(m) for m in marks if m and m != config["path"]), config.get("adapter"))]
    return here + [r for name, node in config.items() for r in _references(node, pinned.get(name), name)]
