"""Variants of instructions: changed words, rewordings, other tasks of the same skill (survey eq. 17-19, methods D25).

Only the last user turn changes; the answer stays, except for another task, which gets its own.
"""

import random
from typing import Any

from itune_ray.config.recipes import AugmentConfig
from itune_ray.config.recipes.transforms import BackTranslationAugment, GenerativeAugment, TokenAugment
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.templates import render
from itune_ray.generate.augmenting import OPERATORS, broken_gate, cut, due, mask
from itune_ray.generate.novelty import nearest, tokens_of
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError


class Augment(Chain):
    """The row itself (`keep_original`) and its variants, each a row or rejected.

    Token-level variants draw an operator in turn, `synonym`, `insert`, `swap`, `delete` or `mask`, and one that changes
    nothing or repeats another is rejected as `unchanged`. A rewording must not be a copy and must hold the same
    numbers, negations and names; then a judge says whether it asks for the same (`meaning_changed`). There is no gate
    on embeddings: the job's engines only write.
    """

    name = "augment"
    version = 2
    provides = ("messages", "seed")
    rows_per_input = None

    def __init__(self, config: AugmentConfig):
        self._config = config
        self.most_rows = config.variants + 1
        names = ("paraphrase", "translate", "same", "sibling") if config.asks_teacher else ()
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in names}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The row itself first, then one outcome per variant that is due."""
        task = last_user_turn(row.prompt)
        if task is None:
            return refused(calls.draft, row, "no_prompt")
        config, written = self._config, {"model": row.model, "sampling": row.sampling}
        count = min(config.variants, due(row.position, config.max_share) if config.keep_original else config.variants)
        outcomes = [calls.accepted(0, recipe=row.recipe, parents=row.parents, **written)]
        if not config.keep_original:
            outcomes.clear()
        if isinstance(config.how, TokenAugment):
            return outcomes + self._token_level(row, task, count, calls, written)
        for number in range(1, count + 1):
            facts: dict[str, Any] = {"recipe": f"augment.{config.how.type}", "round": row.round + 1}
            try:
                messages = await self._rewritten(row, task, calls, number)
            except EndedError as end:
                if end.failed is not None:
                    raise
                outcomes.append(calls.rejected(end.reason, number, raw=end.raw, **facts))
                continue
            outcomes.append(calls.accepted(number, messages=messages, **facts))
        return outcomes

    def _token_level(self, row: Record, task: str, count: int, calls: Calls, written: dict[str, Any]) -> list[Outcome]:
        """Candidates of every operator alike, shuffled and cut to the number that is due."""
        how, rng = self._config.how, calls.rng("augment")
        assert isinstance(how, TokenAugment)
        drawn = [op for op in how.ops for _ in range(count // len(how.ops) + 1)]
        rng.shuffle(drawn)
        seen, outcomes = {task}, list[Outcome]()
        for number, op in enumerate(drawn[:count], start=1):
            text = token_variant(task, op, how, rng)
            facts = {
                "messages": _with_turn(row, text),
                "recipe": f"augment.{op}",
                "round": row.round + 1,
                **written,
            }
            is_new = text not in seen
            outcomes.append(calls.accepted(number, **facts) if is_new else calls.rejected("unchanged", number, **facts))
            seen.add(text)
        return outcomes

    async def _rewritten(self, row: Record, task: str, calls: Calls, number: int) -> tuple[Message, ...]:
        """The messages of variant `number`; raises `EndedError` with the gate that it does not pass."""
        how = self._config.how
        if isinstance(how, GenerativeAugment):
            sibling = await calls.ask(f"sibling/{number}", render(self.prompts["sibling"], task=task))
            if nearest(tokens_of(sibling), [tokens_of(task)], self._config.max_rouge).is_near:
                raise EndedError("copy", raw=sibling)
            asked = (*row.prompt[:-1], {"role": "user", "content": sibling})
            return (*asked, {"role": "assistant", "content": await calls.ask(f"answer/{number}", asked)})
        if isinstance(how, BackTranslationAugment):
            there = await self._translated(task, how.pivot, calls, f"there/{number}")
            text = await self._translated(there, how.language, calls, f"back/{number}")
        else:
            text = await calls.ask(f"paraphrase/{number}", render(self.prompts["paraphrase"], task=task))
        reason = broken_gate(task, text, self._config.max_rouge)
        if reason is not None:
            raise EndedError(reason, raw=text)
        question, greedy = render(self.prompts["same"], first=task, second=text), Sampling(max_tokens=8)
        is_same = await calls.parsed(f"same/{number}", question, parse_yes, of="judge", sampling=greedy, cut=True)
        if not is_same:
            raise EndedError("meaning_changed", raw=text)
        return _with_turn(row, text)

    async def _translated(self, text: str, language: str, calls: Calls, name: str) -> str:
        return await calls.ask(name, render(self.prompts["translate"], text=text, language=language))


def token_variant(text: str, op: str, how: TokenAugment, rng: random.Random) -> str:
    """The text under one operator."""
    pieces = cut(text)
    if op == "mask":
        return mask(pieces, how.mask_share, rng, how.mask_text).text()
    return OPERATORS[op](pieces, how.share, rng).text() if pieces.words else text


def parse_yes(reply: str) -> bool | None:
    """yes or no, whatever the case and punctuation; None for anything else."""
    return {"yes": True, "no": False}.get(reply.strip().strip("`*.!\"'").lower())


def _with_turn(row: Record, text: str) -> tuple[Message, ...]:
    """The row's messages with another last user turn."""
    return (*row.prompt[:-1], {"role": "user", "content": text}, *row.messages[len(row.prompt) :])
