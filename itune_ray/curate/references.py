"""References of set filters: the number of a row that a job file names, see `itune_ray.config.curate.Reference`."""

from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.curate.board import Board
from itune_ray.errors import ConfigError, did_you_mean


def read_reference(reference: str, board: Board, row: int) -> Any:
    """What a reference stands for; None where the row has no such thing. `meta.a.b` reads `b` inside `a`."""
    record = board.record(row)
    if reference == "length":
        answer = record.text if record.text is not None else record.response
        return None if answer is None else len(answer)
    kind, _, name = reference.partition(".")
    if kind == "score":
        return board.score_of(name, row)
    value: Any = record.meta
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def needs_of(references: Sequence[str]) -> frozenset[str]:
    """Facets that references need, see `itune_ray.data.contract`."""
    return frozenset(f"meta.{r.split('.')[1]}" for r in references if r.startswith("meta."))


def check_reference(reference: str, earlier: Sequence[str], step: str) -> None:
    """A score must be that of a filter before this one; raises `ConfigError`."""
    kind, _, name = reference.partition(".")
    if kind != "score" or any(name == other or name.startswith(f"{other}_") for other in earlier):
        return
    raise ConfigError(
        f"filter {step} reads the score of no filter before it{did_you_mean(name, earlier)}",
        got=reference,
        allowed=", ".join(f"score.{other}" for other in earlier) or "no filter stands before it",
        knob="filters.N",
    )
