"""Preference labels of a model: soft, from the log-probabilities of its choice in both orders (Bai et al. 2022, arXiv
2212.08073 §4; Lee et al. 2023, arXiv 2309.00267; methods D14 and D15)."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from itune_ray.config.base import Schema, digest
from itune_ray.config.recipes import PreferenceLabelConfig
from itune_ray.data.chat import UnusableRow
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Message, Record
from itune_ray.engine.base import Sampling
from itune_ray.engine.choice import continued, first_tokens
from itune_ray.engine.templates import render
from itune_ray.generate.recipes.base import builtin_prompt, last_user_turn, refused, transcript
from itune_ray.generate.recipes.chain import Calls, Chain, EndedError
from itune_ray.generate.recipes.principles import principles_text, read_principles
from itune_ray.model.render import model_renderer

OPTIONS = ("A", "B")
REASONS = Sampling(temperature=0.0, max_tokens=512)

LogProbs = tuple[float, float]
"""Natural logarithms of the options' probabilities, of the answer shown first and of the other."""


class Principle(Schema):
    """What two answers are compared under."""

    id: str
    question: str


class Principles(Schema):
    """A file of principles."""

    principles: Annotated[tuple[Principle, ...], Field(min_length=1)]


class PreferenceLabel(Chain):
    """p = P(the row's answer is better than its `rejected`), the mean of P over both orders; the better is chosen.

    In each order P = softmax over the options' log-probabilities as the first token of the reply, asked of exactly
    those tokens. Where an option is no single token, both are scored as continuations of the prompt instead. Under
    `reasons_first` the model argues first and p is clamped, after averaging. |p - 0.5| < `tie` ends rejected as `tie`,
    equal answers as `equal_answers`. The principle is drawn per row: both orders share it.
    """

    name = "preference_label"
    version = 2
    requires = ("messages", "rejected")
    provides = ("messages", "rejected", "num_prompt_tokens", "num_tokens")

    def __init__(self, config: PreferenceLabelConfig):
        self._config = config
        text = principles_text(config.principles, self.name)
        names = ("compare", "ending", "general")
        self.prompts = {name: builtin_prompt(self.name, f"{name}.jinja") for name in names}
        self._principles = None
        if config.criterion == "principles":
            self.prompts["principles"] = text
            self._principles = read_principles(text, Principles).principles

    async def make(self, row: Record, calls: Calls) -> list[Outcome]:
        """The row, its answers in the order of the label."""
        answer, other = row.response, row.rejected
        written = {name: getattr(row, name) for name in ("model", "sampling", "seed", "finish_reason")}
        calls.draft = dataclasses.replace(calls.draft, **written)
        if last_user_turn(row.prompt) is None:
            return refused(calls.draft, row, "no_prompt")
        if answer is None or other is None or not answer.strip() or not other.strip():
            return refused(calls.draft, row, "no_pair")
        if answer.strip() == other.strip():
            return refused(calls.draft, row, "equal_answers")
        principle = None if self._principles is None else calls.rng("principle").choice(self._principles)
        question = render(self.prompts["general"]).strip() if principle is None else principle.question
        given_first = await self._compared(row, (answer, other), question, calls, "given_first")
        given_second = await self._compared(row, (other, answer), question, calls, "given_second")
        p = soft_label(given_first, given_second, self._config.clamp if self._config.reasons_first else None)
        facts = {
            "p_chosen": max(p, 1 - p),
            "orders": {"given_first": list(given_first), "given_second": list(given_second)},
            "principle": None if principle is None else principle.id,
            "swapped": p < 0.5,
            "labeler": calls.llm.model,
        }
        meta = {**row.meta, self.name: facts}
        if abs(p - 0.5) < self._config.tie:
            return [calls.rejected("tie", score=facts["p_chosen"], meta=meta)]
        swapped: dict[str, Any] = {}
        if p < 0.5:
            messages = (*row.prompt, {"role": "assistant", "content": other})
            swapped = {"messages": messages, "rejected": answer, **dict.fromkeys(written)}
        return [calls.accepted(score=facts["p_chosen"], meta=meta, **swapped)]

    async def _compared(self, row: Record, pair: tuple[str, str], question: str, calls: Calls, order: str) -> LogProbs:
        """Log-probabilities of the options for a pair in the order shown."""
        conversation, ending = transcript(row.prompt), render(self.prompts["ending"]).strip()
        asked = render(
            self.prompts["compare"],
            conversation=conversation,
            first=pair[0],
            second=pair[1],
            question=question,
            reasons_first=self._config.reasons_first,
            ending=ending,
            fence=digest([conversation, *sorted(pair)], length=12),
        )
        chat: tuple[Message, ...] = ({"role": "user", "content": asked.strip()},)
        if self._config.reasons_first:
            reasons = await calls.ask(f"{order}/reasons", chat, sampling=REASONS, cut=True)
            chat = (*chat, {"role": "assistant", "content": reasons}, {"role": "user", "content": ending})
        return await self._options(chat, calls, order)

    async def _options(self, chat: Sequence[Message], calls: Calls, order: str) -> LogProbs:
        renderer = model_renderer(calls.llm.ref)
        try:
            prompt = renderer.prompt_ids(chat)
        except UnusableRow as error:
            raise EndedError(error.reason, raw=str(error)) from None
        ids = [option_ids(renderer.tokenizer, option) for option in OPTIONS]
        if not all(ids):
            first, second = OPTIONS
            return await self._continued(prompt, first, calls, order), await self._continued(
                prompt, second, calls, order
            )
        tokens = sorted({token for of_option in ids for token in of_option})
        listed, completion = await first_tokens(calls.llm, prompt, tokens, key=f"{calls.row.key}/{order}")
        calls.counted(completion)
        first, second = (total_of(listed, of_option) for of_option in ids)
        if first is None or second is None:
            raise EndedError("no_option", raw="the engine gives no finite log-probability of an option")
        return first, second

    async def _continued(self, prompt: Sequence[int], option: str, calls: Calls, order: str) -> float:
        """log P(option | prompt), the sum over its tokens."""
        tokens = model_renderer(calls.llm.ref).tokenizer(option, add_special_tokens=False)["input_ids"]
        value, completion = await continued(calls.llm, prompt, tokens, key=f"{calls.row.key}/{order}/{option}")
        calls.counted(completion)
        if math.isnan(value):
            raise EndedError("no_option", raw=f"the engine gives no finite log-probability of {option!r}")
        return value


def option_ids(tokenizer: Any, option: str) -> tuple[int, ...]:
    """The tokens that are the option by themselves, with and without a space before it."""
    encoded = (tokenizer(form, add_special_tokens=False)["input_ids"] for form in (option, f" {option}"))
    return tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))


def total_of(listed: Mapping[int, float], ids: Iterable[int]) -> float | None:
    """log Σ exp over those of the tokens that are listed; None where none is."""
    found = [listed[i] for i in ids if i in listed]
    top = max(found, default=-math.inf)
    return None if top == -math.inf else top + math.log(sum(math.exp(value - top) for value in found))


def p_first(log_probs: LogProbs) -> float:
    """Softmax over two options: the probability of the one shown first."""
    first, second = log_probs
    top = max(first, second)
    e_first, e_second = math.exp(first - top), math.exp(second - top)
    return e_first / (e_first + e_second)


def soft_label(given_first: LogProbs, given_second: LogProbs, clamp: float | None = None) -> float:
    """P(given answer is better): the mean of its probability in both orders, then held in [1 - clamp, clamp]."""
    p = (p_first(given_first) + (1 - p_first(given_second))) / 2
    return p if clamp is None else min(max(p, 1 - clamp), clamp)


def position_bias(orders: Iterable[tuple[LogProbs, LogProbs]]) -> float:
    """Share of pairs where the same position wins in both orders (Lee et al. 2023); NaN of no pairs.

    An order in which both options are as likely has no winner.
    """
    same = [(p_first(one) - 0.5) * (p_first(two) - 0.5) > 0 for one, two in orders]
    return sum(same) / len(same) if same else math.nan


def direct_score(log_probs: Sequence[float]) -> float:
    """Direct RLAIF: s = Σ i·P(i) over the scores 1 to n, P normalised over them, mapped from [1, n] to [-1, 1].

    Raises:
        ValueError: Fewer than two scores, or none that is possible.
    """
    top = max(log_probs, default=-math.inf)
    if len(log_probs) < 2 or not math.isfinite(top):
        raise ValueError(f"the log-probabilities of two or more scores are needed, got {list(log_probs)}")
    weights = [math.exp(value - top) for value in log_probs]
    score = sum(i * weight for i, weight in enumerate(weights, start=1)) / sum(weights)
    return 2 * (score - 1) / (len(log_probs) - 1) - 1
