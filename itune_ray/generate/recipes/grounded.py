"""Tasks wrapped around what people wrote, with answers that stay with the document (DoG-Instruct, methods D18)."""

import difflib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from itune_ray.config.base import digest
from itune_ray.config.recipes import GroundedConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.templates import render
from itune_ray.generate.novelty import tokens_of
from itune_ray.generate.recipes.backtranslation import document_of
from itune_ray.generate.recipes.base import builtin_prompt, refused, task_turn
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.stop_words import STOP_WORDS

END = "</s>"
"""What some wrapper models write after their last word."""
_TAG = re.compile(r"#\s*(?:instruction|input|output)\s*#", re.IGNORECASE)
_FIELDS = re.compile(
    r"#instruction#\s*:?(?P<instruction>.*?)(?:#input#\s*:?(?P<input>.*?))?#output#\s*:?(?P<output>.*)",
    re.IGNORECASE | re.DOTALL,
)
_WRITING = r"(?:text|document|passage|article|excerpt)s?"
_REFERS = re.compile(
    rf"\b(?:{_WRITING} (?:above|below)|(?:above|given|provided|this|these) {_WRITING}"
    rf"|(?:according to|based on|in|from) the {_WRITING})\b",
    re.IGNORECASE,
)


class Task(NamedTuple):
    """What the wrapper wrote."""

    instruction: str
    input: str
    """Empty where the task needs none."""
    output: str


class Grounding(NamedTuple):
    """How an answer stands to its document."""

    recall: float
    """Share of the answer's content words that the document has; NaN where it has none."""
    copied: float
    """Share of the answer's words in the longest run that also stands in the document; NaN for no words."""


class Grounded(Chain):
    """d -> (x, y), y in new words and from the facts of d alone (arXiv 2309.05447, methods D18).

    One task per piece of the document. Rejected are replies without the tags or with them in another order
    (`unparsable`), repeated tags (`tag_leak`), instructions that are empty or too long (`empty_instruction`,
    `long_instruction`) or speak of a document that the row does not show (`refers_to_document`), answers that are too
    short (`short_output`), have no content word (`no_content`), say what the document does not (`ungrounded`) or copy
    it (`copied`).
    """

    name = "grounded"
    version = 2
    requires = ()
    rows_per_input = None

    def __init__(self, config: GroundedConfig):
        self._config = config
        self.most_rows = config.pieces
        self.prompts = {"task": builtin_prompt(self.name, "task.jinja")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per piece."""
        document = document_of(row)
        if document is None:
            return refused(calls.draft, row, "no_document")
        outcomes: list[Outcome] = []
        for index, piece in enumerate(pieces(document, self._config.piece_words)):
            if index == self._config.pieces:
                break
            try:
                outcomes.append(await self._task(piece, index, calls))
            except EndedError as end:
                outcomes.append(calls.ended(end, index))
        return outcomes

    async def _task(self, piece: str, index: int, calls: Calls) -> Outcome:
        asked = render(self.prompts["task"], document=piece, fence=digest(piece, length=12))
        task = await calls.parsed(f"task/{index}", asked, parse_tagged)
        grounding = grounding_of(task.output, piece)
        fields = {
            "messages": (
                {"role": "user", "content": task_turn(task.instruction, task.input)},
                {"role": "assistant", "content": task.output},
            ),
            "text": None,
            "rejected": None,
            "teacher": None,
            "finish_reason": "stop",
        }
        reason = broken_task(task) or self._ungrounded(grounding)
        if reason is not None:
            return calls.rejected(reason, index, score=grounding.recall, **fields)
        facts = {**calls.row.meta, "grounding": {"piece": index, **grounding._asdict()}}
        return calls.accepted(index, score=grounding.recall, meta=facts, **fields)

    def _ungrounded(self, grounding: Grounding) -> str | None:
        if math.isnan(grounding.recall):
            return "no_content"
        if grounding.recall < self._config.min_recall:
            return "ungrounded"
        return "copied" if grounding.copied >= self._config.max_copied else None


def parse_tagged(reply: str) -> Task | None:
    """The fields of `#instruction#: ... #input#: ... #output#: ...`; the input may be left out with its tag."""
    match = _FIELDS.search(reply.strip().removesuffix(END))
    if match is None:
        return None
    return Task(*((match[name] or "").strip() for name in Task._fields))


def broken_task(task: Task) -> str | None:
    """Which rule on the form of a task it breaks, if any."""
    words = len(task.instruction.split())
    checks = {
        "tag_leak": any(_TAG.search(part) for part in task),
        "empty_instruction": not words,
        "long_instruction": words > 150,
        "short_output": len(task.output.split()) < 10,
        "refers_to_document": not task.input and _REFERS.search(task.instruction) is not None,
    }
    return next((reason for reason, failed in checks.items() if failed), None)


def grounding_of(output: str, document: str) -> Grounding:
    """How much of an answer is in the document, by its content words and by its longest copied run of words."""
    words, source = tokens_of(output), tokens_of(document)
    content = [word for word in words if word not in STOP_WORDS]
    known = set(source)
    recall = sum(word in known for word in content) / len(content) if content else math.nan
    run = difflib.SequenceMatcher(None, source, words, autojunk=False).find_longest_match()
    return Grounding(recall, run.size / len(words) if words else math.nan)


def pieces(document: str, max_words: int) -> Iterator[str]:
    """The document cut between paragraphs into pieces of at most so many words; a longer paragraph is cut within."""
    piece: list[str] = []
    held = 0
    for paragraph in _short_paragraphs(document, max_words):
        words = len(paragraph.split())
        if piece and held + words > max_words:
            yield "\n\n".join(piece)
            piece, held = [], 0
        piece.append(paragraph)
        held += words
    if piece:
        yield "\n\n".join(piece)


def _short_paragraphs(document: str, max_words: int) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", document):
        words = paragraph.split()
        if len(words) <= max_words:
            yield from [paragraph.strip()] if words else []
            continue
        for start in range(0, len(words), max_words):
            yield " ".join(words[start : start + max_words])
