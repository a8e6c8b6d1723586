"""[Ray] Eval actors: each takes shards of questions, asks the pools through its clients and grades the replies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from itune_ray.benchmarks.base import Benchmark
from itune_ray.config.evaluate import EvalWorkers
from itune_ray.config.shared import SamplingConfig
from itune_ray.errors import ITuneError
from itune_ray.evaluate.ask import Answer, Asked, Asker, Question

SHARD = 32
"""Questions that travel together: large enough to hide the message, small enough to show progress and lose little."""

SHARDS_IN_FLIGHT = 8
"""Shards one actor works on at once, so that an engine is never idle because one reply of a shard is long."""


@dataclass(frozen=True)
class AskerArguments:
    """What an eval actor needs to build its asker."""

    models: Mapping[str, Asked]
    benchmarks: Mapping[str, Benchmark]
    sampling: SamplingConfig
    seed: int


class EvalActor:
    """One asker in its own process."""

    def __init__(self, arguments: AskerArguments):
        self._asker = Asker(arguments.models, arguments.benchmarks, arguments.sampling, arguments.seed)

    async def answer(self, shard: Sequence[Question]) -> list[Answer]:
        """Answers to one shard of questions to one model."""
        return await self._asker.answer(shard)


def stream_answers(
    shards: Sequence[Sequence[Question]], arguments: AskerArguments, workers: EvalWorkers
) -> Iterator[list[Answer]]:
    """Answers shard by shard as they come; at most `SHARDS_IN_FLIGHT` shards per actor are under way.

    A dead actor starts again and asks its shards anew: request ids name the work, so the pool does it once.
    """
    factory = ray.remote(
        num_cpus=workers.cpus_each, max_restarts=3, max_task_retries=3, max_concurrency=SHARDS_IN_FLIGHT
    )(EvalActor)
    count = min(workers.num, len(shards))
    held = ray.put(arguments)
    actors: list[Any] = [factory.remote(held) for _ in range(count)]
    waiting = list(reversed(shards))
    under_way: dict[Any, Any] = {}
    try:
        for actor in actors * SHARDS_IN_FLIGHT:
            _send(actor, waiting, under_way)
        while under_way:
            done, _ = ray.wait(list(under_way), num_returns=1)
            actor = under_way.pop(done[0])
            _send(actor, waiting, under_way)
            yield _result(done[0])
    finally:
        for actor in actors:
            ray.kill(actor)


def _send(actor: Any, waiting: list[Sequence[Question]], under_way: dict[Any, Any]) -> None:
    if waiting:
        under_way[actor.answer.remote(waiting.pop())] = actor


def _result(reference: Any) -> list[Answer]:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ITuneError):
            raise error.cause from None  # the user's error, without the layers of Ray around it
        raise
