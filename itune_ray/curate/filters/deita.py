"""deita: the best rows by complexity times quality, each unlike those taken before it (methods D32)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from itune_ray.config.curate import DeitaConfig
from itune_ray.curate.filters.base import Choice, Dropped, Reached, SetFilter, number
from itune_ray.curate.geometry import far_enough


class Deita(SetFilter):
    """Walks rows by evol score, highest first, and keeps those far enough from all kept, up to `rows` (Liu et al.
    2312.15685).

    A row without both scores goes as `no_score`, one without an embedding as `not_embedded`, one that is like a kept
    row as `similar`, and one beyond the last kept as `not_selected`.
    """

    def __init__(self, config: DeitaConfig):
        self._config = config
        self.references = (config.complexity, config.quality)

    def choose(self, reached: Reached) -> Choice:
        config = self._config
        pairs = zip(reached.read(config.complexity), reached.read(config.quality), strict=True)
        scores = [evol_score(c, q, config.turns) for c, q in pairs]
        vectors, rows = reached.vectors(config.embedder, config.key)
        index = {int(row): i for i, row in enumerate(rows)}
        dropped: dict[int, Dropped] = {}
        for row, score in enumerate(scores):
            if math.isnan(score):
                dropped[row] = Dropped("no_score")
            elif row not in index:
                dropped[row] = Dropped("not_embedded")
        ranked = sorted((row for row in index if row not in dropped), key=lambda row: (-scores[row], row))
        taken, similar = far_enough(vectors, [index[row] for row in ranked], config.threshold, config.rows)
        kept = {int(rows[i]) for i in taken}
        for row in ranked:
            if row not in kept:
                near = similar.get(index[row])
                dropped[row] = Dropped("not_selected") if near is None else Dropped("similar", of=int(rows[near[0]]))
        scored = {row: score for row, score in enumerate(scores) if not math.isnan(score)}
        return Choice(dropped, scored, facts={"scored": len(scored), "similar": len(similar)})


def evol_score(complexity: Any, quality: Any, turns: Literal["sum", "mean"] = "sum") -> float:
    """s = Σ_t c_t q_t over the turns, or their mean; NaN where a turn has not both."""
    first, second = _per_turn(complexity), _per_turn(quality)
    if not first or len(first) != len(second):
        return math.nan
    total = math.fsum(c * q for c, q in zip(first, second, strict=True))
    return total / len(first) if turns == "mean" else total


def expected_score(log_probs: Mapping[int, float], low: int = 1, high: int = 6) -> float:
    """Σ_k k · softmax_k over the scores a scorer may write first; NaN where the engine lists not all of them.

    Args:
        log_probs: Score -> log-probability of its token at the first generated position.
        low: Lowest score.
        high: Highest score.
    """
    if any(not math.isfinite(log_probs.get(k, math.nan)) for k in range(low, high + 1)):
        return math.nan
    largest = max(log_probs[k] for k in range(low, high + 1))
    mass = {k: math.exp(log_probs[k] - largest) for k in range(low, high + 1)}
    return math.fsum(k * p for k, p in mass.items()) / math.fsum(mass.values())


def _per_turn(value: Any) -> Sequence[float]:
    return [number(item) for item in value] if isinstance(value, list) else [number(value)]
