"""A recipe of a user's, for tests."""

from itune_ray.data.ledger import Outcome


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
