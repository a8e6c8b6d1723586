"""PII: rows that hold personal data or credentials go, or have it masked (methods D29)."""

from collections import Counter
from dataclasses import replace

from itune_ray.config.filters.texts import PiiConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.pii import found, masked
from itune_ray.data.records import Record

MASKED = "pii_masked"
"""Entry of `meta`: kind -> finds that were masked in the row."""


class Pii(RowFilter):
    """Drops rows with personal data in any turn, as `pii_KIND` of the first kind found in the order of `kinds`.

    With action `mask` the row stays, every find replaced by `[KIND]`; one that holds a teacher's distributions, which
    are of the text as it was, goes all the same. Reserved mail domains, numbers kept free for stories and addresses
    that are not public are nobody's data. Cards pass Luhn's check and account numbers ISO 7064; a value after a word
    like `api_key` is a key from 3.5 bits of entropy on.
    """

    version = 2

    def __init__(self, config: PiiConfig):
        self._kinds, self._masks = config.kinds, config.action == "mask"
        self._allowed = tuple(text.casefold() for text in config.allow)

    def keep(self, record: Record) -> Verdict:
        texts = [m["content"] for m in record.messages]
        texts += [text for text in (record.rejected, record.text) if text is not None]
        for kind in self._kinds:
            if any(not self._is_allowed(find) for text in texts for find in found(text, kind)):
                if self._masks and record.teacher is None:
                    return self._masked(record)
                return Verdict(False, f"pii_{kind}")
        return KEEP

    def _masked(self, record: Record) -> Verdict:
        counts: Counter[str] = Counter()

        def mask(text: str) -> str:
            for kind in self._kinds:
                text, count = masked(text, kind, self._is_allowed)
                counts[kind] += count
            return text

        changed = replace(
            record,
            messages=tuple({**turn, "content": mask(turn["content"])} for turn in record.messages),
            rejected=None if record.rejected is None else mask(record.rejected),
            text=None if record.text is None else mask(record.text),
        )
        return Verdict(True, meta={MASKED: dict(+counts)}, changed=changed)

    def _is_allowed(self, find: str) -> bool:
        forms = find.casefold(), "".join(find.casefold().split())  # an account number may be written in groups
        return any(text in form for text in self._allowed for form in forms)
