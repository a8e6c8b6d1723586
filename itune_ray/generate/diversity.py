"""How alike generated texts are to each other."""

import math
import statistics
from collections.abc import Sequence

from itune_ray.benchmarks.similarity import language_of, sentence_bleu
from itune_ray.data.records import row_rng


def self_bleu(texts: Sequence[str], references: int = 1000, seed: int = 0) -> float:
    """Mean over the texts of the highest BLEU, 0 to 1, with another one (Zhu et al. 2018; the highest as in Perez et
    al. 2022); 1 where each has an equal.

    Args:
        texts: NaN for fewer than two.
        references: Texts that each is compared with at most, drawn once for all.
        seed: Of that draw.
    """
    if len(texts) < 2:
        return math.nan
    places = range(len(texts))
    if len(texts) > references:
        places = row_rng(seed, "self_bleu", "references").sample(places, references)
    best = [
        max((sentence_bleu(text, texts[j], language_of(text)) for j in places if j != i), default=0.0)
        for i, text in enumerate(texts)
    ]
    return statistics.fmean(best) / 100
