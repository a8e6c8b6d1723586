"""Filters that choose among all rows."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from itune_ray.config.filters.base import Embedder, FilterConfig, HashedEmbedder, Reference, TextKey
from itune_ray.config.shared import Positive


class SelectConfig(FilterConfig):
    """Keep a subset of given size, D_sample = Sample(D, M) (survey eq. 15 and 16, methods D24)."""

    type: Literal["select"] = "select"
    strategy: Literal["hash", "stratified", "k_center", "longest", "score", "tags"] = "hash"
    """hash: the M smallest hashes. stratified: by `by` in proportion. k_center: k-means, then farthest first in each
    cluster. longest: the longest answers. score: the highest of `by`. tags: by the list `by` holds, most tags first,
    each adding one that the pass has not seen (InsTag)."""
    rows: Positive | None = None
    """M; give this or `share`."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """α: M = max(1, ⌊αN⌋)."""
    by: Reference | None = None
    """For stratified (a meta field), score and tags (a meta field)."""
    lowest: bool = False
    """By score, take the lowest instead."""
    clusters: Positive = 1
    """For k_center; rows of each in proportion to its size."""
    trim: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """For k_center: this share of each cluster, the farthest from its centroid, is not chosen: outliers."""
    min_count: Positive = 1
    """For tags: rarer tags are ignored."""
    key: TextKey = "prompt"
    embedder: Embedder = HashedEmbedder()

    @model_validator(mode="after")
    def _complete(self) -> "SelectConfig":
        if (self.rows is None) == (self.share is None):
            raise ValueError("select needs rows or share, and not both")
        if self.strategy in ("stratified", "score", "tags") and self.by is None:
            raise ValueError(f"strategy {self.strategy} needs by, e.g. by=meta.task")
        if self.strategy in ("stratified", "tags") and not (self.by or "").startswith("meta."):
            raise ValueError(f"strategy {self.strategy} needs by to name a meta field, e.g. by=meta.task")
        return self


class DeitaConfig(FilterConfig):
    """Best rows by complexity times quality that are unlike those taken before (deita, methods D32)."""

    type: Literal["deita"] = "deita"
    complexity: Reference
    """c, e.g. `score.judge_1`, or a meta field that may hold a number per turn."""
    quality: Reference
    """q, likewise."""
    turns: Literal["sum", "mean"] = "sum"
    """How the products of several turns become one score; the sum favours long talks."""
    rows: Positive
    """Stop at so many rows."""
    threshold: Annotated[float, Field(gt=-1, le=1)] = 0.9
    """A row goes when its cosine to one taken before is above."""
    key: TextKey = "full"
    embedder: Embedder = HashedEmbedder()


class DiverseConfig(FilterConfig):
    """A sample with flattened sources and rules of style, as LIMA's (methods D36)."""

    type: Literal["diverse"] = "diverse"
    by: Reference
    """The meta field that names the row's group, e.g. `meta.site`."""
    rows: Positive
    temperature: Annotated[float, Field(ge=1)] = 3.0
    """Groups of n rows are drawn from by p ∝ n^(1/T): 1 is proportional, 3 flattens."""
    score: Reference | None = None
    """Votes or the like: the highest of each group are taken, by default those of smallest hash."""
    min_score: float = 10.0
    """Of `score`, where it is given."""
    min_chars: Annotated[int, Field(ge=0)] = 1200
    max_chars: Positive = 4096
    first_person: bool = False
    """Whether answers may say I or my outside of code and quotations."""
    references: bool = False
    """Whether answers may speak of other answers, or of what stands above."""


class CurriculumConfig(FilterConfig):
    """Write to `meta.curriculum` in which stage of training a row is admitted (methods D35); keeps every row."""

    type: Literal["curriculum"] = "curriculum"
    difficulty: Reference = "length"
    mode: Literal["curriculum", "anti", "random"] = "curriculum"
    """Easy first, hard first, or in stages by hash: the two controls."""
    stages: Positive = 10
    pacing: Literal["competence", "linear", "root", "quadratic", "exponential", "logarithmic", "step"] = "competence"
    start: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Share of rows admitted at the beginning: c0 of competence, b of the others."""
    full: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Part of training after which all rows are admitted: a; competence takes 1."""
    power: Annotated[float, Field(gt=0)] = 2.0
    """p of root pacing."""
