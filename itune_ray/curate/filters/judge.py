"""Judge: answers that a model rates well (AlpaGasus, methods D30)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from itune_ray.config.base import digest
from itune_ray.config.curate import JudgeConfig
from itune_ray.config.shared import SamplingConfig, ServedModel
from itune_ray.curate.filters.base import ModelFilter, Verdict, blank, unanswered
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm
from itune_ray.engine.judge import Judge, planted, prompt_text
from itune_ray.errors import GenerationError


class JudgeFilter(ModelFilter):
    """Keeps answers rated at or above the threshold.

    A reply without a score rates the answer NaN and rejects it as `no_score` with the reply kept.
    """

    needs = frozenset({"response"})
    selection = ModelFilter.selection | {"threshold", "max_parse_fail", "planted"}

    def __init__(self, config: JudgeConfig):
        self.config: JudgeConfig = config
        self._judge = Judge(config.dimension, config.scale, config.template)

    @property
    def served(self) -> ServedModel:
        """The judge."""
        return self.config.judge

    @property
    def sampling(self) -> SamplingConfig:
        """The job's."""
        return self.config.sampling

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "judge": self._judge.version, "template": digest(self._judge.template)}

    async def rate(self, record: Record, llm: Llm, attempt: int) -> Outcome:
        """One answer's rating; whether the score is good enough is decided elsewhere."""
        key = record.content_hash
        judged = await self._judge.score(llm, prompt_text(record), record.response or "", key)
        if judged.error is not None:
            return unanswered(record, judged.error, judged.retryable, attempt)
        rated = blank(record, judged.num_tokens, judged.num_prompt_tokens)
        if math.isnan(judged.score):
            return Outcome(record=rated, input_key=key, status="rejected", reason="no_score", raw=judged.reply)
        return Outcome(record=rated, input_key=key, status="accepted", score=judged.score, raw=judged.reply)

    def probes(self, records: Sequence[Record]) -> dict[str, Record]:
        """Some of the records, always the same ones, with words planted in the answer."""
        chosen = sorted({record.content_hash: record for record in records}.items())[: self.config.planted]
        return {
            key: replace(
                record, messages=(*record.prompt, {"role": "assistant", "content": self._with_words(record, i)})
            )
            for i, (key, record) in enumerate(chosen)
        }

    def _with_words(self, record: Record, number: int) -> str:
        return planted(record.response or "", number, self.config.scale[1])

    def findings(self, probes: Mapping[str, Record], known: Mapping[str, Outcome]) -> dict[str, Any]:
        """What the planted words did, where both answers got a score: how many scores rose, the mean of all changes."""
        pairs = [(known[key], known[record.content_hash]) for key, record in probes.items()]
        rises = [after.score - own.score for own, after in pairs if own.status == after.status == "accepted"]
        mean = round(sum(rises) / len(rises), 4) if rises else 0.0
        return {"planted": len(rises), "raised_by_planted_words": sum(rise > 0 for rise in rises), "mean_rise": mean}

    def verdict(self, rating: Outcome) -> Verdict:
        """What a stored rating means for the row."""
        if rating.status == "failed":
            return Verdict(False, failure=rating.cause)
        if rating.status == "rejected":
            return Verdict(False, rating.reason)
        good = rating.score >= self.config.threshold
        return Verdict(good, None if good else "low_score", rating.score)

    def check(self, replies: int, unscored: int) -> None:
        """Stop the job when too many replies hold no score: then the judge or its template is at fault."""
        if unscored > self.config.max_parse_fail * replies:
            raise GenerationError(
                f"{unscored} of {replies} replies of the judge hold no score",
                got=round(unscored / replies, 3),
                allowed=f"at most {self.config.max_parse_fail}",
                knob="filters.N.max_parse_fail or filters.N.template",
            )
