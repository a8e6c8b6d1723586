"""Pairs judged in both orders: bias of place gives ties, a truthful judge the order, and every pair one result."""

import pytest
from scripted import Scripted, answered, llm, prompt, run

from itune_ray.config.recipes import CompareConfig
from itune_ray.engine.pairwise import Results
from itune_ray.generate.recipes.compare import SCORES, Compare

PAIR = answered("Why?", "good", rejected="bad", model="human", meta={"right": "very good"})


def first_answer(turn):
    return turn.split("[Answer A ")[1].split("]\n")[1].split("\n")[0]


def truthful(turn, index):
    return "I considered [[C]]. [[A]]" if first_answer(turn).startswith("good") else "[[B]]"


def compared(script, row=PAIR, **config):
    (outcome,) = run(Compare(CompareConfig(**config)), row, script)
    return outcome


def test_a_truthful_judge_recovers_the_order():
    outcome = compared(truthful)
    assert (outcome.status, outcome.score) == ("accepted", 1.0)
    assert outcome.record.meta["compare"] == {"result": "win", "verdicts": ["A", "B"]}
    lost = compared(truthful, answered("Why?", "bad", rejected="good"))
    assert (lost.record.meta["compare"]["result"], lost.score) == ("lose", 0.0)


@pytest.mark.parametrize("verdict", ["[[A]]", "[[B]]", "[[C]]"])
@pytest.mark.parametrize("rule", ["conservative", "lenient"])
def test_a_judge_that_looks_at_the_place_alone_gives_ties(verdict, rule):
    outcome = compared(lambda *_: verdict, rule=rule)
    assert (outcome.record.meta["compare"]["result"], outcome.score) == ("tie", 0.5)


def test_the_rules_part_where_one_order_is_a_tie():
    half = lambda turn, index: "[[A]]" if first_answer(turn) == "good" else "[[C]]"  # noqa: E731
    assert compared(half).record.meta["compare"]["result"] == "tie"
    assert compared(half, rule="lenient").record.meta["compare"]["result"] == "win"


def test_the_row_stays_as_it_was_made():
    record = compared(truthful).record
    assert (record.messages, record.rejected, record.model) == (PAIR.messages, "bad", "human")


def test_results_add_up_to_the_rows_and_their_scores_to_the_rate():
    rows = [answered("Why?", "good" if i % 3 else "bad", i, rejected="bad" if i % 3 else "good") for i in range(9)]
    outcomes = [compared(truthful, row) for row in rows]
    results = Results.of(o.record.meta["compare"]["result"] for o in outcomes)
    assert (results.wins, results.ties, results.losses) == (6, 0, 3)
    assert results.win_rate_adjusted == sum(o.score for o in outcomes) / len(outcomes)
    assert SCORES == {"win": 1.0, "tie": 0.5, "lose": 0.0}


def test_results_that_are_not_kept_are_the_reason():
    outcome = compared(lambda *_: "[[A]]", keep=("win",))
    assert (outcome.status, outcome.reason, outcome.score) == ("rejected", "tie", 0.5)


def test_a_reference_is_shown_or_missed():
    guided = lambda turn, index: "[[A]]" if "very good" in turn else "[[B]]"  # noqa: E731
    assert compared(guided, reference="right").record.meta["compare"]["verdicts"] == ["A", "A"]
    assert compared(guided).record.meta["compare"]["verdicts"] == ["B", "B"]
    assert compared(truthful, reference="wrong").reason == "no_reference"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (prompt(), "no_answer"),
        (answered("Why?", "x"), "no_rejected"),
        (prompt(messages=({"role": "assistant", "content": "x"},)), "no_prompt"),
    ],
)
def test_rows_without_a_pair_end_rejected(row, reason):
    assert compared(truthful, row).reason == reason


def test_a_reply_without_a_verdict_is_asked_for_once_more():
    replies = iter(["Hard to say.", "[[A]]", "[[B]]"])
    assert compared(lambda *_: next(replies)).record.meta["compare"]["result"] == "win"
    outcome = compared(lambda *_: "Hard to say.")
    assert (outcome.status, outcome.reason, outcome.raw) == ("rejected", "no_verdict", "Hard to say.")


def test_a_judge_of_its_own_is_asked_in_the_teachers_place():
    judge = Scripted(truthful)
    recipe = Compare(CompareConfig()).bind({"judge": llm(judge)})
    (outcome,) = run(recipe, PAIR, lambda *_: "[[B]]")
    assert outcome.score == 1.0
    assert len(judge.turns) == 2
    assert all(request.sampling.temperature == 0.0 for request in judge.asked)


def test_a_broken_judge_fails_the_row():
    assert compared(lambda *_: OSError("gone")).status == "failed"
