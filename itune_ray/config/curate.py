"""Schema of `itune curate`: its job, the filters that compare rows, and mixing."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.filters.base import Embedder, FilterConfig, HashedEmbedder, TextKey
from itune_ray.config.filters.models import IfdConfig, JudgeConfig, TagsConfig, UncertaintyConfig
from itune_ray.config.filters.sets import CurriculumConfig, DeitaConfig, DiverseConfig, SelectConfig
from itune_ray.config.filters.texts import (
    FinishReasonConfig,
    HygieneConfig,
    LanguageConfig,
    LengthConfig,
    PiiConfig,
    RefusalConfig,
    SafetyConfig,
)
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import Fraction, Job, MixturePart, Positive, Source


class ExactDedupConfig(FilterConfig):
    """One row per normalised text (methods D26)."""

    type: Literal["exact_dedup"] = "exact_dedup"
    key: Literal["full", "prompt", "response"] = "full"
    level: Annotated[int, Field(ge=0, le=3)] = 1
    """0 NFKC, 1 and case and white space, 2 and punctuation, 3 and digits."""


class MinhashDedupConfig(FilterConfig):
    """One row per near-duplicate cluster: MinHash-LSH candidates, verified by true Jaccard similarity (methods D27)."""

    type: Literal["minhash_dedup"] = "minhash_dedup"
    key: Literal["full", "prompt", "response"] = "full"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    num_perm: Positive = 128
    bands: Positive | None = None
    """Default with `rows`: as few as find a pair at the threshold in 99 of 100 cases, e.g. 32 of 4 rows at 0.7."""
    rows: Positive | None = None
    ngram: Positive = 3
    """Words per shingle; 2 for texts under 12 words."""
    min_tokens: Positive = 5
    """Shorter texts are left to exact_dedup."""


class DecontaminateConfig(FilterConfig):
    """Drop rows that hold a benchmark's text: n-gram overlap, by covered share (methods D37)."""

    type: Literal["decontaminate"] = "decontaminate"
    against: Annotated[tuple[Source, ...], Field(min_length=1)]
    """The benchmarks. Files of any columns are read with `format: fields`."""
    fields: tuple[str, ...] = ()
    """Columns of a `fields` benchmark that hold what is asked, averaged over; default: its question, query, prompt,
    instruction, problem, ctx, goal, premise, sentence, input or text, whichever comes first, else all texts."""
    labels: tuple[str, ...] = ()
    """Columns of a `fields` benchmark that hold what is answered; default: answer, target, output or completion."""
    compare: Literal["query", "label", "both"] = "query"
    """query: what a benchmark asks; label: its answers and n-grams over the border of question and answer (as
    datatrove does); both."""
    ngram: Annotated[int, Field(ge=2)] = 8
    """Tokens per n-gram."""
    threshold: Fraction = 0.5
    """Largest share of a benchmark row's tokens that a kept row may hold; 0 rejects at one shared n-gram."""
    common: Positive = 10
    """N-grams of more benchmark rows than this are boilerplate and count for nothing."""


class GraderConfig(FilterConfig):
    """Keep answers an exact grader calls right."""

    type: Literal["grader"] = "grader"
    grader: str = "playground"
    """A grader of `itune_ray.benchmarks`, or `package.module:function` of (prompt, reply, meta) -> score in [0, 1]."""
    threshold: Fraction = 1.0


class HumanRatingConfig(FilterConfig):
    """Keep rows whose mean human rating clears a threshold, and report Q_manual (survey eq. 1, methods D01)."""

    type: Literal["human_rating"] = "human_rating"
    threshold: Fraction = 0.75
    """Of ratings scaled to [0, 1]: 0.75 is 4 on a scale of 1 to 5."""
    q_min: Fraction | None = None
    """The job fails when the lower 95 % bound of Q_manual is below this."""


class SemanticDedupConfig(FilterConfig):
    """Drop rows whose embedding is near that of another row of their k-means cluster (SemDeDup, methods D28)."""

    type: Literal["semantic_dedup"] = "semantic_dedup"
    key: TextKey = "full"
    embedder: Embedder = HashedEmbedder()
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Rows with a cosine above 1 - epsilon are duplicates."""
    mode: Literal["greedy", "paper"] = "greedy"
    """paper: a row goes for any row before it, even one that went, so that chains collapse. greedy: only for rows
    that stay."""
    order: Literal["hard", "easy", "random", "best"] = "hard"
    """Which of two stays: the farther from its centroid (hard), the nearer (easy), by hash, or by the keep rule."""
    clusters: Positive | None = None
    """Default: one for every 1,000 rows."""
    assignments: Annotated[int, Field(ge=1, le=4)] = 2
    """Nearest clusters in which a row is compared: with 1, duplicates across a border are missed."""


class CustomFilterConfig(FilterConfig):
    """Your own filter: a class like those of `itune_ray.curate.filters`."""

    type: Literal["custom"] = "custom"
    import_path: str
    """`package.module:Class`; its source code is part of the artifact's identity."""
    args: dict[str, Any] = {}


AnyFilter = Annotated[
    LengthConfig
    | FinishReasonConfig
    | RefusalConfig
    | HygieneConfig
    | PiiConfig
    | SafetyConfig
    | LanguageConfig
    | ExactDedupConfig
    | MinhashDedupConfig
    | DecontaminateConfig
    | GraderConfig
    | JudgeConfig
    | IfdConfig
    | TagsConfig
    | UncertaintyConfig
    | HumanRatingConfig
    | SemanticDedupConfig
    | SelectConfig
    | DeitaConfig
    | DiverseConfig
    | CurriculumConfig
    | CustomFilterConfig,
    Field(discriminator="type"),
]


class EqualMixing(Schema):
    """Every input the same share."""

    type: Literal["equal"] = "equal"


class TemperatureMixing(Schema):
    """Shares ∝ n^(1/T) of the n rows kept."""

    type: Literal["temperature"] = "temperature"
    temperature: Annotated[float, Field(ge=1)] = 2.0
    """1 is in proportion to size."""


class CappedMixing(Schema):
    """Shares ∝ min(n, cap) (T5, FLAN)."""

    type: Literal["capped"] = "capped"
    cap: Positive = 3000


class ManualMixing(Schema):
    """Shares as given."""

    type: Literal["manual"] = "manual"
    rates: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """Name of each input -> its share; scaled to sum to 1."""


class ReplayMixing(Schema):
    """Rehearsal: of each input that was trained on before, rows in proportion to what is new (CT0, methods D38)."""

    type: Literal["replay"] = "replay"
    old: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the inputs of earlier stages; the others are new, and all their rows stay."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    """ρ: each old input, or each of its tasks, gives max(1, ⌊ρN⌋) of its rows, N being the rows of the new inputs."""
    by: Annotated[str, Field(pattern=r"^meta\.[\w.-]+$")] | None = None
    """The meta field that names a row's task; default: an input is one task."""
    memory: Positive | None = None
    """Rows of a task that are ever drawn from: those of smallest hash, so that memories of shards can be merged."""


Mixing = Annotated[
    EqualMixing | TemperatureMixing | CappedMixing | ManualMixing | ReplayMixing, Field(discriminator="type")
]


class CurateWorkers(Holder):
    """Ray Data tasks that apply the filters to one block each."""

    role: ClassVar[Role] = "data"

    cpus_each: Annotated[float, Field(gt=0)] = 1.0


class CurateJob(Job):
    """Unite sources (survey eq. 5) and filter them; writes kept/, rejected/ (reason, score) and counts."""

    beside_identity = Job.beside_identity | {"blocks", "workers"}

    inputs: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
    filters: tuple[AnyFilter, ...] = ()
    """In this order, each over what the ones before it kept."""
    mixing: Mixing | None = None
    """Set the weights of rows so that an epoch holds these shares of the inputs, counted after the filters (methods
    D38); the inputs' own weights count as sizes. Default: weights as given."""
    max_repeats: Annotated[float, Field(ge=1)] = 4.0
    """Of `mixing`: the largest weight it gives; a smaller input than that can serve falls short of its share."""
    keep_unsafe: bool = False
    """Keep rows that a recipe made to provoke (`meta.unsafe`): they serve evaluation, and no training takes them."""
    min_rows: Positive = 1
    """The job fails when fewer rows are kept: no training on an empty table, hours later."""
    blocks: Positive = 8
    """Most Ray Data blocks a table is cut into; small tables take fewer."""
    workers: CurateWorkers = CurateWorkers()
