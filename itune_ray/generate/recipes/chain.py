"""Recipes that make a row by several calls, where what one call says decides the next."""

import asyncio
import copy
import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Completion, Llm, Sample, Sampling
from itune_ray.generate.recipes.base import from_error, numbered, refused
from itune_ray.generate.recipes.respond import recorded

T = TypeVar("T")


class EndedError(Exception):
    """Ends an input before its rows are made."""

    def __init__(self, reason: str, raw: str | None = None, failed: Completion | None = None):
        super().__init__(reason)
        self.reason, self.raw, self.failed = reason, raw, failed


class Calls:
    """The calls made for one input row, and the rows that come of them.

    Args:
        row: The input.
        llm: The job's model.
        recipe: Name of the recipe in the rows it makes.
        most_rows: Rows of one input at most; numbers them apart from those of other samples of the same prompt.
        others: Further models of the recipe, by the name it knows them under.
    """

    def __init__(self, row: Record, llm: Llm, recipe: str, most_rows: int = 1, others: Mapping[str, Llm] | None = None):
        self.row, self.llm = row, llm
        self._others, self._most_rows = others or {}, most_rows
        self._prompt_tokens = self._tokens = 0
        self.draft = dataclasses.replace(
            row,
            parents=(row.key,),
            recipe=recipe,
            model=llm.model,
            sampling=recorded(llm.sampling),
            seed=llm.seed(row.key),
            finish_reason=None,
            num_prompt_tokens=None,
            num_tokens=None,
        )

    def model(self, name: str | None) -> Llm:
        """A further model by its name; the job's own for None or a name that has none of its own."""
        return self._others.get(name or "", self.llm)

    def rng(self, name: str) -> random.Random:
        """A generator of this row's and this name's own."""
        return random.Random(self.llm.seed(f"{self.row.key}/{name}"))

    async def samples(
        self,
        name: str,
        messages: Sequence[Message],
        n: int = 1,
        *,
        of: str | None = None,
        sampling: Sampling | None = None,
    ) -> tuple[Sample, ...]:
        """All samples of one call.

        Args:
            name: Of the call, unique within the row: it decides the seed.
            messages: The chat, ending in a user turn.
            n: Samples.
            of: The model to ask; see `model`.
            sampling: Default: the job's.

        Raises:
            EndedError: The engine gave an error.
        """
        completion = await self.model(of).generate(messages, key=f"{self.row.key}/{name}", n=n, sampling=sampling)
        return self.counted(completion).samples

    def counted(self, completion: Completion) -> Completion:
        """A completion of this row with its tokens added up; raises `EndedError` for one that failed."""
        self._prompt_tokens += len(completion.prompt_token_ids)
        self._tokens += sum(len(sample.token_ids) for sample in completion.samples)
        if completion.error is not None:
            raise EndedError(completion.error, failed=completion)
        return completion

    async def ask(
        self,
        name: str,
        turn: str | Sequence[Message],
        *,
        of: str | None = None,
        sampling: Sampling | None = None,
        cut: bool = False,
    ) -> str:
        """One reply, stripped, to a user turn or a chat.

        Args:
            name, of, sampling: See `samples`.
            turn: What is asked.
            cut: Whether a reply that was cut at `max_tokens` will do.

        Raises:
            EndedError: The engine gave an error, or the reply is empty or was cut.
        """
        messages = ({"role": "user", "content": turn},) if isinstance(turn, str) else turn
        (sample,) = await self.samples(name, messages, of=of, sampling=sampling)
        text = sample.text.strip()
        if sample.finish_reason == "length" and not cut:
            raise EndedError("truncated", raw=text)
        if not text:
            raise EndedError("empty")
        return text

    async def parsed(
        self,
        name: str,
        turn: str | Sequence[Message],
        parse: Callable[[str], T | None],
        *,
        of: str | None = None,
        sampling: Sampling | None = None,
        retries: int = 1,
        reason: str = "unparsable",
        cut: bool = False,
    ) -> T:
        """What `parse` finds in a reply; where it finds None the call is made again with another seed.

        Raises:
            EndedError: As `ask`; or no reply could be parsed, with `reason` and the last reply.
        """
        text = ""
        for attempt in range(retries + 1):
            text = await self.ask(
                name if attempt == 0 else f"{name}/{attempt}", turn, of=of, sampling=sampling, cut=cut
            )
            found = parse(text)
            if found is not None:
                return found
        raise EndedError(reason, raw=text)

    def accepted(self, index: int = 0, *, score: float = float("nan"), **fields: Any) -> Outcome:
        """Row `index` of this input, with these fields of its record."""
        return Outcome(record=self._numbered(index, fields), input_key=self.row.key, status="accepted", score=score)

    def rejected(
        self, reason: str, index: int = 0, *, raw: str | None = None, score: float = float("nan"), **fields: Any
    ) -> Outcome:
        """Row `index` of this input is not made, for a reason that can be counted."""
        record = self._numbered(index, fields)
        return Outcome(record=record, input_key=self.row.key, status="rejected", reason=reason, raw=raw, score=score)

    def ended(self, end: EndedError, index: int = 0, **fields: Any) -> Outcome:
        """Row `index` rejected by what ended it, while other rows of the input go on; raises `end` again where another
        attempt at the input may mend it."""
        if end.failed is None:
            return self.rejected(end.reason, index, raw=end.raw, **fields)
        if end.failed.retryable:
            raise end
        return self.rejected(end.reason.split(":", 1)[0], index, raw=end.reason, **fields)

    def _numbered(self, index: int, fields: Mapping[str, Any]) -> Record:
        return dataclasses.replace(numbered(self.draft, self.row, index, self._most_rows), **fields)

    def with_tokens(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes with the tokens of all calls: the prompts' on each, as every sample has them; what was generated
        once, on the first."""
        return [
            dataclasses.replace(
                outcome,
                record=dataclasses.replace(
                    outcome.record, num_prompt_tokens=self._prompt_tokens, num_tokens=0 if index else self._tokens
                ),
            )
            for index, outcome in enumerate(outcomes)
        ]


async def together(calls: Sequence[Awaitable[T]]) -> list[T]:
    """The results of calls made at once, in their order; when some end the row, all are awaited, the first counts."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


class Chain(ABC):
    """A recipe of several calls. It implements `make`, and whatever ends a row early is raised as `EndedError`.

    What a failed call has cost is not lost: an input that is driven again counts its tokens again.
    """

    name: str
    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "model", "sampling", "seed", "num_prompt_tokens", "num_tokens")
    rows_per_input: int | None = 1
    most_rows: int = 1
    """Rows of one input at most."""
    prompts: Mapping[str, str]
    _others: Mapping[str, Llm] = {}

    def bind(self, others: Mapping[str, Llm]) -> "Chain":
        """The same recipe with the further models that its config names."""
        bound = copy.copy(self)
        bound._others = dict(others)
        return bound

    @abstractmethod
    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The outcomes of one input."""

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Make rows from one input; see `itune_ray.generate.recipes.base.Recipe`."""
        calls = Calls(row, llm, self.name, self.most_rows, self._others)
        count = self.rows_per_input or 1
        try:
            outcomes = await self.make(row, calls)
        except EndedError as end:
            if end.failed is not None:
                outcomes = from_error(calls.draft, row, end.failed, count)
            else:
                outcomes = refused(calls.draft, row, end.reason, count, raw=end.raw)
        return calls.with_tokens(outcomes)
