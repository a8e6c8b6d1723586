"""Agreement of raters, and ratings as preferences and strengths (methods D02 and D03).

Ratings are a table of units (what is rated) by raters, with gaps. No coefficient is defined where its chance agreement
is perfect, as with one category in use: that is NaN, never 1.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from itune_ray.data.records import row_seed
from itune_ray.errors import DataError

Level = Literal["nominal", "ordinal", "interval", "ratio"]
Unit = Mapping[str, float]
"""Rater -> value, without those who did not rate."""


# --- coefficients --------------------------------------------------------------------------------------------------


def percent_agreement(units: Sequence[Unit]) -> float:
    """Share of equal pairs among all pairs of ratings of the same unit; NaN without pairs."""
    pairs = [a == b for unit in units for a, b in combinations(unit.values(), 2)]
    return fmean(pairs) if pairs else math.nan


def cohen_kappa(
    first: Sequence[float], second: Sequence[float], weights: Literal["none", "linear", "quadratic"] = "none"
) -> float:
    """κ = 1 - Σ w o / Σ w e of two raters (Cohen 1960, 1968), over observed and expected shares of value pairs.

    Args:
        first: One rater's values.
        second: The other's values of the same units.
        weights: Disagreement of two values: 1 if they differ, |i - j|, or (i - j)², i and j being places among the
            values in use.
    """
    if len(first) != len(second):
        raise DataError("two raters must rate the same units", got=f"{len(first)} and {len(second)} ratings")
    values = sorted({*first, *second})
    place = {value: index for index, value in enumerate(values)}
    observed = np.zeros((len(values), len(values)))
    for a, b in zip(first, second, strict=True):
        observed[place[a], place[b]] += 1
    gap = np.abs(np.subtract.outer(np.arange(len(values)), np.arange(len(values)))).astype(float)
    cost = {"none": (gap > 0).astype(float), "linear": gap, "quadratic": gap**2}[weights]
    expected = np.outer(observed.sum(1), observed.sum(0)) / max(1, len(first))
    chance = float((cost * expected).sum())
    return 1 - float((cost * observed).sum()) / chance if chance else math.nan


def fleiss_kappa(counts: Sequence[Sequence[int]]) -> float:
    """κ = (P̄ - P̄_e) / (1 - P̄_e) for a fixed number n of raters per unit (Fleiss 1971).

    P_i = (Σ_j n_ij² - n) / (n (n - 1)) and P̄_e = Σ_j p_j².

    Args:
        counts: Per unit, how many raters chose each category.
    """
    table = np.asarray(counts, float)
    raters = table.sum(1)
    if not len(table) or (raters != raters[0]).any() or raters[0] < 2:
        raise DataError(
            "Fleiss' kappa needs the same number of raters, at least two, for each unit",
            got=sorted(set(raters.tolist())),
            allowed="Krippendorff's alpha takes gaps",
        )
    n = raters[0]
    agreement = float((((table**2).sum(1) - n) / (n * (n - 1))).mean())
    chance = float(((table.sum(0) / table.sum()) ** 2).sum())
    return (agreement - chance) / (1 - chance) if chance < 1 else math.nan


def krippendorff_alpha(units: Sequence[Unit], level: Level = "interval") -> float:
    """α = 1 - D_o / D_e over the coincidences of values within units (Krippendorff 2011); takes gaps.

    A unit of m ratings adds each of its ordered pairs with weight 1 / (m - 1); units of one rating add nothing. The
    squared difference of two values is 0 or 1 (nominal), (Σ of counts from one to the other - half of both)²
    (ordinal), (c - k)² (interval), or ((c - k) / (c + k))² (ratio). NaN without pairs or with one value in use.
    """
    paired = [list(unit.values()) for unit in units if len(unit) > 1]
    values = sorted({value for unit in paired for value in unit})
    if level == "ratio" and values and values[0] < 0:
        raise DataError("a ratio scale has no values below zero", got=values[0], allowed="level interval")
    coincidence = np.zeros((len(values), len(values)))
    for unit in paired:
        coincidence += _coincidence(unit, values)
    return _alpha(coincidence, np.array(values), level)


def _coincidence(unit: Sequence[float], values: Sequence[float]) -> NDArray[np.float64]:
    counts = np.array([unit.count(value) for value in values], float)
    return (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)


def _alpha(coincidence: NDArray[np.float64], values: NDArray[np.float64], level: Level) -> float:
    totals = coincidence.sum(1)
    difference = _difference(values, totals, level)
    expected = float((np.outer(totals, totals) * difference).sum())
    if not expected:
        return math.nan
    return 1 - (totals.sum() - 1) * float((coincidence * difference).sum()) / expected


def _difference(values: NDArray[np.float64], totals: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "ordinal":
        middle = np.cumsum(totals) - totals / 2
        return np.subtract.outer(middle, middle) ** 2
    gap = np.subtract.outer(values, values) ** 2
    if level == "interval":
        return gap
    both = np.add.outer(values, values) ** 2
    return gap / np.where(both == 0, 1.0, both)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval; NaN bounds where too few resamples have a value."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Sequence[Unit]], float], units: Sequence[Unit], seed: int = 0, resamples: int = 1000
) -> Interval:
    """The 2.5 and 97.5 % quantiles of a statistic over resamples of the units, with replacement.

    Resamples without a value (one category drawn alone) are left out; fewer than half with one give no interval.
    """
    draws = (statistic([units[i] for i in chosen]) for chosen in _resampled(len(units), seed, resamples))
    return _interval(statistic(units), draws, resamples)


def alpha_interval(units: Sequence[Unit], level: Level = "interval", seed: int = 0, resamples: int = 1000) -> Interval:
    """`bootstrap` of `krippendorff_alpha`, with the coincidences of each kind of unit computed once."""
    paired = [tuple(sorted(unit.values())) for unit in units if len(unit) > 1]
    value = krippendorff_alpha(units, level)
    kinds = {kind: index for index, kind in enumerate(dict.fromkeys(paired))}
    values = sorted({item for kind in kinds for item in kind})
    if not kinds or len(kinds) * len(values) ** 2 > LARGEST_STACK:
        return bootstrap(lambda some: krippendorff_alpha(some, level), units, seed, resamples)
    stack = np.array([_coincidence(kind, values) for kind in kinds]).reshape(len(kinds), -1)
    kind_of = np.array([kinds[kind] for kind in paired])
    shape, places = (len(values), len(values)), np.array(values)
    draws = (
        _alpha((np.bincount(kind_of[chosen], minlength=len(kinds)) @ stack).reshape(shape), places, level)
        for chosen in _resampled(len(paired), seed, resamples)
    )
    return _interval(value, draws, resamples)


LARGEST_STACK = 5_000_000
"""Numbers that the coincidences of all kinds of units may take."""


def _resampled(count: int, seed: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    for draw in range(resamples if count else 0):
        rng = np.random.default_rng(row_seed(seed, "curate.agreement", str(draw)))
        yield rng.integers(count, size=count)


def _interval(value: float, draws: Iterable[float], resamples: int) -> Interval:
    found = [draw for draw in draws if not math.isnan(draw)]
    if len(found) < max(1, resamples / 2):
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value, float(low), float(high))


# --- pairwise votes ------------------------------------------------------------------------------------------------

Vote = Literal["a", "b", "tie", "both_bad"]
TIES = ("tie", "both_bad")


@dataclass(frozen=True)
class Comparison:
    """One rater's vote on two answers to a prompt."""

    prompt: str
    a: str
    b: str
    rater: str
    vote: Vote


def upright(comparison: Comparison) -> Comparison:
    """The same vote with `a` the smaller name, and both kinds of tie as one."""
    vote: Vote = "tie" if comparison.vote in TIES else comparison.vote
    if comparison.a <= comparison.b:
        return Comparison(comparison.prompt, comparison.a, comparison.b, comparison.rater, vote)
    turned: dict[Vote, Vote] = {"a": "b", "b": "a"}
    return Comparison(comparison.prompt, comparison.b, comparison.a, comparison.rater, turned.get(vote, vote))


def vote_agreement(comparisons: Iterable[Comparison], ties: bool = True) -> float:
    """Share of pairs of raters that vote alike on the same prompt and answers (FastChat); NaN without such pairs.

    Args:
        ties: Whether tied votes count; without them a pair counts only where neither rater tied.
    """
    groups: defaultdict[tuple[str, str, str], list[Vote]] = defaultdict(list)
    for comparison in map(upright, comparisons):
        if ties or comparison.vote != "tie":
            groups[comparison.prompt, comparison.a, comparison.b].append(comparison.vote)
    pairs = [one == other for votes in groups.values() for one, other in combinations(votes, 2)]
    return fmean(pairs) if pairs else math.nan


@dataclass(frozen=True)
class Preferred:
    """Two answers to a prompt of which raters prefer one."""

    prompt: str
    chosen: str
    rejected: str
    p_chosen: float
    """Share of raters that prefer the chosen one; ties are half a vote."""
    margin: float
    """By how much its mean rating is higher; NaN of pairwise votes."""


def likert_preferences(prompt: str, ratings: Mapping[str, Mapping[str, float]], margin: float = 1.0) -> list[Preferred]:
    """All pairs of answers to one prompt whose mean ratings differ by at least `margin`, on the ratings' own scale.

    `p_chosen` is over the raters of both answers; NaN where no rater rated both.

    Args:
        prompt: Names the prompt.
        ratings: Answer -> rater -> value.
        margin: δ; must be above zero.
    """
    if margin <= 0:
        raise DataError("the margin of a preference must be positive", got=margin)
    rated = {answer: values for answer, values in sorted(ratings.items()) if values}
    found: list[Preferred] = []
    for one, other in combinations(rated, 2):
        gap = fmean(rated[one].values()) - fmean(rated[other].values())
        if abs(gap) < margin - 1e-9:
            continue
        chosen, rejected = (one, other) if gap > 0 else (other, one)
        both = sorted(rated[chosen].keys() & rated[rejected].keys())
        votes = [_won(rated[chosen][rater], rated[rejected][rater]) for rater in both]
        found.append(Preferred(prompt, chosen, rejected, fmean(votes) if votes else math.nan, abs(gap)))
    return found


def vote_preferences(comparisons: Iterable[Comparison], least: float = 0.5) -> list[Preferred]:
    """One preference per prompt and pair of answers, where more than `least` of the votes, ties half, are for one."""
    groups: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    for comparison in map(upright, comparisons):
        value = {"a": 1.0, "b": 0.0}.get(comparison.vote, 0.5)
        groups[comparison.prompt, comparison.a, comparison.b].append(value)
    found: list[Preferred] = []
    for (prompt, a, b), votes in sorted(groups.items()):
        share = fmean(votes)
        if max(share, 1 - share) > least:
            chosen, rejected = (a, b) if share > 0.5 else (b, a)
            found.append(Preferred(prompt, chosen, rejected, max(share, 1 - share), math.nan))
    return found


# --- ranking -------------------------------------------------------------------------------------------------------


def win_table(comparisons: Iterable[Comparison]) -> tuple[list[str], NDArray[np.float64]]:
    """Names in order, and how often the one of the row beat the one of the column; a tie is half a win for both."""
    upright_votes = [upright(comparison) for comparison in comparisons]
    names = sorted({name for c in upright_votes for name in (c.a, c.b)})
    place = {name: index for index, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for c in upright_votes:
        won = {"a": 1.0, "b": 0.0}.get(c.vote, 0.5)
        wins[place[c.a], place[c.b]] += won
        wins[place[c.b], place[c.a]] += 1 - won
    return names, wins


def win_rates(wins: NDArray[np.float64]) -> NDArray[np.float64]:
    """(wins + ½ ties) / comparisons of each; NaN for one that was never compared."""
    played = (wins + wins.T).sum(1)
    return np.divide(wins.sum(1), played, out=np.full(len(wins), np.nan), where=played > 0)


def bradley_terry(
    wins: NDArray[np.float64], prior: float = 0.0, tolerance: float = 1e-12, iterations: int = 100_000
) -> NDArray[np.float64]:
    """Strengths p with P(i beats j) = p_i / (p_i + p_j), summing to 1, by maximum likelihood.

    Repeats p_i ← W_i / Σ_j n_ij / (p_i + p_j) (Zermelo 1929, Hunter 2004). `prior` adds so many wins to both sides of
    each pair that was compared: ½ makes strengths finite where someone never lost.

    Raises:
        DataError: Not everyone can be reached by wins from everyone else: then no finite strengths exist, and those
            of separate groups cannot be compared.
    """
    compared = (wins + wins.T) > 0
    table = wins + prior * compared
    _check_connected(table)
    games = table + table.T
    strength = np.full(len(table), 1 / max(1, len(table)))
    for _ in range(iterations):
        sums = (games / np.add.outer(strength, strength)).sum(1)
        again = table.sum(1) / np.where(sums == 0, 1.0, sums)
        again /= again.sum() or 1.0
        done = np.abs(again - strength).max(initial=0.0) < tolerance
        strength = again
        if done or len(table) == 1:
            break
    return strength if len(table) != 1 else np.ones(1)


def elo_scale(strength: NDArray[np.float64]) -> NDArray[np.float64]:
    """400 · log10 of the strengths, with mean 0: a lead of 400 is odds of 10 to 1."""
    scale = 400 * np.log10(strength)
    return scale - scale.mean()


def components(links: NDArray[np.bool_]) -> list[list[int]]:
    """Strongly connected components of a directed graph, each sorted, in the order of their smallest members."""
    reach = links | np.eye(len(links), dtype=bool)
    for middle in range(len(links)):
        reach |= np.outer(reach[:, middle], reach[middle])
    mutual = reach & reach.T
    seen: set[int] = set()
    found: list[list[int]] = []
    for index in range(len(links)):
        if index not in seen:
            group = np.flatnonzero(mutual[index]).tolist()
            seen.update(group)
            found.append(group)
    return found


def _check_connected(wins: NDArray[np.float64]) -> None:
    games = (wins + wins.T) > 0
    islands = components(games)
    if len(islands) > 1:
        raise DataError(f"comparisons fall apart into {len(islands)} groups that never met", got=islands)
    groups = components(wins > 0)
    if len(groups) > 1:
        raise DataError(
            "some never lost to, or never beat, the others, so strengths are not finite",
            got=groups,
            allowed="a prior of 0.5 wins",
        )


def _won(one: float, other: float) -> float:
    return 1.0 if one > other else 0.5 if one == other else 0.0


# --- the whole table -----------------------------------------------------------------------------------------------


def agreement_report(
    units: Sequence[Unit], level: Level = "interval", seed: int = 0, resamples: int = 1000
) -> dict[str, float | int | None]:
    """Krippendorff's α with its interval beside the raw agreement: with skewed values the one may be low and the other
    high. JSON values, None where undefined; empty where no unit has two raters."""
    shared = [unit for unit in units if len(unit) > 1]
    if not shared:
        return {}
    alpha = alpha_interval(shared, level, seed, resamples)
    raters = Counter(rater for unit in shared for rater in unit)
    figures = {
        "alpha": alpha.value,
        "low": alpha.low,
        "high": alpha.high,
        "percent_agreement": percent_agreement(shared),
    }
    rounded = {name: None if math.isnan(value) else round(value, 6) for name, value in figures.items()}
    return {**rounded, "units": len(shared), "raters": len(raters)}
