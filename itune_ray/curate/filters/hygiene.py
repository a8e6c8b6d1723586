"""Hygiene: rows that are broken as text, whatever they say (methods D29, invariant I6)."""

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from itune_ray.config.curate import HygieneConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.formats import FOLLOWERS
from itune_ray.data.records import Record

_FLAG = re.compile("\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f")
"""Flags of regions are spelt with tag characters."""
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\u202d\u202e\U000e0000-\U000e007f\ud800-\udfff]"
)
"""Control characters other than tab and line ends, what decoding left behind, and hidden text."""
_CHAT_TOKEN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end_of_text|system|user"
    r"|assistant|end|pad|unk)\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</s>",
    re.IGNORECASE,
)
_SLOT = re.compile(r"(?<![\\$\w{}^])(?:\{\{\s*[A-Za-z_][\w.]*\s*\}\}|\{(?P<name>[A-Za-z_]\w*)\})(?!\})")
SLOTS = frozenset(
    {
        *("answer", "article", "choices", "completion", "context", "document", "example"),
        *("examples", "input", "instruction", "label", "language", "name", "options"),
        *("output", "paragraph", "passage", "placeholder", "prompt", "query", "question"),
        *("response", "sentence", "target", "text", "title", "topic"),
    }
)
"""Names that templates give their slots; any `{{ name }}` is one."""
_CODE = re.compile(r"(?P<fence>`{3,}|~{3,}).*?(?:(?P=fence)|\Z)|`[^`\n]+`", re.DOTALL)
_FENCE = re.compile(r"[ \t>]*(?P<fence>`{3,}|~{3,})(?P<info>[^`]*)$")
REPEATS = 3
"""Times that an n-gram must occur to be a loop: in a short text each is a large share."""
LINES = 4
"""Lines that a text must have for repeated ones to count."""
LINE_WORDS = 3
"""Shorter lines (brackets, table rules) repeat in good texts."""
PACKED_BYTES = 1000
"""Shorter texts are not measured by compression."""


class Hygiene(RowFilter):
    """Drops rows at the first check that a turn fails, in this order.

    | reason | what it means |
    |---|---|
    | empty_turn | a user or assistant turn, or the rejected answer, without words |
    | bad_roles | roles in an order that no template renders |
    | control_characters | control or hidden characters, U+FFFD, lone surrogates |
    | chat_token | a chat template's own token in the text |
    | template_slot | a `{{ slot }}`, or `{name}` of a usual name, outside code |
    | open_fence | a code fence that is not closed |
    | repeated_lines | of lines of 3 words or more, more than `max_line_share` were there before |
    | ngram_loop | the commonest word n-gram makes up more than `max_ngram_share` of all, and occurs 3 times or more |
    | compressible | zlib packs 1,000 bytes or more to less than `min_packed` of their size |

    The score is the share or the ratio that decided, NaN for checks that measure nothing.
    """

    def __init__(self, config: HygieneConfig):
        self._config = config
        self._slots = SLOTS | set(config.slots)

    def keep(self, record: Record) -> Verdict:
        texts = [m["content"] for m in record.messages]
        texts += [text for text in (record.rejected, record.text) if text is not None]
        for name in self._config.checks:
            verdict = KEEP
            if name == "empty_turn":
                verdict = _empty_turn(record)
            elif name == "bad_roles":
                verdict = _bad_roles(record)
            else:
                found = (score for text in texts if (score := self._measure(name, text)) is not None)
                verdict = next((Verdict(False, name, score) for score in found), KEEP)
            if not verdict.keep:
                return verdict
        return KEEP

    def _measure(self, name: str, text: str) -> float | None:
        """None where the text passes; else the measure, NaN for a check without one."""
        if name in _PATTERNS:
            return float("nan") if _PATTERNS[name](text) else None
        if name == "template_slot":
            return float("nan") if self._has_slot(text) else None
        value = {
            "repeated_lines": repeated_line_share,
            "ngram_loop": lambda text: top_ngram_share(text, self._config.ngram),
            "compressible": packed_ratio,
        }[name](text)
        if name == "compressible":
            return value if value < self._config.min_packed else None
        most = self._config.max_line_share if name == "repeated_lines" else self._config.max_ngram_share
        return value if value > most else None

    def _has_slot(self, text: str) -> bool:
        if "{" not in text:
            return False
        prose = _CODE.sub(" ", text)
        return any(match["name"] is None or match["name"].lower() in self._slots for match in _SLOT.finditer(prose))


def _empty_turn(record: Record) -> Verdict:
    blank = any(not m["content"].strip() for m in record.messages if m["role"] in ("user", "assistant"))
    blank = blank or (record.rejected is not None and not record.rejected.strip())
    blank = blank or (record.text is not None and not record.text.strip())
    return Verdict(False, "empty_turn") if blank else KEEP


def _bad_roles(record: Record) -> Verdict:
    roles = [None, *(m["role"] for m in record.messages)]
    good = all(role in FOLLOWERS.get(before, ()) for before, role in pairwise(roles))
    return KEEP if good else Verdict(False, "bad_roles")


def _has_control(text: str) -> bool:
    return _CONTROL.search(_FLAG.sub("", text)) is not None


def _has_chat_token(text: str) -> bool:
    return _CHAT_TOKEN.search(text) is not None


def has_open_fence(text: str) -> bool:
    """Whether a code fence is not closed: by as many marks or more of its kind, alone on a line (CommonMark)."""
    opened: str | None = None
    for line in text.split("\n"):
        match = _FENCE.match(line.rstrip())
        if match is None:
            continue
        if opened is None:
            opened = match["fence"]
        elif match["fence"].startswith(opened) and not match["info"].strip():
            opened = None
    return opened is not None


_PATTERNS: Mapping[str, Callable[[str], bool]] = {
    "control_characters": _has_control,
    "chat_token": _has_chat_token,
    "open_fence": has_open_fence,
}


def repeated_line_share(text: str) -> float:
    """Share of the lines of 3 words or more that were there before; 0 for a text of fewer than 4 such lines."""
    lines = [folded for line in text.split("\n") if len(folded := line.casefold().split()) >= LINE_WORDS]
    return 1 - len({tuple(line) for line in lines}) / len(lines) if len(lines) >= LINES else 0.0


def top_ngram_share(text: str, n: int) -> float:
    """How much of all word n-grams the commonest one is; 0 where none occurs 3 times."""
    words = text.casefold().split()
    count = max(Counter(_ngrams(words, n)).values(), default=0)
    return count / (len(words) - n + 1) if count >= REPEATS else 0.0


def _ngrams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def packed_ratio(text: str) -> float:
    """Bytes after zlib over bytes before; 1 for a text of fewer than 1,000 bytes."""
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data)) / len(data) if len(data) >= PACKED_BYTES else 1.0
