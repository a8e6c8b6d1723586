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


class TagsConfig(FilterConfig):
    """Tag what each request is about with a model, for sampling by coverage (InsTag, methods D33)."""

    beside_identity = frozenset({"commit"})

    type: Literal["tags"] = "tags"
    model: ServedModel
    """The tagger."""
    template: str | None = None
    """A Jinja file over {{ prompt }} and {{ fence }} that asks for a JSON list of tags; default: our own."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=256)
    min_count: Positive = 1
    """Tags of fewer rows are left out (InsTag's α)."""
    merge: Annotated[float, Field(gt=0, le=1)] | None = None
    """Tags with a cosine of their words at or above this are one, under the most frequent one's name; default: none."""
    max_parse_fail: Fraction = 0.2
    """The job fails when more than this share of replies holds no list."""
    commit: CommitConfig = CommitConfig()


class UncertaintyConfig(FilterConfig):
    """Keep the prompts, or the tasks, that a model is least sure of (active learning, methods D34)."""

    beside_identity = frozenset({"commit"})

    type: Literal["uncertainty"] = "uncertainty"
    model: ServedModel
    """The model to be trained; all measures but `disagreement` need an engine with log-probabilities."""
    measure: Literal["prompt", "confidence", "margin", "entropy", "disagreement"] = "prompt"
    """prompt: how far dropped words of the prompt move the answer's probability (Active-IT). confidence: 1 - the mean
    probability of the answer's tokens. margin: 1 - the mean lead of the likeliest token. entropy: its mean over tokens,
    in nats. disagreement: the share of pairs of sampled answers that differ."""
    samples: Annotated[int, Field(ge=2)] = 10
    """Perturbed prompts, or sampled answers."""
    drop: Fraction = 0.2
    """Chance of each word of the prompt to be dropped."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampled answers; any other is greedy."""
    top: Annotated[int, Field(ge=2)] = 20
    """Tokens seen at each position by margin and entropy; at most `engine.max_logprobs`."""
    max_tokens: Positive = 128
    """Of an answer; one that is cut is measured as far as it goes."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Kept, the most uncertain; 0.1 to 0.3 is usual. Default: every row, with its score."""
    by: Annotated[str, Field(pattern=r"^meta\.[\w.-]+$")] | None = None
    """The meta field that names a row's task, e.g. `meta.task`: whole tasks are kept, by the mean of their rows."""
    commit: CommitConfig = CommitConfig()
