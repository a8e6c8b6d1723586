"""Token-level augmentation of instructions, leaving protected spans alone (Easy Data Augmentation, Wei and Zou 2019),
and the gates that a reworded instruction must pass (survey eq. 17-19, methods D25)."""

import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from itune_ray.generate.novelty import nearest, tokens_of
from itune_ray.generate.stop_words import STOP_WORDS
from itune_ray.generate.synonyms import SYNONYMS

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
NEGATIONS = frozenset(
    _WORD.findall(
        "not no never none nothing nobody neither nor without cannot except unless hardly can't don't doesn't didn't "
        "won't isn't aren't wasn't weren't shouldn't mustn't couldn't wouldn't hasn't haven't hadn't"
    )
)
_NUMBER_WORDS: Mapping[str, str] = {
    word: str(value)
    for value, word in enumerate(_WORD.findall("two three four five six seven eight nine ten eleven twelve"), start=2)
}
"""`one` is left out: it is a pronoun more often than a number."""
PROTECTED = re.compile(
    r"```.*?(?:```|\Z)"  # fenced code
    r"|`[^`\n]*`"
    r"|https?://\S+|www\.\S+"
    r'|"[^"]*"|“[^”]*”|«[^»]*»|(?<!\w)\'[^\'\n]*\'(?!\w)'  # quotations
    r"|\{\{.*?\}\}|\{[^{}\n]*\}|<[^<>\n]+>|\[[^\[\]\n]*\]"  # slots
    r"|\S*\d\S*",  # numbers, with what is written together with them
    re.DOTALL,
)


class Pieces(NamedTuple):
    """A text cut so that its words can be changed: gaps[0] words[0] gaps[1] ... words[n-1] gaps[n]."""

    gaps: tuple[str, ...]
    """What stands between the words: spaces, punctuation and protected spans."""
    words: tuple[str, ...]
    """Words that may be changed."""

    def text(self) -> str:
        """The text again."""
        return self.gaps[0] + "".join(word + gap for word, gap in zip(self.words, self.gaps[1:], strict=True))


def cut(text: str) -> Pieces:
    """Words that may change, and the gaps between them.

    Code, quotations, URLs, template slots and numbers are protected, and so are negations and the word after each.
    """
    spans = [match.span() for match in PROTECTED.finditer(text)]
    gaps, words, end, after_negation = [], [], 0, False
    for match in _WORD.finditer(text):
        if any(start < match.end() and match.start() < stop for start, stop in spans):
            continue
        is_negation = match[0].lower().replace("’", "'") in NEGATIONS
        if not is_negation and not after_negation:
            gaps.append(text[end : match.start()])
            words.append(match[0])
            end = match.end()
        after_negation = is_negation
    return Pieces((*gaps, text[end:]), tuple(words))


def budget(share: float, count: int) -> int:
    """n = max(1, floor(share count)), and 0 for a share of 0."""
    return max(1, int(share * count)) if share > 0 and count else 0


def synonym(pieces: Pieces, share: float, rng: random.Random) -> Pieces:
    """n words that have synonyms and are no stop words, each replaced by one of them."""
    words = list(pieces.words)
    places = [i for i, word in enumerate(words) if _synonyms(word)]
    for i in rng.sample(places, min(budget(share, len(words)), len(places))):
        words[i] = _cased(rng.choice(_synonyms(words[i])), words[i])
    return pieces._replace(words=tuple(words))


def insert(pieces: Pieces, share: float, rng: random.Random) -> Pieces:
    """n times a synonym of some word of the text is put before some word of it."""
    gaps, words = list(pieces.gaps), list(pieces.words)
    known = [word for word in words if _synonyms(word)]
    for _ in range(budget(share, len(words)) if known else 0):
        new = rng.choice(_synonyms(rng.choice(known)))
        place = rng.randrange(1, len(words)) if len(words) > 1 else len(words) - 1
        gaps.insert(place + 1, " ")
        words.insert(place, new)
    return Pieces(tuple(gaps), tuple(words))


def swap(pieces: Pieces, share: float, rng: random.Random) -> Pieces:
    """n times two words change places."""
    words = list(pieces.words)
    for _ in range(budget(share, len(words))):
        swap_once(words, rng)
    return pieces._replace(words=tuple(words))


def swap_once(words: list[str], rng: random.Random) -> None:
    """Two places drawn one after the other; where three draws give the first again nothing is swapped."""
    first = rng.randint(0, len(words) - 1)
    for _ in range(3):
        second = rng.randint(0, len(words) - 1)
        if second != first:
            words[first], words[second] = words[second], words[first]
            return


def kept_words(count: int, share: float, rng: random.Random) -> list[int]:
    """Which words a deletion leaves: each goes with probability `share`; of all that went, one comes back."""
    if count <= 1:
        return list(range(count))
    kept = [i for i in range(count) if rng.uniform(0, 1) > share]
    return kept or [rng.randint(0, count - 1)]


def delete(pieces: Pieces, share: float, rng: random.Random) -> Pieces:
    """Each word goes with probability `share`, at least one stays."""
    return _without(pieces, kept_words(len(pieces.words), share, rng) if share > 0 else range(len(pieces.words)))


def mask(pieces: Pieces, share: float, rng: random.Random, text: str | None = "___") -> Pieces:
    """Each word that is no stop word is hidden with probability `share`: by a text, or dropped for None."""
    words = pieces.words
    hidden = {i for i, word in enumerate(words) if word.lower() not in STOP_WORDS and rng.random() < share}
    if hidden and len(hidden) == len(words):
        hidden.discard(rng.randrange(len(words)))
    if text is None:
        return _without(pieces, [i for i in range(len(words)) if i not in hidden])
    return pieces._replace(words=tuple(text if i in hidden else word for i, word in enumerate(words)))


OPERATORS: Mapping[str, Callable[[Pieces, float, random.Random], Pieces]] = {
    "synonym": synonym,
    "insert": insert,
    "swap": swap,
    "delete": delete,
    "mask": mask,
}


def due(position: int, share: float) -> int:
    """Variants of the row at a position, so that of the first n rows and their variants no more than `share` are
    variants: floor((i + 1) b) - floor(i b) with b = share / (1 - share)."""
    exact = Fraction(str(share))
    ratio = exact / (1 - exact)
    return int((position + 1) * ratio) - int(position * ratio)


# --- gates on rewordings ---------------------------------------------------------------------------------------------


def broken_gate(original: str, reworded: str, max_rouge: float) -> str | None:
    """Which gate a rewording does not pass: `copy`, `numbers_changed`, `negation_changed` or `names_changed`."""
    if nearest(tokens_of(reworded), [tokens_of(original)], max_rouge).is_near:
        return "copy"
    if numbers(original) != numbers(reworded):
        return "numbers_changed"
    if negations(original) != negations(reworded):
        return "negation_changed"
    return "names_changed" if names(original, reworded) or names(reworded, original) else None


def numbers(text: str) -> Counter[str]:
    """Numbers of a text, two to twelve also where they are written as words."""
    found = [number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", text)]
    return Counter(found + [_NUMBER_WORDS[w] for w in re.findall(r"[a-z]+", text.lower()) if w in _NUMBER_WORDS])


def negations(text: str) -> int:
    """Words that negate."""
    return sum(word.lower().replace("’", "'") in NEGATIONS for word in _WORD.findall(text))


def names(text: str, other: str) -> set[str]:
    """Names of a text, capitalised within a sentence, that another text does not hold."""
    found = set(re.findall(r"(?<![.!?:\n])[ \t]([A-Z]\w+)", text.strip()))
    return found - set(re.findall(r"\w+", other))


def _without(pieces: Pieces, kept: Sequence[int]) -> Pieces:
    """Only these words; where one goes, one of the spaces around it goes too."""
    gaps, words = [pieces.gaps[0]], []
    held = set(kept)
    for i, word in enumerate(pieces.words):
        after = pieces.gaps[i + 1]
        if i in held:
            words.append(word)
            gaps.append(after)
        elif after[:1].isspace() and (not gaps[-1] or gaps[-1][-1:].isspace()):
            gaps[-1] += after[1:]
        elif gaps[-1][-1:] == " " and after[:1] in (".", ",", "!", "?", ";", ":", ""):
            gaps[-1] = gaps[-1][:-1] + after
        else:
            gaps[-1] += after
    return Pieces(tuple(gaps), tuple(words))


def _synonyms(word: str) -> tuple[str, ...]:
    return () if word.lower() in STOP_WORDS else SYNONYMS.get(word.lower(), ())


def _cased(word: str, like: str) -> str:
    return word.capitalize() if like[:1].isupper() else word
