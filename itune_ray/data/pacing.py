"""Pacing: which share of rows, the easiest first, is admitted at a time of training (methods D35)."""

import math
from collections.abc import Sequence
from typing import Literal

Pacing = Literal["competence", "linear", "root", "quadratic", "exponential", "logarithmic", "step"]


def competence(time: float, start: float = 0.01) -> float:
    """min(1, √(x (1 - c0²) + c0²)) at part x = t/T of training, c0 = start (Platanios et al. 2019)."""
    return min(1.0, math.sqrt(max(0.0, time) * (1 - start**2) + start**2))


def admitted(pacing: Pacing, time: float, start: float, full: float = 1.0, power: float = 2.0) -> float:
    """The share g of rows admitted at part `time` of training (Wu et al. 2021); g grows and ends at 1.

    With b = start, a = full and x = min(1, time/a): linear b + (1-b) x, root b + (1-b) x^(1/p), quadratic
    b + (1-b) x², exponential b + (1-b) (e^(10x) - 1)/(e^10 - 1), logarithmic b + (1-b) (1 + ln(x + e^-10)/10), and
    step b before x = 1. Competence takes c0 = start and knows neither a nor p.
    """
    if pacing == "competence":
        return competence(time, start)
    x = min(1.0, max(0.0, time) / full)
    shape = {
        "linear": x,
        "root": x ** (1 / power),
        "quadratic": x**2,
        "exponential": math.expm1(10 * x) / math.expm1(10),
        "logarithmic": 1 + 0.1 * math.log(x + math.exp(-10)),
        "step": float(x >= 1),
    }[pacing]
    return min(1.0, start + (1 - start) * shape)


def percentile_ranks(values: Sequence[float]) -> list[float]:
    """u = (values at most this one) / N, in (0, 1]; equal values have equal ranks."""
    ordered = sorted(values)
    last = {value: place + 1 for place, value in enumerate(ordered)}
    return [last[value] / len(ordered) for value in values]


def stage_of(rank: float, shares: Sequence[float]) -> int:
    """The first stage that admits a row of that rank, by the share each stage admits at its end."""
    return next((stage for stage, share in enumerate(shares) if rank <= share), len(shares) - 1)
