"""The benchmark contract: items, a grader, and metrics that are functions of sums.

A benchmark is data + prompt + grader with a version; the runner (evaluate/) owns concurrency, resume and storage. A
grade holds additive statistics per metric, so that the value of a metric over any set of items is a function of their
sums: corpus BLEU, perplexity and accuracy are resampled and sliced alike.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from itune_ray.data.records import Message, Record

Floats = NDArray[np.float64]
Unit = Literal["share", "points", "ratio"]
"""share: 0 to 1, shown in percent; points: 0 to 100 as the metric's authors print it; ratio: any positive number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question of a benchmark. Exactly one of `messages`, `text` and `document` is given."""

    key: str
    """Unique and stable within the benchmark."""
    reference: str
    """The right answer, or the text to be compared with or scored."""
    category: str
    """The slice it belongs to: a task family, a language, a source."""
    groups: tuple[str, ...] = ()
    """Further slices worth a line of their own in a report; they may overlap."""
    messages: tuple[Message, ...] | None = None
    """A chat to answer."""
    text: str | None = None
    """Raw text to continue, without a chat template."""
    document: Record | None = None
    """A row whose supervised tokens are scored instead of generated."""
    stop: tuple[str, ...] = ()
    """Strings that end the reply, beside the job's."""
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the grader needs to know."""

    @property
    def prompt(self) -> str:
        """What was asked, as one text for tables: the last user turn of a chat, or the raw text."""
        turns = self.messages or (self.document.prompt if self.document else ())
        users = [m["content"] for m in turns if m["role"] == "user"]
        return users[-1] if users else (self.text or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a model gave for an item."""

    text: str = ""
    finish_reason: str = "stop"
    logprobs: tuple[float, ...] = ()
    """Natural-log probabilities of a document's supervised tokens, each given all tokens before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """How good a reply is."""

    score: float
    """The item's own value of the benchmark's first metric, for tables and side-by-side views."""
    ok: bool | None
    """Right or wrong; None where the metric knows no such thing."""
    sums: dict[str, tuple[float, ...]]
    """Per metric its additive statistics."""
    details: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Metric:
    """One figure of a benchmark: a function of summed statistics."""

    name: str
    unit: Unit
    value: Callable[[Floats], Floats]
    """Sums `[..., K]` to values `[...]`, vectorised over all leading axes."""
    definition: str
    """One sentence for reports, source included."""
    higher_is_better: bool = True
    binary: bool = False
    """Whether each item is 0 or 1, so that the value is a proportion."""


class Benchmark(ABC):
    """Data, prompt and grader. Registered in `BENCHMARKS` under its config's type."""

    version: ClassVar[str]
    """Changed whenever items, prompts or grades may change: part of the artifact's identity."""
    metrics: tuple[Metric, ...]
    """The first one is the headline."""
    failed_as: Literal["an empty reply", "left out"] = "an empty reply"
    """How an item that no model answer exists for enters the score. Reports say how many there were."""
    wants_texts: bool = False
    """Whether `items` are scored documents, which need log-probabilities and no sampling."""

    def __init__(self, name: str):
        self.name = name
        self.rejected: dict[str, int] = {}
        """Rows that cannot become items, by reason; filled by `items`."""

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All questions, the same and in the same order for every model, machine and time."""

    @abstractmethod
    def grade(self, item: Item, reply: Reply) -> Grade:
        """Grade one reply; pure, so that equal replies get equal grades."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a reader must know to compare the score: data, shots, seed, versions, signatures."""


def share(sums: Floats) -> Floats:
    """`sum / count` of `[..., 2]`; NaN where the count is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])
