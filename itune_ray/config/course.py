"""Schemas of a training's course over its rows: which come first, which are repeated from earlier stages, which tasks
take turns."""

from typing import Annotated, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.shared import MixturePart, Positive

Pacing = Literal["competence", "linear", "root", "quadratic", "exponential", "logarithmic", "step"]


class Curriculum(Schema):
    """Rows by difficulty: `meta.curriculum.difficulty`, written by the curriculum filter (methods D35). Each step draws
    evenly from the rows admitted by then, so that hard rows are used less often than easy ones."""

    mode: Literal["curriculum", "anti", "random"] = "curriculum"
    """Easy first, hard first, or by hash: the two controls."""
    pacing: Pacing = "competence"
    """g, the share of rows that is admitted at part x = min(1, t/(aT)) of training: competence √(x(1-c0²) + c0²),
    linear b + (1-b)x, root b + (1-b)x^(1/p), quadratic b + (1-b)x², exponential, logarithmic or step."""
    start: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of rows admitted at the beginning: c0 of competence, b of the others."""
    full: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of training after which all rows are admitted: a. At 1 the hardest rows are admitted with the last steps,
    too late for all of them to be drawn."""
    power: Annotated[float, Field(gt=0)] = 2.0
    """p of root pacing."""


class Replay(Schema):
    """Rows of earlier stages beside the new ones, against forgetting (methods D38)."""

    data: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    """What was learned before, a part for each task: rows of earlier artifacts, e.g. `step://curate-a/kept`. A part's
    weight is its share of the replayed rows: equal ones, or how much of each task was forgotten."""
    share: Annotated[float, Field(gt=0)] = 0.1
    """Replayed rows for each new one; 0.01 to 0.1 is usual."""


class Reptile(Schema):
    """Meta-tuning (Nichol et al. 2018): tasks take turns, and after k steps on one of them θ ← θ + ε (θ_k - θ), which
    makes for a start from which few steps reach any of them."""

    task: str = "task"
    """Field of a row's `meta` that names its task."""
    inner_steps: Positive = 5
    """k, steps on one task before the outer step."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """ε, how far the outer step goes; 1 is training on one task after another."""
