"""A recipe of a user's, for tests."""

from itune_ray.data.ledger import Outcome


def first_digit(prompt: str, answer: str, meta: dict) -> float:
    """A grader: the fake engine's answers open with a hash."""
    return int(answer[0], 16) / 15


class Echo:
    """Says a word back; raises on request."""

    version = 1
    requires = ("messages",)
    provides = ("text",)
    rows_per_input = 1
    prompts: dict[str, str] = {}

    def __init__(self, word: str = "echo"):
        self.word = word

    async def __call__(self, row, llm):
        """One accepted row, whatever the input."""
        if row.position == 13:
            raise ValueError("unlucky\nrow")
        return [Outcome(record=row, input_key=row.key, status="accepted")]
