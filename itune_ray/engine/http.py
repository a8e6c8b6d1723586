"""An OpenAI-compatible endpoint behind the engine contract: rate limits kept, retries paced, errors never answers.

The openai package sends again what may succeed later, with growing pauses or as long as the endpoint asks for.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from itune_ray.config.shared import HttpEngineConfig, ModelRef
from itune_ray.engine.backends import one_line
from itune_ray.engine.base import UNKNOWN_TOKEN, Completion, FinishReason, Request, Sample, Sampling
from itune_ray.errors import ModelError

if TYPE_CHECKING:
    from openai import APIStatusError

FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
REFUSED = frozenset({401, 403, 404})
"""Answers to the whole job, not to one request: a wrong key, a forbidden or an unknown model."""
CHARACTERS_PER_TOKEN = 4
"""Guess of a prompt's tokens before the endpoint has counted them."""


class HttpEngine:
    """Sends chats to one model of an endpoint.

    Seeds are sent along, but whether equal seeds give equal answers is up to the endpoint. Token ids are not known:
    samples have `UNKNOWN_TOKEN` for each token that the endpoint counted.

    Args:
        config: Endpoint, key and limits.
        model: `path` is the model's name there.

    Raises:
        ModelError: The key's variable is not set.
    """

    def __init__(self, config: HttpEngineConfig, model: ModelRef, threads: int = 1, can_sleep: bool = False):
        from openai import AsyncOpenAI

        self._config, self._model = config, model.path
        self.name = f"{model.path}@{config.url}"
        self._client = AsyncOpenAI(
            base_url=config.url,
            api_key=_key(config.api_key_env),
            max_retries=config.max_retries,
            timeout=config.timeout_s,
        )
        self._requests = Pacer(config.requests_per_minute)
        self._tokens = Pacer(config.tokens_per_minute)
        self._running = 0
        self._embedded = 0

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request; same length and order.

        Raises:
            ModelError: The endpoint refuses the key or does not know the model.
        """
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text, by the endpoint's embeddings."""
        response = await self._client.embeddings.create(model=self._model, input=list(texts))
        usage: Any = getattr(response, "usage", None)  # some endpoints do not tell
        self._embedded += 0 if usage is None else usage.total_tokens
        return [list(item.embedding) for item in sorted(response.data, key=lambda item: item.index)]

    def take_embedded(self) -> int:
        """Tokens of the texts embedded since this was asked last, by the endpoint's count."""
        taken, self._embedded = self._embedded, 0
        return taken

    def status(self) -> str:
        """What it is doing, for the message of a deadline."""
        return f"{self._running} requests at {self._config.url}"

    async def sleep(self) -> bool:
        """There is nothing to give up."""
        return True

    async def wake(self) -> None:
        """There is nothing to bring back."""

    def close(self) -> None:
        """Connections end with the process."""

    async def _complete(self, request: Request) -> Completion:
        import openai

        reason = _unsupported(request)
        if reason is not None:
            return Completion(id=request.id, error=f"unsupported: {reason}")
        guess = _guess(request)
        await self._requests.take(1)
        await self._tokens.take(guess)
        self._running += 1
        try:
            answer = await self._client.chat.completions.create(**self._body(request))
        except openai.APIStatusError as error:
            return self._refusal(request, error)
        except openai.APIConnectionError as error:  # timeouts too
            what = one_line(error.__cause__ or error)
            return Completion(id=request.id, error=f"no answer from {self._config.url}; {what}", retryable=True)
        finally:
            self._running -= 1
        used = guess if answer.usage is None else answer.usage.total_tokens
        self._tokens.give_back(guess - used)
        return completion_of(request, answer)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model,
            "messages": list(request.messages or ()),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "n": sampling.n,
        }
        body |= {"seed": sampling.seed % 2**31} if sampling.seed is not None else {}
        body |= {"stop": list(sampling.stop)} if sampling.stop else {}
        if sampling.json_schema is not None:
            schema = {"name": "answer", "strict": True, "schema": json.loads(sampling.json_schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        extra = _of_vllm(sampling) | self._config.extra
        return body | ({"extra_body": extra} if extra else {})

    def _refusal(self, request: Request, error: "APIStatusError") -> Completion:
        """A status of 4xx or 5xx, after all retries."""
        status, words = error.status_code, one_line(error)
        if status in REFUSED:
            raise ModelError(
                f"the endpoint refuses with status {status}: {words}",
                got=f"{self._model} at {self._config.url}",
                knob="engine.url, engine.api_key_env or model.path",
            )
        retryable = status >= 500 or status in (408, 409, 429)
        return Completion(id=request.id, error=f"http_{status}: {words}", retryable=retryable)


class Pacer:
    """Lets amounts through at a rate per minute; None lets all through at once. A second's worth may go together.

    `give_back` returns what was taken too much, or takes what was taken too little.
    """

    def __init__(self, per_minute: int | None):
        self._per_second = None if per_minute is None else per_minute / 60
        self._free_at = 0.0

    async def take(self, amount: float) -> None:
        """Wait until the amount may go."""
        if self._per_second is None:
            return
        self._free_at = max(time.monotonic() - 1, self._free_at) + amount / self._per_second
        await asyncio.sleep(max(0.0, self._free_at - time.monotonic()))

    def give_back(self, amount: float) -> None:
        """Correct an earlier amount."""
        if self._per_second is not None:
            self._free_at -= amount / self._per_second


def completion_of(request: Request, answer: Any) -> Completion:
    """The contract's completion from the endpoint's; one that a content filter or a tool call ended is none."""
    odd = [choice for choice in answer.choices if choice.finish_reason not in FINISHED]
    if odd:
        return Completion(id=request.id, error=f"{odd[0].finish_reason}: the endpoint ended the answer so")
    if len(answer.choices) != request.sampling.n:
        what = f"the endpoint gave {len(answer.choices)} answers of {request.sampling.n}"
        return Completion(id=request.id, error=what, retryable=True)
    usage = answer.usage
    counts = _shared(usage.completion_tokens if usage else 0, len(answer.choices))
    return Completion(
        id=request.id,
        samples=tuple(
            Sample(
                text=choice.message.content or "",
                token_ids=(UNKNOWN_TOKEN,) * count,
                finish_reason=FINISHED[choice.finish_reason],
            )
            for choice, count in zip(sorted(answer.choices, key=lambda choice: choice.index), counts, strict=True)
        ),
        prompt_token_ids=(UNKNOWN_TOKEN,) * (usage.prompt_tokens if usage else 0),
    )


def _shared(total: int, parts: int) -> list[int]:
    """A total in parts that differ by one at most: endpoints count the tokens of all samples together."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _unsupported(request: Request) -> str | None:
    """What an endpoint cannot do."""
    sampling = request.sampling
    asked = {
        "an adapter on an http endpoint": request.adapter is not None,
        "a prompt of tokens or plain text on an http endpoint": request.messages is None,
        "log-probabilities by token id on an http endpoint": sampling.logprobs is not None
        or bool(sampling.logprob_token_ids),
        "prompt log-probabilities on an http endpoint": sampling.prompt_logprobs is not None,
        "ignore_end on an http endpoint": sampling.ignore_end,
    }
    return next((what for what, wanted in asked.items() if wanted), None)


def _of_vllm(sampling: Sampling) -> dict[str, Any]:
    """Fields that vLLM's server knows beyond OpenAI's."""
    fields: dict[str, Any] = {} if sampling.top_k == -1 else {"top_k": sampling.top_k}
    if sampling.choice:
        fields["structured_outputs"] = {"choice": list(sampling.choice)}
    if sampling.regex is not None:
        fields["structured_outputs"] = {"regex": sampling.regex}
    return fields


def _guess(request: Request) -> int:
    """Tokens of prompt and answers at most, as far as one can tell."""
    characters = sum(len(message["content"]) for message in request.messages or ())
    return characters // CHARACTERS_PER_TOKEN + request.sampling.max_tokens * request.sampling.n


def _key(variable: str | None) -> str:
    if variable is None:
        return "none"
    key = os.environ.get(variable)
    if not key:
        raise ModelError(
            "the endpoint's key is not set where the engine runs", got=f"${variable}", knob="engine.api_key_env"
        )
    return key
