"""Multi-step reflective learning of a student with a teacher (survey algorithm 1, eq. 31-32, methods D23).

The algorithm as printed needs column -1 of its matrix and a context that is never assigned; here convergence is tested
from the second column on, and the context stays unless `reretrieve` is set.
"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from itune_ray.config.recipes import ReflectiveLearningConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.templates import render
from itune_ray.generate.novelty import tokens_of
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, together

DEMANDS: Mapping[str, str] = {
    "easy": "it asks to recall a single fact.",
    "medium": "it asks to relate two things that are said in different places.",
    "hard": "it asks to apply what is said to a new case.",
    "expert": "it asks to criticise what is said, or to deal with a case at its edge.",
}
_SCORE = re.compile(
    r"\s*\W*Score\W*:\W*([01](?:\.\d+)?|\.\d+)(?![\d/%])[ \t`*.]*(?:\n|$)(.*)", re.DOTALL | re.IGNORECASE
)


class Evaluation(NamedTuple):
    """What the teacher says of a reply."""

    score: float
    """In [0, 1]."""
    comment: str


@dataclass(frozen=True)
class Asked:
    """A question at one level of one step."""

    level: str
    step: int
    question: str
    answer: str
    evaluation: Evaluation


class ReflectiveLearning(Chain):
    """R_0 = student(C, I); at step t the teacher asks per level j, the student replies a_jt, the teacher scores F_jt:

        A[j, t] = max(0, cos(e(a_jt), e(I))) F_jt,    R_{t+1} = reflect(R_t, {F_jt})

    until |A[:, t] - A[:, t-1]| < epsilon `patience` times in a row, or `steps` are done. C are the passages likest I.
    The row is (I, the last R) with A in `meta`; each (question, a_jt) is a trace row. 1 + steps (3 k + 1) calls.
    """

    name = "reflective_learning"
    rows_per_input = None

    def __init__(self, config: ReflectiveLearningConfig):
        self._config = config
        self.most_rows = 1 + config.steps * len(config.levels)
        names = ("draft", "question", "answer", "evaluate", "reflect")
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in names}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The revised answer first, then the trace."""
        config, task = self._config, last_user_turn(row.prompt)
        if task is None:
            return refused(calls.draft, row, "no_prompt")
        documents = documents_of(row, config.documents)
        if documents is None:
            return refused(calls.draft, row, "no_documents")
        passages = [passage for text in documents for passage in split_passages(text)]
        context = self._chosen(passages, task)
        response = await self._write("draft", "draft", calls, task=task, passages=context)
        columns: list[list[float]] = []
        trace: list[Asked] = []
        is_converged = False
        for step in range(config.steps):
            asked = await self._questioned(task, response, context, calls, step)
            trace += asked
            columns.append([alignment(a.answer, task, a.evaluation.score, config.bins) for a in asked])
            notes = [
                {"level": a.level, "score": a.evaluation.score, "comment": a.evaluation.comment or "no comment"}
                for a in asked
            ]
            response = await self._write(f"reflect/{step}", "reflect", calls, task=task, response=response, notes=notes)
            if config.reretrieve:
                context = self._chosen(passages, " ".join([task, *(str(note["comment"]) for note in notes)]))
            is_converged = converged(changes(columns), config.epsilon, config.patience)
            if is_converged:
                break
        facts = {
            "levels": list(config.levels),
            "alignment": [list(level) for level in zip(*columns, strict=True)],
            "changes": changes(columns),
            "is_converged": is_converged,
        }
        answered = {"messages": (*row.prompt, {"role": "assistant", "content": response}), "finish_reason": "stop"}
        final = calls.accepted(0, meta={**row.meta, "reflective": facts}, **answered)
        return [final, *(self._traced(a, index, calls) for index, a in enumerate(trace, start=1) if config.trace)]

    def _chosen(self, passages: Sequence[str], query: str) -> list[str]:
        """The likest passages, in the order of the documents."""
        bins = self._config.bins
        likeness = [cosine(hashed_words(passage, bins), hashed_words(query, bins)) for passage in passages]
        best = sorted(range(len(passages)), key=lambda i: -likeness[i])[: self._config.passages]
        return [passages[i] for i in sorted(best)]

    async def _write(self, name: str, template: str, calls: Calls, **values: Any) -> str:
        """What the student writes."""
        return await calls.ask(name, render(self.prompts[template], **values), of="student")

    async def _questioned(
        self, task: str, response: str, passages: Sequence[str], calls: Calls, step: int
    ) -> list[Asked]:
        """A question, a reply and its evaluation per level; the levels at once."""
        shown = {"task": task, "response": response}

        async def at(level: str) -> Asked:
            call = f"{level}/{step}"
            told = {"level": level, "demand": DEMANDS[level]}
            question = await calls.ask(f"question/{call}", render(self.prompts["question"], **shown, **told))
            answer = await self._write(f"answer/{call}", "answer", calls, **shown, passages=passages, question=question)
            asked = render(self.prompts["evaluate"], task=task, level=level, question=question, answer=answer)
            return Asked(level, step, question, answer, await calls.parsed(f"evaluate/{call}", asked, parse_evaluation))

        return await together([at(level) for level in self._config.levels])

    def _traced(self, asked: Asked, index: int, calls: Calls) -> Outcome:
        fields = {
            "messages": ({"role": "user", "content": asked.question}, {"role": "assistant", "content": asked.answer}),
            "recipe": f"{self.name}.trace",
            "round": asked.step + 1,
            "meta": {"reflective": {"level": asked.level, "step": asked.step, "comment": asked.evaluation.comment}},
            "finish_reason": "stop",
        }
        score = asked.evaluation.score
        if score < self._config.trace_min_score:
            return calls.rejected("low_score", index, score=score, **fields)
        return calls.accepted(index, score=score, **fields)

    def facts(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """The mean alignment matrix over the rows, each column over those that got so far; None where none did."""
        found = [o.record.meta.get("reflective", {}) for o in outcomes if o.status == "accepted"]
        matrices = [facts["alignment"] for facts in found if "alignment" in facts]
        if not matrices:
            return {"alignment": None}
        widest = max(len(matrix[0]) for matrix in matrices)
        means: list[list[float]] = []
        for level in range(len(self._config.levels)):
            columns = [[m[level][step] for m in matrices if step < len(m[level])] for step in range(widest)]
            means.append([sum(column) / len(column) for column in columns])
        rows = [sum(step < len(m[0]) for m in matrices) for step in range(widest)]
        return {"alignment": {"levels": list(self._config.levels), "mean": means, "rows": rows}}


def documents_of(row: Record, key: str | None) -> list[str] | None:
    """The row's documents that say something; None where it should have some and has none."""
    if key is None:
        return []
    held = row.meta.get(key)
    texts = [held] if isinstance(held, str) else held if isinstance(held, list) else []
    return [text for text in texts if isinstance(text, str) and text.strip()] or None


def split_passages(text: str) -> list[str]:
    """Paragraphs, white space collapsed."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def hashed_words(text: str, bins: int) -> list[float]:
    """Bag of words of length 1: the bin of a word is the sum of its code points modulo `bins`; 0 for no words."""
    counts = [0.0] * bins
    for word in tokens_of(text):
        counts[sum(map(ord, word)) % bins] += 1
    norm = math.sqrt(sum(count * count for count in counts))
    return [count / norm for count in counts] if norm else counts


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Of vectors of length 1."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def alignment(answer: str, task: str, score: float, bins: int) -> float:
    """max(0, cos(e(answer), e(task))) score, in [0, 1]."""
    return min(1.0, max(0.0, cosine(hashed_words(answer, bins), hashed_words(task, bins)))) * score


def changes(columns: Sequence[Sequence[float]]) -> list[float]:
    """|A[:, t] - A[:, t-1]| for t = 1, 2, ..."""
    return [math.dist(after, before) for before, after in itertools.pairwise(columns)]


def converged(deltas: Sequence[float], epsilon: float, patience: int) -> bool:
    """Whether the last `patience` changes are below epsilon; never before there are so many."""
    return len(deltas) >= patience and all(delta < epsilon for delta in deltas[-patience:])


def parse_evaluation(reply: str) -> Evaluation | None:
    """The score line, which comes first, and the comment after it; None where the score is not a number in [0, 1]."""
    found = _SCORE.match(reply)
    if found is None or not 0 <= float(found[1]) <= 1:
        return None
    return Evaluation(float(found[1]), found[2].strip())
