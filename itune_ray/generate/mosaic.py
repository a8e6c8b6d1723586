"""Mosaic-IT: k rows as one that holds k tasks, with a rule on how to answer them (Li et al. 2024, survey eq. 28-30).

I_mix = f(I_1..I_k), R_mix = g(R_1..R_k): f numbers the tasks and prints the rule, g follows it. No model is asked, so a
reader who follows what is printed gets exactly the answers back.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Strategy = Literal["format", "order", "mask"]
Grouping = Literal["uniform", "fixed", "fill", "exponential", "pareto", "log_normal", "logistic"]


class Pair(NamedTuple):
    """One row as a task and its answer."""

    instruction: str
    response: str


@dataclass(frozen=True)
class Mosaic:
    """k rows composed into one."""

    instruction: str
    response: str
    rule: str
    """`format`, `order.<rule>` or `mask.<rule>`."""
    kept: tuple[int, ...]
    """0-based items in the order in which they are answered; what a mask leaves out is missing."""


# --- rules -----------------------------------------------------------------------------------------------------------

ORDER_RULES = {
    "fix": "in this order of their numbers: {listed}",
    "reverse": "in reverse, from the last to the first",
    "alpha": "sorted alphabetically by their whole text, with A to Z before a to z",
    "reverse_alpha": "sorted alphabetically backwards by their whole text, with z to a before Z to A",
    "length_word": "from the fewest words to the most, equally long ones as they stand",
    "reverse_length_word": "from the most words to the fewest, equally long ones as they stand",
    "length_char": "from the fewest characters to the most, equally long ones as they stand",
    "reverse_length_char": "from the most characters to the fewest, equally long ones as they stand",
    "odd_even": "with the odd numbers first and the even ones after them",
    "even_odd": "with the even numbers first and the odd ones after them",
}
"""How answers are ordered: rule -> how it is printed."""
MASK_RULES = {
    "fix": "those with these numbers: {listed}",
    "word_long": "the {count} with the most words, the earlier of equally long ones first",
    "word_short": "the {count} with the fewest words, the earlier of equally long ones first",
    "odd": "those with odd numbers",
    "even": "those with even numbers",
}
"""Which items stay unanswered: rule -> how it is printed."""


def ordered(rule: str, instructions: Sequence[str], permutation: Sequence[int] = ()) -> tuple[int, ...]:
    """0-based items in the order that a rule asks for.

    Alphabetical order is that of the whole text by code points, so capitals come before small letters; equal items keep
    their order under every rule.

    Args:
        rule: One of `ORDER_RULES`.
        instructions: The tasks, in the order in which they stand.
        permutation: What `fix` prints, 1-based.
    """
    items = range(len(instructions))
    sort_keys: dict[str, Callable[[int], object]] = {
        "reverse": lambda i: -i,
        "alpha": lambda i: instructions[i],
        "length_word": lambda i: len(instructions[i].split()),
        "length_char": lambda i: len(instructions[i]),
        "odd_even": lambda i: i % 2,
        "even_odd": lambda i: 1 - i % 2,
    }
    if rule == "fix":
        return tuple(number - 1 for number in permutation)
    if rule in sort_keys:
        return tuple(sorted(items, key=sort_keys[rule]))  # type: ignore[arg-type]
    return tuple(sorted(items, key=sort_keys[rule.removeprefix("reverse_")], reverse=True))  # type: ignore[arg-type]


def masked(rule: str, instructions: Sequence[str], count: int, listed: Sequence[int] = ()) -> tuple[int, ...]:
    """0-based items that a rule leaves unanswered, in ascending order.

    Args:
        rule: One of `MASK_RULES`.
        instructions: The tasks, in the order in which they stand.
        count: How many `word_long` and `word_short` leave out.
        listed: What `fix` prints, 1-based.
    """
    items = range(len(instructions))
    if rule == "fix":
        return tuple(sorted(number - 1 for number in listed))
    if rule in ("odd", "even"):
        return tuple(items[0 if rule == "odd" else 1 :: 2])
    longest = rule == "word_long"
    by_words = sorted(items, key=lambda i: len(instructions[i].split()), reverse=longest)
    return tuple(sorted(by_words[:count]))


def mask_count(k: int, share: float) -> int:
    """m = max(floor(k u), 1)."""
    return max(math.floor(k * share), 1)


# --- wordings --------------------------------------------------------------------------------------------------------

NUMBERS = ("{}", "({})", "[{}]", "<{}>", "{{{}}}", "#{}", "No. {}", "Item {}", "Task {}", "Part {}")
PUNCTUATION = (".", ":", " -")
NUMBER_GAPS = (" ", "\n")
MARKER_WORDS = (
    ("BEGIN", "END"),
    ("START", "STOP"),
    ("START", "END"),
    ("OPEN", "CLOSE"),
    ("FROM HERE", "TO HERE"),
    ("FIRST WORD", "LAST WORD"),
    ("ANSWER", "END OF ANSWER"),
    ("REPLY", "END OF REPLY"),
    ("RESPONSE", "END OF RESPONSE"),
    ("HEAD", "TAIL"),
    ("ENTER", "LEAVE"),
    ("IN", "OUT"),
    ("TOP", "BOTTOM"),
    ("INTRO", "OUTRO"),
    ("TAKE OFF", "LAND"),
    ("SUNRISE", "SUNSET"),
    ("ALPHA", "OMEGA"),
)
MARKER_SHAPES = tuple(
    left * times + "{}" + right * times
    for left, right in (
        ("(", ")"),
        ("[", "]"),
        ("+", "+"),
        ("<", ">"),
        ("|", "|"),
        ("*", "*"),
        ("_", "_"),
        ("=", "="),
        ("^", "^"),
    )
    for times in (1, 2, 3)
)
"""Braces and tildes are not among them: a word in braces is an unfilled slot of a template (invariant I6), and three
tildes open a fence."""
_MARKER_OPENINGS = (
    "Open each answer with {begin} and close it with {end}.",
    "Put {begin} before each answer and {end} after it.",
    "Every answer stands between {begin} and {end}.",
    "Each answer begins with the mark {begin} and ends with the mark {end}.",
    "Enclose every answer: {begin} in front, {end} at its end.",
    "Use {begin} where an answer starts and {end} where it stops.",
)
_TASK_WORDS = (
    "Several tasks are given, each with a number. ",
    "Answer the numbered tasks one by one. ",
    "Treat each numbered task for itself. ",
    "Keep the number of the task with its answer. ",
    "Give each task an answer of its own. ",
)
MARKER_WORDINGS = tuple(opening + rest for opening in _TASK_WORDS for rest in _MARKER_OPENINGS)
PLAIN_WORDINGS = (
    "Answer each of the numbered tasks.",
    "Several tasks are given; answer them all under their numbers.",
    "Respond to every task, and number the answers as the tasks are numbered.",
    "Each numbered task needs an answer of its own.",
    "Work through the list and label each answer with the number of its task.",
    "Give one answer per task, with the same number.",
    "Take the tasks one by one and answer each.",
)
ORDER_WORDINGS = (
    "Answer the tasks {rule}.",
    "Give the answers {rule}.",
    "The answers must come {rule}.",
    "Arrange what you answer {rule}.",
    "Do not keep the given order; answer {rule}.",
)
MASK_WORDINGS = (
    "Leave some tasks without an answer: {rule}.",
    "Do not answer {rule}.",
    "Skip {rule}.",
    "Answer all tasks but {rule}.",
    "Pass over {rule}, and answer the rest.",
)
LIST_BRACKETS = ("{}", "({})", "[{}]", "<{}>", "{{{}}}", "|{}|", '"{}"', "'{}'")
LIST_SEPARATORS = (", ", ",", " ", "; ", " - ", " / ", " > ")


# --- composing -------------------------------------------------------------------------------------------------------


def compose(pairs: Sequence[Pair], rng: random.Random, strategies: Sequence[Strategy]) -> Mosaic:
    """One row of k, every choice drawn anew; k = 1 has no order and no mask, so only a format.

    Items are always numbered, since every rule speaks of their numbers, and an answer carries the tag of its task.
    """
    instructions = [pair.instruction for pair in pairs]
    strategy: Strategy = rng.choice(strategies) if len(pairs) > 1 else "format"
    tag = f"{rng.choice(NUMBERS)}{rng.choice(PUNCTUATION)}{rng.choice(NUMBER_GAPS)}"
    tags = [tag.format(number) for number in range(1, len(pairs) + 1)]
    wording, begin, end = _format_wording(rng)
    rule, clause, kept = _drawn_rule(strategy, instructions, rng)
    wording = " ".join(part for part in (wording, clause) if part)
    listed = ("\n" * rng.choice((1, 2))).join(t + text for t, text in zip(tags, instructions, strict=True))
    answers = [f"{tags[i]}{begin}{pairs[i].response}{end}" for i in kept]
    return Mosaic(_laid_out(wording, listed, rng), "\n\n".join(answers), rule, kept)


def _format_wording(rng: random.Random) -> tuple[str, str, str]:
    """What is said of the format, and the marks before and after each answer."""
    if rng.random() < 0.5:
        shape, words = rng.choice(MARKER_SHAPES), rng.choice(MARKER_WORDS)
        is_lower = rng.random() < 0.5
        begin, end = (shape.format(word.lower() if is_lower else word) for word in words)
        return rng.choice(MARKER_WORDINGS).format(begin=begin, end=end), begin, end
    return ("" if rng.random() < 0.5 else rng.choice(PLAIN_WORDINGS)), "", ""


def _drawn_rule(
    strategy: Strategy, instructions: Sequence[str], rng: random.Random
) -> tuple[str, str, tuple[int, ...]]:
    """Name of the rule, how it is printed, and the items in the order of their answers."""
    k = len(instructions)
    if strategy == "order":
        rule = rng.choice(tuple(ORDER_RULES))
        permutation = rng.sample(range(1, k + 1), k)
        clause = ORDER_RULES[rule].format(listed=_listed(permutation, rng))
        return f"order.{rule}", rng.choice(ORDER_WORDINGS).format(rule=clause), ordered(rule, instructions, permutation)
    if strategy == "mask":
        rule, count = rng.choice(tuple(MASK_RULES)), mask_count(k, rng.uniform(0.1, 0.5))
        listed = rng.sample(range(1, k + 1), count)
        left_out = masked(rule, instructions, count, listed)
        clause = MASK_RULES[rule].format(listed=_listed(listed, rng), count=count)
        kept = tuple(i for i in range(k) if i not in left_out)
        return f"mask.{rule}", rng.choice(MASK_WORDINGS).format(rule=clause), kept
    return "format", "", tuple(range(k))


def _listed(numbers: Sequence[int], rng: random.Random) -> str:
    return rng.choice(LIST_BRACKETS).format(rng.choice(LIST_SEPARATORS).join(map(str, numbers)))


def _laid_out(wording: str, listed: str, rng: random.Random) -> str:
    """The wording before or after the tasks, one line break or two between them."""
    gap, is_before = "\n" * rng.choice((1, 2)), rng.random() < 0.5
    if not wording:
        return listed
    return f"{wording}{gap}{listed}" if is_before else f"{listed}{gap}{wording}"


# --- grouping --------------------------------------------------------------------------------------------------------


def group_size(grouping: Grouping, largest: int, rng: random.Random) -> int | None:
    """How many rows to put together, in 1..`largest`; None for as many as fit.

    `exponential`, `pareto` (from 0 on, shape 1), `log_normal` (0, 1) and `logistic` (scale 2): `largest` - floor(Z).
    """
    if grouping == "fill":
        return None
    if grouping == "fixed":
        return largest
    if grouping == "uniform":
        return rng.randint(1, largest)
    draws: dict[str, Callable[[], float]] = {
        "exponential": lambda: rng.expovariate(1.0),
        "pareto": lambda: rng.paretovariate(1.0) - 1,
        "log_normal": lambda: rng.lognormvariate(0.0, 1.0),
        "logistic": lambda: _logistic(rng, 2.0),
    }
    return min(largest, max(1, largest - math.floor(draws[grouping]())))


def _logistic(rng: random.Random, scale: float) -> float:
    u = min(max(rng.random(), 1e-12), 1 - 1e-12)
    return scale * math.log(u / (1 - u))


def grouped(
    pairs: Sequence[Pair],
    rng: random.Random,
    *,
    size: Callable[[random.Random], int | None],
    strategies: Sequence[Strategy],
    fits: Callable[[Mosaic], bool],
) -> list[tuple[int, int, Mosaic | None]]:
    """(start, stop, mosaic) over consecutive rows, each used once; None for a row that does not fit by itself.

    A group grows by one row at a time, all choices drawn again each time, until it has its size or no longer fits; the
    last version that fits stays.
    """
    groups: list[tuple[int, int, Mosaic | None]] = []
    start = 0
    while start < len(pairs):
        wanted, best, stop = size(rng), None, start + 1
        last = len(pairs) if wanted is None else min(len(pairs), start + wanted)
        for end in range(start + 1, last + 1):
            mosaic = compose(pairs[start:end], rng, strategies)
            if not fits(mosaic):
                break
            best, stop = mosaic, end
        groups.append((start, stop, best))
        start = stop
    return groups
