"""Reflection-Tuning: a model reviews a row and writes a better instruction, then a better answer (Li et al. 2023, arXiv
2310.11716; methods D11)."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

from itune_ray.config.base import digest
from itune_ray.config.recipes import ReflectionConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError

T = TypeVar("T")

TAGS = ("New Instruction", "New Answer", "Better Answer")
PLACEHOLDERS = frozenset({"your instruction", "your answer", "the instruction", "the answer", "n/a"})
"""Words that stand where a text should: they count as missing."""


class Reflection(Chain):
    """Pass `instruction`: (x, y) -> (x*, y_x*), a harder instruction with its answer. Pass `answer`: (x, y) -> (x, y*),
    of the first pass's pair where that was made.

    A reply without the tagged texts, or one that is empty or cut, is asked for once more, then the pass leaves the row
    as it was. A new instruction without its answer counts as none: the old answer would not be to it. Every row is
    accepted, with what became of each pass in its meta (`reflected` or `original`); the reply that could not be read
    is kept as `raw`.
    """

    name = "reflection"
    provides = ("messages", "num_prompt_tokens", "num_tokens")

    def __init__(self, config: ReflectionConfig):
        self._config = config
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in (*config.passes, "system")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The row, reflected where that was possible."""
        instruction, answer = last_user_turn(row.prompt), row.response
        if instruction is None or answer is None or not answer.strip():
            return refused(calls.draft, row, "no_prompt" if instruction is None else "no_answer")
        became, raw = dict[str, str](), None
        if "instruction" in self._config.passes:
            pair, reply = await self._reviewed("instruction", instruction, answer, new_pair, calls)
            became["instruction"], raw = ("original", reply) if pair is None else ("reflected", raw)
            instruction, answer = pair or (instruction, answer)
        if "answer" in self._config.passes:
            better, reply = await self._reviewed("answer", instruction, answer, better_answer, calls)
            became["answer"], raw = ("original", reply) if better is None else ("reflected", raw)
            answer = better or answer
        chat = (
            *row.prompt[:-1],
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": answer},
        )
        facts: dict[str, Any] = {"finish_reason": "stop"} if "reflected" in became.values() else written(row)
        made = calls.accepted(messages=chat, meta={**row.meta, self.name: became}, **facts)
        return [dataclasses.replace(made, raw=raw)]

    async def _reviewed(
        self, name: str, instruction: str, answer: str, parse: Callable[[str], T | None], calls: Calls
    ) -> tuple[T | None, str | None]:
        pair, retry = (instruction, answer), sampling_of(self._config.retry)
        return await reviewed(calls, name, self.prompts[name], self.prompts["system"], pair, parse, retry)


async def reviewed(
    calls: Calls,
    key: str,
    template: str,
    system: str,
    pair: tuple[str, str],
    parse: Callable[[str], T | None],
    retry: Sampling,
) -> tuple[T | None, str | None]:
    """What `parse` finds in a review, after one more try; else None and the last reply.

    Args:
        calls: The row's.
        key: Of the call.
        template, system: What is asked, and as whom.
        pair: Instruction and answer to review.
        parse: None for a reply that cannot be read.
        retry: How the second try is sampled.
    """
    instruction, answer = pair
    fence = digest([instruction, answer], length=12)
    asked = render(template, instruction=instruction, answer=answer, fence=fence)
    chat = ({"role": "system", "content": system.strip()}, {"role": "user", "content": asked.strip()})
    raw = None
    for name, sampling in ((key, None), (f"{key}/again", retry)):
        try:
            raw = await calls.ask(name, chat, sampling=sampling)
        except EndedError as end:
            if end.failed is not None:
                raise
            raw = end.raw
            continue
        found = parse(raw)
        if found is not None:
            return found, None
    return None, raw


def written(row: Record) -> dict[str, Any]:
    """Who wrote the row, for one that stays as it was."""
    return {name: getattr(row, name) for name in ("model", "sampling", "seed", "finish_reason")}


def tagged(text: str, tag: str) -> str:
    """The text after the first `[tag]` (or `tag:`) up to `[End]`, the next tag or the end; empty where there is none.

    The bare word "End" ends nothing, and the number of a list item before the next tag is no part of the text.
    """
    start = re.search(rf"\[{tag}\]:?", text, re.IGNORECASE) or re.search(rf"\b{tag}:", text, re.IGNORECASE)
    if start is None:
        return ""
    rest = text[start.end() :]
    end = _END.search(rest)
    found = (rest[: end.start()] if end else rest).strip()
    return "" if found.strip(" []()<>\"'.").lower() in PLACEHOLDERS | {""} else found


_ANY_TAG = "|".join(TAGS)
_END = re.compile(rf"\[End\]|(?:\n\s*\d+[.)]\s*)?(?:\[(?:{_ANY_TAG})\]|\b(?:{_ANY_TAG}):)", re.IGNORECASE)


def new_pair(reply: str) -> tuple[str, str] | None:
    """The new instruction and its answer; None where either is missing."""
    instruction, answer = tagged(reply, "New Instruction"), tagged(reply, "New Answer")
    return (instruction, answer) if instruction and answer else None


def better_answer(reply: str) -> str | None:
    """The better answer; None where it is missing."""
    return tagged(reply, "Better Answer") or None
