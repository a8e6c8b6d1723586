"""The recipe contract, and the outcomes every recipe ends its rows in."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, Protocol

import pyarrow as pa

from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Llm

SPEAKERS = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
"""How transcripts name who speaks."""


class Recipe(Protocol):
    """One method of making rows. Instances are pickled to the workers and hold no state between calls.

    Beside what follows, a recipe may have `bind(others)`, where its config names further models, and `facts(outcomes)`
    with figures for the manifest. One that asks no model says so in its config (`asks_teacher`). One whose rows depend
    on each other is a `itune_ray.generate.whole.WholeRecipe`.
    """

    version: int
    """Raised when the same config would make other rows; part of the artifact's identity."""
    requires: tuple[str, ...]
    """Record fields that an input row must have."""
    provides: tuple[str, ...]
    """Record fields that every accepted row has."""

    @property
    def rows_per_input(self) -> int | None:
        """Outcomes that every input ends in; None where the recipe decides per row."""
        ...

    @property
    def prompts(self) -> Mapping[str, str]:
        """Name -> text of the templates it writes prompts with; part of the artifact's identity."""
        ...

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Make rows from one input; call `llm` as often as needed, also in parallel.

        All outcomes carry `input_key=row.key` and keys of their own. Nothing is lost: what cannot be made is rejected
        with a reason, or failed with a cause when another attempt may mend it.
        """
        ...


def facts_of(recipe: Recipe, table: pa.Table) -> dict[str, Any]:
    """Figures for the manifest, of recipes that have a `facts(outcomes)`."""
    facts = getattr(recipe, "facts", None)
    return {} if facts is None else facts([Outcome.from_row(row) for row in table.to_pylist()])


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe decides the rows, beside its config."""
    prompts = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in sorted(recipe.prompts.items())}
    return {"recipe": recipe.version, "prompts": prompts}


def refused(draft: Record, row: Record, reason: str, count: int = 1, raw: str | None = None) -> list[Outcome]:
    """All `count` outcomes of an input rejected for the same reason."""
    return [
        Outcome(record=numbered(draft, row, index, count), input_key=row.key, status="rejected", reason=reason, raw=raw)
        for index in range(count)
    ]


def from_error(draft: Record, row: Record, completion: Completion, count: int = 1) -> list[Outcome]:
    """Outcomes of an input whose call failed: rejected when no attempt can mend it, else failed.

    An engine's error starts with a word or clause that can be counted (`prompt_too_long: 612 tokens, ...`); the whole
    text is kept as `raw`.
    """
    error = completion.error or "no error given"
    if not completion.retryable:
        return refused(draft, row, error.split(":", 1)[0], count, raw=error)
    return [
        Outcome(
            record=numbered(draft, row, index, count),
            input_key=row.key,
            status="failed",
            cause=error.split(";", 1)[0],
            raw=error,
        )
        for index in range(count)
    ]


def numbered(draft: Record, row: Record, index: int, count: int) -> Record:
    """The draft as sample `index` of `count`; inputs that are samples themselves get ranges that do not meet."""
    return dataclasses.replace(draft, sample=row.sample * count + index)


def builtin_prompt(recipe: str, name: str) -> str:
    """A template of `generate/prompts/<recipe>/`."""
    return (resources.files("itune_ray.generate") / "prompts" / recipe / name).read_text(encoding="utf-8")


def last_user_turn(messages: Sequence[Mapping[str, str]]) -> str | None:
    """Text of the final message when it is a user's and says something."""
    last = messages[-1] if messages else None
    return last["content"] if last and last["role"] == "user" and last["content"].strip() else None


def task_turn(instruction: str, input: str) -> str:
    """The user turn of a task: the instruction, a blank line and its input, where it has one."""
    return f"{instruction}\n\n{input}" if input else instruction


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """A chat as text, one paragraph per turn, each after the name of who speaks."""
    return "\n\n".join(f"{SPEAKERS.get(m['role'], m['role'])}: {m['content'].strip()}" for m in messages)
