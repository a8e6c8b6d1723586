"""[Ray] The eval actors of a sweep: they hold the questions and the engines' clients from the first trial to the last.

A trial asks one of them, naming its adapter; the engine loads the adapter beside those of other trials. Answers and
scores of every rung are written before the score is returned.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import pyarrow as pa
import ray

from itune_ray.benchmarks import benchmarks
from itune_ray.benchmarks.base import Benchmark, Item
from itune_ray.config.evaluate import EvalWorkers
from itune_ray.config.shared import ModelRef
from itune_ray.config.sweep import TrialEvaluation
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.ledger import LEDGER_SCHEMA, Outcome
from itune_ray.data.storage import Folder
from itune_ray.evaluate.actor import started_actors
from itune_ray.evaluate.answers import MAX_ATTEMPTS, answers_table, check_answered, outcome_of
from itune_ray.evaluate.ask import Asked, Asker, Client, Question, model_renderer
from itune_ray.evaluate.score import score_benchmark

TRIALS_AT_ONCE = 64
"""Trials one actor serves at the same time: it mostly waits for engines."""


@dataclass(frozen=True)
class Scoring:
    """What is to be scored."""

    trial: str
    shape: str
    base: ModelRef
    evaluate: TrialEvaluation
    folder: str
    """Where answers.parquet and scores.json of this trial at this rung go."""


class Scorer:
    """Scores adapters.

    Args:
        clients: Shape -> client of its pool.
        evaluate: Of the sweep: its benchmarks are asked of every trial.
        seed: Of the sweep.
    """

    def __init__(self, clients: Mapping[str, Client], evaluate: TrialEvaluation, seed: int):
        self._clients, self._seed = clients, seed
        self._measures = benchmarks(evaluate.benchmarks)
        self._items = {measure.name: list(measure.items()) for measure in self._measures}

    async def score(self, asked: Scoring, adapter: str) -> dict[str, Any]:
        """Scores of an adapter, as evaluate's scores.json has them for one model."""
        ref = asked.base.model_copy(update={"adapter": adapter})
        asker = Asker(
            {asked.trial: Asked(self._clients[asked.shape], ref)},
            {measure.name: measure for measure in self._measures},
            asked.evaluate.sampling,
            self._seed,
            _renderer,
        )
        outcomes = await asyncio.gather(*(self._outcomes(asker, asked.trial, m.name) for m in self._measures))
        table = answers_table(_ledger_rows([outcome for part in outcomes for outcome in part]))
        scores = self._scores(table.to_pylist(), asked)
        folder = Folder.at(asked.folder)
        folder.write_table("answers.parquet", table)
        folder.write_json("scores.json", scores)
        return scores

    async def _outcomes(self, asker: Asker, trial: str, benchmark: str) -> list[Outcome]:
        """How every question of a benchmark ended; what another attempt may mend is asked again."""
        todo = [
            Question(model=trial, benchmark=benchmark, position=position, item=item)
            for position, item in enumerate(self._items[benchmark])
        ]
        ended: dict[int, Outcome] = {}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            answers = await asker.answer(todo) if todo else []
            ended |= {a.question.position: outcome_of(a, attempt) for a in answers}
            todo = [a.question for a in answers if a.grade is None and a.retryable]
        return list(ended.values())

    def _scores(self, rows: Sequence[Mapping[str, Any]], asked: Scoring) -> dict[str, Any]:
        scores: dict[str, Any] = {}
        for measure in self._measures:
            answered = [row for row in rows if row["benchmark"] == measure.name]
            check_answered(asked.trial, measure.name, answered)
            scores |= self._scored(measure, self._items[measure.name], answered, asked)
        return scores

    def _scored(
        self, measure: Benchmark, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], asked: Scoring
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {"job_seed": self._seed}
        if not measure.wants_texts:
            settings["sampling"] = asked.evaluate.sampling.model_dump(mode="json")
        return score_benchmark(measure, items, rows, asked.evaluate.bootstrap, self._seed, settings)


class Scorers:
    """The eval actors of one sweep, owned by its driver; use as a context manager."""

    def __init__(self, clients: Mapping[str, Client], evaluate: TrialEvaluation, seed: int, workers: EvalWorkers):
        self._arguments = (ray.put(clients), ray.put(evaluate))  # held here: an actor that died begins with them again
        self.handles = started_actors(Scorer, workers, TRIALS_AT_ONCE, *self._arguments, seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            ray.kill(handle)


def _ledger_rows(outcomes: Sequence[Outcome]) -> pa.Table:
    return pa.Table.from_pylist([outcome.to_row() for outcome in outcomes], schema=LEDGER_SCHEMA)


def _renderer(ref: ModelRef) -> ChatRenderer:
    """One renderer per base model: adapters bring no tokenizer of their own."""
    return _cached_renderer(ref.model_copy(update={"adapter": None}).model_dump_json())


@lru_cache(maxsize=16)
def _cached_renderer(ref_json: str) -> ChatRenderer:
    return model_renderer(ModelRef.model_validate_json(ref_json))
