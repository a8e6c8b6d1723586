"""A model that says what a test tells it to."""

import asyncio
from collections.abc import Callable, Sequence

from itune_ray.config.shared import ModelRef
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Request, Sample, Sampling
from itune_ray.engine.llm import EngineLlm
from itune_ray.generate.recipes.base import Recipe

Reply = str | tuple[str, str] | Exception
"""The words; or (words, finish_reason); or an error, which may be mended by another attempt."""
Script = Callable[[str, int], Reply]
"""(text of the last turn, sample index) -> reply."""


class Scripted:
    """An engine that answers by a script and keeps what it was asked."""

    def __init__(self, script: Script):
        self._script = script
        self.asked: list[Request] = []

    @property
    def turns(self) -> list[str]:
        """Last turns so far, in the order asked."""
        return [last_turn(request) for request in self.asked]

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        raise NotImplementedError

    def _complete(self, request: Request) -> Completion:
        self.asked.append(request)
        turn = last_turn(request)
        replies = [self._script(turn, index) for index in range(request.sampling.n)]
        for reply in replies:
            if isinstance(reply, Exception):
                return Completion(id=request.id, error=str(reply), retryable=True)
        pairs = [reply if isinstance(reply, tuple) else (reply, "stop") for reply in replies]
        return Completion(
            id=request.id,
            samples=tuple(
                Sample(text=text, token_ids=tuple(range(len(text.split()))), finish_reason=reason)
                for text, reason in pairs
            ),
            prompt_token_ids=tuple(range(len(turn.split()))),
        )


def last_turn(request: Request) -> str:
    if request.messages is not None:
        return request.messages[-1]["content"]
    return request.text or ""


def llm(engine: Scripted, name: str = "teacher@1", seed: int = 0, **sampling) -> EngineLlm:
    """The engine as a recipe sees it."""
    settings = Sampling(**{"temperature": 1.0, "max_tokens": 256, **sampling})
    ref = ModelRef(path="playground://base")
    return EngineLlm(engine, model=name, sampling=settings, seed=seed, stage="generate", ref=ref)


def run(recipe: Recipe, row: Record, script: Script, **sampling) -> list[Outcome]:
    """Outcomes of one input under a script."""
    return asyncio.run(recipe(row, llm(Scripted(script), **sampling)))


def prompt(text: str = "Name a colour.", position: int = 0, **fields) -> Record:
    """A prompt row."""
    return Record(**{"source": "s", "position": position, "messages": ({"role": "user", "content": text},), **fields})


def answered(question: str, answer: str, position: int = 0, **fields) -> Record:
    """A row with its answer."""
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(source="s", position=position, messages=turns, **fields)
