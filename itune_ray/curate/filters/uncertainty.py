"""Uncertainty: rows, or tasks, that a model is least sure of, to be labelled or trained on next (Active-IT, Kung et al.
2311.00288, methods D34)."""

import asyncio
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean
from typing import Any

from itune_ray.config.filters.models import UncertaintyConfig
from itune_ray.config.shared import ServedModel
from itune_ray.curate.filters.base import ModelFilter, Seen, Settled, Verdict, blank, unanswered
from itune_ray.curate.uncertainty import (
    disagreement,
    drop_words,
    least_confidence,
    margin_uncertainty,
    mean_entropy,
    most_uncertain,
    prompt_uncertainty,
    sequence_probability,
)
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Completion, Llm, Sample, Sampling
from itune_ray.engine.choice import continued
from itune_ray.model.render import model_renderer


class Uncertainty(ModelFilter):
    """Scores each prompt by how unsure the model is of its own answer, and keeps the most uncertain share.

    `prompt`: U = mean_k |P(y0 | x, prompt_k) - P(y0 | x, prompt_0)|, y0 being the greedy answer to the prompt as it is,
    prompt_k the last user turn with words dropped, and P = exp(mean log-probability of y0's tokens). `confidence`,
    `margin` and `entropy` are of the greedy answer's tokens; margin and entropy see the `top` likeliest of each.
    `disagreement` is the share of pairs of sampled answers that differ. P(y0 | x) is noted beside them all but the
    last: a task of low U and low P is hard, not ambiguous. With `by`, whole tasks are kept by the mean of their rows.
    """

    needs = frozenset({"prompt"})
    selection = ModelFilter.selection | {"share", "by"}

    def __init__(self, config: UncertaintyConfig):
        self.config: UncertaintyConfig = config

    @property
    def served(self) -> ServedModel:
        """The model whose uncertainty is measured."""
        return self.config.model

    def unfit(self, record: Record) -> str | None:
        prompt = record.prompt
        asks = prompt and prompt[-1]["role"] == "user" and prompt[-1]["content"].strip()
        return None if asks else "no_prompt"

    async def rate(self, record: Record, llm: Llm, attempt: int) -> Outcome:
        """U, and P(y0 | x) where it is known, as JSON in `raw`."""
        config, key = self.config, record.content_hash
        samples = config.samples if config.measure == "disagreement" else 1
        temperature = config.temperature if config.measure == "disagreement" else 0.0
        drawn = Sampling(temperature=temperature, max_tokens=config.max_tokens, logprobs=self._listed)
        answer = await llm.generate(record.prompt, key=f"{key}/answer", sampling=drawn, n=samples)
        asked = [answer]
        try:
            if answer.error is not None:
                raise _CallError(answer)
            probability, value = await self._measured(record.prompt, answer.samples, llm, key, asked)
        except _CallError as error:
            failed = error.completion
            return unanswered(record, failed.error or "no error given", failed.retryable, attempt)
        except UnusableRow as error:
            return self._ended(record, asked, error.reason, str(error))
        if math.isnan(value):
            return self._ended(record, asked, "no_log_probability" if answer.samples[0].text else "empty_answer")
        rated = blank(record, *_tokens(asked))
        said = json.dumps({"uncertainty": value, "probability": probability})
        return Outcome(record=rated, input_key=key, status="accepted", score=value, raw=said)

    @property
    def _listed(self) -> int | None:
        """Log-probabilities asked for beside the chosen token's."""
        return {"margin": self.config.top, "entropy": self.config.top, "confidence": 0}.get(self.config.measure)

    async def _measured(
        self, prompt: Sequence[Message], samples: Sequence[Sample], llm: Llm, key: str, asked: list[Completion]
    ) -> tuple[float | None, float]:
        """P(y0 | x), None where it is not asked for, and the uncertainty."""
        measure, (first, *_) = self.config.measure, samples
        if measure == "disagreement":
            return None, disagreement([" ".join(sample.text.split()) for sample in samples])
        if measure == "prompt":
            return await self._perturbed(prompt, first.token_ids, llm, key, asked)
        entries = first.logprobs or ()
        chosen = [entry.get(token, math.nan) for entry, token in zip(entries, first.token_ids, strict=False)]
        values = {
            "confidence": lambda: least_confidence(chosen),
            "margin": lambda: margin_uncertainty(entries),
            "entropy": lambda: mean_entropy(entries),
        }
        return sequence_probability(chosen), values[measure]()

    async def _perturbed(
        self, prompt: Sequence[Message], answer: Sequence[int], llm: Llm, key: str, asked: list[Completion]
    ) -> tuple[float, float]:
        """P of the answer under the prompt, and U over its perturbations."""
        if not answer:
            return math.nan, math.nan
        renderer = model_renderer(llm.ref)

        async def probability(messages: Sequence[Message], name: str) -> float:
            value, completion = await continued(llm, renderer.prompt_ids(messages), answer, key=f"{key}/{name}")
            asked.append(completion)
            if completion.error is not None:
                raise _CallError(completion)
            return math.exp(value / len(answer))

        prompts = [prompt, *(self._without_words(prompt, llm.seed(f"{key}/words/{k}")) for k in self._numbers)]
        found = await asyncio.gather(*(probability(changed, str(k)) for k, changed in enumerate(prompts)))
        return found[0], prompt_uncertainty(found[0], found[1:])

    @property
    def _numbers(self) -> range:
        return range(1, self.config.samples + 1)

    def _without_words(self, prompt: Sequence[Message], seed: int) -> list[Message]:
        last = {**prompt[-1], "content": drop_words(prompt[-1]["content"], self.config.drop, Random(seed))}
        return [*prompt[:-1], last]

    def _ended(self, record: Record, asked: Sequence[Completion], reason: str, raw: str | None = None) -> Outcome:
        rated = blank(record, *_tokens(asked))
        return Outcome(record=rated, input_key=record.content_hash, status="rejected", reason=reason, raw=raw)

    def verdict(self, rating: Outcome) -> Verdict:
        """Every row that was measured stays, until all are."""
        if rating.status == "failed":
            return Verdict(False, failure=rating.cause)
        if rating.status == "rejected":
            return Verdict(False, rating.reason)
        return Verdict(True, score=rating.score)

    def measures(self, rating: Outcome) -> Mapping[str, float]:
        """P(y0 | x)."""
        known = json.loads(rating.raw or "{}") if rating.status == "accepted" else {}
        return {} if known.get("probability") is None else {"probability": known["probability"]}

    def settle(self, seen: Seen) -> Settled:
        """The ⌈share · N⌉ rows of highest U, or the tasks of highest mean U; of equals the smaller name."""
        if self.config.share is None:
            return Settled()
        groups: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
        for record, kept, score in zip(seen.records, seen.kept, seen.scores, strict=True):
            if kept:
                groups[self._group(record)].append((record.key, score))
        means = {name: fmean(score for _, score in rows) for name, rows in groups.items()}
        chosen = set(most_uncertain(means, self.config.share))
        dropped = {key: "not_selected" for name, rows in groups.items() if name not in chosen for key, _ in rows}
        facts: dict[str, Any] = {"kept_mean": fmean(means[name] for name in chosen)} if chosen else {}
        if self.config.by is not None:
            facts["tasks"] = {name: round(means[name], 6) for name in sorted(means)}
        return Settled(dropped=dropped, facts=facts)

    def _group(self, record: Record) -> str:
        name = self.config.by
        return record.key if name is None else str(record.meta.get(name.removeprefix("meta."), "(none)"))


class _CallError(Exception):
    """A call of a row failed."""

    def __init__(self, completion: Completion):
        super().__init__(completion.error)
        self.completion = completion


def _tokens(asked: Sequence[Completion]) -> tuple[int, int]:
    """Tokens generated, and tokens of prompts."""
    generated = sum(len(sample.token_ids) for completion in asked for sample in completion.samples)
    return generated, sum(len(completion.prompt_token_ids) for completion in asked)
