"""Before and after: the same items under two models, and what can honestly be said about the difference."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itune_ray.benchmarks.base import share
from itune_ray.config.report import ReportJob
from itune_ray.data.records import row_rng, row_seed
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.evaluate import stats
from itune_ray.report import format as shown
from itune_ray.report.collect import Row, Run

BOOTSTRAP_SAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Two models on the same items of one benchmark."""

    before: str
    after: str
    name: str
    """Name of the score."""
    score: dict[str, Any]
    """The after model's, as scores.json has it."""
    earlier: dict[str, Any]
    """The before model's."""
    difference: stats.Difference | None
    """After minus before, items resampled in pairs; None where the metric is no mean over items."""
    p: float | None
    """Exact McNemar test of right and wrong; None where replies are not right or wrong."""
    pairs: tuple[tuple[Row, Row], ...]
    """The answers of both to each common item."""

    @property
    def transitions(self) -> dict[str, int]:
        """How many items went from wrong to right, and the other three ways."""
        counts = Counter(transition(old, new) for old, new in self.pairs)
        return {name: counts[name] for name in TRANSITIONS}


RIGHT_OR_WRONG = ("exact_match", "em")
"""Metrics whose items are what McNemar's test compares."""

TRANSITIONS = ("wrong → right", "right → wrong", "right → right", "wrong → wrong")


def transition(old: Row, new: Row) -> str:
    """One of `TRANSITIONS`; an item without a grade counts as wrong."""
    return f"{'right' if old['ok'] else 'wrong'} → {'right' if new['ok'] else 'wrong'}"


def chosen_models(run: Run, job: ReportJob) -> tuple[str, str] | None:
    """Which model is before and which after: the first and the last scored, unless the job names them.

    Raises:
        ConfigError: The job names a model that nothing scored.
    """
    names = list(run.scores)
    for knob, wanted in (("before", job.before), ("after", job.after)):
        if wanted is not None and wanted not in names:
            hint = did_you_mean(wanted, names)
            raise ConfigError(f"no stage scored this model{hint}", got=wanted, allowed=", ".join(names), knob=knob)
    if not names:
        return None
    before, after = job.before or names[0], job.after or names[-1]
    return None if before == after else (before, after)


def compare(run: Run, before: str, after: str, seed: int) -> list[Comparison]:
    """One comparison per score that both models have, in the order of the after model's benchmarks."""
    common = [name for name in run.scores[after] if name in run.scores[before]]
    return [_compare(run, before, after, name, seed) for name in common]


def headline(comparisons: Sequence[Comparison]) -> Comparison | None:
    """What the verdict is about: the first score of right and wrong replies, else of known difference, else any."""
    exact = [c for c in comparisons if c.score["metric"] in RIGHT_OR_WRONG]
    tested = [c for c in comparisons if c.difference is not None]
    return (exact or tested or list(comparisons) or [None])[0]


def _compare(run: Run, before: str, after: str, name: str, seed: int) -> Comparison:
    score, earlier = run.scores[after][name], run.scores[before][name]
    olds = {row["item"]: row for row in run.answers.get((before, score["benchmark"]), ())}
    news = run.answers.get((after, score["benchmark"]), ())
    pairs = tuple((olds[new["item"]], new) for new in news if new["item"] in olds)
    return Comparison(
        before,
        after,
        name,
        score,
        earlier,
        _difference(pairs, score, row_seed(seed, "report", name)),
        _p(pairs),
        pairs,
    )


def _difference(pairs: Sequence[tuple[Row, Row]], score: dict[str, Any], seed: int) -> stats.Difference | None:
    metric, sums = score["metric"], []
    for old, new in pairs:
        both = [_statistics(row, metric, score["failed_as"]) for row in (old, new)]
        if all(both):
            sums.append(both)
    if not sums or score["unit"] == "ratio" or len(sums[0][0]) != 2:
        return None
    table = np.asarray(sums, dtype=np.float64)
    return stats.paired_bootstrap(table[:, 0], table[:, 1], share, samples=BOOTSTRAP_SAMPLES, level=LEVEL, seed=seed)


def _statistics(row: Row, metric: str, failed_as: str) -> tuple[float, ...]:
    if row["failure"] is None:
        return tuple(row["sums"].get(metric, ()))
    return (0.0, 1.0) if failed_as == "an empty reply" else ()


def _p(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    if not pairs or all(new["ok"] is None for _, new in pairs):
        return None
    first, second = (np.array([bool(pair[i]["ok"]) for pair in pairs]) for i in (0, 1))
    return stats.mcnemar(first, second)


def verdict(run: Run, comparison: Comparison | None) -> tuple[str, str]:
    """The run in one sentence, no more certain than its interval: the claim, and the evidence that ends it."""
    if comparison is None:
        return _without_comparison(run)
    c, unit = comparison, comparison.score["unit"]
    new, old = shown.score(c.score["value"], unit), shown.score(c.earlier["value"], unit)
    if c.difference is None:
        return f"{c.after} reaches {new} on {c.name}; {c.before} had {old}", f"n = {c.score['n']:,}."
    gain = shown.points(c.difference.value, unit)
    bounds = f"{shown.points(c.difference.low, unit)} to {shown.points(c.difference.high, unit)}"
    evidence = f"{gain} points on the same {len(c.pairs):,} items, 95 % interval {bounds}"
    evidence += f", {shown.p_value(c.p)}." if c.p is not None and c.score["metric"] in RIGHT_OR_WRONG else "."
    if c.difference.low <= 0 <= c.difference.high:
        return f"No reliable difference on {c.name}: {c.after} scores {new}, {c.before} {old}", evidence
    better = (c.difference.value > 0) == c.score["higher_is_better"]
    return f"{c.after} {'rises' if better else 'falls'} from {old} to {new} on {c.name}", evidence


def _without_comparison(run: Run) -> tuple[str, str]:
    for model, scores in run.scores.items():
        for name, score in scores.items():
            bounds = shown.interval(score["low"], score["high"], score["unit"])
            claim = f"{model} scores {shown.score(score['value'], score['unit'])} on {name}"
            return claim, f"95 % interval {bounds}, n = {score['n']:,}."
    return f"{len(run.stages)} stages finished", "no model was scored."


def chosen_samples(comparison: Comparison, limit: int, seed: int) -> list[tuple[str, Row, Row]]:
    """Items to show side by side, regressions never left out: (transition, before, after).

    Up to half are items that were mended, up to a quarter items that broke; wrong before and after come next, then
    right ones. Within a kind, categories take turns in an order drawn from the seed.
    """
    kinds: dict[str, list[tuple[Row, Row]]] = {name: [] for name in TRANSITIONS}
    for old, new in comparison.pairs:
        kinds[transition(old, new)].append((old, new))
    ranked = {name: _by_turns(pairs, seed, name) for name, pairs in kinds.items()}
    quota = dict(zip(TRANSITIONS, (max(1, limit // 2), max(1, limit // 4), 1, max(1, limit // 4)), strict=True))
    taken = {name: ranked[name][: quota[name]] for name in TRANSITIONS}
    for name in ("wrong → right", "wrong → wrong", "right → wrong", "right → right"):
        spare = limit - sum(map(len, taken.values()))
        taken[name] += ranked[name][len(taken[name]) :][: max(0, spare)]
    return [(name, old, new) for name in TRANSITIONS for old, new in taken[name]][:limit]


def _by_turns(pairs: Sequence[tuple[Row, Row]], seed: int, kind: str) -> list[tuple[Row, Row]]:
    """Shuffled, then one of each category before the second of any."""
    order = list(pairs)
    row_rng(seed, "report-samples", kind).shuffle(order)
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for index, (old, _) in enumerate(order):
        turns.append((seen[old["category"]], index))
        seen[old["category"]] += 1
    return [order[index] for _, index in sorted(turns)]
