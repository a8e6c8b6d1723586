"""PII: rows that hold personal data or credentials, by patterns with their checksums (methods D29)."""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from itune_ray.config.curate import PiiConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.records import Record

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?P<domain>(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,})(?![\w@])")
_RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.com|\.net|\.org)?|test|invalid|localhost)$", re.IGNORECASE)
"""Domains that nobody can own (RFC 2606)."""
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}"
    r"|0[1-9](?:[ .]\d{2}){4}"
    r")(?![\w-]|\.\d)"
)
"""International with +, North American, French."""
_FICTIONAL = re.compile(r"55501\d\d$")
"""Numbers kept free for stories (North American Numbering Plan)."""
_IP4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|build)\s*$", re.IGNORECASE)
_CARD = re.compile(r"(?<![\w.+-])(?:\d[ -]?){12,18}\d(?![\w]|[.-]\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
IBAN_LENGTH = {
    "AD": 24, "AE": 23, "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20,
    "ES": 24, "FI": 18, "FR": 27, "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27,
    "LI": 21, "LT": 20, "LU": 20, "LV": 21, "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24,
    "SA": 24, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "TR": 26, "UA": 29,
}  # fmt: skip
"""Characters of a country's account numbers (ISO 13616)."""
_SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
    r"|(?<!\w)(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}|glpat-[\w-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{20,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}|sk-(?:[a-z]+-)*[A-Za-z0-9_-]{32,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?!\w)"
)
"""Credentials that their issuers made recognisable."""
_SECRET = re.compile(
    r"(?:api[_ -]?key|secret|token|passw(?:or)?d|credential)s?[\"']?\s*(?:[:=]|is)\s*[\"']?(?P<value>[\w/+=.-]{20,})",
    re.IGNORECASE,
)
SECRET_BITS = 3.5
"""Entropy per character from which a value beside a word like `api_key` is taken for a real one."""


class Pii(RowFilter):
    """Drops rows with personal data in any turn, as `pii_KIND` of the first kind found in the order of `kinds`.

    Reserved mail domains, numbers kept free for stories and addresses that are not public are nobody's data. Cards pass
    Luhn's check and account numbers ISO 7064; a value after a word like `api_key` is a key from 3.5 bits of entropy on.
    """

    def __init__(self, config: PiiConfig):
        self._kinds = config.kinds
        self._allowed = tuple(text.casefold() for text in config.allow)

    def keep(self, record: Record) -> Verdict:
        texts = [m["content"] for m in record.messages]
        texts += [text for text in (record.rejected, record.text) if text is not None]
        for kind in self._kinds:
            for text in texts:
                if any(not self._is_allowed(found) for found in DETECTORS[kind](text)):
                    return Verdict(False, f"pii_{kind}")
        return KEEP

    def _is_allowed(self, found: str) -> bool:
        return any(text in found.casefold() for text in self._allowed)


def emails(text: str) -> Iterator[str]:
    """Mail addresses whose domain somebody can own."""
    return (m.group() for m in _EMAIL.finditer(text) if not _RESERVED.search(m["domain"]))


def phones(text: str) -> Iterator[str]:
    """Telephone numbers of 8 to 15 digits."""
    for match in _PHONE.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if 8 <= len(digits) <= 15 and not _FICTIONAL.search(digits):
            yield match.group()


def addresses(text: str) -> Iterator[str]:
    """Public IP addresses; four numbers after a word like `version` are none."""
    for match in (*_IP4.finditer(text), *_IP6.finditer(text)):
        try:
            public = ipaddress.ip_address(match.group()).is_global
        except ValueError:
            continue
        if public and not _VERSION.search(text[max(0, match.start() - 10) : match.start()]):
            yield match.group()


def cards(text: str) -> Iterator[str]:
    """Payment card numbers: 13 to 19 digits of a known network that pass Luhn's check."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits[0] in "23456" and len(set(digits)) > 1 and luhn(digits):
            yield match.group()


def luhn(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812): every second digit from the right doubled, the digit sums add up to 0 modulo 10."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def ibans(text: str) -> Iterator[str]:
    """Account numbers of a country's length that pass ISO 7064 (mod 97 is 1)."""
    for match in _IBAN.finditer(text):
        compact = match.group().replace(" ", "")
        compact = compact[: IBAN_LENGTH.get(compact[:2], 0)]  # capitals that follow belong to the next word
        if compact and iban_holds(compact):
            yield compact


def iban_holds(compact: str) -> bool:
    """Whether an account number has its country's length and check digits."""
    if len(compact) != IBAN_LENGTH.get(compact[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def social_security_numbers(text: str) -> Iterator[str]:
    """US numbers with hyphens, of areas and groups that are given out."""
    return (m.group() for m in _SSN.finditer(text))


def keys(text: str) -> Iterator[str]:
    """Credentials, by their issuer's form or by a word beside a value of high entropy."""
    yield from (m.group() for m in _KEY.finditer(text))
    yield from (m["value"] for m in _SECRET.finditer(text) if entropy(m["value"]) >= SECRET_BITS)


def entropy(text: str) -> float:
    """Shannon entropy in bits per character; 0 for an empty text."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


DETECTORS: Mapping[str, Callable[[str], Iterator[str]]] = {
    "email": emails,
    "phone": phones,
    "ip": addresses,
    "card": cards,
    "iban": ibans,
    "ssn": social_security_numbers,
    "key": keys,
}
"""Kind -> the texts of it in a text."""
