"""The training order: which documents each optimizer step sees, packed and written down before training starts.

The order is a pure function of (seed, epoch, row key): documents are sorted by a hash, so neither the number of
workers nor the order in which a cluster tokenised them can change it. A mixture weight w uses each row floor(w) times
per epoch and a hash-sampled share of w - floor(w) once more (survey eq. 5). The packed rows are stored step by step in
small Parquet row groups; a worker reads only the groups that overlap its slice of a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from itune_ray.data.mixture import epoch_multiplicity
from itune_ray.data.packing import pack
from itune_ray.data.records import row_seed
from itune_ray.data.storage import Folder
from itune_ray.errors import TrainError

ROWS_PER_GROUP = 64
STEPS_PER_FILE = 1000
DOCUMENT_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("weight", pa.float64()),
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
    ]
)
"""One tokenised document per row, unique by key: a chat or text of one segment, or a preference pair of two, chosen
then rejected. Segments never see each other; a document is never split, so that its segments meet in one loss. Further
columns are flat lists, one entry (or k) per supervised token or per segment, or one, as the objective needs them."""
PACKED_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("supervised", pa.list_(pa.bool_())),
        ("lengths", pa.list_(pa.int32())),
        ("keys", pa.list_(pa.string())),
    ]
)
"""One packed row: its documents one after another, with the lengths of their segments and their keys. Further columns
are the documents' own, laid end to end."""
STEP_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("first_group", pa.int32()),
        ("rows", pa.int32()),
        ("documents", pa.int32()),
        ("tokens", pa.int64()),
        ("epoch", pa.float64()),
    ]
)


class PackedRow(NamedTuple):
    """Documents laid end to end: ids and supervised flags per token, length per segment, key per document."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    keys: tuple[str, ...]
    columns: Mapping[str, NDArray[np.generic]] = {}
    """Flat values per supervised token, segment or document, in order."""
    position: int = 0
    """Place among the packed rows of its step, over all ranks."""


@dataclass(frozen=True)
class Plan:
    """What a finished training order says about itself."""

    digest: str
    """Identity of what went in; another one means that the order must be written anew."""
    steps: int
    documents: int
    """Distinct documents."""
    epochs: float
    tokens: int
    """Tokens over all steps, repeats included."""
    unused: int = 0
    """Documents that no step draws: a part of an epoch leaves some out, and so does a curriculum."""


class Order:
    """Epochs of documents, laid out as one endless stream and cut into steps of `batch` documents."""

    def __init__(self, keys: Sequence[str], weights: Sequence[float], seed: int, batch: int):
        self._keys, self._weights, self._seed, self._batch = keys, weights, seed, batch

    def epoch(self, epoch: int) -> list[int]:
        """Document indices of one epoch in their order, repeats by mixture weight included."""
        drawn = [
            (row_seed(self._seed, "train.order", f"{key}#{copy}", epoch), index)
            for index, key in enumerate(self._keys)
            for copy in range(self._copies(index, epoch))
        ]
        return [index for _, index in sorted(drawn)]

    def _copies(self, index: int, epoch: int) -> int:
        return epoch_multiplicity(self._weights[index], self._keys[index], self._seed, epoch)

    def steps(self, epochs: float | None, steps: int | None) -> Iterator[tuple[float, list[int]]]:
        """(epochs done after the step, document indices) of each step; give one of `epochs` and `steps`.

        With `epochs` the last step may be smaller; a fraction takes that share of the last epoch.
        """
        pending: list[int] = []
        for done, (progress, index) in enumerate(self.stream(epochs)):
            pending.append(index)
            if len(pending) == self._batch:
                yield progress, pending
                pending = []
                if steps is not None and (done + 1) // self._batch == steps:
                    return
        if pending:
            yield epochs or 0.0, pending

    def stream(self, epochs: float | None) -> Iterator[tuple[float, int]]:
        epoch = 0
        while epochs is None or epoch < epochs:
            order = self.epoch(epoch)
            if not order:
                raise TrainError("an epoch draws no document: every mixture weight is too small", knob="data.N.weight")
            share = 1.0 if epochs is None else min(1.0, epochs - epoch)
            for i, index in enumerate(order[: max(1, round(share * len(order)))]):
                yield epoch + (i + 1) / len(order), index
            epoch += 1


def write_order(
    documents: pa.Table,
    folder: str,
    *,
    digest: str,
    seed: int,
    batch: int,
    capacity: int | None,
    epochs: float | None,
    steps: int | None,
    order: Order | None = None,
) -> Plan:
    """Write the packed table of a run to `folder` (a path or URI) and return its plan, which is written last.

    Args:
        documents: `DOCUMENT_SCHEMA`, further list columns allowed.
        capacity: Tokens of a packed row; None puts every document in a row of its own.
        order: Of the same documents; default: epochs in the order of a hash.
    """
    target = Folder.at(folder)
    target.fs.create_dir(target.path, recursive=True)
    lists = {name: _Lists(documents[name]) for name in documents.column_names if name not in ("key", "weight")}
    schema = pa.schema(
        [*PACKED_SCHEMA, *(field for field in documents.schema if field.name not in DOCUMENT_SCHEMA.names)]
    )
    keys: list[str] = documents["key"].to_pylist()
    order = order or Order(keys, documents["weight"].to_pylist(), seed, batch)
    step_rows: list[dict[str, object]] = []
    used: set[int] = set()
    tokens, done, writer = 0, 0.0, None
    for step, (done, indices) in enumerate(order.steps(epochs, steps)):
        if step % STEPS_PER_FILE == 0:
            if writer is not None:
                writer.close()
            writer = _FileWriter(target, f"part-{step // STEPS_PER_FILE:05d}.parquet", schema)
        assert writer is not None
        lengths = [lists["input_ids"].length(i) for i in indices]
        rows = pack(lengths, capacity) if capacity is not None else [[i] for i in range(len(indices))]
        entry = writer.write(_packed_table([[indices[i] for i in row] for row in rows], lists, keys, schema))
        step_rows.append({**entry, "documents": len(indices), "tokens": sum(lengths), "epoch": done})
        tokens += sum(lengths)
        used.update(indices)
    if writer is not None:
        writer.close()
    target.write_table("steps.parquet", pa.Table.from_pylist(step_rows, schema=STEP_SCHEMA))
    plan = Plan(digest, len(step_rows), len(keys), done, tokens, unused=len(keys) - len(used))
    target.write_json("plan.json", asdict(plan))
    return plan


def read_plan(folder: str) -> Plan | None:
    """The plan of a finished order, or None where there is none yet."""
    source = Folder.at(folder)
    return Plan(**source.read_json("plan.json")) if source.exists("plan.json") else None


class PackedTable:
    """A finished training order, read step by step and rank by rank."""

    def __init__(self, folder: str):
        plan = read_plan(folder)
        if plan is None:
            raise TrainError("the training order is missing or unfinished", got=folder)
        self.plan = plan
        self._folder = Folder.at(folder)
        steps = self._folder.read_table("steps.parquet")
        self._steps = {name: steps[name].to_numpy() for name in STEP_SCHEMA.names}
        self._open: tuple[str, pq.ParquetFile] | None = None

    def epoch(self, step: int) -> float:
        """Epochs done once the step (from 0) is done."""
        return float(self._steps["epoch"][step])

    def tokens(self, step: int) -> int:
        """Tokens of a step over all ranks, padding not counted."""
        return int(self._steps["tokens"][step])

    def num_rows(self, step: int) -> int:
        """Packed rows of a step over all ranks."""
        return int(self._steps["rows"][step])

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[PackedRow]:
        """This rank's contiguous slice of a step, longest row first so that micro-batches hold equal lengths.

        With more ranks than rows some slices are empty.
        """
        total = self.num_rows(step)
        start, stop = total * rank // world, total * (rank + 1) // world
        stored = enumerate(self._stored(step, start, stop), start)
        placed = [row._replace(position=position) for position, row in stored]
        return sorted(placed, key=lambda row: -len(row.input_ids))

    def first_rows(self) -> Iterator[list[PackedRow]]:
        """Step by step, longest first, the packed rows that hold a document for the first time."""
        seen: set[str] = set()
        for step in range(self.plan.steps):
            rows = self._stored(step, 0, self.num_rows(step))
            fresh = [row for row in rows if not seen.issuperset(row.keys)]
            seen.update(key for row in fresh for key in row.keys)
            if fresh:
                yield sorted(fresh, key=lambda row: -len(row.input_ids))
            if len(seen) == self.plan.documents:
                return

    def _stored(self, step: int, start: int, stop: int) -> list[PackedRow]:
        """Packed rows `start` to `stop` of a step, as they were written."""
        if start == stop:
            return []
        first = int(self._steps["first_group"][step])
        groups = range(first + start // ROWS_PER_GROUP, first + (stop - 1) // ROWS_PER_GROUP + 1)
        table = self._file(str(self._steps["file"][step])).read_row_groups(list(groups), use_threads=False)
        return list(_packed_rows(table.slice(start % ROWS_PER_GROUP, stop - start)))

    def _file(self, name: str) -> pq.ParquetFile:
        if self._open is None or self._open[0] != name:
            stream = self._folder.fs.open_input_file((self._folder / name).path)
            self._open = name, pq.ParquetFile(stream)
        return self._open[1]


class _Lists:
    """A list column as flat values and offsets: slices of it cost nothing."""

    def __init__(self, column: pa.ChunkedArray):
        wide = pa.large_list(column.type.value_type)  # 32-bit offsets end at 2 G tokens
        chunks = column.cast(wide).chunks
        array = pa.concat_arrays(chunks) if chunks else pa.array([], wide)
        self.values: NDArray[np.generic] = array.values.to_numpy(zero_copy_only=False)
        self._offsets: NDArray[np.int64] = array.offsets.to_numpy()

    def __getitem__(self, index: int) -> NDArray[np.generic]:
        return self.values[self._offsets[index] : self._offsets[index + 1]]

    def length(self, index: int) -> int:
        return int(self._offsets[index + 1] - self._offsets[index])


class _FileWriter:
    """One Parquet file of the order; each step starts a new row group."""

    def __init__(self, folder: Folder, name: str, schema: pa.Schema):
        self._name, self._groups = name, 0
        self._stream = folder.fs.open_output_stream((folder / name).path)
        self._writer = pq.ParquetWriter(self._stream, schema, compression="zstd", use_dictionary=False)

    def write(self, table: pa.Table) -> dict[str, object]:
        entry: dict[str, object] = {"file": self._name, "first_group": self._groups, "rows": table.num_rows}
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self._groups += -(-table.num_rows // ROWS_PER_GROUP)
        return entry

    def close(self) -> None:
        self._writer.close()
        self._stream.close()


def _packed_table(
    rows: Sequence[Sequence[int]], lists: Mapping[str, _Lists], keys: Sequence[str], schema: pa.Schema
) -> pa.Table:
    columns: dict[str, list[object]] = {
        name: [np.concatenate([column[i] for i in row]) for row in rows] for name, column in lists.items()
    }
    columns["keys"] = [[keys[i] for i in row] for row in rows]
    return pa.table(columns, schema=schema)


def _packed_rows(table: pa.Table) -> Iterator[PackedRow]:
    lists = {name: _Lists(table[name]) for name in table.column_names if name != "keys"}
    ids, supervised, lengths = (lists.pop(name) for name in ("input_ids", "supervised", "lengths"))
    for index, keys in enumerate(table["keys"].to_pylist()):
        extra = {name: column[index] for name, column in lists.items()}
        yield PackedRow(ids[index], supervised[index], lengths[index], tuple(keys), extra)  # type: ignore[arg-type]
