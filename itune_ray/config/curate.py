"""Schema of `itune curate`."""

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from itune_ray.config.base import Schema
from itune_ray.config.generate import CommitConfig
from itune_ray.config.roles import Holder, Role
from itune_ray.config.shared import Fraction, Job, MixturePart, Positive, SamplingConfig, ServedModel, Source


class FilterConfig(Schema):
    """What every filter has."""

    only: tuple[str, ...] = ()
    """Apply only to rows of these sources; default: to all."""


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
    """Default with `rows`: the pair that minimises false positives plus false negatives at the threshold."""
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
    """A Jinja file over {{ prompt }}, {{ response }}, {{ dimension }}, {{ low }}, {{ high }}, {{ fence }}; default: the
    built-in."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=256)
    max_parse_fail: Fraction = 0.2
    """The job fails when more than this share of replies holds no score."""
    planted: Annotated[int, Field(ge=0)] = 12
    """So many of the answers are rated once more with words planted that ask for the best score; what that raises is
    in the manifest and the report."""
    commit: CommitConfig = CommitConfig()


class HumanRatingConfig(FilterConfig):
    """Keep rows whose mean human rating clears a threshold, and report Q_manual (survey eq. 1, methods D01)."""

    type: Literal["human_rating"] = "human_rating"
    threshold: Fraction = 0.75
    """Of ratings scaled to [0, 1]: 0.75 is 4 on a scale of 1 to 5."""
    q_min: Fraction | None = None
    """The job fails when the lower 95 % bound of Q_manual is below this."""


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
    | HumanRatingConfig
    | CustomFilterConfig,
    Field(discriminator="type"),
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
    min_rows: Positive = 1
    """The job fails when fewer rows are kept: no training on an empty table, hours later."""
    blocks: Positive = 8
    """Most Ray Data blocks a table is cut into; small tables take fewer."""
    workers: CurateWorkers = CurateWorkers()
