"""[Ray] Eval actors: each takes shards of questions, asks the pools through its clients and grades the replies."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import RayTaskError

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


def started_actors(kind: type, workers: EvalWorkers, concurrency: int, *arguments: Any) -> list[Any]:
    """Handles of `workers.num` actors of a class; one that died is started again with the same arguments.

    Args:
        concurrency: Calls one actor works on at the same time.
    """
    factory: Any = ray.remote(kind)
    factory = factory.options(
        num_cpus=workers.cpus_each,
        num_gpus=workers.gpus_each,
        resources=workers.resources_each,
        max_restarts=3,
        max_task_retries=-1,  # the restarts are the bound: while a lost node is not known lost, calls fail at once
        max_concurrency=concurrency,
    )
    return [factory.remote(*arguments) for _ in range(workers.num)]


class EvalActors:
    """The eval actors of one stage; use as a context manager.

    A dead actor is started again and asks its shards anew; request ids name the work, so an engine that still works
    on it does not do it twice.
    """

    def __init__(self, arguments: AskerArguments, workers: EvalWorkers):
        self._actors = started_actors(EvalActor, workers, SHARDS_IN_FLIGHT, arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def stream(self, shards: Sequence[Sequence[Question]]) -> Iterator[list[Answer]]:
        """Answers shard by shard as they come; at most `SHARDS_IN_FLIGHT` shards per actor are under way."""
        waiting = iter(shards)
        under_way: dict[Any, Any] = {}
        for actor, shard in zip(self._actors * SHARDS_IN_FLIGHT, waiting, strict=False):
            under_way[actor.answer.remote(shard)] = actor
        while under_way:
            done, _ = ray.wait(list(under_way), num_returns=1)
            actor = under_way.pop(done[0])
            for shard in itertools.islice(waiting, 1):
                under_way[actor.answer.remote(shard)] = actor
            yield _result(done[0])


def _result(reference: Any) -> list[Answer]:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, ITuneError):
            raise error.cause from None  # the user's error, without the layers of Ray around it
        raise
