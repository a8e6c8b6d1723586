"""Preference pairs on policy: the model's own answers to a prompt, the best against the worst."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from itune_ray.config.recipes import PreferenceConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Llm
from itune_ray.generate.recipes.base import from_error, last_user_turn, refused
from itune_ray.generate.recipes.respond import recorded
from itune_ray.generate.recipes.scored import AnswerScorer, Scored


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

    def __init__(self, config: PreferenceConfig):
        self._config = config
        self._judge: Llm | None = None
        self._scorer = AnswerScorer(config.scorer)

    @property
    def prompts(self) -> Mapping[str, str]:
        """The judge's template, where there is a judge."""
        return self._scorer.prompts

    def bind(self, models: Mapping[str, Llm]) -> "Preference":
        """The same recipe with the judge it asks."""
        bound = Preference(self._config)
        bound._judge = models.get("judge")
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
        if self._scorer.lacks_reference(row):
            return refused(draft, row, "no_reference")
        completion = await llm.generate(row.prompt, key=row.key, n=self._config.samples)
        if completion.error is not None:
            return from_error(draft, row, completion)
        draft = dataclasses.replace(
            draft,
            num_prompt_tokens=len(completion.prompt_token_ids),
            num_tokens=sum(len(sample.token_ids) for sample in completion.samples),
        )
        scored = await self._scorer.scored(row, asked, completion.samples, self._judge)
        if isinstance(scored, str):
            failed = Completion(id=completion.id, error=scored, retryable=True)
            return from_error(draft, row, failed)
        return [self._pair(draft, row, scored)]

    def _pair(self, draft: Record, row: Record, scored: list[Scored]) -> Outcome:
        rated = [answer for answer in scored if not math.isnan(answer.score)]
        if not rated:
            return _refused(draft, row, "unscored")
        worst = min(rated, key=lambda a: (a.score, -a.count, a.first))
        whole = [answer for answer in rated if answer.complete and answer.text]
        best = max(whole, key=lambda a: (a.score, a.count, -a.first), default=None)
        chosen, score = (None, math.nan) if best is None else (best.text, best.score)
        if self._config.chosen == "reference" and row.response and (best is None or best.score < self._scorer.top):
            chosen, score = row.response, self._scorer.top
        if chosen is None or not score - worst.score > self._config.margin:
            return _refused(draft, row, _no_contrast(rated, self._scorer.top))
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


def _refused(draft: Record, row: Record, reason: str) -> Outcome:
    (outcome,) = refused(draft, row, reason)
    return outcome


def _no_contrast(rated: list[Scored], top: float) -> str:
    if all(answer.score >= top for answer in rated):
        return "all_right"
    return "all_wrong" if all(answer.score <= 0 for answer in rated) else "no_contrast"
