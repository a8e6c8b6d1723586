"""Thoughts that a reasoning model writes before its answer, between `<think>` and `</think>`: kept, left out or cut."""

from typing import Any

OPEN, CLOSE = "<think>", "</think>"
"""What encloses thoughts; a chat template may itself write the opening one, so that a reply holds only the other."""


def answer_of(text: str) -> str:
    """What follows the last thought, without line breaks before it: the text itself where there is no thought, and
    nothing where a thought is opened and never closed."""
    before, closed, answer = text.rpartition(CLOSE)
    if closed:
        return answer.lstrip("\n")
    return answer if not answer.lstrip().startswith(OPEN) else before


def within_budget(text: str, budget: int, tokenizer: Any) -> str:
    """The text with its thought cut after its first `budget` tokens, as an engine cuts it; an answer stays whole."""
    before, opened, rest = text.partition(OPEN)
    thought, closed, answer = rest.partition(CLOSE)
    if not (opened and closed):
        return text
    ends = [end for _, end in tokenizer(thought, add_special_tokens=False, return_offsets_mapping=True).offset_mapping]
    if len(ends) <= budget:
        return text
    return f"{before}{OPEN}{thought[: ends[budget - 1]]}{CLOSE}{answer}"
