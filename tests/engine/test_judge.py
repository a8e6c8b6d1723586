"""The judge: scores are read, never guessed."""

import asyncio
import json
import math

import pytest
from testdata import public_data

from itune_ray.engine.base import Completion, Sample, Sampling
from itune_ray.engine.judge import Judge, parse_score
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("4.5\nGood", 4.5),
        ("Score: 4.5\nx", 4.5),
        ("Score:4.5\nx", 4.5),
        ("score: 4.5\nx", 4.5),
        ("4.5/5\nok", 4.5),
        ("\n  3\nwhy", 3.0),
        ("**4**", 4.0),
        ("**Score:** 2", 2.0),
        ("Rating: 3 out of 5", 3.0),
        ("4,5", 4.5),
        ("0", 0.0),
        ("5.", 5.0),
        ("The score is 5", None),
        ("very good", None),
        ("", None),
        ("7", None),
        ("-1", None),
        ("4/10", None),
        ("3 reasons speak against it", None),
        ("10 / 5", None),
    ],
)
def test_parse_score(reply, score):
    assert parse_score(reply, 0, 5) == score


def test_parse_score_on_the_published_cases():
    cases = json.loads(public_data("methods/data_fixtures.json").read_text())["D30"]["cases"]
    assert [parse_score(case["text"], 0, 5) for case in cases] == [case["ours"] for case in cases]


class Replies:
    """An engine that answers with a function of the last turn."""

    def __init__(self, reply):
        self._reply, self.asked = reply, []

    async def generate(self, requests):
        self.asked += requests
        return [self._reply(request) for request in requests]

    async def embed(self, texts):
        raise NotImplementedError


def text(reply: str):
    sample = Sample(text=reply, token_ids=(1, 2, 3), finish_reason="stop")
    return lambda request: Completion(id=request.id, samples=(sample,))


def rate(reply, **judge):
    engine = Replies(reply)
    llm = EngineLlm(engine, model="judge", sampling=Sampling())
    return asyncio.run(Judge(**judge).score(llm, "What is 2 + 2?", "4", key="k")), engine


def test_the_judge_sees_what_it_rates_and_its_score_comes_back():
    judgement, engine = rate(text("4.5\nRight."), dimension="accuracy", scale=(0, 5))
    assert judgement.score == 4.5
    asked = engine.asked[0].messages[-1]["content"]
    for part in ("What is 2 + 2?", "\n4\n", "accuracy", "from 0 ", "to 5 "):
        assert part in asked


def test_no_score_is_nan_and_keeps_the_reply():
    judgement, _ = rate(text("I like it."))
    assert math.isnan(judgement.score)
    assert judgement.reply == "I like it."
    assert judgement.error is None


def test_an_engine_error_is_no_score():
    judgement, _ = rate(lambda request: Completion(id=request.id, error="replica lost", retryable=True))
    assert math.isnan(judgement.score)
    assert (judgement.error, judgement.retryable) == ("replica lost", True)


def test_a_guided_judge_sees_the_right_answer():
    engine = Replies(text("5"))
    llm = EngineLlm(engine, model="judge", sampling=Sampling())
    judge = Judge(guided=True)
    judgement = asyncio.run(judge.score(llm, "What is 2 + 2?", "four", key="k", reference="It is 4."))
    assert judgement.score == 5
    asked = engine.asked[0].messages[-1]["content"]
    assert asked.index("What is 2 + 2?") < asked.index("It is 4.") < asked.index("\nfour\n")
    with pytest.raises(ValueError, match="needs a reference"):
        judge.messages("q", "a")
    with pytest.raises(ValueError, match="no other judge"):
        Judge().messages("q", "a", "r")


def test_own_template(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ response }} for {{ prompt }} in [{{ low }}, {{ high }}]?")
    _, engine = rate(text("1"), template=str(tmp_path / "mine.jinja"), scale=(1, 10))
    assert engine.asked[0].messages[-1]["content"] == "4 for What is 2 + 2? in [1, 10]?"
    with pytest.raises(ConfigError, match="no such template file"):
        Judge(template=str(tmp_path / "missing.jinja"))


def test_the_built_in_for_complexity_reads_the_instruction_alone():
    judge = Judge(dimension="complexity", scale=(1, 6), template="complexity")
    (_, turn) = judge.messages("count the primes", "ANSWER")
    assert "count the primes" in turn["content"]
    assert "ANSWER" not in turn["content"]
    assert "from 1 (" in turn["content"]
    assert Judge(template="answer").template == Judge().template != judge.template
