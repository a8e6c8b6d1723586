"""Intervals of proportions, for whoever counts."""

import math
import statistics
from typing import NamedTuple


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def wilson(right: float, asked: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): honest for few items and at 0 and 1."""
    if asked == 0:
        return Interval(math.nan, math.nan)
    z = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    share = right / asked
    centre = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    # At 0 and 1 rounding can leave the share itself just outside.
    return Interval(max(0.0, min(share, (centre - spread) / scale)), min(1.0, max(share, (centre + spread) / scale)))
