"""[Ray] The generate stage: prompts stream through recipe workers into the engine pool, and each ends in the ledger.

Ray Data moves the blocks; it does not decide what is done. Its retries may repeat or lose rows of a crashed worker, and
`drive` settles both.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from itune_ray import cluster, room
from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import SamplingConfig, ServedModel
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.ledger import LEDGER_SCHEMA, Funnel, Ledger, Outcome, publish_table
from itune_ray.data.records import Record, records_table
from itune_ray.data.sources import read_source, told_apart
from itune_ray.data.yields import by_recipe
from itune_ray.engine.base import Llm
from itune_ray.engine.host import EngineHost
from itune_ray.engine.llm import no_llm, sampling_of
from itune_ray.engine.pool import Pool, pool_key, scaled
from itune_ray.errors import GenerationError, ITuneError
from itune_ray.generate.drive import Stream, check_conserved, check_keys, drive, quarantine
from itune_ray.generate.recipes import load_recipe
from itune_ray.generate.recipes.base import Recipe, facts_of, recipe_identity
from itune_ray.generate.whole import Inputs, WholeRecipe
from itune_ray.generate.worker import RecipeWorker, Settled, unpack
from itune_ray.imports import importing
from itune_ray.observe.progress import Progress

if TYPE_CHECKING:
    from ray.data import DataContext

SEED_STAGE = "generate"
"""Seeds name the kind of stage, not the step of a pipeline: equal artifacts have equal rows."""
TEACHER = "teacher"
"""The job's own model among those a recipe asks."""


def run(job: GenerateJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Generate rows from prompts; a finished artifact is returned without touching Ray or an engine.

    Writes accepted/, rejected/ and failed/ (Parquet in `LEDGER_SCHEMA`).

    Raises:
        GenerationError: No row was made although there were prompts, or the engines are gone for good.
    """
    recipe = load_recipe(job.recipe)
    artifact = runs.artifact(stage, "generate", job, recipe_identity(recipe))
    if artifact.complete:
        return artifact
    records, quarantined = _read(job, progress)
    feed = _Feed(job, engines, progress)
    if isinstance(recipe, WholeRecipe):
        _make_all(job, artifact, recipe, records, quarantined, feed, progress)
        return artifact
    ledger = Ledger(artifact.folder / "ledger")
    quarantine(ledger, quarantined, job.max_attempts)
    with progress.task(stage, len(records)) as task:
        tally = drive(
            records,
            ledger,
            feed.stream_of(recipe, job.sampling, ledger),
            commit=job.commit,
            max_attempts=job.max_attempts,
            on_progress=lambda settled, so_far: task.update(settled, so_far.prompt_tokens + so_far.generated_tokens),
        )
    check_conserved(ledger, len(records), len(quarantined), recipe.rows_per_input)
    table = ledger.table()
    _finish(job, artifact, table, tally.inputs, feed, **facts_of(recipe, table))
    return artifact


def _make_all(
    job: GenerateJob,
    artifact: Artifact,
    recipe: WholeRecipe,
    records: Sequence[Record],
    quarantined: Sequence[Outcome],
    feed: "_Feed",
    progress: Progress,
) -> None:
    made = recipe.make_all(Inputs(job, records, artifact.folder / "ledger", feed.stream_of, progress))
    rows = [outcome.to_row() for outcome in (*quarantined, *made.outcomes)]
    table = pa.Table.from_pylist(rows, schema=LEDGER_SCHEMA).sort_by("key")
    _finish(job, artifact, table, made.driven, feed, **made.facts)


def _read(job: GenerateJob, progress: Progress) -> tuple[list[Record], list[Outcome]]:
    tables = [read_source(source) for source in job.prompts]
    for table in tables:
        unusable = f", {len(table.quarantined)} unusable" if table.quarantined else ""
        progress.say(f"{table.name}: {len(table.records)} rows read as {table.layout}{unusable}")
    tables = told_apart(tables)
    records = [record for table in tables for record in table.records]
    quarantined = [outcome for table in tables for outcome in table.quarantined]
    check_keys([*records, *(outcome.record for outcome in quarantined)])
    return records, quarantined


class _Feed:
    """Inputs into the pools, outcomes out of them."""

    def __init__(self, job: GenerateJob, engines: EngineHost, progress: Progress):
        self._job, self._engines, self._progress = job, engines, progress
        self._starts = engines.starts
        self._pools: dict[str, Pool] = {}
        self._asked_before = 0

    def stream_of(self, recipe: Recipe, sampling: SamplingConfig, ledger: Ledger) -> Stream:
        """Outcomes of whole inputs under a recipe, as they end; engines start with the first input.

        Args:
            recipe: The recipe.
            sampling: Of its calls.
            ledger: Where the outcomes are committed: a worker that starts again passes over what is settled there.
        """
        settled = Settled(ledger.folder.uri, self._job.max_attempts)

        def stream(pending: Sequence[Record]) -> Iterator[list[Outcome]]:
            seed = self._job.seed
            self._connect()
            asked = self._models()
            clients = {
                name: pool.client.llm(sampling_of(sampling), seed, SEED_STAGE, asked[name].model.adapter)
                for name, pool in self._pools.items()
            }
            others = {name: llm for name, llm in clients.items() if name != TEACHER}
            bound = cast(Any, recipe).bind(others) if others else recipe
            return _stream(self._job, bound, clients.get(TEACHER) or no_llm(seed, SEED_STAGE), pending, settled)

        return stream

    def _models(self) -> dict[str, ServedModel]:
        """The models that are asked, by the name the recipe knows them under."""
        teacher = self._job.teacher if self._job.recipe.asks_teacher else None
        return {**({} if teacher is None else {TEACHER: teacher}), **self._job.recipe.served()}

    def _connect(self) -> None:
        """Start or join Ray and the engines, once."""
        if self._pools:
            return
        cluster.connect(self._job.run.ray, self._progress.say)
        _require_workers(self._job, list(self._models().values()), self._engines)
        started = time.monotonic()
        with importing("ray.data"):
            self._pools = {name: self._engines.pool(served) for name, served in self._models().items()}
        self._asked_before = sum(pool.requests for pool in self._pools.values())
        if self.engine_starts:
            names = ", ".join(pool.model for pool in self._pools.values())
            seconds = time.monotonic() - started
            self._progress.say(f"engines: {self.engine_starts} of {names} ready in {seconds:.1f} s")

    @property
    def engine_starts(self) -> int:
        """Engines that were started for this stage."""
        return self._engines.starts - self._starts

    @property
    def requests(self) -> int:
        """Requests of this stage that reached an engine, counted there."""
        return max(0, sum(pool.requests for pool in self._pools.values()) - self._asked_before)


def _require_workers(job: GenerateJob, models: Sequence[ServedModel], engines: EngineHost) -> None:
    """Engines and workers hold their CPUs together; Ray Data would wait for a missing one in silence."""
    workers, held = job.workers, Counter(engines.held)
    for served in {pool_key(model): model for model in models}.values():
        held.update(Counter(engines.held_with(served)) - Counter(engines.held))
    replicas = sum(model.pool.least for model in models)
    own = scaled(workers.each, workers.num)
    held.update(own)
    room.require(
        held,
        f"{replicas} engine replicas and {workers.num} recipe workers beside what the job holds already",
        "workers.num, workers.cpus_each, teacher.pool.cpus_each or run.ray.num_cpus",
        workers.each,
        workers.num,
    )
    engines.leave(own, models)


def _stream(
    job: GenerateJob, recipe: Recipe, llm: Llm, pending: Sequence[Record], settled: Settled
) -> Iterator[list[Outcome]]:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError

    workers = job.workers
    with DataContext.current(_quiet(DataContext.get_current().copy())):
        size = workers.rows_per_block
        blocks = [records_table(pending[start : start + size]) for start in range(0, len(pending), size)]
        # Not from_arrow: it spends a one-CPU task per block on metadata, 10 s for 2,000 rows, and waits for a free CPU.
        dataset = ray.data.from_blocks(blocks).map_batches(
            RecipeWorker,
            fn_constructor_kwargs={"recipe": recipe, "llm": llm, "settled": settled},
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=workers.cpus_each,
            num_gpus=workers.gpus_each or None,
            resources=workers.resources_each or None,
            compute=ActorPoolStrategy(
                size=min(workers.num, len(blocks)),
                max_tasks_in_flight_per_actor=workers.blocks_in_flight,
                max_concurrent_calls_per_actor=workers.blocks_in_flight,
                enable_true_multi_threading=True,
            ),
        )
    dataset.set_name(job.name)
    try:
        # Without prefetching: it would hold a finished parcel back until the next one is there.
        batches: Any = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for batch in batches:
            for parcel in batch["parcel"].to_pylist():
                yield unpack(parcel)
    except RayError as error:
        raise _cause(error) from error


def _quiet(context: "DataContext") -> "DataContext":
    """Every parcel a block of its own, so that it reaches the driver at once; Ray Data's own chatter to its log."""
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.verbose_progress = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return context


def _cause(error: BaseException) -> ITuneError:
    """The project's own error inside Ray's wrapping, else a new one with Ray's last line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ITuneError) and not hasattr(inner, "cause"):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return GenerationError(f"a recipe worker failed: {str(error).strip().splitlines()[-1]}")


def _check_made_enough(job: GenerateJob, funnel: Funnel, table: pa.Table) -> None:
    """An empty table would fail a later stage, with a worse message."""
    if funnel.accepted >= job.min_rows or not funnel.rows_in:
        return
    made = f"{funnel.accepted} rows were made" if funnel.accepted else "no row was made"
    ended = {**funnel.rejected, **funnel.failed}
    if not ended:
        raise GenerationError(made, allowed=f"{job.min_rows} or more", knob="min_rows or prompts")
    why, count = max(ended.items(), key=lambda item: item[1])
    rows = table.select(["reason", "cause", "raw"]).to_pylist()
    words = next((row["raw"] for row in rows if why in (row["reason"], row["cause"])), None)
    raise GenerationError(
        f"{made}: {sum(funnel.rejected.values())} rejected, {sum(funnel.failed.values())} failed, "
        f"{count} of them for `{why}`" + (f" ({words})" if words and words != why else ""),
        knob="max_attempts" if funnel.failed else "prompts or teacher",
    )


def _finish(job: GenerateJob, artifact: Artifact, table: pa.Table, driven: int, feed: _Feed, **facts: Any) -> None:
    funnel = publish_table(table, artifact.folder)
    _check_made_enough(job, funnel, table)
    tokens = table.select(["input_key", "num_prompt_tokens", "num_tokens"]).to_pylist()
    prompts = {row["input_key"]: row["num_prompt_tokens"] or 0 for row in reversed(tokens)}
    artifact.finish(
        funnel=funnel.to_json(),
        rows=funnel.accepted,
        yields=by_recipe(table),
        tokens={"prompt": sum(prompts.values()), "generated": sum(row["num_tokens"] or 0 for row in tokens)},
        requests=feed.requests,
        engine_starts=feed.engine_starts,
        driven=driven,
        **facts,
    )
