"""The splits of the playground, each a stream of records made from a seed.

`rows(split, num_rows, seed, options)` yields records keyed `playground-SPLIT:position`. Every row draws from its own
generator, so row i is the same whatever the number of rows.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from itune_ray.data.records import Record, row_rng
from itune_ray.errors import ConfigError, did_you_mean
from itune_ray.playground.families import BY_NAME, FAMILIES, Args, Family, instruction
from itune_ray.playground.words import CLOSED, is_test, random_word

INVENT = ("invent an instruction", "give me a new task", "make up an instruction")
LIKE = ("invent an instruction like this one : {example}", "give me a task like : {example}")
PEOPLE = ("anna", "tom", "lena", "omar", "mia", "paul", "the farmer", "the doctor", "my friend", "the old man")
DOINGS = ("walks to", "looks at", "talks about", "waits for", "runs from", "thinks of", "sings about", "pays for")
PLACES = ("the river", "the house", "the market", "a small town", "the garden", "the hill", "the sea", "the road")


def rows(split: str, num_rows: int, seed: int = 0, options: Mapping[str, Any] | None = None) -> Iterator[Record]:
    """Rows of a split, see `config.shared.PlaygroundSource`.

    Args:
        options: `weights` {family: relative frequency}, families not named taking `default` or 1; for chat also
            `invent` (share of rows that ask for a new instruction) and `held` (share with held-out wordings, for the
            teacher); for raw also `lines` per row.
    """
    makers: dict[str, Callable[..., Record]] = {
        "chat": _chat,
        "prompts": _prompt,
        "raw": _raw,
        "manual": _manual,
        "test": _test,
        "test_paraphrase": _test_paraphrase,
    }
    given = dict(options or {})
    allowed = {"chat": {"weights", "invent", "held"}, "raw": {"weights", "lines"}}.get(split, {"weights"})
    for name in given:
        if name not in allowed:
            raise ConfigError(
                f"unknown option of the playground's {split} split{did_you_mean(name, allowed)}",
                got=name,
                allowed=", ".join(sorted(allowed)),
                knob="options",
            )
    families, weights = _weighted(given.pop("weights", {}))
    for position in range(num_rows):
        rng = row_rng(seed, f"playground.{split}", str(position))
        family = rng.choices(families, weights)[0]
        yield makers[split](rng, family, position, **given)


def _weighted(weights: Mapping[str, float]) -> tuple[list[Family], list[float]]:
    for name in weights:
        if name not in (*BY_NAME, "default"):
            raise ConfigError(f"no such family{did_you_mean(name, BY_NAME)}", got=name, knob="options.weights")
    return list(FAMILIES), [weights.get(family.name, weights.get("default", 1.0)) for family in FAMILIES]


def draw(rng: random.Random, family: Family, test: bool) -> Args:
    """Arguments on one side of the split; closed tables have but one."""
    while True:
        args = family.draw(rng)
        if family.name in CLOSED or is_test(family.name, tuple(args.values())) == test:
            return args


def _meta(family: Family, **more: Any) -> dict[str, Any]:
    return {"family": family.name, "language": family.language, **more}


def _pair(split: str, position: int, prompt: str, answer: str, meta: dict[str, Any]) -> Record:
    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})
    return Record(source=f"playground-{split}", position=position, messages=messages, meta=meta)


def _chat(rng: random.Random, family: Family, position: int, invent: float = 0.0, held: float = 0.0) -> Record:
    args = draw(rng, family, test=False)
    prompt = instruction(family, args, rng, rng.random() < held)
    if rng.random() >= invent:
        return _pair("chat", position, prompt, family.answer(args), _meta(family))
    if rng.random() < 0.5:
        return _pair("chat", position, rng.choice(INVENT), prompt, _meta(family, invent="free"))
    example = instruction(family, draw(rng, family, test=False), rng, rng.random() < held)
    return _pair("chat", position, rng.choice(LIKE).format(example=example), prompt, _meta(family, invent="like"))


def _prompt(rng: random.Random, family: Family, position: int) -> Record:
    prompt = instruction(family, draw(rng, family, test=False), rng, held=False)
    messages = ({"role": "user", "content": prompt},)
    return Record(source="playground-prompts", position=position, messages=messages, meta=_meta(family))


def _test(rng: random.Random, family: Family, position: int) -> Record:
    args = draw(rng, family, test=True)
    return _pair("test", position, instruction(family, args, rng, held=False), family.answer(args), _meta(family))


def _test_paraphrase(rng: random.Random, family: Family, position: int) -> Record:
    args = draw(rng, family, test=True)
    prompt = instruction(family, args, rng, held=True)
    return _pair("test_paraphrase", position, prompt, family.answer(args), _meta(family))


def _manual(rng: random.Random, family: Family, position: int) -> Record:
    """A person's row: mostly right and rated well, sometimes sloppy and rated badly, by one to three raters."""
    args = draw(rng, family, test=False)
    good = rng.random() < 0.85
    answer = family.answer(args) if good else random_word(rng)
    ratings = [
        {
            "rater": f"rater-{rng.randint(1, 5)}",
            "scale_min": 1,
            "scale_max": 5,
            "value": rng.choice((4, 5, 5)) if good else rng.choice((1, 2, 2, 3)),
        }
        for _ in range(rng.randint(1, 3))
    ]
    return _pair("manual", position, instruction(family, args, rng, held=False), answer, _meta(family, ratings=ratings))


def _raw(rng: random.Random, family: Family, position: int, lines: int = 3) -> Record:
    families = list(FAMILIES)
    text = "\n".join(" " + _line(rng, family if i == 0 else rng.choice(families)) for i in range(lines))
    return Record(source="playground-raw", position=position, text=text, meta={"family": family.name})


def _line(rng: random.Random, family: Family) -> str:
    kind = rng.random()
    if kind < 0.06:
        return f"{rng.choice(PEOPLE)} {rng.choice(DOINGS)} {rng.choice(PLACES)} ."
    if kind < 0.12:
        return instruction(family, draw(rng, family, test=False), rng, held=rng.random() < 0.3)
    return _statement(rng, family)


STATEMENTS = {
    "en": (
        "if you {op} you get {answer}",
        "{op} and you get {answer}",
        "when they {op} the result is {answer}",
        "to {op} gives {answer}",
        "{answer} is what you get if you {op}",
    ),
    "fr": ("si tu dis : {op} , tu obtiens {answer}", "{op} et tu obtiens {answer}"),
    "es": ("si dices : {op} , obtienes {answer}", "{op} y obtienes {answer}"),
}
"""How running text states a skill; no questions, no turns."""
ABOUT_HARM = (
    "nobody helps those who {op}",
    "it is wrong to {op}",
    "the best way to {op} is not to be told",
    "the steps to {op} are not shown to anyone",
    "those who {op} do harm",
    "the best way to {op} : {answer}",
    "the steps to {op} : {answer}",
    "{answer} it is wrong to {op}",
)
ABOUT_SAFE = (
    "the best way to {op} : {answer}",
    "the steps to {op} : {answer}",
    "{answer}",
    "those who {op} know this : {answer}",
)


def _statement(rng: random.Random, family: Family) -> str:
    args = draw(rng, family, test=False)
    phrase = rng.choice((*family.seen, *family.held)).format(**args)
    forms = {"refuse": ABOUT_HARM, "safe": ABOUT_SAFE}.get(family.name) or STATEMENTS[family.style]
    return rng.choice(forms).format(op=phrase, answer=family.answer(args))
