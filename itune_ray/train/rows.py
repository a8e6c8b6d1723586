"""The rows of a training job: a weighted union of sources (survey eq. 5)."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

from itune_ray.config.course import Replay
from itune_ray.config.shared import MixturePart
from itune_ray.config.train import TrainJob, ValidationConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.mixture import capped_quotas
from itune_ray.data.records import REPLAYED, Record, row_seed
from itune_ray.errors import DataError

VALIDATION = "validation"
"""Folder of the held-out rows' order in a stage."""


def validation_job(job: TrainJob) -> TrainJob:
    """The job whose order is that of the held-out rows: each once, packed like the training rows."""
    assert job.validation is not None
    alone = {
        "data": job.validation.data,
        "validation": None,
        "curriculum": None,
        "reptile": None,
        "epochs": 1.0,
        "steps": None,
    }
    return job.model_copy(update=alone)


def read_mixture(parts: Sequence[MixturePart]) -> tuple[list[Record], list[Outcome]]:
    """Usable rows, weighted, and the outcomes of those that cannot be used.

    A row's weight is its own times its part's. Where parts differ in priority, a row whose content a part of higher
    priority holds too is rejected as `duplicate`; equal rows within one priority are the user's wish.

    Raises:
        DataError: Two rows have the same key, which would tie their places in the training order together.
    """
    from itune_ray.data.sources import read_source

    tables = {index: read_source(part.source) for index, part in enumerate(parts)}
    rows: list[Record] = []
    rejected = [outcome for table in tables.values() for outcome in table.quarantined]
    held_above: set[str] = set()
    for priority in sorted({part.priority for part in parts}, reverse=True):
        held_here: set[str] = set()
        for index, part in enumerate(parts):
            if part.priority != priority:
                continue
            for record in tables[index].records:
                if record.content_hash in held_above:
                    rejected.append(rejection(record, "duplicate"))
                else:
                    rows.append(dataclasses.replace(record, weight=record.weight * part.weight))
                    held_here.add(record.content_hash)
        held_above |= held_here
    _check_keys(rows)
    return rows, rejected


def _check_keys(rows: Sequence[Record]) -> None:
    twice = [key for key, count in Counter(row.key for row in rows).items() if count > 1]
    if twice:
        raise DataError(
            "two parts of the data yield rows of the same key",
            got=twice[0],
            allowed="each source once (weight repeats its rows) or sources of different names",
            knob="data.N.source.name",
        )


def read_rows(job: TrainJob) -> tuple[list[Record], list[Outcome]]:
    """The job's rows (see `read_mixture`), those it replays among them: `meta.replayed` names the part they are of."""
    new, unread = read_mixture(job.data)
    if job.replay is None:
        return new, unread
    return new + replayed(job.replay, new, job.seed), unread


def replayed(replay: Replay, new: Sequence[Record], seed: int) -> list[Record]:
    """`share` rows of earlier stages for each new one (rows counted by weight), split among the parts by their weights.

    Of each part those come whose hash of (seed, key) is smallest, so that a larger share adds rows and changes none. A
    row that is among the new ones is not replayed; a part that has too few leaves the rest to the others.
    """
    from itune_ray.data.sources import read_source

    tables = [read_source(part.source) for part in replay.data]
    seen = {row.key for row in new} | {row.content_hash for row in new}
    memories: list[list[Record]] = []
    for table in tables:
        memory = [row for row in table.records if seen.isdisjoint((row.key, row.content_hash))]
        seen |= {row.key for row in memory} | {row.content_hash for row in memory}
        memories.append(sorted(memory, key=lambda row: (row_seed(seed, "train.replay", row.key), row.key)))
    total = round(replay.share * math.fsum(row.weight for row in new))
    quotas = capped_quotas([part.weight for part in replay.data], total, [len(memory) for memory in memories])
    return [
        dataclasses.replace(row, weight=1.0, meta={**row.meta, REPLAYED: table.name})
        for table, memory, quota in zip(tables, memories, quotas, strict=True)
        for row in memory[:quota]
    ]


def replay_counts(rows: Sequence[Record]) -> dict[str, int]:
    """How many of the rows are replayed, by the part they are of."""
    return dict(Counter(row.meta[REPLAYED] for row in rows if REPLAYED in row.meta))


def read_held_out(held_out: ValidationConfig) -> tuple[list[Record], list[Outcome]]:
    """As `read_rows`, but each row weighs 1, whatever is said of it: held-out rows are counted, not drawn."""
    new, unread = read_mixture(held_out.data)
    old, unread_too = read_mixture(held_out.replayed)
    rows = [*new, *(dataclasses.replace(row, meta={**row.meta, REPLAYED: row.source}) for row in old)]
    _check_keys(rows)
    return [dataclasses.replace(row, weight=1.0) for row in rows], unread + unread_too


def rejection(record: Record, reason: str, detail: str | None = None, score: float = float("nan")) -> Outcome:
    """The outcome of a row that is not trained on."""
    noted = record if detail is None else dataclasses.replace(record, meta={**record.meta, "detail": detail})
    return Outcome(record=noted, input_key=record.key, status="rejected", reason=reason, score=score)
