"""Refusal: answers that decline or speak of being a model (methods D29)."""

import itertools
import re
from collections.abc import Iterable

from itune_ray.config.curate import RefusalConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Seen, Settled, Verdict
from itune_ray.data.records import Record, row_seed

HEAD = 200
"""Characters of the answer that are searched: a refusal opens an answer, later mentions are mostly quotations."""

DECLINES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "i can't",
            "i cannot",
            "i can not",
            "i won't",
            "i will not",
            "i'm unable to",
            "i am unable to",
            "i'm not able to",
            "i am not able to",
            "i must decline to",
            "i have to decline to",
        ),
        (
            "help with",
            "help you",
            "assist",
            "provide",
            "answer",
            "comply",
            "fulfill",
            "fulfil",
            "do that",
            "support",
            "discuss",
            "engage",
            "take part in",
            "give advice",
            "suggest",
        ),
    ),
    (
        ("it is not", "it's not", "it would not be", "it wouldn't be"),
        (
            "appropriate or ethical",
            "appropriate or safe",
            "appropriate or respectful",
            "appropriate to provide",
            "appropriate to encourage",
            "appropriate to discuss",
            "appropriate to suggest",
            "ethical to provide",
        ),
    ),
    (
        (
            "je ne peux pas",
            "je ne peux",
            "je ne pourrai pas",
            "je ne suis pas en mesure de",
            "il m'est impossible de",
            "je dois refuser de",
            "je refuse de",
        ),
        ("vous aider", "t'aider", "aider", "répondre", "fournir", "donner", "faire cela", "faire ça", "participer"),
    ),
    (
        ("no puedo", "no podré", "no soy capaz de", "no me es posible", "debo negarme a", "me niego a"),
        ("ayudar", "ayudarte", "ayudarle", "ayudarlo", "responder", "proporcionar", "dar", "hacer eso", "participar"),
    ),
    (
        ("il n'est pas", "il ne serait pas", "no es", "no sería"),
        (
            "approprié de fournir",
            "approprié de donner",
            "éthique de fournir",
            "apropiado proporcionar",
            "apropiado dar",
            "ético proporcionar",
        ),
    ),
)
"""How a refusal begins and goes on, in English, French and Spanish; every pair is a phrase."""

IDENTITIES = (
    "as an ai language model",
    "as an ai assistant",
    "as an ai model",
    "as an ai,",
    "as an ai developed by",
    "as a language model",
    "as a large language model",
    "i am an ai",
    "i'm an ai",
    "i'm just an ai",
    "i'm only an ai",
    "en tant qu'ia",
    "en tant que modèle de langage",
    "en tant qu'intelligence artificielle",
    "je suis une ia",
    "como modelo de lenguaje",
    "como una ia",
    "como ia",
    "como inteligencia artificial",
    "soy una ia",
)


class Refusal(RowFilter):
    """Drops answers whose first 200 characters hold a phrase of refusal or self-identification, at word boundaries.

    Only the final answer is read: a prompt may quote a refusal. `keep_share` of all rows stay as refusals, the ones of
    smallest hash, since a model that never saw a refusal answers everything.
    """

    def __init__(self, config: RefusalConfig):
        declines = (f"{a} {b}" for openings, verbs in DECLINES for a, b in itertools.product(openings, verbs))
        self._pattern = _pattern([*declines, *IDENTITIES, *config.phrases])
        self._keep_share = config.keep_share
        self.settles = config.keep_share > 0

    def keep(self, record: Record) -> Verdict:
        head = _plain(record.response or "")[:HEAD]
        return Verdict(False, "refusal") if self._pattern.search(head) else KEEP

    def settle(self, seen: Seen) -> Settled:
        refusals = [record.key for record, kept in zip(seen.records, seen.kept, strict=True) if not kept]
        quota = int(self._keep_share * len(seen.kept))
        ranked = sorted(refusals, key=lambda key: (row_seed(0, "curate.refusal", key), key))
        return Settled(frozenset(ranked[:quota]), {"refusals": len(refusals), "refusals_kept": min(quota, len(ranked))})


def _plain(text: str) -> str:
    """Lower case, one kind of apostrophe and single spaces."""
    return " ".join(text.lower().replace("\u2019", "'").replace("\u02bc", "'").split())


def _pattern(phrases: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted({_plain(phrase) for phrase in phrases}, key=lambda phrase: (-len(phrase), phrase))
    alternatives = "|".join(map(re.escape, longest_first))
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)")
