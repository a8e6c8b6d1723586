"""Rows concatenated under rule-made meta-instructions, without a model (Mosaic-IT, Li et al. 2024, methods D21)."""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from itune_ray.config.recipes import MosaicConfig
from itune_ray.config.shared import FakeEngineConfig, ServedModel
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record, row_seed
from itune_ray.engine.base import Llm
from itune_ray.generate.mosaic import Mosaic as Composed
from itune_ray.generate.mosaic import Pair, group_size, grouped
from itune_ray.generate.recipes.base import numbered, refused
from itune_ray.generate.whole import Inputs, Made
from itune_ray.model.render import model_renderer

SOURCE = "mosaic"
"""First part of the keys of composed rows; the second counts them over all epochs."""
STAGE = "generate.mosaic"
CountTokens = Callable[[str], int]


class Mosaic:
    """Per epoch the rows are shuffled, cut into blocks, and each block is grouped from its start.

    Groups never cross blocks, so blocks are independent of each other; every usable row is used exactly once per epoch,
    in a group or, where it does not fit `max_tokens` by itself, rejected as `too_long`. A row that is not one user turn
    with its answer is rejected once, as `not_single_turn`.
    """

    version = 2
    requires: tuple[str, ...] = ("messages",)
    provides: tuple[str, ...] = ("messages", "parents", "seed")
    rows_per_input = None
    prompts: Mapping[str, str] = {}

    def __init__(self, config: MosaicConfig):
        self._config = config

    async def __call__(self, row: Record, llm: Llm) -> list[Outcome]:
        """The one row as a mosaic of itself, words counted as tokens."""
        outcomes = self.across([row], llm.seed(row.key), lambda text: len(text.split()))
        return [
            dataclasses.replace(outcome, input_key=row.key, record=_of(row, outcome.record, index, len(outcomes)))
            for index, outcome in enumerate(outcomes)
        ]

    def make_all(self, inputs: Inputs) -> Made:
        """All rows, a pure function of them, so nothing is committed on the way; no engine is asked."""
        outcomes = self.across(inputs.rows, inputs.job.seed, token_counter(inputs.job.teacher))
        return Made(outcomes, len(inputs.rows))

    def across(self, rows: Sequence[Record], seed: int, count: CountTokens) -> list[Outcome]:
        """The outcomes of all rows together, one per composed row and one per row that is none's part.

        Args:
            rows: All inputs, in any order.
            seed: The run's.
            count: Tokens of a text.
        """
        usable = [row for row in rows if _pair(row) is not None]
        ended: list[Outcome] = []
        for epoch in range(1, self._config.epochs + 1):
            for block, members in enumerate(self._blocks(usable, seed, epoch)):
                ended += self._composed(members, seed, epoch, block, count)
        return [refused(row, row, "not_single_turn")[0] for row in rows if _pair(row) is None] + [
            _placed(outcome, position) for position, outcome in enumerate(ended)
        ]

    def _blocks(self, rows: Sequence[Record], seed: int, epoch: int) -> Iterator[Sequence[Record]]:
        shuffled = sorted(rows, key=lambda row: (_place(seed, epoch, row.key), row.key))
        for start in range(0, len(shuffled), self._config.block_rows):
            yield shuffled[start : start + self._config.block_rows]

    def _composed(
        self, rows: Sequence[Record], seed: int, epoch: int, block: int, count: CountTokens
    ) -> Iterator[Outcome]:
        config, block_seed = self._config, row_seed(seed, STAGE, str(block), epoch)
        groups = grouped(
            [_pair(row) or Pair("", "") for row in rows],
            random.Random(block_seed),
            size=lambda rng: group_size(config.grouping, config.max_rows, rng),
            strategies=config.strategies,
            fits=lambda mosaic: count(f"{mosaic.instruction}\n{mosaic.response}") < config.max_tokens,
        )
        for start, stop, mosaic in groups:
            yield _outcome(rows[start:stop], mosaic, epoch, block_seed)


def token_counter(teacher: ServedModel | None) -> CountTokens:
    """Tokens of a text by the teacher's tokenizer, begin and end tokens among them; the fake engine's are words."""
    assert teacher is not None
    if isinstance(teacher.engine, FakeEngineConfig):
        return lambda text: len(text.split())
    renderer = model_renderer(teacher.model)
    return lambda text: len(renderer.text_ids(text).input_ids)


def _pair(row: Record) -> Pair | None:
    """The task and the answer of a row of one user turn and its answer, both of which say something."""
    if [message["role"] for message in row.messages] != ["user", "assistant"]:
        return None
    instruction, response = (message["content"].strip() for message in row.messages)
    return Pair(instruction, response) if instruction and response else None


def _place(seed: int, epoch: int, key: str) -> str:
    return hashlib.sha256(f"{seed}\x1f{epoch}\x1f{key}".encode()).hexdigest()


def _outcome(rows: Sequence[Record], mosaic: Composed | None, epoch: int, seed: int) -> Outcome:
    messages = rows[0].messages
    facts: dict[str, object] = {"count": len(rows), "epoch": epoch}
    if mosaic is not None:
        messages = (
            {"role": "user", "content": mosaic.instruction},
            {"role": "assistant", "content": mosaic.response},
        )
        facts = {**facts, "rule": mosaic.rule, "answered": [i + 1 for i in mosaic.kept]}
    record = Record(
        source=SOURCE,
        position=0,
        messages=messages,
        meta={"mosaic": facts},
        parents=tuple(row.key for row in rows),
        recipe="mosaic",
        round=max(row.round for row in rows) + 1,
        seed=seed,
    )
    status, reason = ("rejected", "too_long") if mosaic is None else ("accepted", None)
    return Outcome(record=record, input_key=record.key, status=status, reason=reason)


def _placed(outcome: Outcome, position: int) -> Outcome:
    record = dataclasses.replace(outcome.record, position=position)
    return dataclasses.replace(outcome, record=record, input_key=record.key)


def _of(row: Record, composed: Record, index: int, count: int) -> Record:
    return numbered(dataclasses.replace(composed, source=row.source, position=row.position), row, index, count)
