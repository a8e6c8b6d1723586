"""Preference pairs on policy: the model's own answers to a prompt, the best against the worst."""

import asyncio
import dataclasses
import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from itune_ray.benchmarks import GRADERS
from itune_ray.config.recipes import GraderScorer, JudgeScorer, PreferenceConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Llm, Sample
from itune_ray.engine.judge import Judge
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.generate.recipes.base import from_error, last_user_turn, refused
from itune_ray.generate.recipes.respond import recorded


@dataclass(frozen=True)
class Scored:
    """One distinct answer."""

    text: str
    score: float
    """NaN where the judge's words held no score."""
    count: int
    """Samples that said it."""
    first: int
    """Index of the first of them."""
    complete: bool
    """Whether it ended by itself; a cut answer is never chosen."""


class Preference:
    """One pair per prompt: the highest score is chosen, the lowest is `rejected`.

    Among equals the more frequent answer is taken, then the earlier one: a mistake that the model makes often teaches
    more than a slip. Prompts without a contrast end rejected: `all_right`, `all_wrong` (scores of 1 or 0 throughout),
    `no_contrast`, `equal_answers`.
    """

    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "rejected", "model", "sampling", "seed")
    rows_per_input = 1
    prompts: Mapping[str, str] = {}

    def __init__(self, config: PreferenceConfig):
        self._config = config
        self._judge_llm: Llm | None = None
        self._judge: Judge | None = None
        if isinstance(config.scorer, JudgeScorer):
            self._judge = Judge(config.scorer.dimension, config.scorer.scale, config.scorer.template)
            self.prompts = {"judge": self._judge.template}
        else:
            load_grader(config.scorer.grader)

    def bind(self, models: Mapping[str, Llm]) -> "Preference":
        """The same recipe with the judge it asks."""
        bound = Preference(self._config)
        bound._judge_llm = models.get("judge")
        return bound

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """The pair of one prompt."""
        draft = dataclasses.replace(
            row,
            messages=row.prompt,
            parents=(row.key,),
            recipe="preference",
            model=llm.model,
            sampling=recorded(llm.sampling),
            seed=llm.seed(row.key),
        )
        asked = last_user_turn(row.prompt)
        if asked is None:
            return refused(draft, row, "no_prompt")
        completion = await llm.generate(row.prompt, key=row.key, n=self._config.samples)
        if completion.error is not None:
            return from_error(draft, row, completion)
        draft = dataclasses.replace(
            draft,
            num_prompt_tokens=len(completion.prompt_token_ids),
            num_tokens=sum(len(sample.token_ids) for sample in completion.samples),
        )
        scored = await self._scored(row, asked, completion)
        if isinstance(scored, str):
            failed = Completion(id=completion.id, error=scored, retryable=True)
            return from_error(draft, row, failed)
        return [self._pair(draft, row, scored)]

    async def _scored(self, row: Record, asked: str, completion: Completion) -> list[Scored] | str:
        """The distinct answers with their scores, or what failed."""
        texts: dict[str, list[tuple[int, Sample]]] = {}
        for index, sample in enumerate(completion.samples):
            texts.setdefault(sample.text.strip(), []).append((index, sample))
        scores = await asyncio.gather(*(self._score(row, asked, text, n) for n, text in enumerate(texts)))
        broken = next((score for score in scores if isinstance(score, str)), None)
        if broken is not None:
            return broken
        return [
            Scored(text, float(score), len(said), said[0][0], any(s.finish_reason == "stop" for _, s in said))
            for (text, said), score in zip(texts.items(), scores, strict=True)
        ]

    async def _score(self, row: Record, asked: str, text: str, number: int) -> float | str:
        if isinstance(self._config.scorer, GraderScorer):
            return float(load_grader(self._config.scorer.grader)(asked, text, row.meta))
        assert self._judge is not None
        assert self._judge_llm is not None, "bind comes first"
        judgement = await self._judge.score(self._judge_llm, asked, text, key=f"{row.key}/judge/{number}")
        return judgement.error if judgement.error is not None else judgement.score

    def _pair(self, draft: Record, row: Record, scored: list[Scored]) -> Outcome:
        rated = [answer for answer in scored if not math.isnan(answer.score)]
        if not rated:
            return _refused(draft, row, "unscored")
        worst = min(rated, key=lambda a: (a.score, -a.count, a.first))
        whole = [answer for answer in rated if answer.complete and answer.text]
        best = max(whole, key=lambda a: (a.score, a.count, -a.first), default=None)
        chosen, score = (None, math.nan) if best is None else (best.text, best.score)
        if self._config.chosen == "reference" and row.response and (best is None or best.score < self._top()):
            chosen, score = row.response, self._top()
        if chosen is None or not score - worst.score > self._config.margin:
            return _refused(draft, row, _no_contrast(rated, self._top()))
        if chosen == worst.text:
            return _refused(draft, row, "equal_answers")
        facts = {"chosen": score, "rejected": worst.score, "answers": dict(Counter({a.text: a.count for a in scored}))}
        record = dataclasses.replace(
            draft,
            messages=(*row.prompt, {"role": "assistant", "content": chosen}),
            rejected=worst.text,
            meta={**row.meta, "preference": facts},
        )
        return Outcome(record=record, input_key=row.key, status="accepted", score=score - worst.score)

    def _top(self) -> float:
        """The best score there is."""
        scorer = self._config.scorer
        return scorer.scale[1] if isinstance(scorer, JudgeScorer) else 1.0


def _refused(draft: Record, row: Record, reason: str) -> Outcome:
    (outcome,) = refused(draft, row, reason)
    return outcome


def _no_contrast(rated: list[Scored], top: float) -> str:
    if all(answer.score >= top for answer in rated):
        return "all_right"
    return "all_wrong" if all(answer.score <= 0 for answer in rated) else "no_contrast"


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
