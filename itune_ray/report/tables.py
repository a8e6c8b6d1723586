"""tables.csv: every figure of the report, one per line, ready for a data frame."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from itune_ray.report.collect import Run, Stage

COLUMNS: tuple[str, ...] = (
    "table",
    "stage",
    "model",
    "benchmark",
    "slice",
    "name",
    "value",
    "low",
    "high",
    "n",
    "unit",
)
"""table: scores, categories, groups, funnel, stages, parameters or training. Columns that do not apply are empty."""

Line = dict[str, Any]


def tables_csv(run: Run) -> str:
    """The whole file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines(run))
    return out.getvalue()


def lines(run: Run) -> Iterator[Line]:
    """The figures in tidy form."""
    for model, scores in run.scores.items():
        for name, score in scores.items():
            yield from _score_lines(model, name, score)
    for stage in run.stages:
        yield from _stage_lines(stage)
        yield from _funnel_lines(stage)
        yield from _training_lines(stage)


def _score_lines(model: str, name: str, score: Mapping[str, Any]) -> Iterator[Line]:
    shared = {"model": model, "benchmark": name, "unit": score["unit"]}
    yield {"table": "scores", **shared, "name": score["metric"], **_figures(score)}
    yield {"table": "scores", **shared, "name": "failed", "value": score["failed"], "unit": "items"}
    for kind in ("categories", "groups"):
        for part, figures in score[kind].items():
            yield {"table": kind, **shared, "slice": part, "name": score["metric"], **_figures(figures)}


def _figures(score: Mapping[str, Any]) -> Line:
    return {key: score[key] for key in ("value", "low", "high", "n")}


def _stage_lines(stage: Stage) -> Iterator[Line]:
    for name, value, unit in (("seconds", stage.seconds, "s"), ("rows", stage.rows, ""), ("tokens", stage.tokens, "")):
        if value is not None:
            yield {"table": "stages", "stage": stage.name, "name": name, "value": value, "unit": unit}


def _funnel_lines(stage: Stage) -> Iterator[Line]:
    if stage.funnel is None:
        return
    for name in ("in", "accepted"):
        yield {"table": "funnel", "stage": stage.name, "name": name, "value": stage.funnel[name], "unit": "rows"}
    for ending in ("rejected", "failed"):
        for reason, number in stage.funnel[ending].items():
            yield {
                "table": "funnel",
                "stage": stage.name,
                "slice": reason,
                "name": ending,
                "value": number,
                "unit": "rows",
            }


def _training_lines(stage: Stage) -> Iterator[Line]:
    parameters = stage.manifest.get("parameters") or {}
    for name in ("trainable", "total", "ratio"):
        if name in parameters:
            yield {"table": "parameters", "stage": stage.name, "name": name, "value": parameters[name]}
    for matrix in parameters.get("matrices", ()):
        yield {
            "table": "parameters",
            "stage": stage.name,
            "slice": matrix["name"],
            "name": "ratio",
            "value": matrix["ratio"],
        }
    for entry in stage.metrics:
        for name in ("loss", "grad_norm", "lr"):
            if name in entry:
                yield {
                    "table": "training",
                    "stage": stage.name,
                    "slice": entry["step"],
                    "name": name,
                    "value": entry[name],
                }
