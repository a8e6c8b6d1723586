"""From a request to token ids, and the checks that keep one bad prompt from the engine."""

from typing import TYPE_CHECKING, Any

from itune_ray.config.shared import Thinking
from itune_ray.data.chat import ChatRenderer, UnusableRow
from itune_ray.engine.base import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BadPromptError(Exception):
    """A prompt that no engine can complete; the text starts with a reason that can be counted."""


class PromptEncoder:
    """Renders with the project's one renderer and refuses what does not fit.

    Args:
        tokenizer: The model's tokenizer.
        template: Chat template instead of the tokenizer's own.
        max_model_len: Tokens of prompt plus answer.
        thinking: What becomes of thoughts.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None,
        max_model_len: int,
        thinking: Thinking = "keep",
    ):
        self._tokenizer: Any = tokenizer
        self._renderer = ChatRenderer(tokenizer, template, thinking)
        self._max_model_len = max_model_len

    def encode(self, request: Request) -> list[int]:
        """Token ids of the prompt, leaving room for one new token; raises `BadPromptError`."""
        ids = self._ids(request)
        if not ids:
            raise BadPromptError("empty_prompt: no token to continue")
        self.check_length(len(ids))
        return ids

    def check_length(self, tokens: int) -> None:
        """Raise `BadPromptError` for a prompt that leaves no room for one new token."""
        if tokens + 1 > self._max_model_len:
            raise BadPromptError(f"prompt_too_long: {tokens} tokens, max_model_len {self._max_model_len}")

    def _ids(self, request: Request) -> list[int]:
        if request.token_ids is not None:
            return list(request.token_ids)
        if request.text is not None:
            bos = self._tokenizer.bos_token_id
            ids: list[int] = self._tokenizer(request.text, add_special_tokens=False)["input_ids"]
            return ids if bos is None else [bos, *ids]
        messages = request.messages or ()
        try:
            if messages and messages[-1]["role"] == "assistant":
                return self._renderer.training_ids(messages, "all").input_ids
            return self._renderer.prompt_ids(messages)
        except UnusableRow as error:
            raise BadPromptError(f"{error.reason}: {error}") from None
