"""Six criteria as one score: the published number, and more of any is more of all."""

import json
import math

import pytest
from testdata import public_data

from itune_ray.engine.criteria import WEIGHTS, ratings_of_heads, weighted_score


def test_the_published_score():
    case = json.loads(public_data("methods/data_fixtures.json").read_text())["D20"]
    assert list(WEIGHTS) == case["order"]
    assert [weight * 9 for weight in WEIGHTS.values()] == case["weights_ninths"]
    assert weighted_score(ratings_of_heads(case["head"])) == pytest.approx(case["score"], abs=1e-9)


def test_the_score_stays_on_the_scale_and_rises_with_each_criterion():
    assert sum(WEIGHTS.values()) == 1
    assert weighted_score(ratings_of_heads([0] * 6)) == pytest.approx(1)
    assert weighted_score(ratings_of_heads([1] * 6)) == pytest.approx(5)
    ratings = dict.fromkeys(WEIGHTS, 3.0)
    for name, weight in WEIGHTS.items():
        rise = weighted_score({**ratings, name: 4.0}) - weighted_score(ratings)
        assert rise == pytest.approx(float(weight))


def test_what_was_not_rated_is_no_score():
    assert math.isnan(weighted_score({**dict.fromkeys(WEIGHTS, 3.0), "creativity": math.nan}))
    with pytest.raises(ValueError, match="not of relevance"):
        weighted_score({"relevance": 3.0})
    with pytest.raises(ValueError, match="shorter"):
        ratings_of_heads([1.0])
