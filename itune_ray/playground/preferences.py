"""Preferences over the playground's instructions, made from a seed: right answers against wrong ones.

A wrong answer is the right one to other arguments of the same family, so that only its content gives it away. Each
function is the `import_path` of a custom source; row i is the same whatever the number of rows.
"""

import random
from collections.abc import Iterator
from dataclasses import replace

from itune_ray.data.records import Record, row_rng
from itune_ray.playground.families import FAMILIES, Family, instruction
from itune_ray.playground.sets import draw
from itune_ray.playground.words import random_word

TRIES = 20
"""Draws of other arguments before a family with few answers gets a random word instead."""


def pairs(rows: int, seed: int = 0) -> Iterator[Record]:
    """An instruction with its right answer, and a wrong one it was preferred to."""
    for position in range(rows):
        record, (wrong, _) = _drawn(position, seed)
        yield replace(record, rejected=wrong)


def labelled(rows: int, seed: int = 0) -> Iterator[Record]:
    """An instruction with a right answer and `label` true, or with a wrong one and `label` false, evenly."""
    for position in range(rows):
        record, (wrong, _) = _drawn(position, seed)
        good = row_rng(seed, "playground.label", str(position)).random() < 0.5
        answer = record.messages[-1]["content"] if good else wrong
        messages = (*record.prompt, {"role": "assistant", "content": answer})
        yield replace(record, messages=messages, meta={**record.meta, "label": good})


def ranked(rows: int, seed: int = 0) -> Iterator[Record]:
    """An instruction with three `responses`: the right one (score 2), a wrong one (1) and a random word (0)."""
    for position in range(rows):
        record, (wrong, noise) = _drawn(position, seed)
        answers = (record.messages[-1]["content"], wrong, noise)
        listed = [{"response": answer, "score": 2 - i} for i, answer in enumerate(answers)]
        yield replace(record, meta={**record.meta, "responses": listed})


def _drawn(position: int, seed: int) -> tuple[Record, tuple[str, str]]:
    """A chat with the right answer, a wrong answer, and a random word; all three differ."""
    rng = row_rng(seed, "playground.preferences", str(position))
    family = rng.choice(FAMILIES)
    args = draw(rng, family, test=False)
    right = family.answer(args)
    messages = (
        {"role": "user", "content": instruction(family, args, rng, held=False)},
        {"role": "assistant", "content": right},
    )
    wrong = _wrong(rng, family, right)
    noise = next(word for word in iter(lambda: random_word(rng), None) if word not in (right, wrong))
    meta = {"family": family.name, "language": family.language}
    return Record(source="playground-preferences", position=position, messages=messages, meta=meta), (wrong, noise)


def _wrong(rng: random.Random, family: Family, right: str) -> str:
    for _ in range(TRIES):
        if (answer := family.answer(draw(rng, family, test=False))) != right:
            return answer
    return next(word for word in iter(lambda: random_word(rng), None) if word != right)
