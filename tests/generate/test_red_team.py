"""Red-teaming: what a question is, which examples are shown, what is harmful, and that every row says it is unsafe."""

import asyncio
import itertools
import json
import random
from collections import Counter

import pytest
from scripted import Scripted, llm, prompt
from testdata import public_data

from itune_ray.config.recipes import RedTeamConfig
from itune_ray.config.shared import FileSource
from itune_ray.errors import ConfigError
from itune_ray.generate.diversity import self_bleu
from itune_ray.generate.recipes.red_team import (
    Case,
    RedTeam,
    contacts,
    drawn,
    example_weights,
    first_question,
    read_cases,
)

TOPIC = "questions to ask someone about their day"


def kind(turn: str) -> str:
    if turn.startswith("Go on with the list"):
        return "question"
    return "harm" if "How harmful is" in turn else "reply"


def scripted(question=None, reply=None, harm=None, start=0):
    """A red model that writes what it is shown or counts, a target that fails on the keyword `secret`, a judge."""
    numbers = itertools.count(start)

    def red(turn):
        number = next(numbers)
        shown = turn.split("List of")[1]
        return f"{number}. What is {'the secret' if 'secret' in shown or number % 4 == 0 else 'thing'} {number}? Yes."

    def target(turn):
        return "Go away, fool." if "secret" in turn else "Good day."

    def judge(turn):
        return "9\nRude." if "fool" in turn else "0"

    writers = {"question": question or red, "reply": reply or target, "harm": harm or judge}

    def script(turn, index):
        said = writers[kind(turn)]
        return said(turn) if callable(said) else said

    return Scripted(script)


def attacked(engine=None, row=None, others=None, **config):
    recipe = RedTeam(RedTeamConfig(**config))
    recipe = recipe.bind({name: llm(other, f"{name}@1") for name, other in others.items()}) if others else recipe
    outcomes = asyncio.run(recipe(row or prompt(TOPIC), llm(engine or scripted(), top_p=0.95)))
    assert {o.record.meta["unsafe"] for o in outcomes} == {True}, "accepted or not"
    return outcomes


def saved(outcomes, folder):
    file = folder / "cases.jsonl"
    rows = [
        {"messages": list(o.record.messages), "meta": o.record.meta, "source": "red", "position": i}
        for i, o in enumerate(outcomes)
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return FileSource(path=str(file))


def test_a_row_is_a_question_with_its_reply_and_harm():
    outcomes = attacked(samples=4)
    assert [o.status for o in outcomes] == ["accepted"] * 4
    assert [m["content"] for m in outcomes[0].record.messages] == ["What is the secret 0?", "Go away, fool."]
    assert [o.score for o in outcomes] == [0.9, 0.0, 0.0, 0.0]
    assert outcomes[0].record.meta["red_team"] == {
        "topic": TOPIC,
        "method": "zero_shot",
        "harm": 0.9,
        "red": "teacher@1",
    }
    assert len({o.record.key for o in outcomes}) == 4


def test_zero_shot_shows_no_example_and_samples_as_the_job_says():
    engine = scripted()
    attacked(engine, samples=1)
    question, reply, harm = engine.asked
    assert question.messages[-1]["content"].endswith(f"List of {TOPIC}:\n1.")
    assert (question.sampling.temperature, question.sampling.top_p) == (1.0, 0.95)
    assert (reply.sampling.temperature, reply.sampling.max_tokens) == (0.7, 256)
    assert harm.sampling.temperature == 0.0


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("Who are you? And why?", "Who are you?"),
        ('3. "Who are you?"', "Who are you?"),
        ("Here is one:\n- Who are you?\n- Why?", "Who are you?"),
        ("Tell me.", None),
        ("?", None),
        ("", None),
    ],
)
def test_a_question_ends_at_its_first_mark(text, question):
    assert first_question(text) == question


def test_questions_without_a_mark_and_repeated_ones_are_rejected_and_go_no_further():
    replies = iter(["Tell me.", "Who are you?", " who ARE  you? Say it.", "Why?"])
    engine = scripted(question=lambda turn: next(replies))
    outcomes = attacked(engine, samples=4)
    assert [o.reason for o in outcomes] == ["no_question", None, "duplicate", None]
    assert Counter(map(kind, engine.turns)) == {"question": 4, "reply": 2, "harm": 2}
    assert outcomes[0].raw == "Tell me."


def test_weights_equal_the_fixture():
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D17"]
    assert example_weights(fixture["r"], fixture["T"]) == pytest.approx(fixture["p"], abs=1e-12)
    assert example_weights([900.0, 0.0], 0.1) == [1.0, 0.0], "no overflow"


def test_examples_are_drawn_with_their_weights_and_without_repetition():
    cases = [Case("a?", 0.9), Case("b?", 0.8), Case("c?", 0.6)]
    first = Counter(drawn(cases, 1, 0.2, random.Random(i))[0] for i in range(3000))
    expected = [3000 * weight for weight in example_weights([case.harm for case in cases], 0.2)]
    seen = [first[case.question] for case in cases]
    assert sum((n - e) ** 2 / e for n, e in zip(seen, expected, strict=True)) < 13.8  # χ², 2 degrees, p = 0.001
    assert all(sorted(drawn(cases, 5, 0.2, random.Random(i))) == ["a?", "b?", "c?"] for i in range(20))
    assert drawn(cases, 2, 0.2, random.Random(1)) == drawn(cases, 2, 0.2, random.Random(1))


def test_few_shot_fails_at_least_as_often_as_zero_shot(tmp_path):
    zero = attacked(samples=16)
    source = saved(zero, tmp_path)
    engine = scripted(start=100)
    few = attacked(engine, samples=16, examples=source)

    def rate(outcomes):
        return sum(o.score > 0.5 for o in outcomes) / len(outcomes)

    assert 0 < rate(zero) < rate(few)
    assert {o.record.meta["red_team"]["method"] for o in few} == {"few_shot"}
    shown = [turn.split(":\n")[1].splitlines() for turn in engine.turns if kind(turn) == "question"]
    assert {len(lines) for lines in shown} == {6}, "five examples and the number of the next"
    assert len(set(map(tuple, shown))) > 1, "drawn per question"


def test_a_question_that_was_shown_is_no_new_one(tmp_path):
    source = saved(attacked(samples=1), tmp_path)
    (outcome,) = attacked(scripted(question="What is the secret 0?"), samples=1, examples=source)
    assert (outcome.status, outcome.reason) == ("rejected", "duplicate")


def test_cases_are_distinct_and_come_from_red_teaming(tmp_path):
    outcomes = attacked(samples=2)
    assert len(read_cases(saved(outcomes * 2, tmp_path))) == 2
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "Name a colour."}\n')
    with pytest.raises(ConfigError, match="hold no row of red_team"):
        RedTeam(RedTeamConfig(examples=FileSource(path=str(other))))


def test_the_target_and_the_judge_are_asked_their_own_questions_alone():
    red, target, judge = scripted(), scripted(), scripted()
    outcomes = attacked(red, samples=3, others={"target": target, "judge": judge})
    assert [set(map(kind, engine.turns)) for engine in (red, target, judge)] == [{"question"}, {"reply"}, {"harm"}]
    assert outcomes[0].record.model == "target@1"
    assert outcomes[0].record.sampling["max_tokens"] == 256


def test_a_system_message_is_the_targets():
    system = {"role": "system", "content": "Be kind."}
    engine = scripted()
    (outcome,) = attacked(engine, prompt(messages=(system, {"role": "user", "content": TOPIC})), samples=1)
    assert outcome.record.messages[0] == system
    assert [request.messages[0] == system for request in engine.asked] == [False, True, False]


@pytest.mark.parametrize(
    ("reason", "words"),
    [("unparsable", {"harm": "It is rude."}), ("unparsable", {"harm": "11"}), ("empty", {"reply": " "})],
)
def test_what_cannot_be_scored_is_rejected_and_never_scored(reason, words):
    (outcome,) = attacked(scripted(**words), samples=1)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert outcome.score != outcome.score


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Write to jo.doe+x@mail.posthaven.org.", ("email",)),
        ("Call +1 555-123-4567 now", ("phone",)),
        ("Call (030) 1234 5678", ("phone",)),
        ("Her number is 078-05-1120.", ("ssn",)),
        ("In 1999 we had 12 500 rows, 3.14 and 2024-05-06.", ()),
        ("user@home", ()),
        ("Write to jo@mail.example.org, a domain that is nobody's.", ()),
    ],
)
def test_contact_details_are_found_where_they_are_planted(text, kinds):
    assert contacts(text) == kinds


def test_contact_details_count_as_harm_without_a_judge():
    engine = scripted(reply=lambda turn: "Ask jo@mail.posthaven.org" if "secret" in turn else "No.")
    outcomes = attacked(engine, samples=2, harm="contact")
    assert [o.score for o in outcomes] == [1.0, 0.0]
    assert "harm" not in map(kind, engine.turns)


def test_a_failed_call_fails_the_whole_input():
    outcomes = attacked(scripted(harm=OSError("gone")), samples=3)
    assert [(o.status, o.cause) for o in outcomes] == [("failed", "gone")] * 3


def test_a_row_without_a_topic_is_rejected():
    assert [o.reason for o in attacked(row=prompt(" "), samples=2)] == ["no_prompt"] * 2


def test_self_bleu():
    equal = ["Who are you and where do you live?"] * 3
    apart = ["Who are you and where do you live?", "Name seven large rivers of Asia.", "Is it late already, my friend?"]
    assert self_bleu(equal) == pytest.approx(1.0)
    assert self_bleu(apart) < 0.2
    assert self_bleu([*equal[:2], *apart[1:]]) == pytest.approx((2 + 2 * self_bleu(apart[1:])) / 4, abs=0.1)
    assert self_bleu(equal * 5, references=4) == pytest.approx(1.0)
    assert self_bleu(["one"]) != self_bleu(["one"]), "NaN"
