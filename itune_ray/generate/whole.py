"""Recipes whose rows depend on each other: they see all inputs at once, on the driver."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import SamplingConfig
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.generate.drive import Stream
from itune_ray.generate.recipes.base import Recipe
from itune_ray.observe.progress import Progress

StreamOf = Callable[[Recipe, SamplingConfig, Ledger], Stream]
"""How a recipe runs over inputs whose outcomes go into a ledger."""


@dataclass(frozen=True)
class Inputs:
    """What such a recipe works with."""

    job: GenerateJob
    rows: Sequence[Record]
    folder: Folder
    """Where its ledgers are."""
    stream_of: StreamOf
    """Runs a recipe over rows, by the stage's workers; engines start with the first."""
    progress: Progress


@dataclass(frozen=True)
class Made:
    """What came of all inputs."""

    outcomes: Sequence[Outcome]
    """Every row that was made or not, each once."""
    driven: int
    """Inputs that this attempt of the stage ran through."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Figures for the manifest, JSON values."""


@runtime_checkable
class WholeRecipe(Protocol):
    """A recipe that makes all rows together; the stage then never calls it row by row."""

    def make_all(self, inputs: Inputs) -> Made:
        """Make the rows, a function of the inputs and the job's seed alone."""
        ...
