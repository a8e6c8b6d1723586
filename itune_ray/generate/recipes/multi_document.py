"""Tasks over clusters of related documents (MDCure's generation, methods D19)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from itune_ray.config.base import digest
from itune_ray.config.recipes import MultiDocumentConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.recipes.self_instruct_instances import parse_yes_no
from itune_ray.generate.snippets import context_of, sentences_of, snippet_pairs, word_vectors

LENGTHS = (
    "1-2 words",
    "3-4 words",
    "a phrase of 5-6 words",
    "1-2 sentences",
    "3-4 sentences",
    "5-7 sentences",
    "8-10 sentences",
    "at least 10 sentences",
)
DIRECTIONS = (
    "Answer in {length}.",
    "Your answer should be {length} long.",
    "Reply with {length}.",
    "Use {length} for your answer.",
    "Keep the answer to {length}.",
    "Respond in {length}.",
    "Give your answer in {length}.",
    "The answer should take {length}.",
    "Write {length} in reply.",
)
CHARACTERISTICS = (
    "several steps of reasoning that build on each other",
    "a comparison of what different documents say",
    "details gathered from all over the documents",
    "a conclusion that no document states by itself",
)
KINDS = (
    "inference, that is, whether a statement follows from the documents, contradicts them, or neither",
    "paraphrase, that is, saying in other words what the documents say about a matter",
    "summary of what the documents say about a matter",
    "information, that is, particular facts that a person looks for",
)
WORDINGS = ("a command", "a question", "a short query of a few keywords, as typed into a search box")
STYLES = tuple(product(CHARACTERISTICS, KINDS, WORDINGS, LENGTHS))
"""4 × 4 × 3 × 8 = 384 ways to ask."""
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=\S)")
_ANSWER = re.compile(r"\*{0,2}\bAnswer\*{0,2}:\*{0,2}")
_A = re.compile(r"(?m)^[ \t]*\*{0,2}A\*{0,2}:\*{0,2}")
"""Only where no `Answer:` stands: it may open the first of several options."""
_QUESTION = re.compile(r"\*{0,2}\bQuestion\*{0,2}:\*{0,2}|(?m:^)[ \t]*\*{0,2}Q\*{0,2}:\*{0,2}")
_SNIPPET = re.compile(r"\bsnippets?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of task whose answer has a form of its own."""

    request: str
    direction: str | None = None
    """How the task says what answer it wants; None: by the length of the answer."""
    answer: str = ""
    """A pattern that the whole answer must match, letter case aside; empty for any."""
    sentences: tuple[int, int] | None = None
    """Least and most sentences of the answer."""
    words: int | None = None
    """Most words of the answer."""


GENERAL: Mapping[str, Form] = {
    "whole": Form("a question that draws on every document."),
    "brief": Form("a question in as few words as can be, with a brief answer."),
    "exam": Form("a hard question for an exam, whose answer takes thought."),
    "phrase": Form("a question whose answer is a single phrase of under 7 words.", words=6),
    "contrast": Form("a question about how the documents differ from each other."),
    "choice": Form(
        "a question with four options, each on a line of its own that starts with A), B), C) or D), of which exactly "
        "one is right. The answer is its letter alone.",
        "Answer with the letter of the right option.",
        r"[A-D][.)]?",
    ),
}
"""Kinds of task over whole documents."""
SNIPPETS: Mapping[str, Form] = {
    "answer": Form("a question whose answer joins what both passages say."),
    "yes": Form("a question whose answer is yes.", "Answer with yes or no.", r"yes\W*"),
    "no": Form("a question whose answer is no.", "Answer with yes or no.", r"no\W*"),
    "phrase": Form("a question whose answer is a phrase of under 7 words.", words=6),
    "long_summary": Form("a request for a summary, answered in 5 sentences or more.", sentences=(5, 10**6)),
    "short_summary": Form("a request for a short summary, answered in fewer than 5 sentences.", sentences=(1, 4)),
}
"""Kinds of task over two related passages."""


class MultiDocument(Chain):
    """{d_1..d_n} -> (d_1..d_n + question + how long, answer) (Liu et al. 2025, arXiv 2410.23463).

    Documents stand on one line each, in an order drawn per task. How long the answer is to be is said as it turned out.
    Rejected are replies without exactly one question and one answer (`unparsable`, `second_marker`), that speak of
    snippets (`snippet_leak`), or whose answer has not the form that was asked for (`wrong_form`); and, with
    `leave_one_out`, tasks that all documents do not answer (`unanswerable`) or that some do (`document_not_needed`).
    """

    name = "multi_document"
    requires = ()

    def __init__(self, config: MultiDocumentConfig):
        self._config = config
        self.rows_per_input = self.most_rows = config.samples
        names = ("documents", "general", "snippets", "style", "answerable")
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in names}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per task."""
        documents = documents_of(row)
        if len(documents) < 2:
            return refused(calls.draft, row, "one_document" if documents else "no_documents", self.most_rows)
        outcomes: list[Outcome] = []
        for index in range(self._config.samples):
            try:
                outcomes.append(await self._task(row, documents, index, calls))
            except EndedError as end:
                outcomes.append(calls.ended(end, index))
        return outcomes

    async def _task(self, row: Record, documents: list[str], index: int, calls: Calls) -> Outcome:
        rng = calls.rng(f"task/{index}")
        drawn = rng.sample(documents, min(self._config.documents, len(documents)))
        shown = [flat(document) for document in drawn]
        family = rng.choice(self._config.families)
        name, form, asked = self._asked(family, drawn, rng)
        reply = await calls.ask(f"task/{index}", asked)
        question, answer = parse_pair(reply)
        if not has_form(answer, form):
            raise EndedError("wrong_form", raw=reply)
        length = form.direction or rng.choice(DIRECTIONS).format(length=answer_length(answer))
        if self._config.leave_one_out:
            await self._check_needed(question, shown, index, calls)
        turn = f"{numbered_documents(shown)}\n\n{question}\n\n{length}"
        facts = {"form": name, "num_documents": len(shown), "question": question, "length": length}
        return calls.accepted(
            index,
            recipe=f"{self.name}.{family}",
            messages=({"role": "user", "content": turn}, {"role": "assistant", "content": answer}),
            text=None,
            finish_reason="stop",
            meta={**row.meta, "multi_document": facts},
        )

    def _asked(self, family: str, drawn: list[str], rng: Random) -> tuple[str, Form, str]:
        """Name and form of a task, and the user turn that asks for it."""
        shown = [flat(document) for document in drawn]
        if family == "style":
            style = rng.choice(STYLES)
            return " / ".join(style), Form(""), self.styled(style, shown)
        name, form = rng.choice(sorted((GENERAL if family == "general" else SNIPPETS).items()))
        if family == "general":
            values = {"documents": shown, "shown": self._shown(shown)}
        else:
            values = {"shown": self._shown(related_passages(drawn, rng))}
        return name, form, render(self.prompts[family], request=form.request, **values)

    def styled(self, style: tuple[str, str, str, str], shown: Sequence[str]) -> str:
        """The user turn that asks for a task in one of `STYLES`."""
        names = dict(zip(("characteristic", "kind", "style", "length"), style, strict=True))
        return render(self.prompts["style"], documents=shown, shown=self._shown(shown), **names)

    def _shown(self, documents: Sequence[str]) -> str:
        fence = digest(list(documents), length=12)
        return render(self.prompts["documents"], documents=documents, fence=fence).strip()

    async def _check_needed(self, question: str, shown: list[str], index: int, calls: Calls) -> None:
        """Raises `EndedError` unless all documents answer the question, and no longer when any one is taken away."""
        for left_out in range(-1, len(shown)):
            rest = [document for number, document in enumerate(shown) if number != left_out]
            turn = render(self.prompts["answerable"], question=question, shown=self._shown(rest))
            greedy = Sampling(temperature=0.0, max_tokens=8)
            name = f"answerable/{index}/{left_out + 1}"
            can = await calls.parsed(name, turn, parse_yes_no, of="judge", sampling=greedy, cut=True)
            if can != (left_out < 0):
                raise EndedError("document_not_needed" if can else "unanswerable", raw=question)


def documents_of(row: Record) -> list[str]:
    """The documents of a row of layout `documents`."""
    found = row.meta.get("documents")
    return [d for d in found if isinstance(d, str) and d.strip()] if isinstance(found, list) else []


def related_passages(documents: Sequence[str], rng: Random) -> list[str]:
    """Two related passages of different documents with what stands around them, drawn from all such pairs; raises
    `EndedError` where there is none."""
    sentences = [sentences_of(document) for document in documents]
    texts = [sentence for lines in sentences for sentence in lines]
    pairs = snippet_pairs(sentences, word_vectors(texts), rng)
    if not pairs:
        raise EndedError("no_related_passages")
    return [context_of(sentences[place.document], place.sentence) for place in rng.choice(pairs)]


def parse_pair(reply: str) -> tuple[str, str]:
    """Question and answer of a reply; raises `EndedError` with what is wrong."""
    parts = (_ANSWER if _ANSWER.search(reply) else _A).split(reply)
    if len(parts) < 2:
        raise EndedError("unparsable", raw=reply)
    before, after = parts[0].strip(), parts[1].strip()
    opening = _QUESTION.match(before)
    question = before[opening.end() :].strip() if opening else before
    if len(parts) > 2 or _QUESTION.search(question) or _QUESTION.search(after):
        raise EndedError("second_marker", raw=reply)
    if not question or not after:
        raise EndedError("unparsable", raw=reply)
    if _SNIPPET.search(question) or _SNIPPET.search(after):
        raise EndedError("snippet_leak", raw=reply)
    return question, after


def has_form(answer: str, form: Form) -> bool:
    """Whether an answer is what its kind of task calls for."""
    low, high = form.sentences or (0, 10**6)
    return (
        (not form.answer or re.fullmatch(form.answer, answer, re.IGNORECASE) is not None)
        and (form.words is None or len(answer.split()) <= form.words)
        and low <= count_sentences(answer) <= high
    )


def answer_length(answer: str) -> str:
    """Which of `LENGTHS` an answer has: by words up to 6, then by sentences."""
    words, sentences = len(answer.split()), count_sentences(answer)
    for bound, length in zip((3, 5, 7), LENGTHS[:3], strict=True):
        if words < bound:
            return length
    for bound, length in zip((2, 4, 7, 10), LENGTHS[3:], strict=False):
        if sentences <= bound:
            return length
    return LENGTHS[-1]


def count_sentences(text: str) -> int:
    """Sentences by their end marks; 0 for no text."""
    return len(_SENTENCE.split(text.strip())) if text.strip() else 0


def numbered_documents(documents: Sequence[str]) -> str:
    """The documents as a task shows them."""
    return "\n\n".join(f"Document {number}: {text}" for number, text in enumerate(documents, start=1))


def flat(document: str) -> str:
    """A document on one line."""
    return " ".join(document.split())
