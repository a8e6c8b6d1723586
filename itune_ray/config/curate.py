"""Schema of `itune curate`."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, model_validator

from itune_ray.config.base import Schema
from itune_ray.config.generate import CommitConfig
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import (
    Fraction,
    Job,
    MixturePart,
    Positive,
    SamplingConfig,
    ServedModel,
    Source,
    VllmEngineConfig,
)


class FilterConfig(Schema):
    """What every filter has."""

    only: tuple[str, ...] = ()
    """Apply only to rows of these sources; default: to all."""


Reference = Annotated[str, Field(pattern=r"^(length|(meta|score)\.[\w.-]+)$")]
"""A number of each row: `length` (characters of its answer), `meta.NAME`, or `score.NAME`, the score of an earlier
filter of the job by the filter's name (its type; `judge_1`, `judge_2` where there are two)."""
TextKey = Literal["full", "prompt", "response"]


class HashedEmbedder(Schema):
    """A hashed bag of words: no model, and blind to synonyms."""

    type: Literal["hashed"] = "hashed"
    dimensions: Annotated[int, Field(ge=2)] = 1024
    ngram: Positive = 2
    """Longest run of words that is a feature."""


class ModelEmbedder(Schema):
    """A pool that serves an embedding model."""

    beside_identity = frozenset({"batch"})

    type: Literal["model"] = "model"
    served: ServedModel
    """A vLLM engine needs `extra: {runner: pooling, convert: embed}`."""
    batch: Positive = 64
    """Texts per call."""

    @model_validator(mode="after")
    def _engine_embeds(self) -> "ModelEmbedder":
        engine = self.served.engine
        if isinstance(engine, VllmEngineConfig) and engine.extra.get("runner") != "pooling":
            raise ValueError("a vLLM engine embeds only with served.engine.extra={runner: pooling, convert: embed}")
        return self


Embedder = Annotated[HashedEmbedder | ModelEmbedder, Field(discriminator="type")]


class LengthConfig(FilterConfig):
    """Bounds on the size of the final answer and of the prompt, in characters."""

    type: Literal["length"] = "length"
    min_response: Annotated[int, Field(ge=0)] = 1
    max_response: Positive = 32_768
    min_prompt: Annotated[int, Field(ge=0)] = 1
    max_prompt: Positive = 131_072


class FinishReasonConfig(FilterConfig):
    """Keep answers that ended by themselves; human rows have no finish_reason and pass."""

    type: Literal["finish_reason"] = "finish_reason"
    allowed: tuple[str, ...] = ("stop",)


class RefusalConfig(FilterConfig):
    """Drop refusals and self-identification in the first 200 characters of an answer (methods D29)."""

    type: Literal["refusal"] = "refusal"
    phrases: tuple[str, ...] = ()
    """Added to the built-in list."""
    keep_share: Fraction = 0.0
    """Refusals kept, chosen by hash, as a share of all rows: a model that never saw one answers everything."""


HygieneCheck = Literal[
    "empty_turn",
    "bad_roles",
    "control_characters",
    "chat_token",
    "template_slot",
    "open_fence",
    "repeated_lines",
    "ngram_loop",
    "compressible",
]
PiiKind = Literal["email", "phone", "ip", "card", "iban", "ssn", "key"]
SafetyCategory = Literal["weapons", "drugs", "malware", "fraud", "violence", "self_harm", "minors", "hate"]


class HygieneConfig(FilterConfig):
    """Drop rows that are broken as text, each check a reason of its own (methods D29)."""

    type: Literal["hygiene"] = "hygiene"
    checks: Annotated[tuple[HygieneCheck, ...], Field(min_length=1)] = get_args(HygieneCheck)
    """In this order; the first that fails is the reason."""
    slots: tuple[str, ...] = ()
    """Names of `{slots}` in your templates, beside the usual ones."""
    max_line_share: Fraction = 0.5
    """Of lines of 3 words or more, those that were there before."""
    ngram: Positive = 4
    max_ngram_share: Fraction = 0.2
    """Of all word n-grams, the commonest."""
    min_packed: Fraction = 0.1
    """Smallest size after compression, as a share, of a text of 1,000 bytes or more."""


class PiiConfig(FilterConfig):
    """Drop rows with personal data or credentials, each kind a reason of its own (methods D29)."""

    type: Literal["pii"] = "pii"
    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = get_args(PiiKind)
    allow: tuple[str, ...] = ()
    """Texts that make a find harmless, e.g. a public address `support@mycompany.com` or a domain."""


class SafetyConfig(FilterConfig):
    """Drop answers that go along with a harmful request, by word lists (methods D29). A first gate, no classifier."""

    type: Literal["safety"] = "safety"
    categories: tuple[SafetyCategory, ...] = get_args(SafetyCategory)
    words: tuple[str, ...] = ()
    """Further words and phrases that no answer may hold; rejected as `unsafe_listed`."""
    template: str | None = None
    """A file of such words, one a line; lines that begin with # are left out."""
    prompts: Literal["refused", "any", "none"] = "refused"
    """Harmful prompts stay where the answer declines (a model must learn to), whatever the answer, or never."""


class LanguageConfig(FilterConfig):
    """Tag the script and the language of prompt and answer, and keep the languages wanted (methods D41)."""

    type: Literal["language"] = "language"
    allowed: tuple[str, ...] = ()
    """ISO 639 codes (`en` or `eng`), and `code` for answers that are all code; default: tag only."""
    part: Literal["target", "prompt", "both"] = "target"
    """Whose language must be allowed. The language of a row is that of its target, which the loss is on."""
    undetermined: Literal["keep", "drop"] = "keep"
    """What becomes of texts too short or too mixed to tell."""
    min_chars: Positive = 20
    """Fewer letters tell no language."""
    confidence: Annotated[float, Field(ge=0.5, le=1)] = 0.65
    """A language's votes over its own and the runner-up's."""


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


Mixing = Annotated[EqualMixing | TemperatureMixing | CappedMixing | ManualMixing, Field(discriminator="type")]


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
