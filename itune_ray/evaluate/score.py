"""From graded answers to scores: one per benchmark metric, with its categories and groups, each with an interval."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from itune_ray.benchmarks.base import Benchmark, Item, Metric, Reply
from itune_ray.config.evaluate import BootstrapConfig
from itune_ray.data.intervals import wilson
from itune_ray.data.records import row_seed
from itune_ray.evaluate import stats

FEW_ITEMS = 100
"""Below this, and wherever all items are right or all wrong, the bootstrap of a proportion is too narrow (at 0 of n it
says [0, 0]); Wilson's interval takes its place and the score says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over some items."""

    value: float
    low: float
    high: float
    n: int
    """Items in the value."""
    interval: str
    """`bootstrap` or `wilson`."""

    def to_json(self) -> dict[str, Any]:
        """`{value, low, high, n, interval}`; what is undefined is null."""
        floats = {"value": self.value, "low": self.low, "high": self.high}
        return {k: None if math.isnan(v) else v for k, v in floats.items()} | {"n": self.n, "interval": self.interval}


def score_names(benchmark: Benchmark) -> dict[str, Metric]:
    """Name in scores.json -> metric: the benchmark's own name, with the metric's after a dot where it has several."""
    if len(benchmark.metrics) == 1:
        return {benchmark.name: benchmark.metrics[0]}
    return {f"{benchmark.name}.{metric.name}": metric for metric in benchmark.metrics}


def score_benchmark(
    benchmark: Benchmark,
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Any]],
    config: BootstrapConfig,
    seed: int,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of one model on one benchmark, as scores.json has them.

    Args:
        items: All of the benchmark's, by position.
        rows: The answers of `ANSWERS_SCHEMA`, one per item, by position; a failed one has no sums.
        seed: Of the job; each benchmark draws its resamples by its own name.
        settings: Of the job, written beside the benchmark's own.
    """
    failed = sum(row["failure"] is not None for row in rows)
    graded = [(item, sums) for item, row in zip(items, rows, strict=True) if (sums := _sums(benchmark, item, row))]
    shared = {
        "failed": failed,
        "failed_as": benchmark.failed_as,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) if not benchmark.wants_texts else 0,
    }
    scores: dict[str, dict[str, Any]] = {}
    for name, metric in score_names(benchmark).items():
        draws = _Draws(metric, config, row_seed(seed, "bootstrap", benchmark.name))
        scores[name] = {
            **draws.score([sums[metric.name] for _, sums in graded]).to_json(),
            **shared,
            "benchmark": benchmark.name,
            "metric": metric.name,
            "unit": metric.unit,
            "definition": metric.definition,
            "higher_is_better": metric.higher_is_better,
            "categories": draws.slices((item.category, sums[metric.name]) for item, sums in graded),
            "groups": draws.slices((g, sums[metric.name]) for item, sums in graded for g in item.groups),
            "settings": {
                "version": benchmark.version,
                **benchmark.settings(),
                **(settings or {}),
                "interval": f"{config.level:.0%}, {config.samples} resamples",
            },
        }
    return scores


@dataclass(frozen=True)
class _Draws:
    """One metric with how it is resampled; every model sees the same draws of items."""

    metric: Metric
    config: BootstrapConfig
    seed: int

    def score(self, sums: Sequence[Sequence[float]]) -> Score:
        if not sums:
            return Score(value=math.nan, low=math.nan, high=math.nan, n=0, interval="none")
        table = np.asarray(sums, dtype=np.float64)
        value = float(self.metric.value(table.sum(axis=0)))
        if self.metric.binary and (len(sums) < FEW_ITEMS or value in (0.0, 1.0)):
            low, high = wilson(float(table[:, 0].sum()), len(sums), self.config.level)
            return Score(value=value, low=low, high=high, n=len(sums), interval="wilson")
        low, high = stats.bootstrap(
            table, self.metric.value, samples=self.config.samples, level=self.config.level, seed=self.seed
        )
        return Score(value=value, low=low, high=high, n=len(sums), interval="bootstrap")

    def slices(self, pairs: Iterable[tuple[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
        """Name -> score of each slice, sorted by name."""
        parts: dict[str, list[Sequence[float]]] = {}
        for name, sums in pairs:
            parts.setdefault(name, []).append(sums)
        return {name: self.score(parts[name]).to_json() for name in sorted(parts)}


def _sums(benchmark: Benchmark, item: Item, row: Mapping[str, Any]) -> dict[str, Sequence[float]] | None:
    """The statistics of an answer; a failed one counts as an empty reply, or not at all."""
    if row["failure"] is None:
        return json.loads(row["sums"])
    if benchmark.failed_as == "left out":
        return None
    return {name: tuple(sums) for name, sums in benchmark.grade(item, Reply(finish_reason="error")).sums.items()}
