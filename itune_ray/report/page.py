"""report.html: what the page shows, section by section, in plain values that the template only lays out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from itune_ray.config.report import ReportJob
from itune_ray.report import continual, figures
from itune_ray.report import format as shown
from itune_ray.report.collect import Row, Run, Stage
from itune_ray.report.compare import (
    RIGHT_OR_WRONG,
    Comparison,
    chosen_models,
    chosen_samples,
    compare,
    headline,
    verdict,
)
from itune_ray.report.sections import (
    alignments,
    compared_pairs,
    distillation,
    inventions,
    preference,
    pruning,
    stated,
    sweeps,
)
from itune_ray.report.summary import Scores

MAX_REPLY = 600
"""Characters of a prompt or reply that a side-by-side view shows; answers.parquet has them whole."""


@dataclass(frozen=True)
class Figure:
    """A key figure at the top of the page."""

    label: str
    value: str
    note: str
    tone: str = ""


def pairs_of(run: Run, job: ReportJob) -> list[Comparison]:
    """The comparisons of model against model that the page states."""
    pair = chosen_models(run, job)
    return compared_pairs(run, [*([pair] if pair and _many(run) else []), *job.pairs], job.seed)


def render(run: Run, job: ReportJob, pairs: Sequence[Comparison], command: str, when: str) -> str:
    """The whole page.

    Args:
        pairs: See `pairs_of`.
        command: The command line that made the run.
        when: Date and time to print.
    """
    pair = chosen_models(run, job)
    comparisons = compare(run, *pair, seed=job.seed) if pair else []
    main = headline(comparisons)
    claim, evidence = verdict(run, main)
    values = {
        "right_or_wrong": RIGHT_OR_WRONG,
        "title": job.title or job.name,
        "when": when,
        "command": command,
        "claim": claim,
        "evidence": evidence,
        "run": run,
        "main": main,
        "comparisons": comparisons,
        "figures": key_figures(run, main, comparisons),
        "scores": _score_table(run, pair),
        "scores_svg": figures.scores_figure(*_coloured(run, pair)),
        "families_svg": _families(main),
        "samples": _samples(main, job),
        "pairs": [stated(comparison) for comparison in pairs],
        "many": _many(run),
        "continual": continual.section(run, job.continual),
        "training": _training(run),
        "inventions": inventions(run),
        "alignments": alignments(run),
        "pruning": pruning(run),
        "sweeps": sweeps(run),
        "funnel": _funnel(run),
        "cost": _cost(run),
        "mixes": _mixes(run),
        "settings": _settings(run),
        "shown": shown,
    }
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("itune_ray.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(values)


def key_figures(run: Run, main: Comparison | None, comparisons: Sequence[Comparison]) -> list[Figure]:
    """The handful of numbers a reader takes away: scores of the after model, then data, size and time."""
    found: list[Figure] = []
    if main:
        found += [_compared(c) for c in comparisons if c.score["unit"] == "share"][:3]
        for name, c in _largest(comparisons)[:4]:
            found.append(_group(name, c.score["groups"][name], c.earlier["groups"].get(name)))
    for stage in run.of_job("generate")[:1]:
        if stage.rows is not None:
            found.append(Figure("rows distilled", shown.count(stage.rows), f"by {stage.name}"))
    for stage in run.of_job("train")[-1:]:
        parameters = stage.manifest.get("parameters")
        if parameters:
            note = f"{shown.count(parameters['trainable'])} of {shown.count(parameters['total'])} parameters"
            found.append(Figure("trained", shown.share(parameters["trainable"], parameters["total"]), note))
    total = sum(stage.seconds for stage in run.stages)
    return [*found, Figure("time, all stages", shown.duration(total), f"{len(run.stages)} stages")]


def _largest(comparisons: Sequence[Comparison]) -> list[tuple[str, Comparison]]:
    """Each group with the benchmark that has most items of it."""
    names = dict.fromkeys(name for c in comparisons for name in c.score["groups"])
    with_group = {name: [c for c in comparisons if name in c.score["groups"]] for name in names}
    return [(name, max(found, key=lambda c: c.score["groups"][name]["n"])) for name, found in with_group.items()]


def _compared(comparison: Comparison) -> Figure:
    score, unit = comparison.score, comparison.score["unit"]
    tone = "" if comparison.difference is None else _tone(comparison)
    was = f"from {shown.score(comparison.earlier['value'], unit)}"
    return Figure(comparison.name, shown.score(score["value"], unit), f"{was} · n = {score['n']:,}", tone)


def _tone(comparison: Comparison) -> str:
    difference = comparison.difference
    if difference is None or difference.low <= 0 <= difference.high:
        return ""
    return "good" if (difference.value > 0) == comparison.score["higher_is_better"] else "bad"


def _group(name: str, score: Mapping[str, Any], earlier: Mapping[str, Any] | None) -> Figure:
    was = f"from {shown.score(earlier['value'], 'share')} · " if earlier else ""
    return Figure(name, shown.score(score["value"], "share"), f"{was}n = {score['n']:,}")


MANY_MODELS = 4
"""Above this, models go down the table of scores and benchmarks across."""


def _many(run: Run) -> bool:
    return len(run.scores) > MANY_MODELS


def _order(run: Run, pair: tuple[str, str] | None) -> list[str]:
    """Before, after, then the others (a teacher)."""
    return [*(pair or ()), *(model for model in run.scores if model not in (pair or ()))]


def _coloured(run: Run, pair: tuple[str, str] | None) -> tuple[Scores, dict[str, str]]:
    roles = dict(zip(pair, ("before", "after"), strict=True)) if pair else {}
    order = _order(run, pair)
    return {model: run.scores[model] for model in order}, {
        model: roles.get(model, "muted" if pair else "after") for model in order
    }


def _score_table(run: Run, pair: tuple[str, str] | None) -> list[dict[str, Any]]:
    """One line per benchmark, one cell per model."""
    names = list(dict.fromkeys(name for scores in run.scores.values() for name in scores))
    return [
        {
            "name": name,
            "cells": [(model, run.scores[model].get(name)) for model in _order(run, pair)],
            "definition": next(s[name]["definition"] for s in run.scores.values() if name in s),
        }
        for name in names
    ]


def _families(main: Comparison | None) -> str:
    if main is None or main.score["unit"] != "share" or len(main.score["categories"]) < 2:
        return ""
    return figures.families_figure(
        main.earlier["categories"], main.score["categories"], (f"{main.before} (before)", f"{main.after} (after)")
    )


def _samples(main: Comparison | None, job: ReportJob) -> dict[str, list[dict[str, Any]]]:
    """Transition -> items side by side, regressions after what was mended."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for kind, old, new in chosen_samples(main, job.samples, job.seed) if main else ():
        groups.setdefault(kind, []).append(_sample(main, old, new))
    return groups


def _sample(main: Comparison | None, old: Row, new: Row) -> dict[str, Any]:
    names = (main.before, main.after) if main else ("", "")
    return {
        "category": new["category"],
        "prompt": shown.shorten(new["prompt"], MAX_REPLY),
        "reference": shown.shorten(new["reference"], MAX_REPLY),
        "sides": [
            {
                "model": model,
                "ok": row["ok"],
                "score": row["score"],
                "failure": row["failure"],
                "reply": shown.shorten(row["reply"] or "", MAX_REPLY),
                "cut": row["finish_reason"] == "length",
            }
            for model, row in zip(names, (old, new), strict=True)
        ],
    }


def _training(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "svg": figures.training_figure(stage),
            "facts": [*_training_facts(stage), *distillation(stage)],
            "preference": preference(stage),
            "matrices": _matrices(stage),
        }
        for stage in run.of_job("train")
    ]


def _training_facts(stage: Stage) -> list[tuple[str, str]]:
    entries, facts = stage.metrics, [("steps", shown.count(len(stage.metrics)))]
    if entries:
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        facts.append(("loss, first → last", f"{losses[0]:.3f} → {losses[-1]:.3f}"))
        facts.append(("tokens", shown.count(stage.tokens)))
    return [*facts, ("time", shown.duration(stage.seconds))]


def _matrices(stage: Stage) -> dict[str, Any] | None:
    """LoRA's efficiency ratio r(1/d + 1/k) (survey eq. 8), equal matrices on one line."""
    parameters = stage.manifest.get("parameters")
    if not parameters:
        return None
    kinds = Counter(
        (m["name"].rpartition(".")[2], m["out_features"], m["in_features"], m["rank"], m["ratio"])
        for m in parameters.get("matrices", ())
    )
    rows = [
        {"name": name, "count": number, "d": d, "k": k, "rank": rank, "ratio": ratio}
        for (name, d, k, rank, ratio), number in kinds.items()
    ]
    return {"rows": rows, **{key: parameters[key] for key in ("trainable", "total", "ratio")}}


def _funnel(run: Run) -> dict[str, Any]:
    """Stages that make data, and any other that lost a row."""
    stages = [
        s
        for s in run.stages
        if s.funnel and s.funnel["in"] and (s.job != "evaluate" or s.funnel["accepted"] < s.funnel["in"])
    ]
    if not stages:
        return {}
    colours = figures.reason_colours(stages)
    rows = [
        {
            "stage": stage,
            "in": stage.funnel["in"] if stage.funnel else 0,
            "endings": [(name, number, colours[name]) for name, number in figures.endings(stage) if number],
            "per_accepted": _per_accepted(stage),
        }
        for stage in stages
    ]
    return {"svg": figures.funnel_figure(stages), "rows": rows, "recipes": _recipes(stages)}


def _per_accepted(stage: Stage) -> str:
    """What one accepted row of a stage took, rejected ones paid for."""
    found = stage.manifest.get("per_accepted") or {}
    words = {"seconds": "{:.3g} s", "tokens": "{:,.0f} tokens", "cost": "{:.3g} by run.prices"}
    return ", ".join(words[unit].format(amount) for unit, amount in found.items() if amount) or "–"


def _recipes(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Yield by recipe, of stages whose rows come from more than one."""
    return [
        {"stage": stage, "rows": [{"recipe": name, **entry} for name, entry in stage.manifest["yields"].items()]}
        for stage in stages
        if len(stage.manifest.get("yields") or {}) > 1
    ]


def _mixes(run: Run) -> list[tuple[str, Any]]:
    """Facts of curate stages: how sources were mixed (survey eq. 5), how good manual rows are (eq. 1), and whether
    words in a row can move its judge."""
    found: list[tuple[str, Any]] = []
    for stage in run.of_job("curate"):
        quality = stage.manifest.get("q_manual")
        found += [(f"Mixture, {stage.name}", stage.mix)] if stage.mix else []
        found += [(f"Manual quality Q, {stage.name}", quality)] if quality else []
        judges = [step for step in stage.manifest.get("filters", []) if "planted" in step]
        found += [(f"Judge, {stage.name}", step) for step in judges]
    return found


def _cost(run: Run) -> str:
    return figures.cost_figure(run.stages) if run.stages else ""


def _settings(run: Run) -> list[tuple[str, dict[str, str]]]:
    """Benchmark name -> settings a reader must know to compare the score."""
    found: dict[str, dict[str, str]] = {}
    for scores in run.scores.values():
        for score in scores.values():
            facts = {name: _plain(value) for name, value in score["settings"].items()}
            found.setdefault(score["benchmark"], facts | {"a failed item counts as": score["failed_as"]})
    return list(found.items())


def _plain(value: Any) -> str:
    """A setting on one line: `temperature 0.0, max_tokens 64`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items() if item not in ((), [], None))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
