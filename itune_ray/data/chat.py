"""The one place where chats become token ids: training, generation and evaluation all render here.

A template that marks its assistant turns with `{% generation %}` says itself which tokens the model writes. Most stock
templates do not, so the spans then come from prefix differences: the turn is what rendering up to and including it
adds to rendering up to it with the generation prompt. That holds only while the template is append-only; a template
that rewrites earlier turns (Qwen3 drops old `<think>` blocks) is refused with a reason rather than mislabelled.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jinja2

from itune_ray.config.shared import Thinking, ThinkingBudget
from itune_ray.data.images import IMAGES
from itune_ray.data.records import Message, Record
from itune_ray.data.thinking import answer_of, within_budget
from itune_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["assistant", "last_assistant", "all"]
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class UnusableRow(DataError):  # noqa: N818  named for the row, whose reason it carries
    """A row that cannot become training tokens; `reason` is the code it is quarantined under."""

    reason: ClassVar[str] = "unusable"


class NoAnswer(UnusableRow):
    """The chat has no assistant turn, or an empty last one."""

    reason = "no_answer"


class NoSupervisedTokens(UnusableRow):
    """Rendering worked, but no token would be trained."""

    reason = "no_supervised_tokens"


class TemplateRewritesHistory(UnusableRow):
    """Rendering more turns changed the rendering of earlier ones, so spans cannot be told."""

    reason = "template_rewrites_history"


class TemplateRefused(UnusableRow):
    """The template itself raised, e.g. because roles do not alternate."""

    reason = "template_refused"


class ControlTokens(UnusableRow):
    """The text of a turn holds a special token of the model: rendered, it would open or close turns by itself."""

    reason = "control_tokens"


_WORDS = "\ue000"
"""Stands for a user's words: a character that no text uses."""


class Rendered(NamedTuple):
    """Token ids of one document and, per token, whether it is a training target."""

    input_ids: list[int]
    supervised: list[bool]


class AnswerTokens(NamedTuple):
    """The final answer of a chat as the template renders it, with what stands before it."""

    prompt: list[int]
    """Every token before the answer."""
    opening: list[int]
    """The last of them, by which the template opens the assistant's turn; empty where it writes nothing there."""
    answer: list[int]
    """The answer with its end-of-turn token."""


class ChatRenderer:
    """Chat messages and texts to token ids, equal token for token to `tokenizer.apply_chat_template`.

    Args:
        tokenizer: A transformers tokenizer.
        template: A Jinja chat template, or a path to a file that holds one; default: the tokenizer's own. It is set
            on the tokenizer too, so that an exported model carries the template it was trained with.
        thinking: What becomes of thoughts in assistant turns. A template that knows `enable_thinking` (its prompt then
            opens a thought or an answer) is told false by `strip` and true by a budget.
        sees: Whether the model is shown a row's images; else they are left out.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str | None = None,
        thinking: Thinking = "keep",
        sees: bool = False,
    ):
        self.tokenizer: Any = tokenizer
        self.sees = sees
        self._thinking: Thinking = thinking
        self._told: dict[str, Any] = {} if thinking == "keep" else {"enable_thinking": thinking != "strip"}
        if template is not None:
            tokenizer.chat_template = read_template(template)
        self._has_markers = bool(_GENERATION_MARKER.search(self.template or ""))
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self.tokenizer.all_special_tokens)
        self._control = _any_of(special)
        self._control_ids = frozenset(self.tokenizer.convert_tokens_to_ids(sorted(special)))

    @property
    def template(self) -> str | None:
        """The Jinja source in use; a tokenizer with several named templates uses `default`."""
        template = self.tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def template_hash(self) -> str:
        """First 16 hex of SHA-256 of the template and of what becomes of thoughts, for identities and caches; empty
        without a template."""
        thinking = self._thinking if isinstance(self._thinking, str) else str(self._thinking.budget)
        text = f"{self.template or ''}{'' if thinking == 'keep' else thinking}"
        return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""

    @property
    def vocabulary_hash(self) -> str:
        """First 16 hex of SHA-256 of the vocabulary: token ids mean the same only where it is equal."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]

    def knows(self, token: str) -> bool:
        """Whether the text is one token of the vocabulary."""
        return self.tokenizer.convert_tokens_to_ids(token) not in (None, self.tokenizer.unk_token_id)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the chat followed by the generation prompt: what an engine continues."""
        return self._encode(self.prompt_text(messages))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The rendered string behind `prompt_ids`; raises `ControlTokens` for a chat that holds some."""
        self._check_content(messages)
        return self._render(self._thought(messages), generation_prompt=True)

    def user_opening_ids(self, messages: Sequence[Message] = ()) -> list[int]:
        """Ids of the chat followed by what the template writes before a user's words: a model that goes on from there
        writes the user's turn. Raises `TemplateRefused` for a template that leaves the words out."""
        self._check_content(messages)
        asked = [*self._thought(messages), {"role": "user", "content": _WORDS}]
        head, found, _ = self._render(asked).partition(_WORDS)
        if not found:
            raise TemplateRefused("the chat template leaves a user's words out")
        return self._encode(head)

    def record_ids(self, record: Record, supervise: Supervise = "assistant") -> Rendered:
        """Training ids of a row, chat or text; raises `UnusableRow` with the reason of its quarantine."""
        if record.text is not None:
            return self.text_ids(record.text)
        return self.training_ids(record.messages, supervise, len(record.meta.get(IMAGES) or ()) if self.sees else 0)

    def text_ids(self, text: str) -> Rendered:
        """`bos + text + eos`, every token supervised; a tokenizer without bos or eos leaves it out."""
        body = self._encode(text)
        if not body:
            raise NoSupervisedTokens("the text of the row is empty")
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = ([] if bos is None else [bos]) + body + ([] if eos is None else [eos])
        return Rendered(ids, [True] * len(ids))

    def training_ids(
        self, messages: Sequence[Message], supervise: Supervise = "assistant", images: int = 0
    ) -> Rendered:
        """Ids of a whole chat and the mask of its supervised tokens, end-of-turn tokens included.

        The first token of a document is never predicted, so it counts for nothing even where the mask says True.

        Args:
            images: So many placeholders stand before the first user turn's words, as the template writes them.
        """
        return self._training_ids(self._thought(messages), supervise, images)

    def _training_ids(self, messages: Sequence[Message], supervise: Supervise, images: int = 0) -> Rendered:
        _check_answer(messages)
        self._check_content(messages)
        if images:
            messages = _with_images(messages, images)
        if supervise == "all":
            ids = self._encode(self._render(messages))
            rendered = Rendered(ids, [True] * len(ids))
        elif self._has_markers:
            rendered = self._by_markers(messages, supervise)
        else:
            rendered = self._by_prefix_difference(messages, supervise)
        if not any(rendered.supervised[1:]):
            raise NoSupervisedTokens("no token of the chat would be trained", got=_shorten(messages))
        return rendered

    def never_ends(self, rendered: Rendered) -> bool:
        """Whether a template that sets turns apart by control tokens leaves the answer's last one unsupervised: a model
        that is trained so never learns to stop. A template of plain text has none to learn."""
        last = len(rendered.supervised) - 1 - rendered.supervised[::-1].index(True)
        marks = (self._control_ids - {self.tokenizer.bos_token_id}) | {self.tokenizer.eos_token_id}
        return rendered.input_ids[last] not in marks and not marks.isdisjoint(rendered.input_ids)

    def answer_tokens(self, messages: Sequence[Message]) -> AnswerTokens:
        """The final answer's tokens apart from its prompt's, cut where training cuts; raises `UnusableRow`."""
        messages = self._thought(messages)
        rendered = self._training_ids(messages, "last_assistant")
        ids, start = rendered.input_ids, rendered.supervised.index(True)
        end = len(ids) - rendered.supervised[::-1].index(True)
        asked = self._render(messages[:-1])
        opens = self._render(messages[:-1], generation_prompt=True).startswith(asked)
        before = _common_prefix(self._encode(asked), ids[:start]) if opens else start
        return AnswerTokens(ids[:start], ids[before:start], ids[start:end])

    def _by_markers(self, messages: Sequence[Message], supervise: Supervise) -> Rendered:
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages), return_assistant_tokens_mask=True, **self._told
            )
        except (jinja2.TemplateError, OverflowError) as error:
            raise TemplateRefused(f"the chat template refused the chat: {error}", got=_shorten(messages)) from None
        ids = list(encoded["input_ids"])
        spans = _runs([bool(flag) for flag in encoded["assistant_masks"]])
        spans = [(start, self._with_end_of_turn(ids, start, end)) for start, end in spans]
        return Rendered(ids, _mask(len(ids), spans[-1:] if supervise == "last_assistant" else spans))

    def _with_end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Templates that close the marked block before the end-of-turn token would teach the model never to stop."""
        closed = self._cut_after_end_of_turn(ids, start, end)
        if ids[closed - 1] not in self._control_ids and end < len(ids) and ids[end] in self._control_ids:
            return end + 1
        return closed

    def _by_prefix_difference(self, messages: Sequence[Message], supervise: Supervise) -> Rendered:
        whole = self._render(messages)
        ids = self._encode(whole)
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        turns = turns[-1:] if supervise == "last_assistant" else turns
        return Rendered(ids, _mask(len(ids), [self._turn_span(messages, k, whole, ids) for k in turns]))

    def _turn_span(self, messages: Sequence[Message], turn: int, whole: str, ids: list[int]) -> tuple[int, int]:
        before = self._render(messages[:turn], generation_prompt=True)
        through = whole if turn + 1 == len(messages) else self._render(messages[: turn + 1])
        if not (whole.startswith(through) and through.startswith(before)):
            raise TemplateRewritesHistory(
                f"the chat template renders turn {turn} differently once later turns follow it",
                got=_shorten(messages),
                allowed="an append-only template, a template with {% generation %} markers, or "
                "supervise=last_assistant",
                knob="model.chat_template",
            )
        # A tokenizer may merge across the boundary; the token that straddles it belongs to the answer.
        start = _common_prefix(self._encode(before), ids)
        end = len(ids) if through is whole else _common_prefix(self._encode(through), ids)
        return start, self._cut_after_end_of_turn(ids, start, end)

    def _cut_after_end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Drop what the template writes after the end-of-turn token (often a newline): no engine generates it.

        That token is the tokenizer's end of text, or another control token (Gemma's) with nothing but white space
        after it.
        """
        eos = self.tokenizer.eos_token_id
        if (last := max((i for i in range(start, end) if ids[i] == eos), default=None)) is not None:
            return last + 1
        last = end - 1
        while last > start and ids[last] not in self._control_ids and not self.tokenizer.decode([ids[last]]).strip():
            last -= 1
        return last + 1 if ids[last] in self._control_ids else end

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        if self.template is None:
            raise ConfigError(
                "the tokenizer has no chat template", allowed="a Jinja template or a file", knob="model.chat_template"
            )
        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self._told
            )
        except (jinja2.TemplateError, OverflowError) as error:
            raise TemplateRefused(f"the chat template refused the chat: {error}", got=_shorten(messages)) from None

    def _thought(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The chat with the thoughts of its assistant turns kept, left out or cut."""
        if self._thinking == "keep":
            return messages
        return [{**m, "content": self._turn(m["content"])} if m["role"] == "assistant" else m for m in messages]

    def _turn(self, content: str) -> str:
        if isinstance(self._thinking, ThinkingBudget):
            return within_budget(content, self._thinking.budget, self.tokenizer)
        return answer_of(content)

    def _check_content(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if (found := self._control.search(message["content"])) is not None:
                raise ControlTokens(
                    f"a turn of the {message['role']} holds the control token {found[0]}", got=_shorten(messages)
                )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_images(messages: Sequence[Message], images: int) -> list[Any]:
    """The chat as templates of image-text models take it: a turn's content is a list of its parts."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    shown = [{"type": "image"}] * images
    return [
        {**m, "content": [*(shown if i == first else ()), {"type": "text", "text": m["content"]}]}
        for i, m in enumerate(messages)
    ]


def read_template(template: str) -> str:
    """The template itself, or the contents of the file it names; raises `ConfigError` for a file that is missing."""
    if "{" in template or "\n" in template:
        return template
    file = Path(template)
    if not file.is_file():
        raise ConfigError(
            "the chat template is neither Jinja nor a file",
            got=template,
            allowed="Jinja text or a path",
            knob="model.chat_template",
        )
    return file.read_text(encoding="utf-8")


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches each of the words, the longest first, and nothing where there are none."""
    ordered = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def _check_answer(messages: Sequence[Message]) -> None:
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers or not answers[-1].strip():
        raise NoAnswer("the chat has no answer to train on", got=_shorten(messages))


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Half-open spans of consecutive True flags."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _mask(length: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    mask = [False] * length
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return mask


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shorten(messages: Sequence[Message]) -> str:
    text = " | ".join(f"{m['role']}: {m['content']}" for m in messages)
    return text if len(text) <= 80 else text[:77] + "..."
