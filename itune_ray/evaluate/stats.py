"""How sure a score is: bootstrap, Wilson, paired differences, McNemar.

Shapes: N items, K additive statistics per item, B bootstrap samples. A metric is a function of the *sums* of its
statistics (accuracy: right and asked; corpus BLEU: n-gram counts and lengths; perplexity: NLL and tokens), so one
resampling of items serves them all, and no interval ever rests on a mean of means.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from itune_ray.data.intervals import Interval

Floats = NDArray[np.float64]
Value = Callable[[Floats], Floats]
"""Sums `[..., K]` to values `[...]`; NaN where a value is undefined."""

MAX_CELLS = 4_000_000
"""Resampled items held at once: 32 MB of indices, whatever N and B are."""


class Difference(NamedTuple):
    """An effect on the same items: `value` = second minus first, with its interval."""

    value: float
    low: float
    high: float


def bootstrap(sums: Floats, value: Value, *, samples: int, level: float, seed: int) -> Interval:
    """Percentile bootstrap over items (Efron 1979).

    Args:
        sums: Additive statistics `[N, K]`, one row per item.
        samples: B.
        level: Coverage, e.g. 0.95.

    Returns:
        The central `level` of the B resampled values; NaN twice where there are no items.
    """
    return _central(_resampled_values(sums, value, samples, seed), level)


def paired_bootstrap(
    first: Floats, second: Floats, value: Value, *, samples: int, level: float, seed: int
) -> Difference:
    """Bootstrap of `value(second) - value(first)`, items resampled in pairs (methods E11).

    Args:
        first: Statistics `[N, K]` of the one model.
        second: Statistics `[N, K]` of the other, row by row on the same items.
    """
    if first.shape != second.shape:
        raise ValueError(f"paired statistics need equal shapes, got {first.shape} and {second.shape}")

    def difference(both: Floats) -> Floats:
        width = first.shape[1]
        return value(both[..., width:]) - value(both[..., :width])

    both = np.concatenate([first, second], axis=1)
    point = float(difference(both.sum(axis=0)))
    return Difference(point, *bootstrap(both, difference, samples=samples, level=level, seed=seed))


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact two-sided McNemar test on paired right/wrong items: the p-value that the two err equally often.

    Only the items on which they differ count; under the null each is a fair coin.
    """
    gained, lost = int((second & ~first).sum()), int((first & ~second).sum())
    discordant = gained + lost
    if discordant == 0:
        return 1.0
    tail = sum(math.comb(discordant, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


def _resampled_values(sums: Floats, value: Value, samples: int, seed: int) -> Floats:
    if len(sums) == 0:
        return np.full(samples, np.nan)
    generator = np.random.default_rng(seed)
    return np.concatenate([value(counts @ sums) for counts in _resamples(len(sums), samples, generator)])


def _resamples(items: int, samples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """How often each item was drawn, `[b, N]` at a time."""
    step = max(1, MAX_CELLS // items)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        # `integers` would buffer half words, so that the chunking showed in the draws; `random` does not.
        drawn = (generator.random((rows, items)) * items).astype(np.int64) + items * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items).astype(np.float64)


def _central(values: Floats, level: float) -> Interval:
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Interval(math.nan, math.nan)
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
