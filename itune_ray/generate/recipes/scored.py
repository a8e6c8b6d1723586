"""Samples of a prompt with their scores, by a grader or a judge: what pairs and best-of-n choose from."""

import asyncio
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from itune_ray.benchmarks import GRADERS
from itune_ray.config.recipes.preferences import GraderScorer, JudgeScorer
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm, Sample
from itune_ray.engine.judge import Judge
from itune_ray.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Scored:
    """One distinct answer."""

    text: str
    score: float
    """NaN where the judge's words held no score."""
    samples: tuple[int, ...]
    """Indices of the samples that said it."""
    complete: bool
    """Whether it ended by itself; a cut answer is never chosen."""

    @property
    def count(self) -> int:
        """Samples that said it."""
        return len(self.samples)

    @property
    def first(self) -> int:
        """Index of the first of them."""
        return self.samples[0]


class AnswerScorer:
    """Scores answers as a recipe's `scorer` says; picklable.

    Raises:
        ConfigError: The grader or the judge's template is not there.
    """

    def __init__(self, config: GraderScorer | JudgeScorer):
        self._config = config
        self._judge: Judge | None = None
        if isinstance(config, JudgeScorer):
            guided = config.reference is not None
            self._judge = Judge(config.dimension, config.scale, config.template, guided)
        else:
            load_grader(config.grader)

    @property
    def prompts(self) -> Mapping[str, str]:
        """The judge's template, where there is a judge."""
        return {} if self._judge is None else {"judge": self._judge.template}

    @property
    def top(self) -> float:
        """The best score there is."""
        return self._config.scale[1] if isinstance(self._config, JudgeScorer) else 1.0

    def lacks_reference(self, row: Record) -> bool:
        """Whether the judge is to be shown a right answer that the row does not have."""
        config = self._config
        if not isinstance(config, JudgeScorer) or config.reference is None:
            return False
        return not isinstance(row.meta.get(config.reference), str)

    async def scored(self, row: Record, asked: str, samples: Sequence[Sample], judge: Llm | None) -> list[Scored] | str:
        """The distinct answers with their scores, in the order of their first samples; or what failed."""
        texts: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            texts.setdefault(sample.text.strip(), []).append(index)
        scores = await asyncio.gather(*(self._score(row, asked, text, n, judge) for n, text in enumerate(texts)))
        broken = next((score for score in scores if isinstance(score, str)), None)
        if broken is not None:
            return broken
        return [
            Scored(text, float(score), tuple(said), any(samples[i].finish_reason == "stop" for i in said))
            for (text, said), score in zip(texts.items(), scores, strict=True)
        ]

    async def _score(self, row: Record, asked: str, text: str, number: int, judge: Llm | None) -> float | str:
        config = self._config
        if isinstance(config, GraderScorer):
            return float(load_grader(config.grader)(asked, text, row.meta))
        assert self._judge is not None
        assert judge is not None, "bind comes first"
        reference = None if config.reference is None else row.meta[config.reference]
        key = f"{row.key}/judge/{number}"
        judgement = await self._judge.score(judge, asked, text, key=key, reference=reference)
        return judgement.error if judgement.error is not None else judgement.score


def load_grader(location: str) -> Callable[[str, str, Mapping[str, Any]], float]:
    """The grader of that name or import path; raises `ConfigError` when there is none."""
    if location not in GRADERS and ":" not in location:
        raise ConfigError(
            f"unknown grader{did_you_mean(location, GRADERS)}",
            got=location,
            allowed=", ".join(GRADERS) + " or package.module:function",
            knob="recipe.scorer.grader",
        )
    module, _, name = GRADERS.get(location, location).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the grader cannot be imported: {error}", got=location, knob="recipe.scorer.grader"
        ) from None
