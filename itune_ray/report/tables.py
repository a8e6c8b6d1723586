"""tables.csv: every figure of the report, one per line, ready for a data frame."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from itune_ray.config.axes import told
from itune_ray.config.report import Continual
from itune_ray.report import continual
from itune_ray.report.collect import Row, Run, Stage
from itune_ray.report.compare import Comparison

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
"""table: scores, categories, groups, pairs, funnel, stages, parameters, training, validation, compression, sweep or
continual; in pairs, `slice` is the model before. Columns that do not apply are empty."""
_BOOKKEEPING = frozenset({"step", "epoch", "tokens", "ranks", "seconds", "tokens_per_s", "n", "low", "high"})
"""Of a line of metrics.jsonl or validation.jsonl: what is no figure of its own."""
_PROPORTIONS = frozenset({"reward_accuracy"})
"""Metrics whose interval stands beside them in validation.jsonl."""

Line = dict[str, Any]


def tables_csv(run: Run, pairs: Sequence[Comparison] = (), stages: Continual | None = None) -> str:
    """The whole file.

    Args:
        pairs: Model against model, on the same items.
        stages: Models that learned one task after another.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines(run))
    writer.writerows(_pair_line(comparison) for comparison in pairs)
    writer.writerows(continual.lines(run, stages))
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
        yield from _metric_lines(stage, "training", stage.metrics)
        yield from _metric_lines(stage, "validation", stage.validation)
        yield from _compression_lines(stage)
        yield from _sweep_lines(stage)


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


def _metric_lines(stage: Stage, table: str, entries: Sequence[Row]) -> Iterator[Line]:
    for entry in entries:
        shared = {"table": table, "stage": stage.name, "slice": entry.get("step")}
        for name, value in entry.items():
            if name in _BOOKKEEPING or not isinstance(value, (int, float)):
                continue
            interval = _figures({"value": value, **entry}) if name in _PROPORTIONS and "low" in entry else {}
            yield {**shared, "name": name, "value": value, **interval}


def _compression_lines(stage: Stage) -> Iterator[Line]:
    facts: Row = stage.compression or {}
    for when in ("before", "after") if facts else ():
        shared = {"table": "compression", "stage": stage.name, "slice": when}
        for part, number in facts["parameters"][when].items():
            yield {**shared, "name": f"parameters/{part}", "value": number}
        yield {**shared, "name": "bytes", "value": facts["bytes"][when], "unit": "bytes"}
        if facts["tokens_per_s"]:
            yield {**shared, "name": "tokens_per_s", "value": facts["tokens_per_s"][when], "unit": "tokens/s"}


def _sweep_lines(stage: Stage) -> Iterator[Line]:
    sweep: Row = stage.sweep or {}
    for trial in sweep.get("trials", ()):
        shared = {"table": "sweep", "stage": stage.name, "slice": told(trial["axes"])}
        yield {**shared, "name": sweep["metric"], **_figures(trial["score"])}
        for name in ("steps", "parameters", "trainable", "tokens_per_s"):
            yield {**shared, "name": name, "value": trial[name]}


def _pair_line(comparison: Comparison) -> Line:
    d = comparison.difference
    assert d is not None
    return {
        "table": "pairs",
        "model": comparison.after,
        "benchmark": comparison.name,
        "slice": comparison.before,
        "name": "difference",
        "value": d.value,
        "low": d.low,
        "high": d.high,
        "n": len(comparison.pairs),
        "unit": comparison.score["unit"],
    }
