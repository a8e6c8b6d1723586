"""Diverse sampling: flattened groups under rules of style, as LIMA drew from community sites (methods D36)."""

import math
import re
from collections import defaultdict
from typing import Any

from itune_ray.config.curate import DiverseConfig
from itune_ray.curate.filters.base import Choice, Dropped, Reached, SetFilter, number
from itune_ray.data.mixture import capped_quotas, temperature_rates
from itune_ray.data.records import Record, row_seed

_ASIDE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|<(code|pre|blockquote)\b.*?</\1\s*>|^[ \t]*>[^\n]*|\"[^\"\n]*\"|“[^”\n]*”",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
"""Code and quotations: their words are not the author's."""
_FIRST_PERSON = re.compile(r"\bI\b(?!\.?/O\b)|\b[Mm]y\b")
_ELSEWHERE = re.compile(
    r"\b(?:as (?:mentioned|stated|said|noted)|(?:other|another|previous|accepted|above) (?:answer|post|comment)s?"
    r"|(?:answer|post|comment)s? above|see above)\b",
    re.IGNORECASE,
)


class Diverse(SetFilter):
    """Keeps rows that follow the rules, in numbers by p ∝ n^(1/T) of each group's n such rows (Zhou et al. 2305.11206).

    A group gives no more than it has; the others make up for it. Within a group the highest scores are taken, or the
    smallest hashes where none is named.
    """

    def __init__(self, config: DiverseConfig):
        self._config = config
        self.references = (config.by, *([] if config.score is None else [config.score]))

    def choose(self, reached: Reached) -> Choice:
        config = self._config
        groups: defaultdict[str, list[int]] = defaultdict(list)
        scores = [math.nan] * len(reached.records) if config.score is None else reached.numbers(config.score).tolist()
        dropped: dict[int, Dropped] = {}
        for row, (record, group) in enumerate(zip(reached.records, reached.read(config.by), strict=True)):
            reason = "no_group" if group is None else self._fault(record, scores[row])
            if reason is None:
                groups[str(group)].append(row)
            else:
                dropped[row] = Dropped(reason)
        names = sorted(groups)
        sizes = [len(groups[name]) for name in names]
        quotas = capped_quotas(temperature_rates(sizes, config.temperature), config.rows, sizes) if names else []
        for name, quota in zip(names, quotas, strict=True):
            dropped |= dict.fromkeys(self._ranked(reached, groups[name], scores)[quota:], Dropped("not_sampled"))
        counts = {n: {"fit": s, "kept": q} for n, s, q in zip(names, sizes, quotas, strict=True)}
        return Choice(dropped, facts={"groups": counts})

    def _ranked(self, reached: Reached, rows: list[int], scores: list[float]) -> list[int]:
        def rank(row: int) -> tuple[Any, ...]:
            drawn = row_seed(reached.seed, "curate.diverse", reached.records[row].key)
            return (0.0 if math.isnan(scores[row]) else -scores[row], drawn, row)

        return sorted(rows, key=rank)

    def _fault(self, record: Record, score: float) -> str | None:
        """Why a row may not be drawn."""
        config, answer = self._config, (record.response or "").strip()
        if not config.min_chars <= len(answer) or not answer:
            return "short_answer"
        if len(answer) > config.max_chars:
            return "long_answer"
        if config.score is not None and math.isnan(number(score)):
            return "no_score"
        if config.score is not None and score < config.min_score:
            return "low_score"
        own_words = _ASIDE.sub(" ", answer)
        if not config.first_person and _FIRST_PERSON.search(own_words):
            return "first_person"
        return "refers_elsewhere" if not config.references and _ELSEWHERE.search(own_words) else None
