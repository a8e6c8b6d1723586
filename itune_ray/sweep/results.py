"""What a sweep found: sweep.json for reports, trials.csv for people."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.errors import TrainError
from itune_ray.sweep.ledger import SweepLedger
from itune_ray.sweep.pareto import pareto
from itune_ray.sweep.plans import Planned
from itune_ray.train.metrics import read_metrics
from itune_ray.train.outcome import pause_folder, read_outcome

SCORE_KEYS = ("value", "low", "high", "n")


def trial_result(trial: Planned, ledger: SweepLedger, tokens_per_s: float | None) -> dict[str, Any]:
    """One trial: its axes, how far it got and how it ended, its score with an interval, its size.

    `parameters` are those of the model that serves the adapter; `trainable` those of the adapter.
    """
    entries = ledger.of(trial.point.key)
    end, scored = entries[-1], [entry for entry in entries if entry.score is not None]
    outcome = read_outcome(pause_folder(trial.plan.stage_dir, scored[-1].steps)) if scored else None
    sizes = outcome.parameters if outcome else None
    return {
        "key": trial.point.key,
        "axes": trial.point.axes,
        "steps": scored[-1].steps if scored else 0,
        "tokens": sum(int(row["tokens"]) for row in read_metrics(trial.plan.stage_dir)),
        "ended": end.ended,
        "cause": end.cause,
        "score": _score(trial, scored[-1].steps) if scored else dict.fromkeys(SCORE_KEYS),
        "rungs": [{"step": entry.steps, "value": entry.score} for entry in scored],
        "parameters": sizes.total - sizes.trainable if sizes else None,
        "trainable": sizes.trainable if sizes else None,
        "tokens_per_s": tokens_per_s,
        "artifact": trial.artifact.path(),
    }


def sweep_result(
    metric: str,
    higher_is_better: bool,
    axes: Sequence[str],
    trials: Sequence[dict[str, Any]],
    models: Sequence[Mapping[str, Any]],
    engine_starts: int,
) -> dict[str, Any]:
    """The whole of sweep.json.

    The Pareto set is that of score, few parameters and tokens per second. A stopped trial takes part with the score it
    had when it was stopped.

    Raises:
        TrainError: No trial has a score.
    """
    scored = {trial["key"]: trial for trial in trials if trial["score"]["value"] is not None}
    if not scored:
        raise TrainError(f"every trial failed; the first: {trials[0]['cause']}", knob="axes")
    sign = 1.0 if higher_is_better else -1.0

    def figures(trial: Mapping[str, Any]) -> tuple[float, float, float]:
        return sign * trial["score"]["value"], -float(trial["parameters"]), trial["tokens_per_s"] or 0.0

    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        "axes": list(axes),
        "trials": list(trials),
        "pareto": pareto({key: figures(trial) for key, trial in scored.items()}),
        "best": max(scored, key=lambda key: figures(scored[key])),
        "engine_starts": engine_starts,
        "shapes": len(models),
        "models": list(models),
    }


def trials_csv(result: Mapping[str, Any]) -> str:
    """One line per trial, the best score first."""
    sign = -1.0 if result["higher_is_better"] else 1.0
    columns = ("steps", "tokens", "ended", "parameters", "trainable", "tokens_per_s")
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n")
    write.writerow(["trial", *result["axes"], result["metric"], "low", "high", "n", *columns, "pareto"])
    for trial in sorted(result["trials"], key=lambda t: _rank(t, sign)):
        score = trial["score"]
        own = [trial["key"], *(trial["axes"][path] for path in result["axes"]), *(score[key] for key in SCORE_KEYS)]
        write.writerow([*own, *(trial[name] for name in columns), trial["key"] in result["pareto"]])
    return out.getvalue()


def _rank(trial: Mapping[str, Any], sign: float) -> float:
    """Failed trials come last."""
    value = trial["score"]["value"]
    return math.inf if value is None else sign * value


def _score(trial: Planned, rung: int) -> dict[str, Any]:
    score = trial.plan.scored_at(rung).read_json("scores.json")[trial.plan.metric]
    return {key: score[key] for key in SCORE_KEYS}
