"""Reference log-probabilities: what the policy said before its first step, as a column of the rows.

The reference is the policy itself at step 0, a continued adapter included, so no second model is ever in memory and DPO
starts at log 2. One forward-only pass of the loop's own model, strategy, dtype and packing writes a number per segment,
keyed by row; each rank writes its part, a marker comes last. A finished pass is read again, a half one done anew.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.data.storage import Folder
from itune_ray.train.documents import SEGMENTS
from itune_ray.train.forward import forward_only, micro_batches
from itune_ray.train.objectives.pairs import REFERENCE, segment_log_probs
from itune_ray.train.step import Stepper

MARKER = "complete.json"
SCHEMA = pa.schema([("key", pa.string()), ("log_probs", pa.list_(pa.float64()))])
"""Per row the summed log-probability of the supervised tokens of each of its segments."""


class Reference:
    """Reference log-probabilities by row key."""

    def __init__(self, by_key: dict[str, NDArray[np.float64]]):
        self._by_key = by_key

    def attached(self, rows: Sequence[PackedRow]) -> list[PackedRow]:
        """The rows with the column `reference`, one value per segment."""
        return [row._replace(columns={**row.columns, REFERENCE: self._of(row)}) for row in rows]

    def _of(self, row: PackedRow) -> NDArray[np.float64]:
        return np.concatenate([self._by_key[key] for key in row.keys])


def reference_of(folder: str, table: PackedTable, stepper: Stepper, micro_batch: int, pad: int) -> Reference:
    """The reference of all rows of a table, made now or read from an earlier attempt. Collective.

    To be called before a checkpoint is loaded: what was built from the job's model is the reference.

    Args:
        folder: Where it is kept, a path or URI.
    """
    kept = Folder.at(folder)
    done = kept.exists(MARKER) and kept.read_json(MARKER)["digest"] == table.plan.digest
    stepper.world.barrier()
    if not done:
        if stepper.world.is_main:
            kept.delete()
        stepper.world.barrier()
        part = _pass(table, stepper, micro_batch, pad)
        kept.write_table(f"part-{stepper.world.rank:05d}.parquet", part)
        stepper.world.barrier()
        if stepper.world.is_main:
            kept.write_json(MARKER, {"digest": table.plan.digest, "world": stepper.world.size})
        stepper.world.barrier()
    return _read(kept)


def _pass(table: PackedTable, stepper: Stepper, micro_batch: int, pad: int) -> pa.Table:
    """This rank's part: each packed row that holds a key for the first time, shared out in order."""
    world, found = stepper.world, dict[str, list[float]]()
    for rows in table.first_rows():
        total = len(rows)
        mine = rows[total * world.rank // world.size : total * (world.rank + 1) // world.size]
        batches = micro_batches(mine, -(-total // world.size), micro_batch, pad, stepper)
        for batch, scores in forward_only(stepper, batches):
            found |= _by_key(batch, segment_log_probs(scores, batch).tolist())
    return pa.table({"key": list(found), "log_probs": list(found.values())}, schema=SCHEMA)


def _by_key(batch: Batch, values: list[float]) -> dict[str, list[float]]:
    """Values of the segments under the keys of their documents: two each, unless a column says how many."""
    keys = [key for row in batch.keys for key in row]
    counts = batch.columns[SEGMENTS].tolist() if SEGMENTS in batch.columns else [2] * len(keys)
    ends = accumulate(counts)
    return {key: values[end - count : end] for key, count, end in zip(keys, counts, ends, strict=True)}


def _read(folder: Folder) -> Reference:
    by_key: dict[str, NDArray[np.float64]] = {}
    for name in folder.names():
        if name.endswith(".parquet"):
            part = folder.read_table(name)
            values = (np.array(v, dtype=np.float64) for v in part["log_probs"].to_pylist())
            by_key |= dict(zip(part["key"].to_pylist(), values, strict=True))
    return Reference(by_key)
