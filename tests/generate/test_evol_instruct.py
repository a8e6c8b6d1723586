"""Evol-Instruct: every rule is hit by its row and by nothing else, and what fails goes on as it was."""

from collections import Counter

import pytest
from scripted import Scripted, prompt, run

from itune_ray.config.recipes import EvolInstructConfig
from itune_ray.generate.recipes.evol_instruct import EvolInstruct, broken_answer, broken_rule, parse_equal

TASK = "Name a colour of the sky."


def script(evolve="Name two colours of the sky, and say when each is seen.", equal="Not equal", answer="Blue at noon."):
    def reply(turn, index):
        if "Are they equal?" in turn:
            return equal
        if "<task>" in turn:
            return evolve(turn) if callable(evolve) else evolve
        return answer

    return reply


def one(**words):
    (outcome,) = run(EvolInstruct(EvolInstructConfig(rounds=1)), prompt(TASK), script(**words))
    return outcome


def test_a_rewrite_with_its_answer_is_a_row():
    outcome = one()
    record = outcome.record
    assert outcome.status == "accepted"
    assert [m["content"] for m in record.messages] == [
        "Name two colours of the sky, and say when each is seen.",
        "Blue at noon.",
    ]
    assert (record.round, record.parents) == (1, ("s:0:0",))
    assert record.recipe.startswith("evol_instruct.")
    assert record.num_tokens == 12 + 2 + 3


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("unchanged", {"evolve": " name a colour  of the sky. "}),
        ("scaffold", {"evolve": "The rewritten task: name three colours."}),
        ("talk", {"evolve": "As an AI, I would ask for three colours."}),
        ("not_richer", {"equal": "**Equal.**"}),
        ("unparsable", {"equal": "They are equal in part."}),
        ("apology", {"answer": "Sorry, I do not know."}),
        ("no_content", {"answer": "It is as it is."}),
        ("truncated", {"answer": ("Blue at", "length")}),
        ("empty", {"evolve": "  "}),
    ],
)
def test_each_rule_rejects_its_row(reason, words):
    outcome = one(**words)
    assert (outcome.status, outcome.reason) == ("rejected", reason)


def test_rules_leave_alone_what_only_looks_like_them():
    assert parse_equal("Not Equal") is False
    assert broken_answer("Write an apology that says sorry.", "Sorry for the delay.") is None
    assert broken_answer(TASK, "sorry " + "word " * 80) is None
    assert broken_rule("What does an AI assistant do?", "What does an AI assistant do at night?") is None


def test_what_fails_is_evolved_again_from_where_it_was():
    def evolve(turn):
        task = turn.split("<task>\n")[1].split("\n</task>")[0]
        evolve.seen.append(task)
        return task if len(evolve.seen) == 2 else task + " more"

    evolve.seen = []
    outcomes = run(EvolInstruct(EvolInstructConfig(rounds=3)), prompt(TASK), script(evolve=evolve))
    assert [o.reason for o in outcomes] == [None, "unchanged", None]
    assert evolve.seen == [TASK, f"{TASK} more", f"{TASK} more"]
    assert [o.record.parents for o in outcomes] == [("s:0:0",), ("s:0:0",), ("s:0:0",)][:1] + [("s:0:0",)] * 2
    assert [o.record.round for o in outcomes] == [1, 2, 3]
    assert len({o.record.key for o in outcomes}) == 3


def test_a_failed_call_fails_the_whole_input():
    outcomes = run(EvolInstruct(EvolInstructConfig(rounds=2)), prompt(TASK), script(answer=OSError("gone")))
    assert {(o.status, o.cause) for o in outcomes} == {("failed", "gone")}
    assert len(outcomes) == 2


def test_operators_are_drawn_evenly_and_by_row():
    recipe = EvolInstruct(EvolInstructConfig(rounds=4))
    drawn = [o.record.recipe for i in range(300) for o in run(recipe, prompt(TASK, i), script())]
    counts = Counter(drawn)
    expected = len(drawn) / 6
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 20.5  # χ² of 5 degrees at p = 0.001
    assert len(counts) == 6
    assert drawn == [o.record.recipe for i in range(300) for o in run(recipe, prompt(TASK, i), script())]


def test_the_judge_is_asked_about_equality_alone():
    judge = Scripted(lambda turn, index: "Equal")
    from scripted import llm

    recipe = EvolInstruct(EvolInstructConfig(rounds=1)).bind({"judge": llm(judge)})
    (outcome,) = run(recipe, prompt(TASK), script(equal="Not equal"))
    assert outcome.reason == "not_richer"
    assert len(judge.turns) == 1
