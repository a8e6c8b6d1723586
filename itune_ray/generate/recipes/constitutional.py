"""Constitutional AI, supervised stage: answers criticised and revised under principles (Bai et al. 2022, arXiv
2212.08073; methods D13)."""

import dataclasses
import re
from typing import Annotated, Any

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.recipes import ConstitutionalConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused, transcript
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.recipes.principles import principles_text, read_principles

HEADINGS = ("### Conversation", "### Critique", "### Revision")
"""How the sections of the template begin; each ends a reply that writes on."""
SECTION = re.compile(r"^### (?:Conversation|Critique|Critique request|Revision|Revision request)\s*$", re.MULTILINE)


class Principle(Schema):
    """One thing to look for in an answer, and to mend."""

    id: str
    critique: str
    revision: str


class Example(Schema):
    """A worked case that is shown before the row's own."""

    conversation: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str


class Constitution(Schema):
    """A file of principles."""

    principles: Annotated[tuple[Principle, ...], Field(min_length=1)]
    examples: tuple[Example, ...] | None = None
    """Default: the built-in ones."""

    @model_validator(mode="after")
    def _distinct(self) -> "Constitution":
        if len({principle.id for principle in self.principles}) < len(self.principles):
            raise ValueError("two principles have the same id")
        return self


class Constitutional(Chain):
    """y_0 ~ M(x); for n = 1..N a principle c_n is drawn per row and n, k_n ~ M(x, y_{n-1}, c_n) criticises and
    y_n ~ M(x, y_{n-1}, c_n, k_n) revises. Every (x, y_n) is a row, y_0 is none.

    With `direct_revision` there is no k_n. A revision that repeats headings of the template is rejected (`scaffold`),
    as is one that is empty or cut; then y_n = y_{n-1}. One equal to y_{n-1} is kept and marked `unchanged`.
    """

    name = "constitutional"

    def __init__(self, config: ConstitutionalConfig):
        self._config = config
        self.rows_per_input = self.most_rows = config.revisions
        text = principles_text(config.principles, self.name)
        self.prompts = {"case": builtin_prompt(self.name, "case.jinja"), "principles": text}
        constitution = read_principles(text, Constitution)
        self._principles = constitution.principles
        self._examples = constitution.examples
        if self._examples is None:
            own = builtin_prompt(self.name, "principles.json")
            self.prompts["examples"] = own
            self._examples = read_principles(own, Constitution).examples or ()

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per revision."""
        if last_user_turn(row.prompt) is None:
            return refused(calls.draft, row, "no_prompt", self.most_rows)
        first = answer = await calls.ask("answer", row.prompt)
        outcomes: list[Outcome] = []
        parent, applied = row.key, list[str]()
        for number in range(1, self._config.revisions + 1):
            principle = calls.rng(f"principle/{number}").choice(self._principles)
            facts = {"round": row.round + number, "parents": (parent,)}
            about: dict[str, Any] = {"principles": [*applied, principle.id]}
            try:
                critique, revision = await self._revised(row, answer, principle, calls, number)
            except EndedError as end:
                if end.failed is not None:
                    raise
                meta = {**row.meta, self.name: about}
                outcomes.append(calls.rejected(end.reason, number - 1, raw=end.raw, meta=meta, **facts))
                continue
            about |= {"critique": critique, "unchanged": revision == answer}
            meta = {**_harmless(row.meta, is_revised=revision != first), self.name: about}
            chat = (*row.prompt, {"role": "assistant", "content": revision})
            outcomes.append(calls.accepted(number - 1, messages=chat, finish_reason="stop", meta=meta, **facts))
            answer, parent, applied = revision, outcomes[-1].record.key, about["principles"]
        return outcomes

    async def _revised(
        self, row: Record, answer: str, principle: Principle, calls: Calls, number: int
    ) -> tuple[str | None, str]:
        """The critique, where one is made, and the revision."""
        sampling = dataclasses.replace(
            calls.llm.sampling, stop=(*calls.llm.sampling.stop, *(f"\n{heading}" for heading in HEADINGS))
        )
        case = {
            "conversation": transcript([*row.prompt, {"role": "assistant", "content": answer}]),
            "critique_request": principle.critique,
            "revision_request": principle.revision,
            "examples": [example.model_dump() for example in self._examples or ()],
            "direct": self._config.direct_revision,
        }
        critique = None
        if not self._config.direct_revision:
            asked = render(self.prompts["case"], wanted="critique", critique="", **case)
            critique = await calls.ask(f"critique/{number}", asked, sampling=sampling)
        asked = render(self.prompts["case"], wanted="revision", critique=critique or "", **case)
        revision = await calls.ask(f"revision/{number}", asked, sampling=sampling)
        if SECTION.search(revision):
            raise EndedError("scaffold", raw=revision)
        return critique, revision


def _harmless(meta: dict[str, Any], *, is_revised: bool) -> dict[str, Any]:
    """The row's facts; one that was unsafe is so no more once its answer was revised."""
    return {name: value for name, value in meta.items() if not (is_revised and name == "unsafe")}
