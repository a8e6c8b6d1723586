"""Alpaca's variant of Self-Instruct: one call writes whole (instruction, input, output) triples (methods D09)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from itune_ray.config.recipes import AlpacaConfig
from itune_ray.data.records import Record
from itune_ray.engine.templates import read_template, render
from itune_ray.generate.novelty import Tokens
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, task_turn
from itune_ray.generate.recipes.propose import Candidate, Proposer

NO_INPUT = "<noinput>"
_SEPARATOR = re.compile(r"(?m)^[ \t]*###[ \t]*(?=\d+\.|$)")
"""A line of its own, so that a heading within an output separates nothing."""
_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Triple:
    """A task with its answer."""

    instruction: str
    input: str
    """Empty where the task needs none."""
    output: str


class Alpaca(Proposer):
    """Triples (Taori et al. 2023): no classification branch, one instance per instruction, seeds only as examples.

    Items that do not carry the running number end as `misnumbered`, the last one of a cut reply as `truncated`.
    """

    name = "alpaca"
    source = "alpaca-triples"
    seeds = "rows with a user turn and an answer"

    def __init__(self, config: AlpacaConfig, pool: Sequence[Tokens] = ()):
        self._examples, self._list_length = config.examples, config.list_length
        own = config.template
        template = read_template(own, "recipe.template") if own else builtin_prompt(self.name, "triples.jinja")
        super().__init__(config, template, pool)

    @property
    def prompts(self) -> Mapping[str, str]:
        """The template that shows the examples."""
        return {"propose": self._template}

    def instruction(self, row: Record) -> str | None:
        """The first paragraph of the user turn; None for a row without an answer."""
        triple = triple_of(row)
        return None if triple is None else triple.instruction

    def asked(self, examples: Sequence[Record]) -> str:
        """The user turn that shows these triples and opens the next."""
        shown = [asdict(triple) for row in examples if (triple := triple_of(row)) is not None]
        return render(self._template, examples=shown, list_length=self._list_length, no_input=NO_INPUT).strip()

    def candidates(self, reply: str, is_cut: bool) -> list[Candidate]:
        """Triples with their answers; of a cut reply all but the last."""
        items = split_items(reply, self._examples + 1)
        last = len(items) - 1
        return [_candidate(triple, text, is_cut and index == last) for index, (triple, text) in enumerate(items)]


def _candidate(triple: Triple | None, text: str, is_cut: bool) -> Candidate:
    if is_cut or triple is None:
        return Candidate(broken="truncated" if is_cut else "misnumbered", raw=text)
    turns = (
        {"role": "user", "content": task_turn(triple.instruction, triple.input)},
        {"role": "assistant", "content": triple.output},
    )
    return Candidate(turns, broken=None if triple.output else "empty_output")


def split_items(reply: str, first: int) -> list[tuple[Triple | None, str]]:
    """The items of a reply that goes on after `first. Instruction:`, each with its triple.

    The triple is None where an item does not consist of exactly an instruction, an input and an output, in this order
    and under the number that its place in the list calls for.
    """
    opening = f"{first}. Instruction:"
    text = reply.strip()
    text = text if text.startswith(opening) else f"{opening} {text}"
    pieces = [piece.strip() for piece in _SEPARATOR.split(text)]
    while pieces and not pieces[-1]:
        pieces.pop()
    if pieces == [opening]:
        return []
    return [(_triple(piece, first + index), piece) for index, piece in enumerate(pieces)]


def _triple(piece: str, number: int) -> Triple | None:
    parts = re.split(rf"(?m)^[ \t]*{number}\.\s*(Instruction|Input|Output):", piece)
    if len(parts) != 7 or parts[1::2] != ["Instruction", "Input", "Output"]:
        return None
    instruction, input, output = (part.strip() for part in parts[2::2])
    return Triple(_SPACE.sub(" ", instruction), "" if input.lower() == NO_INPUT else input, output)


def triple_of(row: Record) -> Triple | None:
    """The triple of a row with an answer: its instruction is the user turn up to the first blank line."""
    asked = last_user_turn(row.prompt)
    if asked is None or not row.response:
        return None
    instruction, _, input = asked.partition("\n\n")
    return Triple(_SPACE.sub(" ", instruction).strip(), input.strip(), row.response)
