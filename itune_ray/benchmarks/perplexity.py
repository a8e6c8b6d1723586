"""Perplexity: how surprised a model is by texts it did not write."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from itune_ray.benchmarks.base import Benchmark, Floats, Grade, Item, Metric, Reply, share
from itune_ray.benchmarks.rows import answered_rows
from itune_ray.config.evaluate import PerplexityBenchmark
from itune_ray.data.records import Record


def perplexity(sums: Floats) -> Floats:
    """`exp(NLL / tokens)` of `[..., 2]`; NaN without tokens."""
    return np.exp(share(sums))


class Perplexity(Benchmark):
    """exp of the mean negative log-likelihood per token, over all supervised tokens of all rows.

    Supervised are the answers of chats, end-of-turn token included, and every token of a text row but its first. The
    mean is over tokens, never over rows' means; values of models with different tokenizers do not compare.
    """

    version = "1"
    failed_as = "left out"
    wants_texts = True
    metrics = (
        Metric(
            "perplexity",
            "ratio",
            perplexity,
            "exp of the mean negative log-likelihood per supervised token",
            higher_is_better=False,
        ),
    )

    def __init__(self, config: PerplexityBenchmark, name: str):
        super().__init__(name)
        self.config = config
        self._source: str | None = None

    def items(self) -> Sequence[Item]:
        read = answered_rows(self.config.source, texts=True)
        self.rejected, self._source = read.rejected, read.source
        return [_item(row) for row in read.rows]

    def grade(self, item: Item, reply: Reply) -> Grade:
        nll, tokens = -math.fsum(reply.logprobs), len(reply.logprobs)
        score = math.exp(min(nll / tokens, 700.0)) if tokens else math.nan
        return Grade(score=score, ok=None, sums={"perplexity": (nll, float(tokens))}, details={"tokens": tokens})

    def settings(self) -> dict[str, Any]:
        return {"source": self._source, "tokens": "supervised tokens under the model's own tokenizer and chat template"}


def _item(row: Record) -> Item:
    category = str(row.meta.get("category") or row.meta.get("family") or row.source)
    reference = row.text if row.text is not None else row.response
    return Item(key=row.key, reference=reference or "", category=category, document=row)
