"""Publishing: the tables of a curated artifact, its mixture and its counts."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from itune_ray.config.curate import CurateJob
from itune_ray.curate.board import Board
from itune_ray.curate.mixing import mix
from itune_ray.data.artifact import Artifact
from itune_ray.data.ledger import Funnel, funnel_of, publish_parts
from itune_ray.data.mixture import Mixture, mix_report
from itune_ray.data.sources import SourceTable
from itune_ray.data.yields import by_recipe
from itune_ray.errors import DataError

COUNTED = ["key", "status", "reason", "cause", "recipe", "num_tokens"]
"""Columns that the counts are made of."""


def publish(
    job: CurateJob, artifact: Artifact, board: Board, tables: Sequence[SourceTable], facts: Mapping[str, Any]
) -> None:
    """Write kept/, rejected/, failed/ and mix_report.json, and finish the artifact.

    Args:
        facts: Further entries of the manifest.

    Raises:
        DataError: Fewer than `min_rows` rows are kept; the tables are written all the same, to be looked at.
    """
    planned = None if job.mixing is None else mix(job.mixing, board, job.max_repeats, job.seed)
    counted: list[pa.Table] = []

    def parts() -> Iterator[pa.Table]:
        for part in board.outcome_parts():
            counted.append(part.select(COUNTED))
            yield part

    publish_parts(parts(), artifact.folder, {"accepted": "kept"})
    table = pa.concat_tables(counted)
    funnel = balanced(table, board.mixture)
    artifact.folder.write_json("mix_report.json", mix_report(board.mixture, board.kept(), job.seed, planned))
    _check_min_rows(job, funnel, artifact)
    sources = [{"source": t.name, "layout": t.layout, "revision": t.revision, "rows": t.rows_in} for t in tables]
    artifact.finish(funnel=funnel.to_json(), rows=funnel.accepted, sources=sources, yields=by_recipe(table), **facts)


def balanced(table: pa.Table, mixture: Mixture) -> Funnel:
    """The counts; raises `DataError` unless every row that was read is there exactly once."""
    counts = table.group_by("key").aggregate([([], "count_all")])
    twice = counts.filter(pc.field("count_all") > 1)["key"].to_pylist()
    if twice:
        raise DataError("a row ended twice", got=twice[0])
    return dataclasses.replace(funnel_of(table), rows_in=mixture.rows_in)


def _check_min_rows(job: CurateJob, funnel: Funnel, artifact: Artifact) -> None:
    if funnel.accepted >= job.min_rows:
        return
    ends = Counter({**funnel.rejected, **funnel.failed}).most_common(1)
    most = f"; most were ended by `{ends[0][0]}` ({ends[0][1]} rows)" if ends else ""
    raise DataError(
        f"only {funnel.accepted} of {funnel.rows_in} rows are kept{most}, see {artifact.path('rejected')}",
        got=funnel.accepted,
        allowed=f"at least {job.min_rows}",
        knob="min_rows",
    )
