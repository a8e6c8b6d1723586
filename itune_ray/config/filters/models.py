"""Filters that ask a model about each row."""

from typing import Annotated, Literal

from pydantic import Field

from itune_ray.config.filters.base import FilterConfig
from itune_ray.config.generate import CommitConfig
from itune_ray.config.shared import Fraction, Positive, SamplingConfig, ServedModel


class JudgeConfig(FilterConfig):
    """Rate each answer with a model and keep the good ones (AlpaGasus, methods D30)."""

    beside_identity = frozenset({"commit"})

    type: Literal["judge"] = "judge"
    judge: ServedModel
    dimension: str = "accuracy"
    scale: tuple[float, float] = (0, 5)
    threshold: float = 4.5
    template: str | None = None
    """A Jinja file over {{ prompt }}, {{ response }}, {{ dimension }}, {{ low }}, {{ high }}, {{ fence }}, or a
    built-in: `answer` (the default), or `complexity`, which rates how hard the instruction is."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=256)
    max_parse_fail: Fraction = 0.2
    """The job fails when more than this share of replies holds no score."""
    planted: Annotated[int, Field(ge=0)] = 12
    """So many of the answers are rated once more with words planted that ask for the best score; what that raises is
    in the manifest and the report."""
    commit: CommitConfig = CommitConfig()


class IfdConfig(FilterConfig):
    """Instruction-following difficulty: how little the prompt helps a model to predict the answer (Cherry,
    Superfiltering, methods D31)."""

    beside_identity = frozenset({"commit"})

    type: Literal["ifd"] = "ifd"
    model: ServedModel
    """Scores two sequences per row, and generates nothing."""
    definition: Literal["loss_ratio", "perplexity_ratio"] = "loss_ratio"
    """loss_ratio: s(A|Q) / s(A) (Cherry). perplexity_ratio: exp(s(A|Q) - s(A)) (Superfiltering). They rank rows
    differently; changing it scores nothing again."""
    low: float | None = None
    """Rows below go as `low_ifd`."""
    high: float | None = 1.0
    """Rows above go as `high_ifd`: the prompt does not help. By perplexity_ratio also those at it, as published."""
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of all rows that reach the filter, the highest of those within the bounds; default: every row within."""
    min_tokens: Positive = 5
    """Shorter answers give noisy ratios and go as `short_answer`."""
    max_length: Positive | None = None
    """Rows of more tokens go as `too_long` unscored, never cut; default: what the engine can hold."""
    commit: CommitConfig = CommitConfig()
