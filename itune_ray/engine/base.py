"""The engine contract: requests in, completions out, one bad prompt never failing another.

An engine has two verbs, and a pool serves one of them: `generate` and `embed`. Engines render chats themselves, with
the project's one renderer, so a prompt reaches every engine as messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from itune_ray.config.shared import ModelRef
from itune_ray.data.records import Message
from itune_ray.errors import GenerationError

FinishReason = Literal["stop", "length", "error"]
UNKNOWN_TOKEN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling of one request."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 512
    ignore_end: bool = False
    """Write on past end-of-text up to `max_tokens`, so that every model does equal work (for measuring speeds)."""
    stop: tuple[str, ...] = ()
    n: int = 1
    """Samples of the same prompt; all are returned."""
    seed: int | None = None
    logprobs: int | None = None
    """Top log-probabilities per generated token; 0 gives the chosen token's only."""
    prompt_logprobs: int | None = None
    """The same per prompt token. Raw values at T = 1 whatever the temperature."""
    logprob_token_ids: tuple[int, ...] = ()
    """In place of `logprobs`: those of exactly these tokens and of the chosen one, per generated token; 128 at most."""
    choice: tuple[str, ...] = ()
    """The answer is one of these texts."""
    json_schema: str | None = None
    """The answer is JSON that fits this schema, itself JSON."""
    regex: str | None = None
    """The answer matches this expression whole. At most one of `choice`, `json_schema` and `regex` is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. Exactly one of `messages`, `text` and `token_ids` is given."""

    id: str
    """Idempotent: sent again after a replica's death, it names the same work."""
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    """A chat, rendered with a generation prompt; with a final assistant turn, rendered whole (for scoring)."""
    text: str | None = None
    """Text to continue, tokenised with BOS and no template."""
    token_ids: tuple[int, ...] | None = None
    adapter: str | None = None
    """Folder of an adapter to answer with; loaded on first use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One generated continuation."""

    text: str
    token_ids: tuple[int, ...]
    """One per token; `UNKNOWN_TOKEN` from an endpoint that counts tokens without naming them."""
    finish_reason: FinishReason
    logprobs: tuple[dict[int, float], ...] | None = None
    """Per generated token: token id -> log-probability (natural log), the chosen token always among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one request; `error` is set instead of samples when it failed."""

    id: str
    samples: tuple[Sample, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[dict[int, float] | None, ...] | None = None
    """Per prompt token: token id -> log-probability given the tokens before it; None at the first."""
    num_cached_tokens: int = 0
    """Prompt tokens that the engine found in its prefix cache."""
    error: str | None = None
    """Why it failed, in the engine's own words."""
    retryable: bool = False
    """Whether another attempt may mend it: a dead replica, not a prompt that is too long."""


class Engine(Protocol):
    """What every engine can do."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request; same length and order, errors as completions, never raised for one request."""
        ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text."""
        ...


class EngineDiedError(GenerationError):
    """The engine itself is gone, with all it was working on; the same requests may succeed on another."""


class PoolDownError(GenerationError):
    """No replica answers: they kept dying, could not be started, or took too long. Says nothing of what was asked."""


class Llm(Protocol):
    """What a recipe sees: chats in, completions out, for one model."""

    @property
    def model(self) -> str:
        """The model that answers, as `path@revision`."""
        ...

    @property
    def sampling(self) -> Sampling:
        """The job's sampling."""
        ...

    @property
    def ref(self) -> ModelRef:
        """The model itself, for callers that must render as it does."""
        ...

    def seed(self, key: str) -> int:
        """Seed of the call of that name; sample i of it draws from seed + i."""
        ...

    async def generate(
        self, messages: Sequence[Message], *, key: str, sampling: Sampling | None = None, n: int = 1
    ) -> Completion:
        """Complete one chat.

        Args:
            messages: The chat, ending in a user turn.
            key: Names the call within the job, e.g. the row key; decides the seed, so that a retry draws the same.
            sampling: Default: the job's.
            n: Samples to draw; overrides the sampling's.
        """
        ...

    async def complete(
        self, prompt: Sequence[int] | str, *, key: str, sampling: Sampling | None = None, n: int = 1
    ) -> Completion:
        """Go on from token ids, or from a text with BOS before it; no chat template.

        Args:
            prompt: What stands before the completion.
            key, sampling, n: As for `generate`.
        """
        ...

    async def score(self, token_ids: Sequence[int], *, key: str, top: int) -> Completion:
        """Log-probabilities of the given tokens, each under those before it.

        Args:
            token_ids: The prompt, rendered.
            key: Names the call within the job.
            top: Likeliest tokens listed at each position beside the given one.
        """
        ...
