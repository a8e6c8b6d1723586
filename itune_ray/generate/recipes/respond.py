"""Distillation: the teacher answers each prompt (survey eq. 2), n samples of each, all kept."""

import dataclasses
from collections.abc import Mapping

import jinja2

from itune_ray.config.recipes import RespondConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Completion, Llm, Sampling
from itune_ray.engine.templates import read_template, render
from itune_ray.generate.recipes.base import builtin_prompt, from_error, last_user_turn, numbered, refused


class Respond:
    """D = {(x, y) : y ~ M_teacher(. | x)}, x over the prompts (survey eq. 2).

    A row that has an answer already is asked anew: the teacher's replaces it. An answer cut at `max_tokens` is kept
    with finish_reason `length`, for curation to judge; an empty one is rejected.
    """

    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = (
        "messages",
        "model",
        "sampling",
        "seed",
        "finish_reason",
        "num_prompt_tokens",
        "num_tokens",
    )

    def __init__(self, config: RespondConfig):
        self._config = config
        own = config.template
        self._template = read_template(own, "recipe.template") if own else builtin_prompt("respond", "user.jinja")

    @property
    def rows_per_input(self) -> int:
        """One row per sample."""
        return self._config.samples

    @property
    def prompts(self) -> Mapping[str, str]:
        """The template of the last user turn."""
        return {"user": self._template}

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """Answers of the teacher to one prompt."""
        count = self._config.samples
        draft = dataclasses.replace(
            row,
            messages=row.prompt,
            parents=(row.key,),
            recipe="respond",
            model=llm.model,
            sampling=recorded(llm.sampling),
            seed=None,
            finish_reason=None,
            num_prompt_tokens=None,
            num_tokens=None,
        )
        asked = last_user_turn(row.prompt)
        if asked is None:
            return refused(draft, row, "no_prompt", count)
        try:
            draft = dataclasses.replace(draft, messages=self._messages(row, asked))
        except jinja2.UndefinedError as error:
            return refused(draft, row, "template_undefined", count, raw=str(error))
        completion = await llm.generate(draft.messages, key=row.key, n=count)
        if completion.error is not None:
            return from_error(draft, row, completion, count)
        return [self._outcome(draft, row, completion, index, llm.seed(row.key)) for index in range(count)]

    def _messages(self, row: Record, asked: str) -> tuple[Message, ...]:
        """The chat as it is sent: the system message first where the row has none, the last turn by the template."""
        turn = {"role": "user", "content": render(self._template, prompt=asked, meta=row.meta)}
        chat = (*row.prompt[:-1], turn)
        if self._config.system is None or chat[0]["role"] == "system":
            return chat
        return ({"role": "system", "content": self._config.system}, *chat)

    def _outcome(self, draft: Record, row: Record, completion: Completion, index: int, seed: int) -> Outcome:
        sample = completion.samples[index]
        record = dataclasses.replace(
            numbered(draft, row, index, self._config.samples),
            messages=(*draft.messages, {"role": "assistant", "content": sample.text}),
            seed=seed + index,
            finish_reason=sample.finish_reason,
            num_prompt_tokens=len(completion.prompt_token_ids),
            num_tokens=len(sample.token_ids),
        )
        if not sample.text.strip():
            return Outcome(record=record, input_key=row.key, status="rejected", reason="empty")
        return Outcome(record=record, input_key=row.key, status="accepted")


def recorded(sampling: Sampling) -> dict[str, object]:
    """The part of a sampling that a row remembers."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop),
    }
