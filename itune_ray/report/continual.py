"""Continual learning: what models that learned one task after another still know (methods T18, E8)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itune_ray.config.report import Continual
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.report import format as shown
from itune_ray.report.collect import Run


@dataclass(frozen=True)
class Transfer:
    """Figures of a matrix R[t, i]: the score on task i after stage t, of T stages and as many tasks (Lopez-Paz and
    Ranzato 2017; Chaudhry et al. 2018)."""

    accuracy: float
    """ACC = mean over i of R[T, i]."""
    backward: float
    """BWT = mean over i < T of R[T, i] - R[i, i]: below 0 where earlier tasks got worse."""
    forgetting: tuple[float, ...]
    """F_i = max over t of R[t, i], less R[T, i], of each task."""


def transfer(scores: Sequence[Sequence[float]]) -> Transfer:
    """The figures of a square matrix, T at least 2."""
    matrix = np.asarray(scores, dtype=np.float64)
    last = matrix[-1]
    return Transfer(
        accuracy=float(last.mean()),
        backward=float((last - matrix.diagonal())[:-1].mean()),
        forgetting=tuple((matrix.max(axis=0) - last).tolist()),
    )


def scores_of(run: Run, continual: Continual) -> list[list[dict[str, Any]]]:
    """The scores behind R[t, i]; raises `ConfigError` where one is missing, or is better when smaller."""
    found = [[_score(run, model, task) for task in continual.tasks] for model in continual.models]
    odd = [task for task, score in zip(continual.tasks, found[0], strict=True) if not score["higher_is_better"]]
    units = {score["unit"] for score in found[0]}
    if odd or len(units) > 1:
        raise ConfigError(
            "backward transfer needs scores of one unit that grow with skill",
            got=odd[0] if odd else ", ".join(sorted(units)),
            allowed="e.g. exact match of every task",
            knob="continual.tasks",
        )
    return found


def _values(scores: Sequence[Sequence[dict[str, Any]]]) -> list[list[float]]:
    return [[score["value"] for score in line] for line in scores]


def section(run: Run, continual: Continual | None) -> dict[str, Any] | None:
    """What the page shows."""
    if continual is None:
        return None
    scores = scores_of(run, continual)
    unit, found = scores[0][0]["unit"], transfer(_values(scores))
    rows = [
        {"model": model, "values": [shown.score(value, unit) for value in line]}
        for model, line in zip(continual.models, _values(scores), strict=True)
    ]
    facts = [
        ("accuracy over all tasks (ACC)", shown.score(found.accuracy, unit)),
        ("backward transfer (BWT)", shown.points(found.backward, unit)),
    ]
    forgotten = [shown.points(value, unit) for value in found.forgetting]
    return {"tasks": continual.tasks, "rows": rows, "forgetting": forgotten, "facts": facts}


def lines(run: Run, continual: Continual | None) -> Iterator[dict[str, Any]]:
    """The figures for tables.csv."""
    if continual is None:
        return
    scores = scores_of(run, continual)
    found = transfer(_values(scores))
    last = {"table": "continual", "model": continual.models[-1], "unit": scores[0][0]["unit"]}
    yield {**last, "name": "ACC", "value": found.accuracy}
    yield {**last, "name": "BWT", "value": found.backward}
    for task, value in zip(continual.tasks, found.forgetting, strict=True):
        yield {**last, "benchmark": task, "name": "forgetting", "value": value}


def _score(run: Run, model: str, task: str) -> dict[str, Any]:
    for kind, name, names in (("model", model, run.scores), ("benchmark", task, run.scores.get(model, {}))):
        if name not in names:
            raise ConfigError(
                f"no stage scored this {kind}{did_you_mean(name, names)}",
                got=name if kind == "model" else f"{task}, of {model}",
                allowed=", ".join(names),
                knob="continual",
            )
    return run.scores[model][task]
