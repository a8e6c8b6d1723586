"""[Ray] What a run cost and made, as metrics: the finished stages' figures, and tokens and price while it works."""

import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from itune_ray.data.artifact import Artifact
from itune_ray.data.yields import per_accepted
from itune_ray.observe import metrics
from itune_ray.pipeline.budget import Purse

COUNT_S = 1.0
"""How often engines are asked for the tokens they have used."""
SAMPLE_S = 10.0
"""How often the bill is written down, and the cluster's price added."""


def record_stage(artifact: Artifact, cost: float | None) -> None:
    """Figures of a stage that has just finished; rows of `generate`, and all tokens, were counted as they came.

    Args:
        artifact: The stage's; what an accepted row has cost is added to its manifest.
        cost: Of the cluster while this attempt of the stage ran; None without prices.
    """
    facts = artifact.manifest
    metrics.gauge("itune_stage_seconds", facts["seconds"])
    if "yields" in facts:
        _yields(artifact, facts, cost)
    if facts.get("funnel") and artifact.job_type != "generate":
        metrics.count_funnel(facts["funnel"])
    if artifact.job_type == "evaluate":
        _scores(artifact.folder.read_json("scores.json"))
    if artifact.job_type == "sweep":
        for ended, number in facts["trials"].items():
            metrics.gauge("itune_trials", number, ended=ended)


def _yields(artifact: Artifact, facts: Mapping[str, Any], cost: float | None) -> None:
    earlier = facts.get("cost") or 0.0
    total = None if cost is None else earlier + cost
    tokens = facts.get("tokens") or {}
    per_row = per_accepted(facts["rows"], facts["seconds"], sum(tokens.values()), total)
    artifact.note(cost=total, per_accepted=per_row)
    for unit, amount in per_row.items():
        if amount is not None:
            metrics.gauge("itune_per_accepted_row", amount, unit=unit)
    for recipe, entry in facts["yields"].items():
        if entry["tokens_per_accepted"] is not None:
            metrics.gauge("itune_recipe_tokens_per_row", entry["tokens_per_accepted"], recipe=recipe)


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> None:
    for model, per in scores.items():
        for benchmark, score in per.items():
            for bound in ("value", "low", "high"):
                metrics.gauge("itune_score", score[bound], model=model, benchmark=benchmark, bound=bound)


class Meter:
    """Adds up what engines use and what the cluster costs while the run works: every living node counts, busy or not.

    Args:
        prices: Price of one resource for an hour; empty: it costs nothing.
        purse: What pays, and remembers over attempts.
        count: Records the tokens that engines have used since it was called last.
    """

    def __init__(self, prices: Mapping[str, float], purse: Purse, count: Callable[[], None] = lambda: None):
        self._prices, self._purse, self._count = prices, purse, count
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="meter")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._purse.save()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(min(COUNT_S, SAMPLE_S)):
            self._count()
            now = time.monotonic()
            if now - last < SAMPLE_S:
                continue
            if self._prices:
                self._purse.spend(cost=self._per_hour() * (now - last) / 3600)
                metrics.gauge("itune_cost", self._purse.cost)
            last = now
            self._purse.save()

    def _per_hour(self) -> float:
        import ray
        from ray.exceptions import RayError

        try:
            total = ray.cluster_resources() if ray.is_initialized() else {}
        except RayError:
            return 0.0
        return sum(self._prices.get(name, 0.0) * amount for name, amount in total.items())
