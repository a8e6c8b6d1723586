"""Recipes that propose in rounds: one call shows tasks and parses new ones out of the reply; and Self-Instruct's."""

import copy
import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from itune_ray.config.recipes import AlpacaConfig, SelfInstructConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Llm
from itune_ray.engine.templates import read_template, render
from itune_ray.generate.novelty import Tokens, nearest, tokens_of
from itune_ray.generate.recipes.base import builtin_prompt, from_error, last_user_turn, refused
from itune_ray.generate.recipes.respond import recorded
from itune_ray.generate.whole import Inputs, Made

_NUMBER = re.compile(r"(?:^|\n)\s*\d+\s?[.)]\s*")
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One item of a reply."""

    messages: tuple[Message, ...] = ()
    """The user turn, with an answer where the item brings its own."""
    broken: str | None = None
    """Why the item could not be read."""
    raw: str | None = None
    """The item as it came, where it could not be read."""


class Proposer(ABC):
    """Candidates of one call, each accepted (new against the frozen pool) or rejected with its reason.

    Novelty among the candidates of a round is decided by the driver, in order; here each is only compared with what was
    accepted before the round.

    Args:
        config: Filters and the novelty threshold.
        template: Shows the examples.
        pool: Tokens of every instruction accepted so far, seeds included.
    """

    name: str
    source: str
    """First part of the keys of made rows; the second is the call, the third the item of its reply."""
    seeds = "rows with a user turn"
    """What can be shown."""
    version = 2
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "model", "sampling", "seed")
    rows_per_input = None

    def __init__(self, config: SelfInstructConfig | AlpacaConfig, template: str, pool: Sequence[Tokens] = ()):
        self.config, self._template, self._pool = config, template, tuple(pool)
        blocked = "|".join(re.escape(word) for word in config.blocked)
        self._blocked = re.compile(rf"(?i)(?<!\w)(?:{blocked})(?!\w)") if blocked else None
        self._starts = tuple(start.lower() for start in config.blocked_starts)

    def against(self, pool: Sequence[Tokens]) -> "Proposer":
        """The same recipe for a round with this frozen pool."""
        bound = copy.copy(self)
        bound._pool = tuple(pool)
        return bound

    @property
    @abstractmethod
    def prompts(self) -> Mapping[str, str]:
        """See `itune_ray.generate.recipes.base.Recipe`."""

    @abstractmethod
    def instruction(self, row: Record) -> str | None:
        """The text that must be new; None where the row cannot be a seed."""

    @abstractmethod
    def asked(self, examples: Sequence[Record]) -> str:
        """The user turn that shows these rows."""

    @abstractmethod
    def candidates(self, reply: str, is_cut: bool) -> list[Candidate]:
        """The items of a reply, in order; none where there is nothing to read.

        Args:
            reply: The model's words.
            is_cut: Whether they end at `max_tokens`.
        """

    def make_all(self, inputs: Inputs) -> Made:
        """All rounds over the seeds; see `itune_ray.generate.rounds`."""
        from itune_ray.generate.rounds import SelfInstruct  # which is built on this class

        loop = SelfInstruct(inputs.job, inputs.rows, inputs.folder, inputs.stream_of, inputs.progress)
        return Made(loop.run(), loop.tally.inputs, {"rounds": loop.facts()})

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Every candidate of one call."""
        draft = dataclasses.replace(
            row,
            recipe=f"{self.name}.propose",
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
        is_cut = sample.finish_reason == "length"
        candidates = self.candidates(sample.text, is_cut)
        if not candidates:
            return refused(draft, row, "truncated" if is_cut else "unparsable", raw=sample.text)
        return [self._outcome(draft, row, index, candidate) for index, candidate in enumerate(candidates)]

    def _outcome(self, draft: Record, row: Record, index: int, candidate: Candidate) -> Outcome:
        record = dataclasses.replace(draft, sample=index, messages=candidate.messages or draft.messages)
        if index:  # the call's tokens are counted once
            record = dataclasses.replace(record, num_prompt_tokens=None, num_tokens=None)
        reason, score = candidate.broken, math.nan
        if reason is None:
            text = self.instruction(record) or ""
            reason = self._refusal(text)
            if reason is None:
                found = nearest(tokens_of(text), self._pool, self.config.novelty)
                reason, score = ("not_novel" if found.is_near else None), found.score
        status = "accepted" if reason is None else "rejected"
        return Outcome(record=record, input_key=row.key, status=status, reason=reason, score=score, raw=candidate.raw)

    def _refusal(self, text: str) -> str | None:
        """Why a candidate is no usable instruction (methods D08, step 1)."""
        config, words = self.config, len(text.split())
        checks: dict[str, Any] = {
            "empty": not words,
            "too_short": words < config.min_words,
            "too_long": words > config.max_words,
            "blocked_word": self._blocked is not None and self._blocked.search(text) is not None,
            "blocked_start": text.lower().startswith(self._starts),
            "odd_start": not (text[:1].isalnum() or text[:1] in "¿¡"),
        }
        return next((reason for reason, failed in checks.items() if failed), None)


class Propose(Proposer):
    """The proposing half of Self-Instruct: instructions alone, answered when the rounds are over (methods D08)."""

    name = "self_instruct"
    source = "self-instruct"

    def __init__(self, config: SelfInstructConfig, pool: Sequence[Tokens] = ()):
        self._style = config.style
        own = config.template
        template = read_template(own, "recipe.template") if own else builtin_prompt(self.name, f"{config.style}.jinja")
        super().__init__(config, template, pool)

    @property
    def prompts(self) -> Mapping[str, str]:
        """The template that shows the examples, and the one that asks for answers."""
        return {"propose": self._template, "answer": builtin_prompt("respond", "user.jinja")}

    def instruction(self, row: Record) -> str | None:
        """The last user turn."""
        return last_user_turn(row.prompt)

    def asked(self, examples: Sequence[Record]) -> str:
        """The user turn that shows these instructions."""
        return render(self._template, examples=[self.instruction(row) for row in examples]).strip()

    def candidates(self, reply: str, is_cut: bool) -> list[Candidate]:
        """Instructions; a reply that was cut is discarded whole."""
        texts = [] if is_cut else parse(reply, self._style)
        return [Candidate(({"role": "user", "content": text},)) for text in texts]


def parse(reply: str, style: str) -> list[str]:
    """Instructions of a reply, white space collapsed: all of it, or the items of the list that the prompt opened.

    The first letter is raised, the others stay as they are.
    """
    if style == "single":
        text = _SPACE.sub(" ", reply).strip()
        return [text] if text else []
    items = (_SPACE.sub(" ", item).strip() for item in _NUMBER.split(reply))
    return [item[:1].upper() + item[1:] for item in items if item]
