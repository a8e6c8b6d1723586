"""Surface forms of a task: how an instruction and its input become one prompt (Self-Instruct step 5, methods D08)."""

import random
import re
from typing import NamedTuple

WITH_INPUT = (
    "{instruction}\n\n{input}",
    "{instruction}\n\nInput: {input}",
    "{instruction}\n\nInput: {input}\n\nOutput:",
    "{instruction}\n{input}\n\nAnswer:",
    "Task: {instruction}\n\n{input}",
    "Task: {instruction}\nInput: {input}\nOutput:",
    "{input}\n\n{instruction}",
)
WITHOUT_INPUT = (
    "{instruction}",
    "{instruction}\n\nOutput:",
    "{instruction}\n\nAnswer:",
    "Task: {instruction}",
    "Task: {instruction}\nOutput:",
    "Here is a task.\n\n{instruction}",
)
_LABEL = re.compile(r"(?m)^[ \t]*[^\W\d_][\w ]{0,30}:[ \t]*")


class Encoded(NamedTuple):
    """A prompt, and what was drawn for it."""

    prompt: str
    form: int
    """Index in `WITH_INPUT` or `WITHOUT_INPUT`."""
    is_unlabelled: bool
    """Whether a field label was taken off the input."""


def encode(instruction: str, input: str, rng: random.Random) -> Encoded:
    """A task in one of the forms, each as likely; half of the inputs with a single field label lose it."""
    forms = WITH_INPUT if input else WITHOUT_INPUT
    form = rng.randrange(len(forms))
    bare = without_label(input)
    is_unlabelled = bare is not None and rng.random() < 0.5
    shown = bare if bare is not None and is_unlabelled else input
    # Not str.format, which would read braces of the task.
    parts = {"{instruction}": instruction, "{input}": shown}
    prompt = re.sub(r"\{instruction\}|\{input\}", lambda match: parts[match[0]], forms[form])
    return Encoded(prompt, form, is_unlabelled)


def without_label(input: str) -> str | None:
    """An input that opens with its only `name:`, without it and with single line ends; None for any other."""
    labels = list(_LABEL.finditer(input))
    if len(labels) != 1 or labels[0].start() != 0:
        return None
    bare = input[labels[0].end() :].strip().replace("\n\n", "\n")
    return bare or None
