"""Multiple choice by log-probabilities: how likely each option is right after a shared prompt.

Options of one token are read at the first generated position of a single request, which reads the prompt from the
engine's prefix cache. Longer ones are scored as part of the prompt, a request each, which fills the cache anew.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from itune_ray.engine.base import Completion, Llm, Sampling

MOST_LISTED = 128
"""Tokens whose log-probabilities vLLM gives at one position."""


@dataclass(frozen=True)
class Choice:
    """log P(option | prompt) per option, natural logarithms at T = 1; NaN where the engine gives none."""

    log_probs: tuple[float, ...]
    completions: tuple[Completion, ...]
    """What was asked for it, to count tokens and to find errors."""


async def choose(llm: Llm, prompt: Sequence[int], options: Sequence[Sequence[int]], *, key: str) -> Choice:
    """Log-probabilities of options after a prompt, each the sum over its tokens.

    Args:
        llm: The model.
        prompt: The prompt's tokens, rendered.
        options: The tokens of each option.
        key: Names the call within the job.

    Raises:
        ValueError: An option has no token.
    """
    if not all(options):
        raise ValueError("an option has no token")
    short = list(dict.fromkeys(option[0] for option in options if len(option) == 1))
    parts = [short[start : start + MOST_LISTED] for start in range(0, len(short), MOST_LISTED)]
    long = [index for index, option in enumerate(options) if len(option) > 1]
    listed, scored = await asyncio.gather(
        asyncio.gather(*(first_tokens(llm, prompt, part, key=f"{key}/first/{i}") for i, part in enumerate(parts))),
        asyncio.gather(*(continued(llm, prompt, options[i], key=f"{key}/{i}") for i in long)),
    )
    known = {token: value for values, _ in listed for token, value in values.items()}
    sums = {index: value for index, (value, _) in zip(long, scored, strict=True)}
    values = (sums[i] if i in sums else known.get(option[0], math.nan) for i, option in enumerate(options))
    return Choice(tuple(values), tuple(completion for _, completion in (*listed, *scored)))


async def first_tokens(
    llm: Llm, prompt: Sequence[int], tokens: Sequence[int], *, key: str
) -> tuple[dict[int, float], Completion]:
    """log P(token | prompt) of given tokens, at most `MOST_LISTED`; the prompt is read from the prefix cache."""
    sampling = Sampling(temperature=0.0, max_tokens=1, logprob_token_ids=tuple(tokens))
    completion = await llm.complete(prompt, key=key, sampling=sampling)
    entries = completion.samples[0].logprobs if completion.samples else None
    return (entries[0] if entries else {}), completion


async def continued(llm: Llm, prompt: Sequence[int], option: Sequence[int], *, key: str) -> tuple[float, Completion]:
    """log P(option | prompt), the sum over its tokens; NaN where the engine gives no finite value for one."""
    completion = await llm.score([*prompt, *option], key=key, top=1)
    entries = (completion.prompt_logprobs or ())[-len(option) :]
    found = [(entry or {}).get(token) for entry, token in zip(entries, option, strict=False)]
    known = [value for value in found if value is not None and math.isfinite(value)]
    return (sum(known) if len(known) == len(option) else math.nan), completion
