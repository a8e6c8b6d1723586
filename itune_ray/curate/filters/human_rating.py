"""Human rating: rows that people rated well, and Q_manual (survey eq. 1, methods D01)."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from itune_ray.config.curate import HumanRatingConfig
from itune_ray.curate.agreement import agreement_report
from itune_ray.curate.filters.base import KEEP, RowFilter, Seen, Settled, Verdict
from itune_ray.data.records import Record
from itune_ray.errors import DataError

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
EPSILON = 1e-9
"""A mean of scaled ratings at the threshold counts as reaching it, whatever its rounding."""
UNNAMED = "unnamed"


class Rating(NamedTuple):
    """One rater's opinion, scaled to [0, 1]."""

    rater: str
    value: float


class HumanRating(RowFilter):
    """Keeps rows whose mean scaled rating h is at least the threshold τ, and gates on Q_manual = (1/N) Σ 1[h ≥ τ].

    `meta.ratings` holds numbers on a scale of 1 to 5 or {value, rater, scale_min, scale_max}; each is scaled to
    (v − min) / (max − min). Unrated rows stay; they are counted apart and are no part of N. A rating outside its scale
    makes the row a `bad_rating`.
    """

    needs = frozenset({"meta.ratings"})
    settles = True

    def __init__(self, config: HumanRatingConfig):
        self._threshold, self._q_min = config.threshold, config.q_min

    def keep(self, record: Record) -> Verdict:
        try:
            ratings = list(ratings_of(record))
        except (KeyError, TypeError, ValueError):
            return Verdict(False, "bad_rating")
        if not ratings:
            return KEEP
        score = fmean(rating.value for rating in ratings)
        return Verdict(True, score=score) if self._passes(score) else Verdict(False, "low_rating", score)

    def settle(self, seen: Seen) -> Settled:
        """Q_manual with its Wilson interval, overall and per rater, and how far named raters of the same rows agree
        (Krippendorff's α of the scaled ratings, methods D02).

        Raises:
            DataError: The lower bound is below `q_min`.
        """
        rated = [score for score in seen.scores if not math.isnan(score)]
        good = sum(self._passes(score) for score in rated)
        low, high = wilson(good, len(rated))
        q = good / len(rated) if rated else math.nan
        if self._q_min is not None and not low >= self._q_min:
            raise DataError(
                f"Q_manual is {q:.3f} over {len(rated)} rated rows, lower 95 % bound {low:.3f}",
                got=round(low, 3),
                allowed=f"at least {self._q_min}",
                knob="filters.N.q_min",
            )
        unrated = sum(not record.meta.get("ratings") for record in seen.records)
        facts = {
            "value": q,
            "low": low,
            "high": high,
            "n": len(rated),
            "unrated": unrated,
            "threshold": self._threshold,
            "raters": self._per_rater(seen),
        }
        agreement = agreement_report(_units(seen))
        return Settled(facts={"q_manual": facts, **({"agreement": agreement} if agreement else {})})

    def _per_rater(self, seen: Seen) -> dict[str, dict[str, float]]:
        values: defaultdict[str, list[float]] = defaultdict(list)
        for record, score in zip(seen.records, seen.scores, strict=True):
            if not math.isnan(score):
                for rating in ratings_of(record):
                    values[rating.rater].append(rating.value)
        return {rater: {"value": fmean(map(self._passes, v)), "n": len(v)} for rater, v in sorted(values.items())}

    def _passes(self, score: float) -> bool:
        return score >= self._threshold - EPSILON


def _units(seen: Seen) -> list[dict[str, float]]:
    """Per rated row rater -> rating, of named raters; of one who rated a row twice, the mean."""
    units: list[dict[str, float]] = []
    for record, score in zip(seen.records, seen.scores, strict=True):
        values: defaultdict[str, list[float]] = defaultdict(list)
        for rating in [] if math.isnan(score) else ratings_of(record):
            if rating.rater != UNNAMED:
                values[rating.rater].append(rating.value)
        units.append({rater: fmean(given) for rater, given in values.items()})
    return units


def ratings_of(record: Record) -> Iterator[Rating]:
    """The row's ratings scaled to [0, 1]; raises ValueError, TypeError or KeyError for one that is none."""
    given = record.meta.get("ratings")
    for rating in given if isinstance(given, list) else [] if given is None else [given]:
        fields: Mapping[str, Any] = rating if isinstance(rating, Mapping) else {"value": rating}
        low, high = float(fields.get("scale_min", 1)), float(fields.get("scale_max", 5))
        value = float(fields["value"])
        if not low <= value <= high or low == high:
            raise ValueError(f"{value} is not on the scale {low} to {high}")
        yield Rating(str(fields.get("rater", UNNAMED)), (value - low) / (high - low))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); NaN without observations."""
    if n == 0:
        return math.nan, math.nan
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return centre - half, centre + half
