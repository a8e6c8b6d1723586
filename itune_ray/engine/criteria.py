"""Ratings on several criteria as one score (MDCureRM, methods D20)."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

WEIGHTS: Mapping[str, Fraction] = {
    "relevance": Fraction(1, 9),
    "coherence_factuality": Fraction(1, 9),
    "creativity": Fraction(1, 9),
    "context_integration": Fraction(2, 9),
    "inter_document": Fraction(2, 9),
    "complexity": Fraction(2, 9),
}
"""Weights that sum to 1; those that only several documents can meet count twice."""


def weighted_score(ratings: Mapping[str, float]) -> float:
    """Σ w_i s_i over `WEIGHTS`, within [1, 5] for ratings of 1 to 5; NaN where a rating is.

    Raises:
        ValueError: The ratings are not those of the criteria.
    """
    if set(ratings) != set(WEIGHTS):
        raise ValueError(f"ratings of {', '.join(sorted(ratings))}, not of {', '.join(WEIGHTS)}")
    return sum(float(weight) * ratings[name] for name, weight in WEIGHTS.items())


def ratings_of_heads(predictions: Sequence[float]) -> dict[str, float]:
    """Ratings s = 4 p + 1 of a regression head that was trained on (s - 1) / 4, in the order of `WEIGHTS`."""
    return {name: 4 * value + 1 for name, value in zip(WEIGHTS, predictions, strict=True)}
