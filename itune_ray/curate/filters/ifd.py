"""Instruction-following difficulty: rows whose prompt helps a model a little, but not much (methods D31)."""

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from itune_ray.config.curate import IfdConfig
from itune_ray.config.shared import ServedModel
from itune_ray.curate.filters.base import ModelFilter, Seen, Settled, Verdict, blank, unanswered
from itune_ray.data.chat import AnswerTokens, UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Llm
from itune_ray.model.render import model_renderer


class AnswerLoss(NamedTuple):
    """Mean negative log-likelihood of the same N tokens of an answer, in nats."""

    conditioned: float
    """s(A|Q) = -(1/N) Σ log P(w_i | Q, w_<i)."""
    direct: float
    """s(A) = -(1/N) Σ log P(w_i | w_<i)."""
    tokens: int

    @property
    def loss_ratio(self) -> float:
        """s(A|Q) / s(A) (Li et al. 2308.12032, eq. 5); NaN where the answer alone is certain, s(A) = 0."""
        return self.conditioned / self.direct if self.direct > 0 else math.nan

    @property
    def perplexity_ratio(self) -> float:
        """exp(s(A|Q) - s(A)) (Superfiltering); infinite beyond the largest float."""
        difference = self.conditioned - self.direct
        return math.exp(difference) if difference < 709 else math.inf


class Ifd(ModelFilter):
    """Keeps rows with an IFD within the bounds, and of those the highest where only a share is wanted.

    Both sequences are rendered by the model's own template: the whole chat up to the answer's end, and the answer
    after nothing but what opens the assistant's turn (and the model's first token, where it has one). The answer has
    the same token ids in both, and N is the same: where nothing stands before the answer alone, its first token
    counts in neither. Of several turns the last is the answer. No sequence is ever cut.
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
        alone = context(tokens, renderer.tokenizer.bos_token_id)
        first = 0 if alone else 1
        if len(tokens.answer) <= first:
            return _rejected(record, "short_answer", f"{len(tokens.answer)} tokens")
        conditioned, direct = await asyncio.gather(
            llm.score([*tokens.prompt, *tokens.answer], key=f"{key}/conditioned", top=0),
            llm.score([*alone, *tokens.answer], key=f"{key}/direct", top=0),
        )
        for completion in (conditioned, direct):
            if completion.error is not None:
                return _refused(record, completion, attempt)
        try:
            loss = AnswerLoss(
                mean_loss(conditioned, tokens.answer, first),
                mean_loss(direct, tokens.answer, first),
                len(tokens.answer) - first,
            )
        except ValueError as error:
            return _rejected(record, "no_log_probability", str(error))
        generated = sum(len(sample.token_ids) for c in (conditioned, direct) for sample in c.samples)
        rated = blank(record, generated, length + len(alone) + len(tokens.answer))
        return Outcome(record=rated, input_key=key, status="accepted", raw=json.dumps(loss._asdict()))

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


def context(tokens: AnswerTokens, bos: int | None) -> list[int]:
    """What stands before the answer alone: the model's first token where the chat has it, and the turn's opening."""
    begins = tokens.prompt[:1] == [bos] and len(tokens.opening) < len(tokens.prompt)
    return [*(tokens.prompt[:1] if begins else []), *tokens.opening]


def mean_loss(completion: Completion, answer: Sequence[int], first: int = 0) -> float:
    """Mean negative log-probability of an answer that ends the prompt, from its token `first` on.

    Raises:
        ValueError: The engine gave no finite log-probability of one of the tokens.
    """
    entries = (completion.prompt_logprobs or ())[-len(answer) :]
    if len(entries) < len(answer):
        raise ValueError(f"{len(entries)} log-probabilities for {len(answer)} tokens")
    found = [(entry or {}).get(token, math.nan) for entry, token in zip(entries, answer, strict=True)][first:]
    wrong = [value for value in found if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(found)} tokens have no finite log-probability")
    return -math.fsum(found) / len(found)


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
