"""Uncertainty by known answers, and what has none."""

import math
from random import Random

import pytest

from itune_ray.curate.uncertainty import (
    disagreement,
    drop_words,
    least_confidence,
    margin_uncertainty,
    mean_entropy,
    most_uncertain,
    prompt_uncertainty,
    sequence_probability,
)

LOG = math.log


def test_prompt_uncertainty_of_the_specification():
    assert prompt_uncertainty(0.62, [0.60, 0.41, 0.66, 0.58]) == pytest.approx(0.0775)
    assert prompt_uncertainty(0.62, [0.62] * 4) == 0, "a model that a changed prompt does not move"
    assert math.isnan(prompt_uncertainty(0.62, []))


def test_probability_of_a_sequence():
    assert sequence_probability([LOG(0.5), LOG(0.125)]) == pytest.approx(0.25)
    assert least_confidence([LOG(0.5), LOG(0.1)]) == pytest.approx(0.7)
    assert math.isnan(sequence_probability([]))
    assert math.isnan(least_confidence([]))


def test_margin_and_entropy():
    sure, unsure = {1: LOG(0.9), 2: LOG(0.1)}, {1: LOG(0.5), 2: LOG(0.5)}
    assert margin_uncertainty([sure]) == pytest.approx(0.2)
    assert margin_uncertainty([sure, unsure]) == pytest.approx(0.6)
    assert mean_entropy([unsure]) == pytest.approx(LOG(2))
    assert mean_entropy([{k: LOG(0.25) for k in range(4)}]) == pytest.approx(LOG(4))
    assert mean_entropy([{1: 0.0}]) == 0
    for nothing in ([], [{1: -0.1}]):
        assert math.isnan(margin_uncertainty(nothing))
    assert math.isnan(mean_entropy([]))


def test_disagreement_of_answers():
    assert disagreement(["a", "a", "b"]) == pytest.approx(2 / 3)
    assert disagreement(["a", "a"]) == 0
    assert math.isnan(disagreement(["a"]))


def test_words_are_dropped_by_rate():
    text = " ".join(f"w{i}" for i in range(2000))
    assert drop_words(text, 0.0, Random(0)) == text
    kept = drop_words(text, 0.2, Random(0)).split()
    assert 1500 < len(kept) < 1700
    assert [int(w[1:]) for w in kept] == sorted(int(w[1:]) for w in kept)
    assert drop_words("one two", 1.0, Random(0)) == "one", "never an empty prompt"
    assert drop_words(text, 0.2, Random(0)) == drop_words(text, 0.2, Random(0))


def test_the_most_uncertain_are_chosen_whatever_the_order():
    scores = {"d": 0.5, "a": 0.5, "b": math.nan, "c": 0.9, "e": 0.1}
    assert most_uncertain(scores, 0.4) == ["c", "a"]
    assert most_uncertain(dict(reversed(scores.items())), 0.4) == ["c", "a"]
    assert most_uncertain(scores, 1.0) == ["c", "a", "d", "e"], "what is not scored is never chosen"
    assert most_uncertain({}, 0.3) == []
