"""Personal data and credentials in a text, by patterns with their checksums (methods D29)."""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

Span = tuple[int, int]
"""[start, stop) of a find in its text."""

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?P<domain>(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,})(?![\w@])")
_RESERVED = re.compile(r"(?:^|\.)(?:example(?:\.com|\.net|\.org)?|test|invalid|localhost)$", re.IGNORECASE)
"""Domains that nobody can own (RFC 2606)."""
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])[2-9]\d{2}[.-]\d{4}"
    r"|0[1-9](?:[ .]\d{2}){4}"
    r"|\(0\d{1,4}\) ?\d{3,4}[ -]?\d{3,5}"
    r")(?![\w-]|\.\d)"
)
"""International with +, North American, French, and with an area code in brackets."""
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
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:.*?-----END (?:[A-Z]+ )*PRIVATE KEY-----"
    r"|(?:\s*[A-Za-z0-9+/=]{16,})*(?:\s+[A-Za-z0-9+/=]+(?=\s*\Z))?)"  # one that is cut: what follows of its body
    r"|(?<!\w)(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}|glpat-[\w-]{20,}"
    r"|xox[abprs]-[A-Za-z0-9-]{20,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}|sk-(?:[a-z]+-)*[A-Za-z0-9_-]{32,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?!\w)",
    re.DOTALL,
)
"""Credentials that their issuers made recognisable."""
_SECRET = re.compile(
    r"(?:api[_ -]?key|secret|token|passw(?:or)?d|credential)s?[\"']?\s*(?:[:=]|is)\s*[\"']?(?P<value>[\w/+=.-]{20,})",
    re.IGNORECASE,
)
SECRET_BITS = 3.5
"""Entropy per character from which a value beside a word like `api_key` is taken for a real one."""


def emails(text: str) -> Iterator[Span]:
    """Mail addresses whose domain somebody can own: reserved ones are nobody's."""
    return (m.span() for m in _EMAIL.finditer(text) if not _RESERVED.search(m["domain"]))


def phones(text: str) -> Iterator[Span]:
    """Telephone numbers of 8 to 15 digits; those kept free for stories are nobody's."""
    for match in _PHONE.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if 8 <= len(digits) <= 15 and not _FICTIONAL.search(digits):
            yield match.span()


def addresses(text: str) -> Iterator[Span]:
    """Public IP addresses; four numbers after a word like `version` are none."""
    for match in (*_IP4.finditer(text), *_IP6.finditer(text)):
        try:
            public = ipaddress.ip_address(match.group()).is_global
        except ValueError:
            continue
        if public and not _VERSION.search(text[max(0, match.start() - 10) : match.start()]):
            yield match.span()


def cards(text: str) -> Iterator[Span]:
    """Payment card numbers: 13 to 19 digits of a known network that pass Luhn's check."""
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if digits[0] in "23456" and len(set(digits)) > 1 and luhn(digits):
            yield match.span()


def luhn(digits: str) -> bool:
    """Luhn's check (ISO/IEC 7812): every second digit from the right doubled, the digit sums add up to 0 modulo 10."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def ibans(text: str) -> Iterator[Span]:
    """Account numbers of a country's length that pass ISO 7064 (mod 97 is 1)."""
    for match in _IBAN.finditer(text):
        size, places = IBAN_LENGTH.get(match.group()[:2], 0), list(_within(match))
        compact = "".join(text[place] for place in places[:size])  # capitals that follow belong to the next word
        if compact and iban_holds(compact):
            yield places[0], places[size - 1] + 1


def _within(match: re.Match[str]) -> Iterator[int]:
    """Places of the characters of a match that are no spaces."""
    return (match.start() + i for i, character in enumerate(match.group()) if character != " ")


def iban_holds(compact: str) -> bool:
    """Whether an account number has its country's length and check digits."""
    if len(compact) != IBAN_LENGTH.get(compact[:2]):
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def social_security_numbers(text: str) -> Iterator[Span]:
    """US numbers with hyphens, of areas and groups that are given out."""
    return (m.span() for m in _SSN.finditer(text))


def keys(text: str) -> Iterator[Span]:
    """Credentials, by their issuer's form or by a word beside a value of 3.5 bits of entropy per character or more."""
    yield from (m.span() for m in _KEY.finditer(text))
    yield from (m.span("value") for m in _SECRET.finditer(text) if entropy(m["value"]) >= SECRET_BITS)


def entropy(text: str) -> float:
    """Shannon entropy in bits per character; 0 for an empty text."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


DETECTORS: Mapping[str, Callable[[str], Iterator[Span]]] = {
    "email": emails,
    "phone": phones,
    "ip": addresses,
    "card": cards,
    "iban": ibans,
    "ssn": social_security_numbers,
    "key": keys,
}
"""Kind -> where a text holds such."""


def found(text: str, kind: str) -> list[str]:
    """The finds of a kind, as they are written."""
    return [text[start:stop] for start, stop in DETECTORS[kind](text)]


def masked(text: str, kind: str, is_allowed: Callable[[str], bool] = lambda find: False) -> tuple[str, int]:
    """The text with every find of a kind replaced by `[KIND]`, nothing else changed, and how many there were.

    Finds that overlap are replaced as one.

    Args:
        is_allowed: Which finds stay.
    """
    spans = sorted(span for span in DETECTORS[kind](text) if not is_allowed(text[slice(*span)]))
    parts, end, count = list[str](), 0, 0
    for start, stop in spans:
        if start >= end:
            parts += [text[end:start], f"[{kind.upper()}]"]
            count += 1
        end = max(end, stop)
    return "".join([*parts, text[end:]]), count
