"""An engine without a model, for unit tests: a pure function of (prompt, sample index, seed), with fault injection."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from functools import lru_cache

from itune_ray.config.shared import FakeEngineConfig, ModelRef
from itune_ray.engine.base import Completion, FinishReason, Request, Sample

CONTEXT = 512
"""Words of prompt plus answer that the fake model can hold."""

REFUSAL = "I'm sorry, but I can't help with that."


class FakeEngine:
    """Answers by hashing; words are its tokens. Greedy sampling ignores the seed, an adapter changes every answer."""

    def __init__(
        self,
        config: FakeEngineConfig | None = None,
        model: ModelRef | None = None,
        threads: int = 1,
        can_sleep: bool = False,
    ):
        self._config = config or FakeEngineConfig()
        time.sleep(self._config.load_s)
        self._failed_once: set[str] = set()
        self._embedded = 0
        self.name = f"{model.path if model else 'fake'}@fake"

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request, in order; the slowest takes 1.5 times the configured latency."""
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Eight hashed numbers per text; all of them together take the configured latency."""
        await asyncio.sleep(self._config.latency_s)
        self._embedded += sum(len(text.split()) for text in texts)
        return [[_draw(text, dimension) for dimension in range(8)] for text in texts]

    def take_embedded(self) -> int:
        """Words embedded since this was asked last."""
        taken, self._embedded = self._embedded, 0
        return taken

    def status(self) -> str:
        """What it is doing, for the message of a deadline."""
        return "fake engine, alive"

    async def sleep(self) -> bool:
        """There is nothing to give up."""
        return True

    async def wake(self) -> None:
        """There is nothing to bring back."""

    def close(self) -> None:
        """Nothing is held."""

    async def _complete(self, request: Request) -> Completion:
        prompt = _prompt(request)
        if self._config.latency_s:
            await asyncio.sleep(self._config.latency_s * (0.5 + _draw("latency", prompt)))
        error, retryable = self._fault(request, prompt)
        if error is not None:
            return Completion(id=request.id, error=error, retryable=retryable)
        words = prompt.split()
        return Completion(
            id=request.id,
            samples=tuple(self._sample(request, prompt, index) for index in range(request.sampling.n)),
            prompt_token_ids=tuple(_token(word) for word in words),
            prompt_logprobs=None
            if request.sampling.prompt_logprobs is None
            else _prompt_logprobs(words, request.sampling.prompt_logprobs),
        )

    def _fault(self, request: Request, prompt: str) -> tuple[str | None, bool]:
        if request.sampling.json_schema is not None or request.sampling.regex is not None:
            return "unsupported: the fake engine has no structured output but `choice`", False
        if (length := len(prompt.split())) >= CONTEXT:
            return f"prompt_too_long: {length} tokens, max_model_len {CONTEXT}", False
        if _chance(self._config.fail_rate, "fail", prompt):
            return "injected failure", True
        if _chance(self._config.flaky_rate, "flaky", prompt) and request.id not in self._failed_once:
            self._failed_once.add(request.id)
            return "injected failure of the first attempt", True
        return None, False

    def _sample(self, request: Request, prompt: str, index: int) -> Sample:
        sampling = request.sampling
        seed = None if sampling.temperature == 0 else (sampling.seed or 0) + index
        words = self._words(prompt, seed, request.adapter)
        if sampling.choice:
            words = sampling.choice[_hash(prompt, seed, request.adapter) % len(sampling.choice)].split()
        cut = min(sampling.max_tokens, CONTEXT - len(prompt.split()))
        if _chance(self._config.truncate_rate, "truncate", prompt, index):
            cut = min(cut, max(1, len(words) // 2))
        finish: FinishReason = "length" if len(words) > cut else "stop"
        kept = words[:cut]
        ids = tuple(_token(word) for word in kept)
        return Sample(
            text=" ".join(kept),
            token_ids=ids,
            finish_reason=finish,
            logprobs=None
            if sampling.logprobs is None and not sampling.logprob_token_ids
            else tuple({t: -_draw("logprob", t) for t in (i, *sampling.logprob_token_ids)} for i in ids),
        )

    def _words(self, prompt: str, seed: int | None, adapter: str | None) -> list[str]:
        if _chance(self._config.empty_rate, "empty", prompt, seed):
            return []
        if _chance(self._config.refuse_rate, "refuse", prompt, seed):
            return list(REFUSAL.split())
        reply = f"{_hash(prompt, seed, adapter):016x} answers: {prompt.split(':', 1)[-1].strip()[:200]}"
        return list(reply.split())


def _prompt(request: Request) -> str:
    if request.messages is not None:
        return " ".join(f"{m['role']}: {m['content']}" for m in request.messages)
    return request.text if request.text is not None else " ".join(map(str, request.token_ids or ()))


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def _draw(*parts: object) -> float:
    """A number in [0, 1), the same for the same parts."""
    return _hash(*parts) / 2**64


def _chance(rate: float, *parts: object) -> bool:
    """True for that share of all parts, always for the same ones."""
    return rate > 0 and _draw(*parts) < rate


@lru_cache(maxsize=4096)
def _token(word: str) -> int:
    return _hash("token", word) % 32_000


def _prompt_logprobs(words: Sequence[str], top: int) -> tuple[dict[int, float] | None, ...]:
    """The given token's, and those of `top` likelier ones."""
    tokens = [_token(word) for word in words]
    likelier = {32_000 + rank: -1.0 - rank for rank in range(top)}
    return (None, *({**likelier, token: -_draw("logprob", token) - top} for token in tokens[1:]))
