"""What a teacher would have said at each token of a given answer: the rows of knowledge distillation (survey eq. 3)."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from itune_ray.config.recipes import TeacherTopkConfig
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record, TopK
from itune_ray.engine.base import Llm
from itune_ray.generate.recipes.base import from_error, refused
from itune_ray.model.render import model_renderer

LOWEST = -1e4
"""Stands for probabilities that float16 logarithms cannot hold."""


class TeacherTopk:
    """The row as it is, with the teacher's k likeliest tokens at every supervised position as `teacher` (methods D05).

    The chat is rendered by the teacher's template and scored, not generated. The given token is kept only where it is
    among the k. Logarithms are stored as float16, whose error is at most 2^-11 of their size.
    """

    version = 1
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "teacher")
    rows_per_input = 1
    prompts: Mapping[str, str] = {}

    def __init__(self, config: TeacherTopkConfig):
        self._config = config

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """The row with its distributions."""
        draft = dataclasses.replace(row, parents=(row.key,), meta={**row.meta, "teacher": llm.model}, teacher=None)
        renderer = model_renderer(llm.ref)
        try:
            ids, supervised = renderer.record_ids(row, "assistant")
        except UnusableRow as error:
            return refused(draft, row, error.reason, raw=str(error))
        completion = await llm.score(ids, key=row.key, top=self._config.k)
        if completion.error is not None:
            return from_error(draft, row, completion)
        positions = tuple(i for i, flag in enumerate(supervised) if flag and i > 0)
        entries = completion.prompt_logprobs or ()
        top, log_probs = likeliest([entries[i] or {} for i in positions], self._config.k)
        teacher = TopK(
            input_ids=tuple(ids),
            positions=positions,
            k=self._config.k,
            ids=top.astype("<i4").tobytes(),
            log_probs=log_probs.astype("<f2").tobytes(),
            tokenizer=renderer.vocabulary_hash,
        )
        record = dataclasses.replace(draft, teacher=teacher, num_prompt_tokens=len(ids))
        return [
            Outcome(record=record, input_key=row.key, status="accepted", score=float(np.exp(log_probs).sum(1).mean()))
        ]


def likeliest(entries: Sequence[Mapping[int, float]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and natural logarithms [M, k], likeliest first; of equals the smaller id.

    Raises:
        ValueError: An entry holds fewer than k tokens.
    """
    rows = [sorted(entry.items(), key=lambda item: (-item[1], item[0]))[:k] for entry in entries]
    if any(len(row) < k for row in rows):
        raise ValueError(f"the engine gave {min(map(len, rows))} tokens per position, not {k}")
    table = np.array(rows, dtype=np.float64).reshape(len(rows), k, 2)
    return table[..., 0].astype(np.int64), np.maximum(table[..., 1], LOWEST)
