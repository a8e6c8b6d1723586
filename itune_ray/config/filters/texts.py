"""Filters that judge each text by itself, without a model."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from itune_ray.config.filters.base import FilterConfig
from itune_ray.config.shared import Fraction, Positive


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
    """Drop rows with personal data or credentials, each kind a reason of its own, or mask it (methods D29)."""

    type: Literal["pii"] = "pii"
    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = get_args(PiiKind)
    action: Literal["drop", "mask"] = "drop"
    """mask: the row stays, with `[EMAIL]` and the like in place of what was found."""
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
