"""Rows of the playground's preferences: right against wrong, a function of the seed."""

import itertools

from itune_ray.benchmarks import GRADERS
from itune_ray.generate.recipes.scored import load_grader
from itune_ray.playground.preferences import labelled, pairs, ranked


def test_the_grader_agrees_on_what_is_right():
    assert "playground" in GRADERS
    grade = load_grader("playground")

    def right(row, answer):
        return grade(row.prompt[-1]["content"], answer, row.meta) == 1

    for row in pairs(60, seed=1):
        assert right(row, row.response)
        assert not right(row, row.rejected)
    kinds = set()
    for row in labelled(60, seed=1):
        assert right(row, row.response) == row.meta["label"]
        kinds.add(row.meta["label"])
    assert kinds == {True, False}
    for row in ranked(60, seed=1):
        answers = [entry["response"] for entry in row.meta["responses"]]
        assert [right(row, answer) for answer in answers] == [True, False, False]
        assert len(set(answers)) == 3


def test_a_row_does_not_depend_on_how_many_there_are():
    for function in (pairs, labelled, ranked):
        assert list(function(3, seed=2)) == list(itertools.islice(function(9, seed=2), 3))
        assert next(function(1, seed=2)) != next(function(1, seed=3))
