"""A small table of English synonyms that hold in instructions: no antonyms, no words of quantity, no negations."""

_GROUPS = (
    "write compose draft",
    "describe depict portray",
    "explain clarify",
    "show display",
    "make produce create",
    "build construct",
    "give provide supply",
    "list enumerate",
    "name mention",
    "find locate",
    "choose select pick",
    "compare contrast",
    "summarise condense",
    "summarize condense",
    "change alter modify",
    "improve enhance",
    "begin start",
    "finish complete",
    "help assist",
    "answer reply",
    "ask inquire",
    "use employ",
    "need require",
    "think consider",
    "discuss debate",
    "suggest propose recommend",
    "check verify",
    "solve resolve",
    "replace substitute",
    "big large",
    "small little",
    "quick fast rapid",
    "easy simple",
    "hard difficult",
    "important significant",
    "interesting engaging",
    "common frequent",
    "short brief",
    "whole entire",
    "correct right",
    "clear plain",
    "various diverse",
    "story tale narrative",
    "task job",
    "problem issue",
    "idea thought",
    "reason cause",
    "way manner",
    "method approach technique",
    "example instance",
    "part portion",
    "picture image",
    "letter note",
    "phrase expression",
    "text passage",
    "topic subject theme",
    "advantage benefit",
    "drawback disadvantage",
    "result outcome",
    "goal aim objective",
    "house home",
    "road street",
    "child kid",
    "doctor physician",
    "job occupation",
    "company firm business",
    "customer client",
    "also additionally",
    "maybe perhaps",
    "often frequently",
    "about regarding concerning",
)


def _table() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for group in _GROUPS:
        words = group.split()
        for word in words:
            found.setdefault(word, []).extend(other for other in words if other not in (word, *found.get(word, ())))
    return {word: tuple(others) for word, others in found.items()}


SYNONYMS = _table()
"""Word -> others that may stand in its place, in lower case."""
