"""Instruction-following difficulty: rows whose prompt helps a model a little, but not much (methods D31)."""

import json
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from itune_ray.config.curate import IfdConfig
from itune_ray.config.shared import ServedModel
from itune_ray.curate.filters.base import ModelFilter, Seen, Settled, Verdict, blank, unanswered
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Llm
from itune_ray.engine.difficulty import AnswerLoss, answer_loss, context
from itune_ray.model.render import model_renderer


class Ifd(ModelFilter):
    """Keeps rows with an IFD within the bounds, and of those the highest where only a share is wanted.

    How sequences are scored is told at `itune_ray.engine.difficulty.answer_loss`. Of several turns the last is the
    answer.
    """

    needs = frozenset({"response"})
    selection = ModelFilter.selection | {"definition", "low", "high", "keep", "min_tokens"}

    def __init__(self, config: IfdConfig):
        self.config: IfdConfig = config

    @property
    def served(self) -> ServedModel:
        """The model that scores."""
        return self.config.model

    def unfit(self, record: Record) -> str | None:
        return super().unfit(record) or (None if record.prompt else "no_prompt")

    async def rate(self, record: Record, llm: Llm, attempt: int) -> Outcome:
        """Both losses, as JSON in `raw`."""
        key, renderer = record.content_hash, model_renderer(llm.ref)
        try:
            tokens = renderer.answer_tokens(record.messages)
        except UnusableRow as error:
            return _rejected(record, error.reason, str(error))
        length = len(tokens.prompt) + len(tokens.answer)
        if self.config.max_length is not None and length > self.config.max_length:
            return _rejected(record, "too_long", f"{length} tokens")
        scored = await answer_loss(llm, renderer, tokens, key=key)
        for completion in scored.completions:
            if completion.error is not None:
                return _refused(record, completion, attempt)
        if scored.loss is None:
            return _rejected(record, scored.reason or "not_scored", scored.detail)
        alone = context(tokens, renderer.tokenizer.bos_token_id)
        generated = sum(len(sample.token_ids) for c in scored.completions for sample in c.samples)
        rated = blank(record, generated, length + len(alone) + len(tokens.answer))
        return Outcome(record=rated, input_key=key, status="accepted", raw=json.dumps(scored.loss._asdict()))

    def verdict(self, rating: Outcome) -> Verdict:
        """Within the bounds or not, by the chosen definition."""
        if rating.status == "failed":
            return Verdict(False, failure=rating.cause)
        if rating.status == "rejected":
            return Verdict(False, rating.reason)
        loss, config = loss_of(rating), self.config
        if loss.tokens < config.min_tokens:
            return Verdict(False, "short_answer")
        ifd: float = getattr(loss, config.definition)
        if math.isnan(ifd):
            return Verdict(False, "undefined_ifd")
        if config.low is not None and ifd < config.low:
            return Verdict(False, "low_ifd", ifd)
        if config.high is not None and (ifd > config.high or (ifd == config.high and self._strict)):
            return Verdict(False, "high_ifd", ifd)
        return Verdict(True, score=ifd)

    @property
    def _strict(self) -> bool:
        return self.config.definition == "perplexity_ratio"

    def measures(self, rating: Outcome) -> Mapping[str, float]:
        """Both losses, both definitions and N."""
        if rating.status != "accepted":
            return {}
        loss = loss_of(rating)
        return {**loss._asdict(), "loss_ratio": loss.loss_ratio, "perplexity_ratio": loss.perplexity_ratio}

    def settle(self, seen: Seen) -> Settled:
        """The highest ⌊keep · N⌋ rows, at least one, N being all that reached the filter; of equals the smaller key."""
        if self.config.keep is None:
            return Settled()
        quota = max(1, math.floor(Fraction(str(self.config.keep)) * len(seen.records)))
        standing = [(-score, record.key) for record, kept, score in _rows(seen) if kept]
        return Settled(dropped={key: "not_selected" for _, key in sorted(standing)[quota:]})


def loss_of(rating: Outcome) -> AnswerLoss:
    """The losses that a rating holds."""
    return AnswerLoss(**json.loads(rating.raw or "{}"))


def _rows(seen: Seen) -> Any:
    return zip(seen.records, seen.kept, seen.scores, strict=True)


def _rejected(record: Record, reason: str, raw: str) -> Outcome:
    return Outcome(record=blank(record), input_key=record.content_hash, status="rejected", reason=reason, raw=raw)


def _refused(record: Record, completion: Completion, attempt: int) -> Outcome:
    """A prompt that the engine cannot hold is the row's own fault; every other error is a failure."""
    error = completion.error or ""
    if error.startswith("prompt_too_long"):
        return _rejected(record, "too_long", error)
    return unanswered(record, error, completion.retryable, attempt)
