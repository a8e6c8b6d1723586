"""Selective Reflection-Tuning: a teacher reflects on a row, and the student's difficulty decides what of it is taken
(Li et al. 2024, arXiv 2402.10110; methods D12)."""

import math
from collections.abc import Sequence
from typing import Any

from itune_ray.config.base import digest
from itune_ray.config.recipes import SelectiveReflectionConfig
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.difficulty import chat_loss
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError, together
from itune_ray.generate.recipes.reflection import better_answer, new_pair, reviewed, written
from itune_ray.generate.selective_reflection import Difficulty, Version, select_version
from itune_ray.model.render import model_renderer

Pair = tuple[str, str]
"""Instruction and answer."""


class SelectiveReflection(Chain):
    """(x, y) -> the one of its four versions that the student takes, if any.

    The teacher writes (x*, y_x*), then y* to x and y** to x* (as recipe `reflection` does). The student scores each
    version: IFD(x, y) = PPL(y | x) / PPL(y), and reversed IFD(x, y) = PPL(x | guess prompt of y) / PPL(x), by
    log-probabilities of the prompt. `itune_ray.generate.selective_reflection.select_version` decides.

    A row without all four versions ends as `not_reflected`, one with a ratio that cannot be told as `not_scored`, one
    that the rule leaves out as `not_selected`, the last two with what was scored in their meta.
    """

    name = "selective_reflection"
    provides = ("messages", "num_prompt_tokens", "num_tokens")

    def __init__(self, config: SelectiveReflectionConfig):
        self._config = config
        reviews = {name: builtin_prompt("reflection", f"{name}.jinja") for name in ("instruction", "answer", "system")}
        self.prompts = {**reviews, "guess": builtin_prompt(self.name, "guess.jinja")}

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The version taken, or why none is."""
        instruction, answer = last_user_turn(row.prompt), row.response
        if instruction is None or answer is None or not answer.strip():
            return refused(calls.draft, row, "no_prompt" if instruction is None else "no_answer")
        versions = await self._versions((instruction, answer), calls)
        asked = [self._difficulty(name, pair, row, calls) for name, pair in versions.items()]
        try:
            scores = dict(zip(versions, await together(asked), strict=True))
        except UnusableRow as error:
            raise EndedError(error.reason, raw=str(error)) from None
        ratios = {name: [_known(score.ifd), _known(score.reversed_ifd)] for name, score in scores.items()}
        facts: dict[str, Any] = {"ratios": ratios, "student": calls.model("student").model}
        meta = {**row.meta, self.name: facts}
        if any(None in pair for pair in ratios.values()):
            return [calls.rejected("not_scored", meta=meta)]
        taken = select_version(scores, self._config.mode)
        if taken is None:
            return [calls.rejected("not_selected", meta=meta)]
        facts["version"] = taken
        made: dict[str, Any] = written(row) if taken == "ori" else {"finish_reason": "stop"}
        return [calls.accepted(score=scores[taken].ifd, messages=_chat(row, versions[taken]), meta=meta, **made)]

    async def _versions(self, pair: Pair, calls: Calls) -> dict[Version, Pair]:
        """The row's four versions; raises `EndedError` where the teacher gives no readable review."""

        async def review(key: str, name: str, of: Pair, parse: Any) -> Any:
            found, reply = await reviewed(
                calls, key, self.prompts[name], self.prompts["system"], of, parse, sampling_of(self._config.retry)
            )
            if found is None:
                raise EndedError("not_reflected", raw=reply)
            return found

        new: Pair = await review("instruction", "instruction", pair, new_pair)
        better: Sequence[str] = await together(
            [review("answer", "answer", pair, better_answer), review("answer/new", "answer", new, better_answer)]
        )
        return {"ori": pair, "Q": new, "A": (pair[0], better[0]), "QA": (new[0], better[1])}

    async def _difficulty(self, name: Version, pair: Pair, row: Record, calls: Calls) -> Difficulty:
        instruction, answer = pair
        guess = render(self.prompts["guess"], answer=answer, fence=digest(answer, length=12)).strip()
        backwards = ({"role": "user", "content": guess}, {"role": "assistant", "content": instruction})
        ratios = [
            await self._ratio(_chat(row, pair), f"{name}/ifd", calls),
            await self._ratio(backwards, f"{name}/reversed", calls),
        ]
        return Difficulty(*ratios)

    async def _ratio(self, chat: Sequence[Message], key: str, calls: Calls) -> float:
        """PPL of the chat's last turn after the others over that of the turn alone; NaN where it cannot be told."""
        student = calls.model("student")
        scored = await chat_loss(student, model_renderer(student.ref), chat, key=f"{calls.row.key}/{key}")
        for completion in scored.completions:
            calls.counted(completion)
        return math.nan if scored.loss is None else scored.loss.perplexity_ratio


def _chat(row: Record, pair: Pair) -> tuple[Message, ...]:
    return (*row.prompt[:-1], {"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})


def _known(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None
