"""[Ray] The curate stage: unite the inputs, filter them in order, and publish what became of every row."""

import functools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from itune_ray import cluster, room
from itune_ray.config.curate import CurateJob, HashedEmbedder
from itune_ray.curate.board import Board
from itune_ray.curate.embeddings import Vectors, hashed_vectors, model_vectors
from itune_ray.curate.filters.base import (
    AnyEmbedder,
    GroupFilter,
    ModelFilter,
    Reached,
    RowFilter,
    Seen,
    SetFilter,
    Settled,
)
from itune_ray.curate.judging import rate_all, ratings, unrated
from itune_ray.curate.mixing import check_mixing
from itune_ray.curate.publish import publish
from itune_ray.curate.references import read_reference
from itune_ray.curate.steps import Step, check_steps, make_steps, passes
from itune_ray.curate.vectors import VectorStore
from itune_ray.curate.verdicts import VERDICT_SCHEMA, Link, block_table, judge_block
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.dedup import TEXT_SCHEMA, Duplicates, slices
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.mixture import unite
from itune_ray.data.records import ROWS_AT_ONCE, UNSAFE, rows_of
from itune_ray.data.sources import read_source
from itune_ray.engine.host import EngineHost
from itune_ray.engine.llm import sampling_of
from itune_ray.errors import DataError, ITuneError
from itune_ray.observe.progress import Progress

ROWS_PER_BLOCK = 2048
"""A smaller block costs more in worker start-up than it saves: `blocks` is the most a table is cut into."""
SHUFFLE_ROWS = 2_000_000
"""Fewer rows are deduplicated on the driver, with the same result: exact and near deduplication of 52,000 Alpaca
prompts took 6 s there and 60 s through Ray Data's shuffle on the same two busy cores. Spreading pays with many."""
ROWS_IN_FLIGHT = 2**17
"""Rows that a pass of row filters has in the object store at a time."""


@dataclass
class Run:
    """What a running stage shares between its steps."""

    job: CurateJob
    board: Board
    runs: RunStore
    engines: EngineHost
    progress: Progress
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    steps: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def manifest(self) -> dict[str, Any]:
        """What the manifest says beside the counts."""
        facts: dict[str, Any] = {"filters": self.steps}
        q_manual = [step.pop("q_manual") for step in self.steps if "q_manual" in step]
        if q_manual:
            facts["q_manual"] = q_manual[0] if len(q_manual) == 1 else q_manual
        if self.generated_tokens:
            facts["tokens"] = {"prompt": self.prompt_tokens, "generated": self.generated_tokens}
        return facts


def run(job: CurateJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Curate rows; a complete artifact is returned at once, without Ray.

    Writes kept/, rejected/ and failed/ (Parquet in `LEDGER_SCHEMA` plus `input`, `duplicate_of`, `score_*`), and
    mix_report.json. The result depends neither on the order of the rows nor on the number of blocks.

    Raises:
        DataError: An input cannot be used, fewer than `min_rows` rows are kept, or a gate of a filter is missed.
    """
    steps = make_steps(job.filters)
    artifact = runs.artifact(stage, "curate", job, {"filters": [step.filter.identity() for step in steps]})
    if artifact.complete:
        return artifact
    tables = [read_source(part.source) for part in job.inputs]
    check_steps(steps, tables)
    check_mixing(job.mixing, [table.name for table in tables])
    for step in steps:
        step.filter.prepare()
    mixture = unite(job.inputs, tables)
    board = Board(mixture)
    if not job.keep_unsafe:
        _drop_unsafe(board)
    state = Run(job, board, runs, engines, progress)
    groups = list(passes(steps))
    engines.leave(job.workers.each)
    with progress.task(stage, mixture.rows_in) as task:
        task.update(0)
        for number, group in enumerate(groups, start=1):
            _apply(group, state)
            task.update(mixture.rows_in * number // len(groups), standing=len(board.alive()), after=group[-1].name)
        task.update(mixture.rows_in, kept=len(board.alive()))
    publish(job, artifact, board, tables, state.manifest())
    return artifact


def _drop_unsafe(board: Board) -> None:
    for row in board.alive():
        if board.record(row).meta.get(UNSAFE) is True:
            board.reject(row, UNSAFE, "keep_unsafe")


def _apply(group: Sequence[Step], state: Run) -> None:
    if isinstance(group[0].filter, ModelFilter):
        _ask(group[0], group[0].filter, state)
    elif isinstance(group[0].filter, GroupFilter):
        _deduplicate(group[0], group[0].filter, state)
    elif isinstance(group[0].filter, SetFilter):
        _choose(group[0], group[0].filter, state)
    else:
        _filter_rows(group, state)
    for step in group:
        ended = state.board.rejected_by(step.name)
        state.steps.append({"filter": step.name, "ended": ended, **state.facts.pop(step.name, {})})


# --- row filters ---------------------------------------------------------------------------------------------------


def _filter_rows(group: Sequence[Step], state: Run) -> None:
    board = state.board
    rows = board.alive()
    last = group[-1]
    settling = last.filter if isinstance(last.filter, RowFilter) and last.filter.settles else None
    chain = [Link(s.name, s.filter, s.config.only) for s in group if isinstance(s.filter, RowFilter)]
    for start in range(0, len(rows), ROWS_IN_FLIGHT):
        part = rows[start : start + ROWS_IN_FLIGHT]
        table = block_table(part, (board.record(row) for row in part), [board.source(row) for row in part])
        for verdict in rows_of(_verdicts(table, chain, state)):
            _note(board, verdict, chain[verdict["link"]].name)
    for link in chain:
        state.facts[link.name] = link.filter.facts()
    if settling is not None:
        _settle(last, settling, rows, state)


def _verdicts(table: pa.Table, chain: Sequence[Link], state: Run) -> pa.Table:
    _connect(state)
    import ray.data
    from ray.exceptions import RayError

    with _quiet():
        dataset = ray.data.from_arrow(list(slices(table, _blocks(table.num_rows, state.job))))
        workers = state.job.workers
        judged = dataset.map_batches(
            partial(judge_block, chain=chain),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=workers.cpus_each,
            num_gpus=workers.gpus_each or None,
            resources=workers.resources_each or None,
        )
        try:
            batches: list[Any] = list(judged.iter_batches(batch_format="pyarrow", batch_size=None))
        except RayError as error:
            raise _cause(error) from error
    parts = [batch.select(VERDICT_SCHEMA.names).cast(VERDICT_SCHEMA) for batch in batches if batch.num_rows]
    found = pa.concat_tables(parts or [VERDICT_SCHEMA.empty_table()])
    return found.sort_by([("row", "ascending"), ("link", "ascending")])


def _note(board: Board, verdict: dict[str, Any], name: str) -> None:
    row, score = verdict["row"], verdict["score"]
    board.score(name, row, score)
    if verdict["meta"] is not None:
        board.annotate(row, _facts(verdict["meta"]))
    if verdict["texts"] is not None:
        board.rewrite(row, json.loads(verdict["texts"]))
    if verdict["failure"] is not None:
        board.fail(row, f"{name}: {verdict['failure']}", name)
    elif not verdict["keep"]:
        board.reject(row, verdict["reason"] or name, name, score=score, of=verdict["of"])


@functools.lru_cache(maxsize=2**12)
def _facts(text: str) -> dict[str, Any]:
    """JSON of facts; rows that are told the same share the values."""
    return json.loads(text)


def _settle(step: Step, filter: RowFilter, rows: Sequence[int], state: Run) -> None:
    """Show the filter its verdicts on the rows that reached it."""
    board = state.board
    reached = [row for row in rows if not step.config.only or board.source(row) in step.config.only]
    reached = [row for row in reached if board.ended_by(row) in (None, step.name)]
    settled = filter.settle(_seen(step, reached, board))
    _use_settled(step, settled, reached, board)
    state.facts[step.name] = {**filter.facts(), **settled.facts}


def _seen(step: Step, reached: Sequence[int], board: Board) -> Seen:
    return Seen(
        [board.record(row) for row in reached],
        [board.ended_by(row) is None for row in reached],
        [board.score_of(step.name, row) for row in reached],
    )


def _use_settled(step: Step, settled: Settled, reached: Sequence[int], board: Board) -> None:
    for row in reached:
        key = board.record(row).key
        if key in settled.reprieved:
            board.reprieve(row)
        elif key in settled.dropped:
            board.reject(row, settled.dropped[key], step.name)
        if key in settled.meta:
            board.annotate(row, settled.meta[key])


# --- duplicates ----------------------------------------------------------------------------------------------------


def _deduplicate(step: Step, filter: GroupFilter, state: Run) -> None:
    board = state.board
    ranked = board.best_first(board.alive(step.config.only))
    texts = pa.concat_tables(_texts(ranked, board, filter))
    for loser, duplicate in _duplicates(texts, filter, state).items():
        similarity = duplicate.similarity if filter.scores else math.nan
        of = board.record(ranked[duplicate.of]).key
        board.reject(ranked[loser], filter.reason, step.name, score=similarity, of=of)
    state.facts[step.name] = {"compared": texts.num_rows, **filter.facts()}


def _texts(ranked: Sequence[int], board: Board, filter: GroupFilter) -> Iterator[pa.Table]:
    """What is compared in `TEXT_SCHEMA`, by rank."""
    yield TEXT_SCHEMA.empty_table()
    for start in range(0, len(ranked), ROWS_AT_ONCE):
        texts = [filter.text(board.record(row)) for row in ranked[start : start + ROWS_AT_ONCE]]
        table = pa.table({"id": range(start, start + len(texts)), "text": texts}, schema=TEXT_SCHEMA)
        yield table.filter(pc.field("text").is_valid())


def _duplicates(texts: pa.Table, filter: GroupFilter, state: Run) -> Duplicates:
    if texts.num_rows < SHUFFLE_ROWS:
        return filter.duplicates(texts, None)
    _connect(state)
    from ray.exceptions import RayError

    with _quiet():
        try:
            return filter.duplicates(texts, _blocks(texts.num_rows, state.job))
        except RayError as error:
            raise _cause(error) from error


# --- sets ----------------------------------------------------------------------------------------------------------


def _choose(step: Step, filter: SetFilter, state: Run) -> None:
    board = state.board
    rows = board.alive(step.config.only)
    place = {row: index for index, row in enumerate(rows)}
    reached = Reached(
        records=[board.record(row) for row in rows],
        best_first=[place[row] for row in board.best_first(rows)],
        seed=state.job.seed,
        read=lambda reference: [read_reference(reference, board, row) for row in rows],
        embed=lambda embedder, texts: _embed(embedder, texts, state),
    )
    choice = filter.choose(reached)
    for index, row in enumerate(rows):
        board.score(step.name, row, choice.scores.get(index, math.nan))
        if (meta := choice.meta.get(index)) is not None:
            board.annotate(row, meta)
        if (dropped := choice.dropped.get(index)) is not None:
            of = None if dropped.of is None else board.record(rows[dropped.of]).key
            board.reject(row, dropped.reason, step.name, score=dropped.score, of=of)
    state.facts[step.name] = {"reached": len(rows), **choice.facts}


def _embed(embedder: AnyEmbedder, texts: Sequence[str], state: Run) -> Vectors:
    if isinstance(embedder, HashedEmbedder):
        return hashed_vectors(texts, embedder)

    def asked(missing: Sequence[str]) -> Vectors:
        cluster.connect(state.job.run.ray, state.progress.say)
        return model_vectors(missing, state.engines.pool(embedder.served).client, embedder)

    return VectorStore(state.runs.folder, embedder).vectors(texts, asked)


# --- models --------------------------------------------------------------------------------------------------------


def _ask(step: Step, filter: ModelFilter, state: Run) -> None:
    board, job, kind = state.board, state.job, step.config.type
    reached = board.alive(step.config.only)
    unfit = {row: filter.unfit(board.record(row)) for row in reached}
    for row, reason in unfit.items():
        if reason is not None:
            board.reject(row, reason, step.name)
    rows = [row for row in reached if unfit[row] is None]
    records = [board.record(row) for row in rows]
    served = filter.served
    ledger = Ledger(state.runs.folder / f"ledger-{kind}" / filter.ratings_id(job.seed))
    probes = filter.probes(records)
    asked = [*records, *probes.values()]

    if unrated(asked, ledger):
        cluster.connect(job.run.ray, state.progress.say)

    def llm() -> Any:
        client = state.engines.pool(served).client
        return client.llm(sampling_of(filter.sampling), job.seed, f"curate.{kind}", served.model.adapter)

    in_flight = served.pool.most * served.pool.max_outstanding
    contents = len({record.content_hash for record in asked})
    with state.progress.task(step.name, contents, "answers") as task:
        spent = rate_all(asked, filter, llm, ledger, in_flight, lambda done, tokens: task.update(done, tokens))
    state.prompt_tokens += spent.prompt
    state.generated_tokens += spent.generated
    known = ratings(ledger)
    _use_ratings(step, filter, rows, known, state)
    settled = filter.settle(_seen(step, rows, board))
    _use_settled(step, settled, rows, board)
    state.facts[step.name] |= {**settled.facts, **filter.facts(), **filter.findings(probes, known)}


def _use_ratings(
    step: Step, filter: ModelFilter, rows: Sequence[int], known: Mapping[str, Outcome], state: Run
) -> None:
    board = state.board
    rated = {row: known[board.record(row).content_hash] for row in rows}
    replies = [rating for rating in rated.values() if rating.status != "failed"]
    unscored = sum(rating.status == "rejected" for rating in replies)
    filter.check(len(replies), unscored)
    for row, rating in rated.items():
        verdict = filter.verdict(rating)
        for name, value in filter.measures(rating).items():
            board.measure(f"{step.name}_{name}", row, value)
        board.score(step.name, row, verdict.score)
        if verdict.meta is not None:
            board.annotate(row, verdict.meta)
        if verdict.failure is not None:
            board.fail(row, verdict.failure, step.name, rating.attempts)
        elif not verdict.keep:
            board.reject(row, verdict.reason or step.name, step.name, score=verdict.score, raw=rating.raw)
    state.facts[step.name] = {"rated": len(replies) - unscored, "no_score": unscored}


# --- Ray -----------------------------------------------------------------------------------------------------------


def _connect(state: Run) -> None:
    """Join Ray, and refuse at once where running engines leave no CPU to a task: Ray Data would wait for ever."""
    cluster.connect(state.job.run.ray, state.progress.say)
    held, each = Counter(state.engines.held), state.job.workers.each
    held.update(each)
    room.require(held, "curating beside the engines that run", "run.ray.num_cpus or pool.cpus_each", each)


def _blocks(rows: int, job: CurateJob) -> int:
    return max(1, min(job.blocks, math.ceil(rows / ROWS_PER_BLOCK)))


def _quiet() -> Any:
    """A Ray Data context that says nothing."""
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return DataContext.current(context)


def _cause(error: BaseException) -> ITuneError:
    """What broke in a worker, in its own words: Ray Data passes the text on, not the error."""
    lines = [line.strip() for line in str(error).splitlines() if _ERROR_LINE.match(line.strip())]
    return DataError(f"a filter broke: {lines[0] if lines else str(error).strip().splitlines()[-1]}", knob="filters")


_ERROR_LINE = re.compile(r"(?!ray\.)[\w.]*(?:Error|Exception)\b(?::|$)")
