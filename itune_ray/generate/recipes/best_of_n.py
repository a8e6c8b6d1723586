"""Best of n: several answers to a prompt, scored, the best kept as one row (rejection sampling)."""

import math

from itune_ray.config.recipes import BestOfNConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion
from itune_ray.generate.recipes.base import last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.recipes.scored import AnswerScorer, Scored


class BestOfN(Chain):
    """y* = argmax_i score(x, y_i), y_1..y_n ~ M(. | x) (Touvron et al. 2023, arXiv 2307.09288).

    Among equals the more frequent answer is taken, then the earlier one. Answers that were cut or are empty are scored
    and never taken. Without a score at all the row is `unscored`, without a whole answer `truncated`, or `empty` where
    none says anything.
    """

    name = "best_of_n"

    def __init__(self, config: BestOfNConfig):
        self._config = config
        self._scorer = AnswerScorer(config.scorer)
        self.prompts = self._scorer.prompts

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The best answer to one prompt."""
        asked = last_user_turn(row.prompt)
        if asked is None:
            return refused(calls.draft, row, "no_prompt")
        if self._scorer.lacks_reference(row):
            return refused(calls.draft, row, "no_reference")
        samples = await calls.samples("answer", row.prompt, self._config.samples)
        scored = await self._scorer.scored(row, asked, samples, calls.model("judge"))
        if isinstance(scored, str):
            raise EndedError(scored, failed=Completion(id=row.key, error=scored, retryable=True))
        rated = [answer for answer in scored if not math.isnan(answer.score)]
        whole = [answer for answer in rated if answer.complete and answer.text]
        facts = {"best_of_n": {"scores": per_sample(scored, len(samples))}}
        if not whole:
            reason = "unscored" if not rated else "truncated" if any(answer.text for answer in rated) else "empty"
            return [calls.rejected(reason, messages=row.prompt, meta={**row.meta, **facts})]
        best = max(whole, key=lambda answer: (answer.score, answer.count, -answer.first))
        fields = {
            "messages": (*row.prompt, {"role": "assistant", "content": best.text}),
            "meta": {**row.meta, **facts},
            "seed": calls.llm.seed(f"{row.key}/answer") + best.first,
            "finish_reason": "stop",
        }
        if self._config.min_score is not None and best.score < self._config.min_score:
            return [calls.rejected("low_score", score=best.score, **fields)]
        return [calls.accepted(score=best.score, **fields)]


def per_sample(scored: list[Scored], count: int) -> list[float | None]:
    """Scores in the order of the samples; None where there is none."""
    scores: list[float | None] = [None] * count
    for answer in scored:
        for index in answer.samples:
            scores[index] = None if math.isnan(answer.score) else answer.score
    return scores
