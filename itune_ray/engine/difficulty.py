"""Instruction-following difficulty: how much a prompt helps a model to predict its answer (IFD, methods D31)."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from itune_ray.data.chat import AnswerTokens, ChatRenderer
from itune_ray.data.records import Message
from itune_ray.engine.base import Completion, Llm


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


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the two passes over an answer gave: its losses, or why there are none."""

    loss: AnswerLoss | None = None
    reason: str | None = None
    """Why there are none, as a word that can be counted: short_answer, no_log_probability."""
    detail: str = ""
    completions: tuple[Completion, ...] = ()
    """What was asked for it; an error among them leaves `loss` and `reason` open."""


async def answer_loss(llm: Llm, renderer: ChatRenderer, tokens: AnswerTokens, *, key: str) -> Scored:
    """Score an answer after its prompt, and by itself.

    Both sequences are rendered by the model's own template: the whole chat up to the answer's end, and the answer after
    nothing but what opens the assistant's turn (and the model's first token, where it has one). The answer has the same
    token ids in both, and N is the same: where nothing stands before the answer alone, its first token counts in
    neither. No sequence is ever cut.

    Args:
        llm: The model that scores.
        renderer: The model's own.
        tokens: The chat's, see `ChatRenderer.answer_tokens`.
        key: Names the calls.
    """
    alone = context(tokens, renderer.tokenizer.bos_token_id)
    first = 0 if alone else 1
    if len(tokens.answer) <= first:
        return Scored(reason="short_answer", detail=f"{len(tokens.answer)} tokens")
    asked = await asyncio.gather(
        llm.score([*tokens.prompt, *tokens.answer], key=f"{key}/conditioned", top=0),
        llm.score([*alone, *tokens.answer], key=f"{key}/direct", top=0),
    )
    if any(completion.error is not None for completion in asked):
        return Scored(completions=tuple(asked))
    try:
        conditioned, direct = (mean_loss(completion, tokens.answer, first) for completion in asked)
    except ValueError as error:
        return Scored(reason="no_log_probability", detail=str(error), completions=tuple(asked))
    return Scored(loss=AnswerLoss(conditioned, direct, len(tokens.answer) - first), completions=tuple(asked))


async def chat_loss(llm: Llm, renderer: ChatRenderer, messages: Sequence[Message], *, key: str) -> Scored:
    """`answer_loss` of a chat's last turn; raises `UnusableRow` where the chat cannot be rendered."""
    return await answer_loss(llm, renderer, renderer.answer_tokens(messages), key=key)


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
