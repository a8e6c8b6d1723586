"""The Pareto set: what no other candidate beats in every respect at once."""

from collections.abc import Mapping, Sequence


def pareto(candidates: Mapping[str, Sequence[float]]) -> list[str]:
    """Names of the candidates that are not dominated, in the order given.

    One dominates another when it is at least as good in every respect and better in one; equals do not dominate each
    other, so ties stay together.

    Args:
        candidates: Name -> figures of which more is better (negate what should be small); all equally many.
    """
    return [
        name for name, own in candidates.items() if not any(_dominates(other, own) for other in candidates.values())
    ]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
