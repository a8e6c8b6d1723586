"""What a recipe worker does with a block of rows: all of them at once, each given back as it ends."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from itune_ray.data.ledger import LEDGER_SCHEMA, Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Llm
from itune_ray.errors import ITuneError, StorageError
from itune_ray.generate.recipes.base import Recipe

INPUTS_PER_PARCEL = 16
"""Finished inputs that travel together. A fixed number: a block run again after a crash must yield as many parcels."""


READS = 5
"""Times that a ledger is read anew when the driver merges commits under the reader's hands."""


@dataclass(frozen=True, slots=True)
class Settled:
    """Where a worker reads which inputs need no engine any more; picklable."""

    ledger: str
    """The ledger's folder."""
    max_attempts: int

    def read(self) -> frozenset[str]:
        """Keys of the inputs that are settled by now."""
        for attempt in range(1, READS + 1):
            try:
                return frozenset(Ledger(Folder.at(self.ledger)).settled(self.max_attempts))
            except StorageError:
                if attempt == READS:
                    raise
        raise AssertionError("unreachable")


class RecipeWorker:
    """Runs a recipe over blocks of rows, several blocks at once, on one event loop.

    A worker that crashed is started again with the blocks it had in work. What was settled by then is read once, at the
    start, and passed over: none of it reaches an engine again.

    Args:
        recipe: The recipe.
        llm: The model it calls.
        settled: Where settled inputs are read; by default none are.
    """

    def __init__(self, recipe: Recipe, llm: Llm, settled: Settled | None = None):
        self._recipe, self._llm = recipe, llm
        self._settled = frozenset[str]() if settled is None else settled.read()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True, name="recipes").start()

    def __call__(self, block: pa.Table) -> Iterator[dict[str, list[bytes]]]:
        """Parcels of outcomes in the order in which the inputs end; a slow row holds nothing else up."""
        rows = [Record.from_row(row) for row in block.to_pylist()]
        finished: queue.SimpleQueue[list[Outcome] | BaseException] = queue.SimpleQueue()
        asyncio.run_coroutine_threadsafe(self._run(rows, finished), self._loop)
        ended = (_outcomes(finished.get()) for _ in rows)
        while parcel := list(itertools.islice(ended, INPUTS_PER_PARCEL)):
            yield {"parcel": [pack(itertools.chain.from_iterable(parcel))]}

    async def _run(self, rows: Sequence[Record], finished: "queue.SimpleQueue[list[Outcome] | BaseException]") -> None:
        async def one(row: Record) -> None:
            if row.key in self._settled:
                finished.put([])
                return
            try:
                finished.put(await outcomes_of(self._recipe, row, self._llm))
            except BaseException as error:  # noqa: BLE001  the thread that waits must end too
                finished.put(error)

        await asyncio.gather(*map(one, rows))


def _outcomes(ended: list[Outcome] | BaseException) -> list[Outcome]:
    if isinstance(ended, BaseException):
        raise ended
    return ended


async def outcomes_of(recipe: Recipe, row: Record, llm: Llm) -> list[Outcome]:
    """The outcomes of one input; an error of the recipe's own fails this row and no other."""
    try:
        outcomes = await recipe(row, llm)
    except ITuneError:
        raise  # the pool is gone or the job is wrong: no row can be made
    except Exception as error:  # noqa: BLE001  a recipe is the user's code
        return _broken(recipe, row, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])
    expected = recipe.rows_per_input
    if (expected is not None and len(outcomes) != expected) or not outcomes:
        return _broken(recipe, row, f"the recipe returned {len(outcomes)} outcomes, not {expected or 'one or more'}")
    if any(outcome.input_key != row.key for outcome in outcomes):
        return _broken(recipe, row, "the recipe returned outcomes of another input")
    return outcomes


def _broken(recipe: Recipe, row: Record, cause: str) -> list[Outcome]:
    from itune_ray.generate.recipes.base import numbered

    count = recipe.rows_per_input or 1
    return [
        Outcome(record=numbered(row, row, index, count), input_key=row.key, status="failed", cause=cause)
        for index in range(count)
    ]


def pack(outcomes: Iterable[Outcome]) -> bytes:
    """Outcomes as one Arrow stream: a cell that no block boundary can cut through."""
    table = pa.Table.from_pylist([outcome.to_row() for outcome in outcomes], schema=LEDGER_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(parcel: bytes) -> list[Outcome]:
    """The inverse of `pack`."""
    rows: Sequence[dict[str, Any]] = pa.ipc.open_stream(parcel).read_all().to_pylist()
    return [Outcome.from_row(row) for row in rows]
