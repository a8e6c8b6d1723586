"""Preference pairs: which answer wins, which loses, and which prompts give none."""

import asyncio
from typing import Any

import pytest

from itune_ray.config.recipes import PreferenceConfig
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion, Sample, Sampling
from itune_ray.errors import ConfigError
from itune_ray.generate.recipes.preference import Preference
from itune_ray.playground.parser import parse

PROMPT = "reverse stone please"
ROW = Record(source="p", position=3, messages=({"role": "user", "content": PROMPT},))


class Says:
    """A model whose samples are given."""

    model, sampling = "student@1", Sampling(temperature=1.0)

    def __init__(self, *replies: str | tuple[str, str], error: str | None = None):
        self._replies = [reply if isinstance(reply, tuple) else (reply, "stop") for reply in replies]
        self._error = error

    def seed(self, key: str) -> int:
        return 7

    async def generate(self, messages: Any, *, key: str, sampling: Any = None, n: int = 1) -> Completion:
        if self._error:
            return Completion(id=key, error=self._error, retryable=True)
        samples = tuple(
            Sample(text=text, token_ids=(1,), finish_reason=finish)  # type: ignore[arg-type]
            for text, finish in (self._replies * n)[:n]
        )
        return Completion(id=key, samples=samples, prompt_token_ids=(1, 2))


def pair(llm: Says, row: Record = ROW, judge: Any = None, **config: Any) -> Outcome:
    recipe = Preference(PreferenceConfig(**config))
    recipe = recipe.bind({"judge": judge}) if judge else recipe
    (outcome,) = asyncio.run(recipe(row, llm))
    assert outcome.input_key == row.key
    return outcome


def test_the_prompt_is_one_of_the_world():
    assert parse(PROMPT) is not None


def test_the_right_answer_is_chosen_and_the_frequent_mistake_rejected():
    outcome = pair(Says("enots", "slip", "wrong", "wrong"))
    assert outcome.status == "accepted"
    assert outcome.record.response == "enots"
    assert outcome.record.rejected == "wrong"
    assert outcome.record.meta["preference"]["answers"] == {"enots": 1, "slip": 1, "wrong": 2}
    assert outcome.record.num_tokens == 4


@pytest.mark.parametrize(
    ("replies", "reason"),
    [(("enots",), "all_right"), (("a", "b"), "all_wrong"), ((("enots", "length"), "b"), "no_contrast")],
)
def test_prompts_without_a_contrast_end_rejected(replies, reason):
    assert pair(Says(*replies)).reason == reason


def test_an_answer_cut_short_is_never_chosen():
    outcome = pair(Says(("enots", "length"), "b"))
    assert outcome.status == "rejected"


def test_the_reference_stands_in_where_no_sample_is_right():
    answered = Record(source="p", position=3, messages=(*ROW.messages, {"role": "assistant", "content": "enots"}))
    outcome = pair(Says("a", "a", "b"), answered, chosen="reference")
    assert (outcome.record.response, outcome.record.rejected) == ("enots", "a")
    assert pair(Says("a", "b"), answered).status == "rejected", "only when asked for"


class Judge(Says):
    """Rates by the length of the answer, says nonsense of `?`, and breaks on `!`."""

    async def generate(self, messages: Any, *, key: str, sampling: Any = None, n: int = 1) -> Completion:
        text = messages[-1]["content"]
        if "!!" in text:
            return Completion(id=key, error="judge is gone", retryable=True)
        score = "no idea" if "??" in text else str(5 if "longest" in text else 1)
        return Completion(id=key, samples=(Sample(text=score, token_ids=(1,), finish_reason="stop"),))


def judged(*replies: str) -> Outcome:
    scorer = {"type": "judge", "judge": {"model": {"path": "judge"}, "engine": {"type": "fake"}}}
    return pair(Says(*replies), judge=Judge(), scorer=scorer, samples=len(replies))


def test_a_judge_decides_and_what_it_cannot_rate_takes_no_part():
    outcome = judged("short", "the longest", "??")
    assert (outcome.record.response, outcome.record.rejected) == ("the longest", "short")
    assert outcome.score == 4
    assert judged("??", "?? too").reason == "unscored"
    assert judged("short", "tiny").reason == "no_contrast"


def test_a_broken_judge_or_model_fails_the_row_for_another_attempt():
    assert (judged("short", "!!").status, judged("short", "!!").cause) == ("failed", "judge is gone")
    assert pair(Says(error="replica died")).status == "failed"


def test_bad_input_is_one_line():
    with pytest.raises(ConfigError, match=r"unknown grader; did you mean 'playground'\?; got 'plaground'"):
        Preference(PreferenceConfig(scorer={"type": "grader", "grader": "plaground"}))
    with pytest.raises(ConfigError, match="the grader cannot be imported"):
        Preference(PreferenceConfig(scorer={"type": "grader", "grader": "no.such:thing"}))
