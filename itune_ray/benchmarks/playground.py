"""Playground: exact match on fresh instances of the built-in world, per instruction family.

Zero-shot is the chat alone. A base model that never saw a chat turn cannot do better than chance there, however able
it is, so its few-shot score stands beside it: k solved examples of the *same* family (as BIG-bench Hard's and MMLU's
few-shot prompts do per task), drawn from the training side of the world's split, so that no example is the question.
They come as plain text by default, an instruction and its answer on alternate lines, each line opened by a space like
the base's own training text, and the reply ends where a new line opens; no wording of that text is borrowed. It is
what prompting alone can get out of the base. `options.shot_format: sentence` joins each into one sentence of the kind
the base was trained on ("... and you get ..."), which asks what it knows rather than what a foreign prompt gets out of
it; `chat` writes chat turns, the fairer form for a model tuned on chats.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from itune_ray.benchmarks.base import Benchmark, Grade, Item, Metric, Reply, share
from itune_ray.config.evaluate import PlaygroundBenchmark
from itune_ray.data.records import Message, Record, row_rng
from itune_ray.errors import ConfigError
from itune_ray.playground import parser
from itune_ray.playground.families import FAMILIES
from itune_ray.playground.sets import rows

SHOT_FORMATS = ("text", "sentence", "chat")
LINE = "\n "
"""Opens a line of text; inside an answer of several lines none begins with a space."""
POOL = 64
"""Solved examples per family to draw shots from."""
GROUPS = {"refuse": ("unsafe requests refused",), "safe": ("safe look-alikes answered",)}
"""Families worth a line of their own: refusing everything must not look like safety."""


class Playground(Benchmark):
    """Right is the exact answer, white space at its ends aside."""

    version = "1"
    metrics = (Metric("exact_match", "share", share, "share of replies equal to the one right answer", binary=True),)

    def __init__(self, config: PlaygroundBenchmark, name: str):
        super().__init__(name)
        self.config = config
        options = dict(config.options)
        self._shot_format = options.pop("shot_format", "text")
        self._options = options
        if self._shot_format not in SHOT_FORMATS:
            raise ConfigError(
                "no such format of solved examples",
                got=self._shot_format,
                allowed=", ".join(SHOT_FORMATS),
                knob="benchmarks.N.options.shot_format",
            )

    def items(self) -> Sequence[Item]:
        config = self.config
        return [self._item(record) for record in rows(config.split, config.rows, config.seed, self._options)]

    def grade(self, item: Item, reply: Reply) -> Grade:
        ok = reply.text.strip() == item.reference.strip()
        return Grade(score=float(ok), ok=ok, sums={"exact_match": (float(ok), 1.0)})

    def settings(self) -> dict[str, Any]:
        config = self.config
        facts: dict[str, Any] = {
            "split": config.split,
            "rows": config.rows,
            "seed": config.seed,
            "shots": config.shots,
        }
        return facts | ({"shot_format": self._shot_format} if config.shots else {}) | self._options

    def _item(self, record: Record) -> Item:
        family = str(record.meta["family"])
        shots = self._shots(record, family)
        prompt: dict[str, Any] = {"messages": (*_turns(shots), *record.prompt)}
        if shots and self._shot_format != "chat":
            write = _as_text if self._shot_format == "text" else _as_sentences
            prompt = {"text": write(shots, record), "stop": (LINE,)}
        return Item(
            key=record.key, reference=record.response or "", category=family, groups=GROUPS.get(family, ()), **prompt
        )

    def _shots(self, record: Record, family: str) -> list[Record]:
        if not self.config.shots:
            return []
        rng = row_rng(self.config.seed, "playground.shots", record.key)
        return rng.sample(solved_examples(family, self.config.seed, max(POOL, self.config.shots)), self.config.shots)


def grade_reply(prompt: str, reply: str, meta: Mapping[str, Any]) -> float:
    """1 for the exact answer to an instruction of the world, given or invented, else 0."""
    return float(parser.grade(prompt, reply).correct)


@functools.cache
def solved_examples(family: str, seed: int, number: int) -> tuple[Record, ...]:
    """Instructions of one family with their answers, from the training side of the split."""
    weights: Mapping[str, float] = {known.name: float(known.name == family) for known in FAMILIES}
    return tuple(rows("chat", number, seed, {"weights": weights}))


def _turns(shots: Sequence[Record]) -> list[Message]:
    return [message for shot in shots for message in shot.messages]


def _as_text(shots: Sequence[Record], question: Record) -> str:
    """` instruction\\n answer\\n instruction\\n answer\\n instruction\\n`."""
    lines = [message["content"] for message in (*_turns(shots), *question.prompt)]
    return " " + LINE.join(lines) + "\n"


def _as_sentences(shots: Sequence[Record], question: Record) -> str:
    """` instruction and you get answer\n ... instruction and you get`, for the base to finish."""
    solved = [f"{shot.messages[0]['content']} and you get {shot.response}" for shot in shots]
    return " " + LINE.join([*solved, f"{question.messages[0]['content']} and you get"])
