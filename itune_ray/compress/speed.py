"""Tokens per second of two models over the same prompts, taking turns, so that a busy machine slows both alike."""

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Request, Sampling


class Client(Protocol):
    """What answers: a pool's client."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...


def compare_speed(clients: Mapping[str, Client], records: Sequence[Record], tokens: int, rounds: int) -> dict[str, Any]:
    """Median generated tokens per second by name, after one round that is not counted.

    Every answer has the full length: where a damaged model answers at greater length, the tail of a few long answers
    would otherwise make it look slow.

    Args:
        clients: Name -> client, e.g. before and after.
        records: Rows whose prompts are answered greedily.
        tokens: Length of each answer.
        rounds: Rounds that count.
    """
    rates: dict[str, list[float]] = {name: [] for name in clients}
    for turn in range(rounds + 1):
        for name, client in clients.items():
            rate = asyncio.run(_rate(client, records, tokens, f"compress.speed/{name}/{turn}"))
            if turn:
                rates[name].append(rate)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {**medians, "prompts": len(records), "tokens": tokens, "rounds": rounds}


async def _rate(client: Client, records: Sequence[Record], tokens: int, stage: str) -> float:
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_end=True)
    requests = [Request(id=f"{stage}/{r.key}", sampling=sampling, messages=tuple(r.prompt)) for r in records]
    started = time.perf_counter()
    completions = await client.generate(requests)
    generated = sum(len(sample.token_ids) for completion in completions for sample in completion.samples)
    return generated / (time.perf_counter() - started)
