"""Reflection: tagged texts are found in untidy replies, and what is missing leaves the row as it was."""

import asyncio
import json

import pytest
from scripted import Scripted, answered, llm, prompt
from testdata import public_data

from itune_ray.config.recipes import ReflectionConfig
from itune_ray.generate.recipes.reflection import Reflection, better_answer, new_pair, tagged

FIXTURE = json.loads(public_data("methods/data_fixtures.json").read_text())["D11"]
ROW = answered("Name a colour.", "Blue.", model="writer@1", seed=3, finish_reason="stop")
PAIR = "1. Too easy.\n[New Instruction] Name two colours. [End]\n[New Answer] Blue, red. [End]"
BETTER = "It is short. [Better Answer] Blue, as the sky. [End]"


def is_first_pass(turn: str) -> bool:
    return "[New Instruction]" in turn


def reflected(pair=PAIR, better=BETTER, row=ROW, **config):
    """The outcome, and the engine that was asked."""

    def reply(turn, index):
        said = pair if is_first_pass(turn) else better
        return said(turn) if callable(said) else said

    engine = Scripted(reply)
    (outcome,) = asyncio.run(Reflection(ReflectionConfig(**config))(row, llm(engine, temperature=0.0)))
    assert outcome.input_key == row.key
    return outcome, engine


def texts(outcome):
    return [m["content"] for m in outcome.record.messages]


@pytest.mark.parametrize("case", FIXTURE["instruction_cases"], ids=lambda case: case["text"][:20])
def test_instruction_cases_of_the_fixture(case):
    found = tagged(case["text"], "New Instruction"), tagged(case["text"], "New Answer")
    assert found == (case["instruction"], case["answer"])


@pytest.mark.parametrize("case", FIXTURE["response_cases"], ids=lambda case: case["text"][:20])
def test_response_cases_of_the_fixture(case):
    assert better_answer(case["text"]) == case["ours"]
    if "reference_bug" in case:
        assert case["ours"] != case["reference_bug"], "the bare word End ends nothing"


def test_untidy_replies():
    assert better_answer("[better answer]: yes [END] bye") == "yes"
    assert better_answer("A Better Answer: no.\n[Better Answer] yes [End]") == "yes", "brackets go first"
    assert new_pair("[New Instruction] It costs 3. [New Answer] No.") == ("It costs 3.", "No.")
    assert new_pair("[New Instruction] a [End]") is None
    assert new_pair("[New Answer] a [End]") is None


@pytest.mark.parametrize("words", ["your answer", "[Your answer]", "N/A", "<the answer>", " ", "[]"])
def test_placeholders_count_as_missing(words):
    assert better_answer(f"[Better Answer] {words} [End]") is None
    assert new_pair(f"[New Instruction] Do X [End] [New Answer] {words} [End]") is None


def test_both_passes_rewrite_the_row():
    outcome, engine = reflected()
    assert outcome.status == "accepted"
    assert texts(outcome) == ["Name two colours.", "Blue, as the sky."]
    assert outcome.record.meta["reflection"] == {"instruction": "reflected", "answer": "reflected"}
    assert (outcome.record.model, outcome.record.parents, outcome.raw) == ("teacher@1", ("s:0:0",), None)
    assert len(engine.asked) == 2
    assert "Name two colours." in engine.turns[1], "the second pass reviews the pair of the first"
    assert "Blue, red." in engine.turns[1]


def test_one_pass_alone_gives_the_versions_of_selective_reflection():
    assert texts(reflected(passes=("instruction",))[0]) == ["Name two colours.", "Blue, red."]
    assert texts(reflected(passes=("answer",))[0]) == ["Name a colour.", "Blue, as the sky."]


MISSING = ["I like it as it is.", "[New Instruction] Only this. [End]", "  ", ("[New Instruction] a [New", "length")]


@pytest.mark.parametrize("pair", MISSING, ids=str)
def test_a_missing_pair_keeps_instruction_and_answer_together(pair):
    outcome, engine = reflected(pair=pair, passes=("instruction",))
    assert outcome.status == "accepted"
    assert texts(outcome) == ["Name a colour.", "Blue."]
    assert outcome.record.meta["reflection"] == {"instruction": "original"}
    assert (outcome.record.model, outcome.record.seed, outcome.record.finish_reason) == ("writer@1", 3, "stop")
    assert len(engine.asked) == 2


def test_a_missing_answer_keeps_what_the_first_pass_made():
    outcome, engine = reflected(better="None needed.")
    assert texts(outcome) == ["Name two colours.", "Blue, red."]
    assert outcome.record.meta["reflection"] == {"instruction": "reflected", "answer": "original"}
    assert outcome.raw == "None needed."
    assert outcome.record.model == "teacher@1"
    assert len(engine.asked) == 3


def test_the_second_try_is_sampled_anew_and_counts():
    replies = iter(["no tags", BETTER])
    outcome, engine = reflected(better=lambda turn: next(replies), passes=("answer",))
    assert texts(outcome)[1] == "Blue, as the sky."
    first, second = (request.sampling for request in engine.asked)
    assert (first.temperature, second.temperature, second.max_tokens) == (0.0, 0.7, 2048)
    assert first.seed != second.seed
    assert outcome.record.num_tokens == 2 + len(BETTER.split())


def test_what_goes_in_is_reflected_or_kept():
    def pair(turn):
        number = int(turn.split("colour ")[1].split(".")[0])
        return PAIR if number % 3 else "no tags"

    rows = [answered(f"Name colour {i}.", "Blue.", position=i) for i in range(12)]
    became = [reflected(pair=pair, row=row, passes=("instruction",))[0].record.meta["reflection"] for row in rows]
    counts = [b["instruction"] for b in became]
    assert (counts.count("reflected"), counts.count("original")) == (8, 4)


def test_earlier_turns_stay():
    row = answered("Name a colour.", "Blue.")
    system = {"role": "system", "content": "Be brief."}
    outcome, _ = reflected(row=prompt(messages=(system, *row.messages)))
    assert outcome.record.messages[0] == system
    assert len(outcome.record.messages) == 3


@pytest.mark.parametrize(
    ("reason", "row"),
    [("no_answer", prompt("q")), ("no_answer", answered("q", " ")), ("no_prompt", answered(" ", "a"))],
)
def test_rows_that_cannot_be_reviewed_are_rejected_unasked(reason, row):
    outcome, engine = reflected(row=row)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert not engine.asked


def test_a_failed_call_fails_the_row():
    outcome, _ = reflected(better=OSError("gone"))
    assert (outcome.status, outcome.cause) == ("failed", "gone")
