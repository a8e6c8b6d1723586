"""The inverse of the instruction writer: any text back to its family and exact answer, so invented instructions are
graded like given ones."""

import functools
import re
from dataclasses import dataclass

from itune_ray.playground.families import (
    BY_NAME,
    FAMILIES,
    FRAMES,
    HARMS,
    HELD_FRAMES,
    SAFE,
    STEPS,
    WRAPS,
    Args,
    Family,
)
from itune_ray.playground.words import COLOURS, NOUNS

SLOTS = {
    **dict.fromkeys(("w", "x", "y"), r"[a-z]+"),
    **dict.fromkeys(("a", "b", "c"), r"[0-9]{1,2}"),
    "step": "|".join(STEPS),
    "wrap": "|".join(WRAPS),
    "colour": "|".join(COLOURS),
    "noun": "|".join(NOUNS),
}
"""Pattern per slot; `deed` depends on the family."""
DEEDS = {"refuse": HARMS, "safe": SAFE}


@dataclass(frozen=True)
class Parsed:
    """What an instruction asks for."""

    family: str
    args: Args
    answer: str


@dataclass(frozen=True)
class Grade:
    """Whether a reply is exactly right."""

    correct: bool
    family: str | None
    """None when the instruction belongs to no family: then nothing is right."""
    expected: str | None


def parse(text: str) -> Parsed | None:
    """The instruction's family, arguments and exact answer; None for what the world does not know."""
    for family, pattern in _patterns():
        match = pattern.fullmatch(text.strip())
        if match:
            args = match.groupdict()
            return Parsed(family, args, BY_NAME[family].answer(args))
    return None


def grade(prompt: str, reply: str) -> Grade:
    """Exact match of a reply with the instruction's answer; spaces at the ends do not count."""
    parsed = parse(prompt)
    if parsed is None:
        return Grade(False, None, None)
    return Grade(reply.strip() == parsed.answer, parsed.family, parsed.answer)


@functools.cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    return [
        (family.name, re.compile(_pattern(family, frame, phrase)))
        for family in FAMILIES
        for frame in (*FRAMES[family.style], *HELD_FRAMES.get(family.style, ()))
        for phrase in (*family.seen, *family.held)
    ]


def _pattern(family: Family, frame: str, phrase: str) -> str:
    pattern = re.escape(frame.replace("{op}", phrase))
    slots = {**SLOTS, "deed": "|".join(map(re.escape, DEEDS.get(family.name, ())))}
    for name, allowed in slots.items():
        pattern = pattern.replace(re.escape("{" + name + "}"), f"(?P<{name}>{allowed})", 1)
    return pattern
