"""The proposing half of Self-Instruct: one call shows instructions and parses new ones out of the reply."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.config.recipes import SelfInstructConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Llm
from itune_ray.generate.novelty import Tokens, nearest, tokens_of
from itune_ray.generate.recipes.base import builtin_prompt, from_error, read_prompt, refused, render
from itune_ray.generate.recipes.respond import recorded

_NUMBER = re.compile(r"(?:^|\n)\s*\d+\s?[.)]\s*")
_SPACE = re.compile(r"\s+")


class Propose:
    """Candidates of one call, each accepted (new against the frozen pool) or rejected with its reason.

    Novelty among the candidates of a round is decided by the
    driver, in order; here each is only compared with what was accepted before the round.

    Args:
        config: Styles, filters and the novelty threshold.
        pool: Tokens of every instruction accepted so far, seeds included.
    """

    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "model", "sampling", "seed")
    rows_per_input = None

    def __init__(self, config: SelfInstructConfig, pool: Sequence[Tokens] = ()):
        self._config, self._pool = config, tuple(pool)
        own = config.template
        self._template = (
            read_prompt(own, "recipe.template") if own else builtin_prompt("self_instruct", f"{config.style}.jinja")
        )
        blocked = "|".join(re.escape(word) for word in config.blocked)
        self._blocked = re.compile(rf"(?i)(?<!\w)(?:{blocked})(?!\w)") if blocked else None

    @property
    def prompts(self) -> Mapping[str, str]:
        """The template that shows the examples, and the one that asks for answers."""
        return {"propose": self._template, "answer": builtin_prompt("respond", "user.jinja")}

    def against(self, pool: Sequence[Tokens]) -> "Propose":
        """The same recipe for a round with this frozen pool."""
        return Propose(self._config, pool)

    def asked(self, examples: Sequence[str]) -> str:
        """The user turn that shows these examples."""
        return render(self._template, examples=list(examples)).strip()

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Every candidate of one call."""
        draft = dataclasses.replace(
            row,
            recipe="self_instruct.propose",
            model=llm.model,
            sampling=recorded(llm.sampling),
            seed=llm.seed(row.key),
        )
        completion = await llm.generate(row.messages, key=row.key)
        if completion.error is not None:
            return from_error(draft, row, completion)
        (sample,) = completion.samples
        draft = dataclasses.replace(
            draft,
            finish_reason=sample.finish_reason,
            num_prompt_tokens=len(completion.prompt_token_ids),
            num_tokens=len(sample.token_ids),
        )
        if sample.finish_reason == "length":
            return refused(draft, row, "truncated", raw=sample.text)
        candidates = parse(sample.text, self._config.style)
        if not candidates:
            return refused(draft, row, "unparsable", raw=sample.text)
        return [self._outcome(draft, row, index, text) for index, text in enumerate(candidates)]

    def _outcome(self, draft: Record, row: Record, index: int, text: str) -> Outcome:
        record = dataclasses.replace(draft, sample=index, messages=({"role": "user", "content": text},))
        if index:  # the call's tokens are counted once
            record = dataclasses.replace(record, num_prompt_tokens=None, num_tokens=None)
        reason, score = self._refusal(text), math.nan
        if reason is None:
            found = nearest(tokens_of(text), self._pool, self._config.novelty)
            reason, score = ("not_novel" if found.is_near else None), found.score
        status = "accepted" if reason is None else "rejected"
        return Outcome(record=record, input_key=row.key, status=status, reason=reason, score=score)

    def _refusal(self, text: str) -> str | None:
        """Why a candidate is no usable instruction (methods D08, step 1)."""
        config, words = self._config, len(text.split())
        checks: dict[str, Any] = {
            "empty": not words,
            "too_short": words < config.min_words,
            "too_long": words > config.max_words,
            "blocked_word": self._blocked is not None and self._blocked.search(text) is not None,
            "odd_start": not (text[:1].isalnum() or text[:1] in "\"'(¿¡"),
        }
        return next((reason for reason, failed in checks.items() if failed), None)


def parse(reply: str, style: str) -> list[str]:
    """Instructions of a reply, white space collapsed: all of it, or the items of the list that the prompt opened.

    The first letter is raised, the others stay as they are.
    """
    if style == "single":
        text = _SPACE.sub(" ", reply).strip()
        return [text] if text else []
    items = (_SPACE.sub(" ", item).strip() for item in _NUMBER.split(reply))
    return [item[:1].upper() + item[1:] for item in items if item]
