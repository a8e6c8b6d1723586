"""Calibration rows: answered chats or texts, rendered as training renders them, in an order that nothing can change."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from itune_ray.config.compress import CalibrationConfig
from itune_ray.data.batches import Batch, collate
from itune_ray.data.chat import ChatRenderer, UnusableRow
from itune_ray.data.order import PackedRow
from itune_ray.data.records import Record, row_seed
from itune_ray.errors import CompressError


@dataclass(frozen=True)
class Calibration:
    """Rows ready for the model, and what became of the others."""

    batches: list[Batch]
    records: list[Record]
    """The rows used, in order."""
    unusable: dict[str, int]
    """Rows by the reason for which they were left out."""


def calibrate_on(
    records: Iterable[Record], config: CalibrationConfig, renderer: ChatRenderer, pad: int, seed: int
) -> Calibration:
    """The first `rows` usable records by the hash of their keys; raises `CompressError` when there is none."""
    rows: list[PackedRow] = []
    used: list[Record] = []
    unusable: dict[str, int] = {}
    for record in sorted(records, key=lambda r: row_seed(seed, "compress.calibration", r.key)):
        if len(rows) == config.rows:
            break
        try:
            ids, supervised = renderer.record_ids(record)
            reason = "too_long" if len(ids) > config.max_length else None
        except UnusableRow as error:
            ids, supervised, reason = [], [], error.reason
        if reason is not None:
            unusable[reason] = unusable.get(reason, 0) + 1
            continue
        lengths = np.array([len(ids)], dtype=np.int32)
        rows.append(PackedRow(np.array(ids, np.int32), np.array(supervised, np.bool_), lengths, (record.key,)))
        used.append(record)
    if not rows:
        raise CompressError(
            "no calibration row has an answer that fits",
            got=unusable or "no rows",
            allowed="rows with an answer within calibration.max_length",
            knob="calibration.data",
        )
    size = config.micro_batch
    return Calibration([collate(rows[i : i + size], pad) for i in range(0, len(rows), size)], used, unusable)
