"""What the model said before its first step, as columns of the rows.

The reference is the model itself at step 0, a continued adapter included, so no second model is ever in memory, DPO
starts at log 2 and the divergence from a base at 0. One forward-only pass of the loop's own model, strategy, dtype and
packing writes the columns of each document, keyed by row; each rank writes its part, a marker comes last. A finished
pass is read again, a half one done anew. Its identity is the content of the documents and of the model: another job of
the run, of another rate or another weight in the loss, finds it by that.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from itune_ray.config.base import digest
from itune_ray.config.train import TrainJob
from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.data.storage import Folder
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import GENERAL, SEGMENTS
from itune_ray.train.forward import forward_only, micro_batches
from itune_ray.train.objectives.domain import BASE_IDS, BASE_LOG_PROBS, general_tokens
from itune_ray.train.objectives.pairs import REFERENCE, segment_lengths, segment_log_probs
from itune_ray.train.step import Stepper

MARKER = "complete.json"
Values = NDArray[np.generic]
"""Of one column, flat."""


@dataclass(frozen=True)
class Measure:
    """What a reference says of a document."""

    columns: Mapping[str, pa.DataType]
    """Names, and types of their values."""
    values: Callable[[TokenScores, Batch], tuple[Tensor, Mapping[str, Tensor]]]
    """Of a micro-batch: how many values each document has, and those of each column, flat in the documents' order."""
    concerns: Callable[[PackedRow], bool] = lambda row: True
    """Whether a packed row has any; the pass leaves out the others."""


def _answers(scores: TokenScores, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Summed log-probability of each segment."""
    return _num_segments(batch), {REFERENCE: segment_log_probs(scores, batch)}


def _distributions(scores: TokenScores, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The k likeliest tokens at each general supervised one, and their log-probabilities."""
    assert scores.ids is not None
    assert scores.at is not None
    general = general_tokens(batch)
    tokens = segment_lengths(batch) * batch.columns[GENERAL]
    counts = torch.stack([part.sum() for part in tokens.split(_num_segments(batch).tolist())])
    values = {BASE_IDS: scores.ids[general].flatten(), BASE_LOG_PROBS: scores.at[general].flatten()}
    return counts * scores.ids.shape[1], values


def _num_segments(batch: Batch) -> Tensor:
    """Segments of each document: two, unless a column says how many."""
    return batch.columns.get(SEGMENTS, torch.full([sum(map(len, batch.keys))], 2))


MEASURES = (
    Measure({REFERENCE: pa.float64()}, _answers),
    Measure(
        {BASE_IDS: pa.int32(), BASE_LOG_PROBS: pa.float32()},
        _distributions,
        concerns=lambda row: bool(row.columns[GENERAL].any()),
    ),
)


def measure_for(needs: Sequence[str]) -> Measure | None:
    """The measure whose columns an objective needs; None where it compares with nothing."""
    return next((measure for measure in MEASURES if not measure.columns.keys().isdisjoint(needs)), None)


def model_at_start(job: TrainJob, origin: str) -> str:
    """Identity of what the model says before its first step, and how much of it is asked for; adapters that begin as no
    change are not part of it.

    Args:
        origin: `itune_ray.train.build.Built.origin`.
    """
    peft = job.model.peft
    change = "lora" if peft.name in ("lora", "rslora") else [peft.model_dump(mode="json"), job.seed]
    model = [origin, job.model.added_tokens, job.model.attention, job.precision, change]
    return digest([model, vars(job.objective).get("k")])


class Reference:
    """Columns by row key: {column: {key: values}}."""

    def __init__(self, columns: Mapping[str, Mapping[str, Values]]):
        self._columns = columns

    def attached(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """The rows with the columns of their documents."""
        return [row._replace(columns={**row.columns, **self._of(row)}) for row in rows]

    def _of(self, row: PackedRow) -> dict[str, Values]:
        return {name: np.concatenate([by_key[key] for key in row.keys]) for name, by_key in self._columns.items()}


def reference_of(
    folder: str,
    table: PackedTable,
    measure: Measure,
    model: str,
    stepper: Stepper,
    micro_batch: int,
    pad: int,
    shared: str | None = None,
) -> Reference:
    """The reference of all rows of a table, made now or read from an earlier attempt or job. Collective.

    To be called before a checkpoint is loaded: what was built from the job's model is the reference.

    Args:
        folder: Where it is kept, a path or URI.
        model: Identity of all that decides what the model says at step 0, and how much of it is asked for.
        shared: Folder where the jobs of a run say where their references are.
    """
    world, kept = stepper.world, Folder.at(folder)
    identity, place = world.gather(_found(kept, table, measure, model, shared) if world.is_main else None)[0]
    if place is not None:
        return _read(Folder.at(place), measure)
    if world.is_main:
        kept.delete()
    world.barrier()
    part = _pass(table, measure, stepper, micro_batch, pad)
    kept.write_table(f"part-{world.rank:05d}.parquet", part)
    world.barrier()
    if world.is_main:
        kept.write_json(MARKER, {"identity": identity, "world": world.size})
        if shared is not None:
            Folder.at(shared).write_json(f"{identity}.json", {"folder": kept.uri})
    world.barrier()
    return _read(kept, measure)


def _found(
    kept: Folder, table: PackedTable, measure: Measure, model: str, shared: str | None
) -> tuple[str, str | None]:
    """(identity of the reference, folder of a finished pass of it)."""
    identity = digest([model, list(measure.columns), _content(table)], length=16)
    places = [kept.uri]
    if shared is not None and Folder.at(shared).exists(f"{identity}.json"):
        places.append(Folder.at(shared).read_json(f"{identity}.json")["folder"])
    return identity, next((place for place in places if _is_finished(Folder.at(place), identity)), None)


def _is_finished(folder: Folder, identity: str) -> bool:
    return folder.exists(MARKER) and folder.read_json(MARKER).get("identity") == identity


def _content(table: PackedTable) -> str:
    """Hash of all documents, as they are packed."""
    content = hashlib.sha256()
    for rows in table.first_rows():
        for row in rows:
            content.update("\0".join(row.keys).encode())
            columns = [row.columns[name] for name in sorted(row.columns)]
            for values in (row.input_ids, row.supervised, row.lengths, *columns):
                content.update(values.tobytes())
    return content.hexdigest()


def _pass(table: PackedTable, measure: Measure, stepper: Stepper, micro_batch: int, pad: int) -> pa.Table:
    """This rank's part: each packed row that holds a key for the first time, shared out in order."""
    world = stepper.world
    keys: list[str] = []
    columns: dict[str, list[Values]] = {name: [] for name in measure.columns}
    for rows in table.first_rows():
        asked = [row for row in rows if measure.concerns(row)]
        total = len(asked)
        mine = asked[total * world.rank // world.size : total * (world.rank + 1) // world.size]
        batches = micro_batches(mine, -(-total // world.size), micro_batch, pad, stepper)
        for batch, scores in forward_only(stepper, batches):
            if not batch.keys:  # a dummy
                continue
            keys += (key for row in batch.keys for key in row)
            counts, values = measure.values(scores, batch)
            for name, flat in values.items():
                columns[name] += (part.numpy() for part in flat.cpu().split(counts.tolist()))
        if world.is_main:
            left_out = [key for row in rows if not measure.concerns(row) for key in row.keys]
            keys += left_out
            for parts in columns.values():
                parts += [np.empty(0)] * len(left_out)
    arrays = {name: pa.array(columns[name], pa.list_(kind)) for name, kind in measure.columns.items()}
    return pa.table({"key": pa.array(keys, pa.string()), **arrays})


def _read(folder: Folder, measure: Measure) -> Reference:
    columns: dict[str, dict[str, Values]] = {name: {} for name in measure.columns}
    for file in folder.names():
        if file.endswith(".parquet"):
            for part in folder.read_table(file).to_batches():
                for name, by_key in columns.items():
                    by_key |= zip(part["key"].to_pylist(), _split(part[name]), strict=True)
    return Reference(columns)


def _split(lists: pa.ListArray) -> list[Values]:
    values: Values = lists.values.to_numpy()
    return [values[start:end] for start, end in pairwise(lists.offsets.to_numpy())]
