"""Reflective learning: the trace of the fixtures to the digit, what stops it, and rows that carry all of it."""

import json
import math
import re

import pytest
from scripted import Scripted, llm, prompt, run
from testdata import public_data

from itune_ray.config.recipes import ReflectiveLearningConfig
from itune_ray.generate.recipes.reflective_learning import (
    ReflectiveLearning,
    alignment,
    changes,
    converged,
    hashed_words,
    parse_evaluation,
    split_passages,
)

LEVELS = ("easy", "medium", "hard", "expert")
TASK = "sum the list"
Q0 = dict(zip(LEVELS, (0.8, 0.5, 0.3, 0.1), strict=True))
RATE = dict(zip(LEVELS, (0.2, 0.4, 0.6, 0.75), strict=True))
FIRST = [0.8, 0.333333, 0.07746, 0.02582]
CHANGES = [0.585117, 0.45402, 0.140088, 0.308296, 0.080275, 0.057744, 0.04214]


def quality(level, t):
    return 1 - (1 - Q0[level]) * RATE[level] ** t


class Agents:
    """Teacher and student whose quality at a level is a function of how often they were asked there."""

    def __init__(self, learn=True, reflect=None):
        self.steps = dict.fromkeys(LEVELS, 0)
        self.learn, self.reflect = learn, reflect
        self.calls = 0

    def __call__(self, turn, index):
        self.calls += 1
        if "want to find out" in turn:
            level = re.search(r'at the level "(\w+)"', turn)[1]
            t = self.steps[level]
            self.steps[level] += 1
            return f"Question {level} {t if self.learn else 0}"
        if "Rate the reply" in turn:
            return f"Score: {quality(*self.asked(turn)):.17f}\nName the steps."
        if "asks about it" in turn:
            good = max(1, math.ceil(quality(*self.asked(turn)) * 3))
            return " ".join(TASK.split()[:good] + ["noise"] * (3 - good))
        if "wrote the answer" in turn:
            return self.reflect or f"revised {self.calls}"
        return "first draft"

    @staticmethod
    def asked(turn):
        level, t = re.search(r"Question (\w+) (\d+)", turn).groups()
        return level, int(t)


def recipe(**config):
    return ReflectiveLearning(ReflectiveLearningConfig(**{"documents": None, "bins": 16, "steps": 10, **config}))


def facts_of(outcomes):
    return outcomes[0].record.meta["reflective"]


def test_the_trace_of_the_fixtures():
    agents = Agents()
    outcomes = run(recipe(patience=1), prompt(TASK), agents)
    facts = facts_of(outcomes)
    matrix = facts["alignment"]
    assert [level[0] for level in matrix] == pytest.approx(FIRST, abs=1e-6)
    assert facts["changes"] == pytest.approx(CHANGES, abs=1e-6)
    assert [len(level) for level in matrix] == [8] * 4, "stops after column t = 7"
    assert facts["is_converged"] is True
    assert all(0 <= cell <= 1 for level in matrix for cell in level)
    assert agents.calls == 1 + 8 * (3 * 4 + 1)


def test_the_matrix_of_the_fixture_file():
    fixture = json.loads(public_data("methods/data_fixtures.json").read_text())["D23"]
    facts = facts_of(run(recipe(epsilon=1e-9), prompt(TASK), Agents()))
    for level, expected in zip(facts["alignment"], fixture["A"], strict=True):
        assert level == pytest.approx(expected, abs=1e-6)
    assert facts["changes"] == pytest.approx(fixture["delta_from_t1"], abs=1e-6)
    assert facts["is_converged"] is False
    false_stop = facts_of(run(recipe(epsilon=0.2, patience=1), prompt(TASK), Agents()))
    assert len(false_stop["changes"]) == fixture["false_stop_column_eps0.2_patience1"] == 3


def test_patience_does_not_stop_at_a_change_that_is_small_by_chance():
    facts = facts_of(run(recipe(epsilon=0.2, patience=2), prompt(TASK), Agents()))
    assert len(facts["changes"]) == 6
    assert converged([0.3, 0.1], 0.2, 1)
    assert not converged([0.3, 0.1], 0.2, 2)
    assert not converged([], 0.2, 1), "the first column has none before it"


def test_a_student_that_does_not_change_stops_at_the_second_column():
    agents = Agents(learn=False, reflect="first draft")
    outcomes = run(recipe(patience=1), prompt(TASK), agents)
    assert facts_of(outcomes)["changes"] == [0.0]
    assert agents.calls == 1 + 2 * 13
    assert outcomes[0].record.response == "first draft"


def test_the_row_is_the_last_revision_and_the_trace_is_rows_of_its_own():
    outcomes = run(recipe(steps=2), prompt(TASK, meta={"kind": "x"}), Agents())
    final, *trace = outcomes
    assert final.record.messages[0]["content"] == TASK
    assert final.record.response.startswith("revised")
    assert final.record.meta["kind"] == "x"
    assert len(trace) == 2 * 4
    assert len({o.record.key for o in outcomes}) == 9
    assert {o.record.parents for o in outcomes} == {("s:0:0",)}
    for outcome in trace:
        level, step = (outcome.record.meta["reflective"][name] for name in ("level", "step"))
        assert outcome.score == pytest.approx(quality(level, step))
        assert outcome.reason == (None if outcome.score >= 0.5 else "low_score")
        assert outcome.record.meta["reflective"]["comment"] == "Name the steps."
    assert len(run(recipe(steps=2, trace=False), prompt(TASK), Agents())) == 1


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("Score: 0.25\nMend it.", (0.25, "Mend it.")),
        ("**Score:** 1\n\nFine.", (1.0, "Fine.")),
        ("score: .5", (0.5, "")),
        ("`Score: 0.7`\nNo.", (0.7, "No.")),
        ("Score: 1.5\nGood.", None),
        ("Score: 8\nGood.", None),
        ("Score: 1/5", None),
        ("Score: 10", None),
        ("I like it. Score: 1", None),
        ("Score: high", None),
    ],
)
def test_scores_are_parsed_or_refused(reply, found):
    assert parse_evaluation(reply) == found


def test_a_score_that_cannot_be_parsed_ends_the_row():
    agents = Agents()
    (outcome,) = run(recipe(), prompt(TASK), lambda t, i: "Good." if "Rate the reply" in t else agents(t, i))
    assert (outcome.status, outcome.reason, outcome.raw) == ("rejected", "unparsable", "Good.")


def test_an_engine_error_fails_the_row():
    agents = Agents()
    (outcome,) = run(recipe(), prompt(TASK), lambda t, i: OSError("gone") if "asks about" in t else agents(t, i))
    assert (outcome.status, outcome.cause) == ("failed", "gone")


def test_passages_are_chosen_by_likeness_and_shown_in_order():
    seen = []
    agents = Agents()

    def script(turn, index):
        seen.append(turn)
        return agents(turn, index)

    documents = ["Cats sleep.\n\nTo sum  the list,\nadd all.", "Rain falls.\n\nThe list of the sum ends."]
    config = {"documents": "documents", "passages": 2, "bins": 1024, "steps": 1}
    run(recipe(**config), prompt(TASK, meta={"documents": documents}), script)
    assert re.findall(r"<passage id=\"\d\">\n(.*)\n", seen[0]) == [
        "To sum the list, add all.",
        "The list of the sum ends.",
    ]
    assert split_passages(" a\nb \n \n\n c") == ["a b", "c"]
    for meta in ({}, {"documents": []}, {"documents": [" "]}, {"documents": 3}):
        assert run(recipe(**config), prompt(TASK, meta=meta), script)[0].reason == "no_documents"


def test_passages_are_chosen_anew_by_the_comments():
    documents = ["sum the list", "steps name other"]
    shown = {}
    for reretrieve in (False, True):
        seen, agents = [], Agents()

        def script(turn, index, seen=seen, agents=agents):
            seen.append(turn)
            if "Rate the reply" in turn:
                return "Score: 0.5\nsteps name other, steps name other, steps name other"
            return agents(turn, index)

        config = {
            "documents": "d",
            "passages": 1,
            "bins": 1024,
            "steps": 2,
            "reretrieve": reretrieve,
            "levels": ["easy"],
        }
        run(recipe(**config), prompt(TASK, meta={"d": documents}), script)
        shown[reretrieve] = [re.search(r"<passage id=\"1\">\n(.*)\n", t)[1] for t in seen if "asks about it" in t]
    assert shown == {False: ["sum the list", "sum the list"], True: ["sum the list", "steps name other"]}


def test_student_and_teacher_are_asked_their_own():
    agents = Agents()
    student = Scripted(agents)
    teacher_turns = []

    def teacher(turn, index):
        teacher_turns.append(turn)
        return agents(turn, index)

    run(recipe(steps=1).bind({"student": llm(student)}), prompt(TASK), teacher)
    assert len(teacher_turns) == 2 * 4
    assert len(student.turns) == 1 + 4 + 1
    assert all("You teach" in turn for turn in teacher_turns)


def test_embeddings_and_alignment():
    assert hashed_words("", 16) == [0.0] * 16
    assert alignment("", TASK, 1.0, 16) == 0
    assert alignment(TASK, TASK, 0.4, 16) == pytest.approx(0.4)
    assert changes([[0.0, 0.0], [0.3, 0.4]]) == [0.5]


def test_the_manifest_has_the_mean_matrix():
    made = recipe(steps=3, epsilon=1e-9)
    short = recipe(steps=1)
    outcomes = run(made, prompt(TASK), Agents()) + run(short, prompt(TASK, 1), Agents())
    facts = made.facts(outcomes)["alignment"]
    assert facts["rows"] == [2, 1, 1]
    assert [level[0] for level in facts["mean"]] == pytest.approx(FIRST, abs=1e-6)
    assert made.facts([]) == {"alignment": None}
