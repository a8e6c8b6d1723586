"""Magpie: a tuned model that is given nothing but the opening of a user's turn writes an instruction (Xu et al. 2024,
arXiv 2406.08464)."""

import dataclasses
from collections.abc import Mapping

from itune_ray.config.recipes import MagpieConfig
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Sample
from itune_ray.engine.llm import sampling_of
from itune_ray.generate.recipes.base import refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError, together
from itune_ray.model.render import model_renderer


class Magpie(Chain):
    """x ~ M(. | opening of a user's turn), y ~ M(. | x): 1 call per input for its x, and 1 for each answer.

    A model that was never tuned on chats writes anything there; one whose template puts a system message of its own
    first is steered by that.
    """

    name = "magpie"
    prompts: Mapping[str, str] = {}

    def __init__(self, config: MagpieConfig):
        self._config = config
        self.rows_per_input = self.most_rows = config.samples

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """One outcome per instruction drawn."""
        system = tuple(m for m in row.messages[:1] if m["role"] == "system")
        calls.draft = dataclasses.replace(calls.draft, messages=system)
        try:
            opening = model_renderer(calls.llm.ref).user_opening_ids(system)
        except UnusableRow as error:
            return refused(calls.draft, row, error.reason, self.most_rows, raw=str(error))
        asked = await calls.llm.complete(opening, key=f"{row.key}/instruction", n=self._config.samples)
        samples = calls.counted(asked).samples
        return await together([self._outcome(sample, index, system, calls) for index, sample in enumerate(samples)])

    async def _outcome(self, sample: Sample, index: int, system: tuple[Message, ...], calls: Calls) -> Outcome:
        text = sample.text.strip()
        chat = (*system, {"role": "user", "content": text})
        reason = self._refusal(sample, text)
        if reason is not None:
            return calls.rejected(reason, index, raw=sample.text)
        try:
            answer = await calls.ask(f"answer/{index}", chat, sampling=sampling_of(self._config.answer))
        except EndedError as end:
            return calls.ended(end, index)
        turns = (*chat, {"role": "assistant", "content": answer})
        return calls.accepted(index, messages=turns, finish_reason="stop")

    def _refusal(self, sample: Sample, text: str) -> str | None:
        words = len(text.split())
        checks = {
            "truncated": sample.finish_reason == "length",
            "empty": not words,
            "too_short": words < self._config.min_words,
            "too_long": words > self._config.max_words,
        }
        return next((reason for reason, failed in checks.items() if failed), None)
