"""Rows and planned vectors for the tests of set filters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate.board import Board
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import Choice, Reached, SetFilter
from itune_ray.curate.references import read_reference
from itune_ray.data.mixture import unite
from itune_ray.data.records import Record
from itune_ray.data.sources import SourceTable

Rows = Sequence[Record]


def row(position: int, answer: str = "a", question: str | None = None, **meta: Any) -> Record:
    turns = ({"role": "user", "content": question or f"q{position}"}, {"role": "assistant", "content": answer})
    return Record(source="s", position=position, messages=turns, meta=meta)


def made(**config: Any) -> SetFilter:
    """The filter of a job file's section."""
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": [config]}
    found = load_filter(validate(CurateJob, job, "x").filters[0])
    assert isinstance(found, SetFilter)
    return found


def circle(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def reached(rows: Rows, vectors: np.ndarray | None = None, seed: int = 0, best: Sequence[int] | None = None) -> Reached:
    """The rows as a filter sees them; row i has vector i."""
    part = validate(CurateJob, {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}]}, "x").inputs[0]
    board = Board(unite([part], [SourceTable("s", list(rows), [])]))
    records = [board.record(i) for i in range(len(rows))]
    assert [r.key for r in records] == sorted(r.key for r in records)
    place = {record.content_hash: index for index, record in enumerate(records)}
    if vectors is not None:
        assert len(place) == len(records)
    queue = [] if vectors is None else list(vectors)

    def embed(embedder: Any, texts: Sequence[str]) -> np.ndarray:
        assert len(texts) == len(queue)
        return np.array(queue)

    return Reached(
        records=records,
        best_first=list(best or range(len(rows))),
        seed=seed,
        read=lambda reference: [read_reference(reference, board, index) for index in range(len(records))],
        embed=embed,
    )


def reasons(choice: Choice) -> Mapping[int, str]:
    return {index: dropped.reason for index, dropped in choice.dropped.items()}


def stays(choice: Choice, count: int) -> list[int]:
    return [index for index in range(count) if index not in choice.dropped]
