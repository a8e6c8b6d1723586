"""A model as a judge of two answers: verdicts in both orders, and the rules that make one result of them (Zheng et al.
2023, methods D16)."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

from itune_ray.config.base import digest
from itune_ray.data.records import Message
from itune_ray.engine.templates import read_template, render

Verdict = Literal["A", "B", "tie"]
"""Which answer is better by its place in the prompt."""
Result = Literal["win", "tie", "lose"]
"""How an answer fared against another."""

BUILTIN = {"pair": "itune_ray.engine:pairwise.jinja"}
"""Templates by name."""
TIE_MARGIN = 0.1
"""Scores of a pair that differ by no more than this are a tie."""
_VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_RATING = re.compile(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]")


def parse_verdict(reply: str) -> Verdict | None:
    """The last `[[A]]`, `[[B]]` or `[[C]]` (a tie) of a reply: a judge that weighs `[[A]]` first may end in `[[B]]`."""
    found = _VERDICT.findall(reply)
    verdicts: dict[str, Verdict] = {"A": "A", "B": "B", "C": "tie"}
    return verdicts[found[-1]] if found else None


def parse_rating(reply: str, low: float, high: float) -> float | None:
    """The last number in double brackets, `[[7.5]]`, where it is within [low, high].

    A number in single brackets is a citation as often as a rating, so it is none.
    """
    found = _RATING.findall(reply)
    rating = float(found[-1]) if found else math.nan
    return rating if low <= rating <= high else None


def verdict_of_scores(a: float, b: float, margin: float = TIE_MARGIN) -> Verdict:
    """A tie where |a - b| <= margin, in decimals: 3.2 against 3.1 is a tie at 0.1, which floating point denies."""
    difference = Fraction(str(a)) - Fraction(str(b))
    if abs(difference) <= Fraction(str(margin)):
        return "tie"
    return "A" if difference > 0 else "B"


def conservative(first: Verdict, swapped: Verdict) -> Result:
    """A win or loss only where both orders name the same answer, everything else a tie (Zheng et al. 2023).

    Args:
        first: Verdict with the answer as A.
        swapped: Verdict with the answer as B.
    """
    return {("A", "B"): "win", ("B", "A"): "lose"}.get((first, swapped), "tie")  # type: ignore[return-value]


def lenient(first: Verdict, swapped: Verdict) -> Result:
    """A win for a win in one order and no loss in the other; a win and a loss are a tie (Li et al. 2024, §3.3).

    Args:
        first, swapped: See `conservative`.
    """
    total = {"A": 1, "tie": 0, "B": -1}[first] + {"B": 1, "tie": 0, "A": -1}[swapped]
    return "win" if total > 0 else "lose" if total < 0 else "tie"


RULES = {"conservative": conservative, "lenient": lenient}
"""Name -> what two orders come to."""


@dataclass(frozen=True, slots=True)
class Results:
    """Counts of compared pairs."""

    wins: int
    ties: int
    losses: int
    errors: int = 0
    """Pairs without a result; no part of the rate."""

    @classmethod
    def of(cls, results: Iterable[Result | None]) -> Self:
        """Counted; None is an error."""
        counts = Counter(results)
        return cls(counts["win"], counts["tie"], counts["lose"], counts[None])

    @property
    def win_rate_adjusted(self) -> float:
        """(wins + ties / 2) / (wins + ties + losses); NaN where nothing was compared."""
        judged = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / judged if judged else math.nan


class PairJudge:
    """Asks which of two answers is better; picklable.

    Args:
        template: A Jinja file over {{ prompt }}, {{ first }}, {{ second }}, {{ reference }} (a right answer, or None)
            and {{ fence }}, as in `itune_ray.engine.judge.Judge`. Default: the built-in.
    """

    version = 1

    def __init__(self, template: str | None = None):
        self.template = read_template(template or "pair", "template", BUILTIN)

    def messages(self, prompt: str, first: str, second: str, reference: str | None = None) -> tuple[Message, ...]:
        """The chat that the judge is asked, with `first` as answer A."""
        fence = digest([prompt, *sorted((first, second)), reference], length=12)
        asked = render(self.template, prompt=prompt, first=first, second=second, reference=reference, fence=fence)
        return ({"role": "user", "content": asked.strip()},)
