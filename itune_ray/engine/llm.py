"""The `Llm` of recipes, judges and benchmarks: an engine with a model's name, a sampling and a seed.

The seed of a call is a pure function of (run seed, stage, key), so neither batching, worker count nor a retry changes
what is drawn.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from itune_ray.config.base import digest
from itune_ray.config.shared import ModelRef, SamplingConfig
from itune_ray.data.records import Message, row_seed
from itune_ray.engine.base import Completion, Engine, Request, Sampling
from itune_ray.errors import ConfigError


def sampling_of(config: SamplingConfig) -> Sampling:
    """The engine's sampling from the job's."""
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=config.max_tokens,
        stop=config.stop,
        choice=config.choice,
        json_schema=None if config.json_schema is None else json.dumps(config.json_schema, sort_keys=True),
        regex=config.regex,
    )


class EngineLlm:
    """One model behind an engine or a pool client.

    Args:
        engine: Anything with `generate(requests)`.
        model: The model's name in records, `path@revision`.
        sampling: Used where a call gives none.
        seed: The run's seed.
        stage: First part of every request id, and of the seeds.
        adapter: LoRA adapter folder to answer with.
        ref: The model, for callers that must render as it does.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        model: str,
        sampling: Sampling,
        seed: int = 0,
        stage: str = "",
        adapter: str | None = None,
        ref: ModelRef | None = None,
    ):
        self._engine, self._seed, self._stage, self._adapter = engine, seed, stage, adapter
        self._model, self._sampling, self._ref = model, sampling, ref

    @property
    def model(self) -> str:
        """The model that answers, as `path@revision`."""
        return self._model

    @property
    def sampling(self) -> Sampling:
        """The job's sampling."""
        return self._sampling

    @property
    def ref(self) -> ModelRef:
        """The model itself."""
        if self._ref is None:
            raise ConfigError("this model was given without its reference", got=self._model)
        return self._ref

    def seed(self, key: str) -> int:
        """63-bit seed of the call of that name."""
        return row_seed(self._seed, self._stage, key)

    async def generate(
        self, messages: Sequence[Message], *, key: str, sampling: Sampling | None = None, n: int = 1
    ) -> Completion:
        """Complete one chat; see `itune_ray.engine.base.Llm`."""
        request = Request(
            id="", sampling=self._drawn(sampling, key, n), messages=tuple(messages), adapter=self._adapter
        )
        return await self._ask(request, key)

    async def complete(
        self, prompt: Sequence[int] | str, *, key: str, sampling: Sampling | None = None, n: int = 1
    ) -> Completion:
        """Go on from token ids or a text; see `itune_ray.engine.base.Llm`."""
        given: dict[str, Any] = {"text": prompt} if isinstance(prompt, str) else {"token_ids": tuple(prompt)}
        request = Request(id="", sampling=self._drawn(sampling, key, n), adapter=self._adapter, **given)
        return await self._ask(request, key)

    async def score(self, token_ids: Sequence[int], *, key: str, top: int) -> Completion:
        """Log-probabilities of every prompt token; see `itune_ray.engine.base.Llm`."""
        sampling = Sampling(max_tokens=1, prompt_logprobs=top)
        request = Request(id="", sampling=sampling, token_ids=tuple(token_ids), adapter=self._adapter)
        return await self._ask(request, key)

    def _drawn(self, sampling: Sampling | None, key: str, n: int) -> Sampling:
        return dataclasses.replace(sampling or self._sampling, n=n, seed=self.seed(key))

    async def _ask(self, request: Request, key: str) -> Completion:
        (completion,) = await self._engine.generate([self._named(request, key)])
        return completion

    def _named(self, request: Request, key: str) -> Request:
        """The id holds a digest of the work, so that two calls that reuse a key by mistake never share an answer."""
        work = digest(
            [request.messages, request.text, request.token_ids, dataclasses.asdict(request.sampling), request.adapter]
        )
        return dataclasses.replace(request, id=f"{self._stage}/{key}/{work}")


class _NoEngine:
    """Stands where no model is asked."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        raise ConfigError("the recipe asks a model, and the job names none", knob="teacher")

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        raise ConfigError("the recipe asks a model, and the job names none", knob="teacher")


def no_llm(seed: int, stage: str) -> EngineLlm:
    """What a recipe that asks no model is given: it has seeds, and refuses every call."""
    return EngineLlm(_NoEngine(), model="none", sampling=Sampling(), seed=seed, stage=stage)
