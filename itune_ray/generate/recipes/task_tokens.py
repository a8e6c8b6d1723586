"""Control tokens that say what a prompt is about, without a model (survey figure 2, methods D39)."""

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.config.recipes import TaskTokensConfig
from itune_ray.config.recipes.transforms import Attribute
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Llm
from itune_ray.generate.recipes.base import last_user_turn, numbered, refused

ORDER: tuple[Attribute, ...] = ("task", "lang", "length", "domain")
"""In which attributes are written, whatever the order of the config."""
_TYPED = re.compile(r"<\|((?:task|lang|length|domain):[^|<>\n]*)\|>|\[((?:task|lang|length|domain): [^\[\]\n]*)\]")
"""A control token of either form."""


class TaskTokens:
    """The row with its tokens before the first user turn or the system message; with chance `dropout` without any.

    What looks like a token in the row's own user and system turns is defused, so nobody can type one; an assistant turn
    that holds one is rejected as `token_in_answer`, since it would be learned. A row whose name is not in the registry
    is rejected as `unknown_<attribute>`, one with no attribute at all as `no_attribute`.
    """

    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "seed")
    rows_per_input = 1
    prompts: Mapping[str, str] = {}

    def __init__(self, config: TaskTokensConfig):
        self._config = config

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """One outcome."""
        seed = llm.seed(row.key)
        draft = dataclasses.replace(row, parents=(row.key,), recipe="task_tokens", round=row.round + 1, seed=seed)
        if last_user_turn(row.prompt) is None:
            return refused(draft, row, "no_prompt")
        if any(message["role"] == "assistant" and _TYPED.search(message["content"]) for message in row.messages):
            return refused(draft, row, "token_in_answer")
        named = self._named(row)
        for attribute, name in named:
            if name not in self._config.names[attribute]:
                return refused(draft, row, f"unknown_{attribute}", raw=name)
        if not named:
            return refused(draft, row, "no_attribute")
        is_dropped = random.Random(seed).random() < self._config.dropout
        tokens = [] if is_dropped else [token(a, name, self._config.form) for a, name in named]
        messages = tuple(
            m if m["role"] == "assistant" else {**m, "content": defused(m["content"])} for m in row.messages
        )
        record = dataclasses.replace(
            numbered(draft, row, 0, 1),
            messages=prefixed(messages, tokens, self._config.place),
            meta={**row.meta, "task_tokens": tokens},
        )
        return [Outcome(record=record, input_key=row.key, status="accepted")]

    def _named(self, row: Record) -> list[tuple[Attribute, str]]:
        """The row's attributes that the registry has, in their fixed order."""
        config = self._config
        named: list[tuple[Attribute, str]] = []
        for attribute in ORDER:
            name = row.meta.get(config.keys.get(attribute, attribute))
            if attribute in config.names and name is not None:
                named.append((attribute, str(name)))
        return named

    def facts(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The tokens that a tokenizer must get, as added tokens that are not special, and rows without any."""
        config = self._config
        tokens = [token(a, n, config.form) for a in ORDER for n in config.names.get(a, ())]
        made = [o.record.meta["task_tokens"] for o in outcomes if o.status == "accepted"]
        return {
            "added_tokens": tokens if config.form == "special" else [],
            "without_tokens": sum(not held for held in made),
        }


def token(attribute: Attribute, name: str, form: str) -> str:
    """As it is written."""
    return f"<|{attribute}:{name}|>" if form == "special" else f"[{attribute}: {name}]"


def defused(text: str) -> str:
    """The text with whatever looks like a control token in round brackets."""
    return _TYPED.sub(lambda found: f"({found[1] or found[2]})", text)


def prefixed(messages: Sequence[Message], tokens: Sequence[str], place: str) -> tuple[Message, ...]:
    """The chat with the tokens before its first turn of that role; a system message is made where there is none."""
    if not tokens:
        return tuple(messages)
    words = " ".join(tokens)
    index = next((i for i, message in enumerate(messages) if message["role"] == place), None)
    if index is None:
        return ({"role": place, "content": words}, *messages)
    changed = {**messages[index], "content": f"{words}\n{messages[index]['content']}"}
    return (*messages[:index], changed, *messages[index + 1 :])
