"""IF-Score: how near responses come to references, each metric apart.

Source: survey eq. 11, `IF = 1/N * sum similarity(response, reference)`. The similarities are never averaged together.
"""

from collections.abc import Sequence
from typing import Any

import rouge_score
import sacrebleu

from itune_ray.benchmarks import similarity
from itune_ray.benchmarks.base import Benchmark, Grade, Item, Metric, Reply, share
from itune_ray.benchmarks.rows import answered_rows
from itune_ray.config.evaluate import IfScoreBenchmark
from itune_ray.data.records import Record

_BLEU = (
    Metric("bleu", "points", similarity.corpus_bleu, "corpus BLEU by sacreBLEU (Papineni 2002, Post 2018)"),
    Metric("sentence_bleu", "points", share, "mean sentence BLEU over responses (survey eq. 11)"),
)
METRICS: dict[str, tuple[Metric, ...]] = {
    "bleu": _BLEU,
    "rouge1": (Metric("rouge1", "share", share, "mean ROUGE-1 F1 over responses (Lin 2004)"),),
    "rouge2": (Metric("rouge2", "share", share, "mean ROUGE-2 F1 over responses (Lin 2004)"),),
    "rougeL": (Metric("rougeL", "share", share, "mean ROUGE-L F1 over responses (Lin 2004)"),),
    "chrf": (Metric("chrf", "points", share, "mean chrF2 over responses (Popović 2015)"),),
    "em": (Metric("em", "share", share, "share of responses equal after SQuAD's normalisation", binary=True),),
}
"""Names of the config -> the figures each yields."""


class IfScore(Benchmark):
    """Chats whose last assistant turn is the reference; the prompt is everything before it."""

    version = "1"

    def __init__(self, config: IfScoreBenchmark, name: str):
        super().__init__(name)
        self.config = config
        self.metrics = tuple(metric for wanted in config.metrics for metric in METRICS[wanted])
        self._languages: set[str] = set()
        self._source: str | None = None

    def items(self) -> Sequence[Item]:
        read = answered_rows(self.config.source, texts=False)
        self.rejected, self._source = read.rejected, read.source
        items = [_item(row) for row in read.rows]
        self._languages = {item.meta["language"] for item in items}
        return items

    def grade(self, item: Item, reply: Reply) -> Grade:
        wanted = {metric.name for metric in self.metrics}
        language, text = item.meta["language"], reply.text.strip()
        values = _values(text, item.reference, language, wanted)
        sums: dict[str, tuple[float, ...]] = {name: (value, 1.0) for name, value in values.items()}
        if "bleu" in wanted:
            values["bleu"] = values["sentence_bleu"]
            sums["bleu"] = similarity.bleu_sums(text, item.reference, language)
        matches = similarity.exact_match(text, item.reference)
        return Grade(score=values[self.metrics[0].name], ok=matches, sums=sums, details=values)

    def settings(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"source": self._source, "languages": sorted(self._languages)}
        facts["sacrebleu"] = sacrebleu.__version__
        if "bleu" in self.config.metrics:
            facts["bleu_signature"] = similarity.bleu_signature(sorted(self._languages) or ["en"])
        if any(name.startswith("rouge") for name in self.config.metrics):
            facts["rouge"] = f"{rouge_score.__name__}, F1, Porter stemmer for English, Unicode words elsewhere"
        return facts


def _item(row: Record) -> Item:
    reference = row.response or ""
    language = similarity.language_of(reference, row.meta.get("language"))
    category = str(row.meta.get("category") or row.meta.get("family") or language)
    return Item(key=row.key, reference=reference, category=category, messages=row.prompt, meta={"language": language})


def _values(text: str, reference: str, language: str, wanted: set[str]) -> dict[str, float]:
    """Per-response similarities; `sentence_bleu` stands for BLEU here."""
    values: dict[str, float] = {}
    if "sentence_bleu" in wanted:
        values["sentence_bleu"] = similarity.sentence_bleu(text, reference, language)
    if wanted & {"rouge1", "rouge2", "rougeL"}:
        values |= {k: v for k, v in similarity.rouge(text, reference, language).items() if k in wanted}
    if "chrf" in wanted:
        values["chrf"] = similarity.chrf(text, reference)
    if "em" in wanted:
        values["em"] = float(similarity.exact_match(text, reference))
    return values
