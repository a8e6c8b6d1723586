"""Asking a model the items of a benchmark and grading what it says; no Ray in here."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from itune_ray.benchmarks.base import Benchmark, Grade, Item, Reply
from itune_ray.config.base import digest
from itune_ray.config.shared import ModelRef, SamplingConfig
from itune_ray.data.chat import ChatRenderer, Rendered, UnusableRow
from itune_ray.data.records import row_seed
from itune_ray.data.thinking import answer_of
from itune_ray.engine.base import Completion, Request, Sampling
from itune_ray.engine.llm import sampling_of
from itune_ray.errors import EvalError
from itune_ray.model.render import model_renderer


class Client(Protocol):
    """What sends requests to a model: a pool's client, or a fake one in tests."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One item put to one model."""

    model: str
    benchmark: str
    position: int
    """Index of the item in its benchmark."""
    item: Item

    @property
    def source(self) -> str:
        """`model/benchmark`: the source of its ledger row."""
        return f"{self.model}/{self.benchmark}"

    @property
    def key(self) -> str:
        """Key of its ledger row."""
        return f"{self.source}:{self.position}:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a question: a graded reply, or why there is none."""

    question: Question
    reply: Reply | None = None
    grade: Grade | None = None
    cause: str | None = None
    retryable: bool = False
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """A model as the asker sees it."""

    client: Client
    ref: ModelRef

    @property
    def adapter(self) -> str | None:
        """The LoRA folder to answer with: models that differ only here share one engine."""
        return self.ref.adapter


class Asker:
    """Sends questions to models and grades the replies.

    Args:
        models: By name.
        benchmarks: By name; used to grade only.
        sampling: Of generated replies; a benchmark's own stop strings are added.
        seed: Of the job; each question draws by its own key.
        render: Makes the renderer of a model, for scored documents; called once per model.
    """

    def __init__(
        self,
        models: Mapping[str, Asked],
        benchmarks: Mapping[str, Benchmark],
        sampling: SamplingConfig,
        seed: int,
        render: Callable[[ModelRef], ChatRenderer] | None = None,
    ):
        self._models, self._benchmarks = models, benchmarks
        self._sampling, self._seed = sampling, seed
        self._render = render or model_renderer
        self._renderers: dict[str, ChatRenderer] = {}

    async def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions of one model, in order; one that fails fails alone."""
        rendered: dict[int, Rendered] = {}
        answers: dict[int, Answer] = {}
        requests: list[Request] = []
        for question in questions:
            try:
                requests.append(self._request(question, rendered))
            except UnusableRow as error:
                answers[question.position] = Answer(question=question, cause=error.reason)
        completions = await self._models[questions[0].model].client.generate(requests) if requests else []
        asked = [q for q in questions if q.position not in answers]
        for question, request, completion in zip(asked, requests, completions, strict=True):
            answers[question.position] = self._graded(question, request, completion, rendered.get(question.position))
        return [answers[q.position] for q in questions]

    def _request(self, question: Question, rendered: dict[int, Rendered]) -> Request:
        item, adapter = question.item, self._models[question.model].adapter
        if item.document is not None:
            ids = rendered[question.position] = self._renderer(question.model).record_ids(item.document)
            scoring = Sampling(max_tokens=1, prompt_logprobs=0)
            return _named(Request(id="", sampling=scoring, token_ids=tuple(ids.input_ids), adapter=adapter), question)
        sampling = dataclasses.replace(
            sampling_of(self._sampling),
            stop=tuple(dict.fromkeys((*self._sampling.stop, *item.stop))),
            seed=row_seed(self._seed, "evaluate", question.key),
        )
        request = Request(id="", sampling=sampling, messages=item.messages, text=item.text, adapter=adapter)
        return _named(request, question)

    def _renderer(self, model: str) -> ChatRenderer:
        if model not in self._renderers:
            self._renderers[model] = self._render(self._models[model].ref)
        return self._renderers[model]

    def _graded(
        self, question: Question, request: Request, completion: Completion, rendered: Rendered | None
    ) -> Answer:
        prompt_tokens = len(completion.prompt_token_ids)
        if completion.error is not None:
            return Answer(question=question, cause=completion.error, retryable=completion.retryable)
        if rendered is not None:
            reply, tokens = Reply(logprobs=supervised_logprobs(rendered, completion)), 0
        else:
            sample = completion.samples[0]
            reply, tokens = Reply(text=sample.text, finish_reason=sample.finish_reason), len(sample.token_ids)
        said = dataclasses.replace(reply, text=answer_of(reply.text))
        grade = self._benchmarks[question.benchmark].grade(question.item, said)
        return Answer(
            question=question,
            reply=reply,
            grade=grade,
            num_prompt_tokens=prompt_tokens,
            num_tokens=tokens,
            seed=request.sampling.seed,
        )


def supervised_logprobs(rendered: Rendered, completion: Completion) -> tuple[float, ...]:
    """Log-probabilities of the supervised tokens; the first token of a document is never predicted."""
    entries = completion.prompt_logprobs
    if entries is None or len(entries) != len(rendered.input_ids):
        raise EvalError(
            "the engine gave no log-probability per prompt token",
            got=None if entries is None else f"{len(entries)} entries for {len(rendered.input_ids)} tokens",
        )
    wanted = [i for i, supervised in enumerate(rendered.supervised) if supervised and i > 0]
    values = [(entries[i] or {}).get(rendered.input_ids[i], math.nan) for i in wanted]
    if any(math.isnan(value) for value in values):
        raise EvalError("the engine left out the log-probability of a prompt token")
    return tuple(values)


def _named(request: Request, question: Question) -> Request:
    """The id holds a digest of the work: a pool outlives a stage, and the next one may ask the same item otherwise."""
    work = digest([request.messages, request.text, request.token_ids, asdict(request.sampling), request.adapter])
    return dataclasses.replace(request, id=f"evaluate/{question.key}/{work}")
