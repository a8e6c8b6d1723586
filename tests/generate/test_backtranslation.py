"""Backtranslation: a text gets its instruction and keeps its words; only pairs rated well are rows."""

import pytest
from scripted import Scripted, answered, llm, prompt, run

from itune_ray.config.recipes import BacktranslationConfig
from itune_ray.data.records import Record
from itune_ray.generate.recipes.backtranslation import Backtranslation, document_of

TEXT = Record(source="web", position=4, text="Bread rises because yeast makes gas.\n")
ASKED = "Why does bread rise?"


def outcome_of(row=TEXT, instruction=ASKED, rating="It is clear. [[5]]", judge=None, **config):
    def script(turn, index):
        return rating if "[Request " in turn else instruction

    recipe = Backtranslation(BacktranslationConfig(**config))
    recipe = recipe if judge is None else recipe.bind({"judge": llm(judge)})
    (outcome,) = run(recipe, row, script)
    return outcome


def test_a_text_becomes_the_answer_to_its_instruction():
    outcome = outcome_of()
    record = outcome.record
    assert (outcome.status, outcome.score) == ("accepted", 5.0)
    assert [(m["role"], m["content"]) for m in record.messages] == [
        ("user", ASKED),
        ("assistant", "Bread rises because yeast makes gas."),
    ]
    assert (record.text, record.parents, record.recipe) == (None, ("web:4:0",), "backtranslation")
    assert record.model is None, "a person wrote the answer"
    assert record.meta["backtranslation"] == {"model": "teacher@1"}


def test_an_answer_gets_a_new_instruction():
    row = answered("old", "Bread rises because yeast makes gas.", rejected="x")
    record = outcome_of(row).record
    assert (record.prompt[0]["content"], record.rejected) == (ASKED, None)
    assert document_of(prompt()) is None
    assert document_of(Record(source="s", position=0, text=" ")) is None


@pytest.mark.parametrize(
    ("words", "reason", "score"),
    [
        ({"rating": "Off the topic. [[3]]"}, "low_score", 3.0),
        ({"rating": "[[5]] would be too much: [[1]]"}, "low_score", 1.0),
        ({"rating": "[[9]]"}, "unscored", None),
        ({"rating": "Score: 5"}, "unscored", None),
        ({"instruction": "Say this: bread rises because  yeast makes gas."}, "leak", None),
        ({"instruction": " "}, "empty", None),
        ({"instruction": ("Why does", "length")}, "truncated", None),
        ({"max_words": 5}, "too_long", None),
        ({"row": prompt()}, "no_answer", None),
        ({"row": Record(source="s", position=0, text="")}, "no_answer", None),
    ],
)
def test_each_rule_rejects_its_row(words, reason, score):
    outcome = outcome_of(**words)
    assert (outcome.status, outcome.reason) == ("rejected", reason)
    assert outcome.score == score or score is None


def test_the_threshold_is_the_least_score_that_is_kept():
    assert outcome_of(rating="[[4]]").status == "accepted"
    assert outcome_of(rating="[[4]]", min_score=4.5).reason == "low_score"


def test_rows_can_be_told_from_others_by_their_system_message():
    record = outcome_of(system="Answer as a web page would.").record
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant"]


def test_the_judge_rates_and_the_teacher_writes():
    judge = Scripted(lambda turn, index: "[[4]]")
    assert outcome_of(rating="[[1]]", judge=judge).score == 4.0
    (turn,) = judge.turns
    assert ASKED in turn
    assert "yeast" in turn


def test_a_failed_call_fails_the_row():
    assert outcome_of(rating=OSError("gone")).status == "failed"
