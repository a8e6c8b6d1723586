"""Agreement, preferences and strengths by known answers of the literature, and properties that hold for any ratings."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.curate.agreement import (
    Comparison,
    agreement_report,
    alpha_interval,
    bootstrap,
    bradley_terry,
    cohen_kappa,
    components,
    elo_scale,
    fleiss_kappa,
    krippendorff_alpha,
    likert_preferences,
    percent_agreement,
    vote_agreement,
    vote_preferences,
    win_rates,
    win_table,
)
from itune_ray.errors import DataError

GAPS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [{f"r{r}": float(row[u]) for r, row in enumerate(GAPS) if row[u] is not None} for u in range(12)]
FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]


# --- coefficients --------------------------------------------------------------------------------------------------


def test_cohen_on_the_table_of_the_specification():
    first = [1] * 25 + [0] * 25
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)
    for weights in ("linear", "quadratic"):
        assert cohen_kappa(first, second, weights) == pytest.approx(0.4), "of two values all weights are the same"


def test_weighted_cohen_forgives_near_misses():
    """Of (1,1), (2,2), (3,3), (1,2) only the last pair differs, by one step: Σ w o = 1 whatever the weights."""
    first, second = [1, 2, 3, 1], [1, 2, 3, 2]
    observed_margins = {1: (2, 1), 2: (1, 2), 3: (1, 1)}
    for weights, power in (("linear", 1), ("quadratic", 2)):
        expected = sum(
            abs(i - j) ** power * observed_margins[i][0] * observed_margins[j][1] / 4
            for i in (1, 2, 3)
            for j in (1, 2, 3)
        )
        assert cohen_kappa(first, second, weights) == pytest.approx(1 - 1 / expected)  # type: ignore[arg-type]
    assert cohen_kappa(first, second, "quadratic") > cohen_kappa(first, second)


def test_fleiss_on_the_table_of_the_specification():
    assert fleiss_kappa(FLEISS) == pytest.approx(0.209931, abs=1e-6)
    with pytest.raises(DataError, match="same number of raters"):
        fleiss_kappa([[1, 2], [1, 1]])
    with pytest.raises(DataError, match="at least two"):
        fleiss_kappa([[1, 0]])


@pytest.mark.parametrize(
    ("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849), ("ratio", 0.797)]
)
def test_krippendorff_with_gaps(level, alpha):
    assert krippendorff_alpha(UNITS, level) == pytest.approx(alpha, abs=5e-4)


def test_one_category_has_no_agreement_beyond_chance():
    same = [{"a": 3.0, "b": 3.0}] * 5
    assert percent_agreement(same) == 1.0
    assert math.isnan(krippendorff_alpha(same))
    assert math.isnan(cohen_kappa([1, 1], [1, 1]))
    assert math.isnan(fleiss_kappa([[3, 0], [3, 0]]))
    assert math.isnan(krippendorff_alpha([{"a": 1.0}, {"b": 2.0}]))
    assert math.isnan(percent_agreement([{"a": 1.0}]))


def test_skewed_values_agree_often_and_by_chance():
    """The paradox of kappa: 91 % agreement and a coefficient near zero; so both are reported."""
    first = [1] * 95 + [0] * 5
    second = [1] * 90 + [0] * 5 + [1] * 4 + [0]
    units = [{"a": float(a), "b": float(b)} for a, b in zip(first, second, strict=True)]
    assert percent_agreement(units) == pytest.approx(0.91)
    assert cohen_kappa(first, second) < 0.15


def test_a_ratio_scale_starts_at_zero():
    with pytest.raises(DataError, match="below zero"):
        krippendorff_alpha([{"a": -1.0, "b": 1.0}], "ratio")
    assert math.isfinite(krippendorff_alpha([{"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 2.0}], "ratio"))


tables = st.lists(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 4), min_size=1), min_size=2, max_size=12)


@settings(max_examples=60, deadline=None)
@given(tables, st.permutations("abcd"), st.sampled_from(["nominal", "ordinal", "interval", "ratio"]))
def test_the_names_of_raters_and_the_order_of_units_decide_nothing(units, names, level):
    renamed = [{names["abcd".index(r)]: v for r, v in sorted(unit.items(), reverse=True)} for unit in units][::-1]
    before, after = krippendorff_alpha(units, level), krippendorff_alpha(renamed, level)
    assert (math.isnan(before) and math.isnan(after)) or before == pytest.approx(after)
    assert math.isnan(before) or before <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1))
def test_identical_ratings_agree_wholly(values):
    units = [{"a": float(v), "b": float(v), "c": float(v)} for v in values]
    for level in ("nominal", "ordinal", "interval", "ratio"):
        assert krippendorff_alpha(units, level) == pytest.approx(1)
    assert cohen_kappa(values, values) == pytest.approx(1)
    assert fleiss_kappa([[3 * (v == k) for k in range(1, 5)] for v in values]) == pytest.approx(1)


# --- bootstrap -----------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_value_and_repeats():
    one = alpha_interval(UNITS, "nominal", resamples=300)
    assert one == alpha_interval(UNITS, "nominal", resamples=300)
    assert one != alpha_interval(UNITS, "nominal", seed=1, resamples=300)
    assert one.value == pytest.approx(0.743, abs=5e-4)
    assert 0.3 < one.low < one.value < one.high <= 1


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval", "ratio"])
def test_the_fast_interval_is_the_plain_one(level):
    shared = [unit for unit in UNITS if len(unit) > 1]
    fast = alpha_interval(shared, level, resamples=60)
    plain = bootstrap(lambda some: krippendorff_alpha(some, level), shared, resamples=60)
    assert (fast.low, fast.high) == (pytest.approx(plain.low), pytest.approx(plain.high))


def test_more_units_narrow_the_interval():
    rng = random.Random(0)
    many = [
        {"a": float(v), "b": float(v if rng.random() < 0.8 else rng.randint(1, 5))}
        for v in (rng.randint(1, 5) for _ in range(400))
    ]
    wide, narrow = alpha_interval(many[:25], resamples=200), alpha_interval(many, resamples=200)
    assert narrow.high - narrow.low < 0.6 * (wide.high - wide.low)


def test_no_interval_where_resamples_have_no_value():
    found = alpha_interval([{"a": 1.0, "b": 1.0}] * 3, resamples=50)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_the_report_is_json_and_empty_without_shared_units():
    report = agreement_report(UNITS, "nominal", resamples=100)
    assert report["alpha"] == pytest.approx(0.743, abs=5e-4)
    assert (report["units"], report["raters"]) == (11, 4)
    assert report["percent_agreement"] == pytest.approx(percent_agreement(UNITS), abs=1e-6)
    assert agreement_report([{"a": 1.0, "b": 1.0}] * 2, resamples=20)["alpha"] is None
    assert agreement_report([{"a": 1.0}]) == {}


# --- votes ---------------------------------------------------------------------------------------------------------


def vote(rater: str, a: str, b: str, said: str, prompt: str = "p") -> Comparison:
    return Comparison(prompt, a, b, rater, said)  # type: ignore[arg-type]


VOTES = [
    vote("r1", "m", "n", "a"),
    vote("r2", "n", "m", "b"),
    vote("r3", "m", "n", "tie"),
    vote("r4", "n", "m", "both_bad"),
]


def test_votes_agree_whatever_the_order_of_the_answers():
    assert vote_agreement(VOTES) == pytest.approx(2 / 6), "r1 with r2, r3 with r4"
    assert vote_agreement(VOTES, ties=False) == 1.0
    assert math.isnan(vote_agreement([vote("r1", "m", "n", "a"), vote("r2", "m", "n", "a", prompt="other")]))


def turned(c: Comparison) -> Comparison:
    return vote(c.rater, c.b, c.a, {"a": "b", "b": "a"}.get(c.vote, c.vote), c.prompt)


votes = st.builds(
    vote,
    st.sampled_from("uvw"),
    st.sampled_from("klm"),
    st.sampled_from("xyz"),
    st.sampled_from(["a", "b", "tie", "both_bad"]),
    st.sampled_from("pq"),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(votes, max_size=20))
def test_swapping_answers_and_votes_changes_nothing(comparisons):
    swapped = [turned(c) for c in comparisons]
    one, other = vote_agreement(comparisons), vote_agreement(swapped)
    assert one == other or (math.isnan(one) and math.isnan(other))
    assert repr(vote_preferences(comparisons)) == repr(vote_preferences(swapped))
    names, wins = win_table(comparisons)
    assert names == win_table(swapped)[0]
    assert (wins == win_table(swapped)[1]).all()
    assert wins.sum() == len(comparisons)


def test_votes_become_preferences():
    (found,) = vote_preferences(VOTES)
    assert (found.chosen, found.rejected, found.p_chosen) == ("m", "n", 0.75)
    assert math.isnan(found.margin)
    assert vote_preferences(VOTES, least=0.75) == []
    assert vote_preferences([vote("r1", "m", "n", "tie")]) == []


def test_ratings_become_preferences():
    ratings = {
        "x": {"r1": 5.0, "r2": 4.0, "r3": 3.0},
        "y": {"r1": 3.0, "r2": 4.0, "r3": 2.0},
        "z": {"r4": 1.0},
        "unrated": {},
    }
    found = {(p.chosen, p.rejected): p for p in likert_preferences("p", ratings)}
    assert set(found) == {("x", "y"), ("x", "z"), ("y", "z")}
    assert found["x", "y"].margin == pytest.approx(1.0), "a margin at the bound is enough"
    assert found["x", "y"].p_chosen == pytest.approx(2.5 / 3)
    assert math.isnan(found["x", "z"].p_chosen), "nobody rated both"
    assert {(p.chosen, p.rejected) for p in likert_preferences("p", ratings, 1.5)} == {("x", "z"), ("y", "z")}
    with pytest.raises(DataError, match="positive"):
        likert_preferences("p", ratings, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("xyz"), st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1), min_size=2
    ),
    st.integers(-3, 3),
)
def test_a_shifted_scale_prefers_the_same(ratings, shift):
    moved = {answer: {r: v + shift for r, v in values.items()} for answer, values in ratings.items()}
    one, other = likert_preferences("p", ratings), likert_preferences("p", moved)
    assert [(p.chosen, p.rejected) for p in one] == [(p.chosen, p.rejected) for p in other]


# --- strengths -----------------------------------------------------------------------------------------------------

WINS = np.array([[0, 7, 9], [3, 0, 6], [1, 4, 0]], float)


def test_bradley_terry_of_the_specification():
    strength = bradley_terry(WINS)
    assert strength == pytest.approx([0.6625, 0.2197, 0.1178], abs=5e-5)
    assert strength.sum() == pytest.approx(1)
    expected = np.array(
        [
            sum((WINS[i, j] + WINS[j, i]) * strength[i] / (strength[i] + strength[j]) for j in range(3) if j != i)
            for i in range(3)
        ]
    )
    assert expected == pytest.approx(WINS.sum(1)), "the likelihood's own condition"
    assert bradley_terry(WINS[::-1, ::-1]) == pytest.approx(strength[::-1], abs=1e-9)


def test_strengths_on_the_scale_of_chess():
    scale = elo_scale(np.array([10.0, 1.0]) / 11)
    assert scale[0] - scale[1] == pytest.approx(400)
    assert scale.sum() == pytest.approx(0)


def test_groups_that_never_met_are_refused():
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 1
    for prior in (0.0, 0.5):
        with pytest.raises(DataError, match=r"2 groups that never met.*\[\[0, 1\], \[2, 3\]\]"):
            bradley_terry(apart, prior)


def test_who_never_lost_needs_a_prior():
    undefeated = np.array([[0, 3, 2], [0, 0, 2], [0, 1, 0]], float)
    with pytest.raises(DataError, match=r"never lost.*prior"):
        bradley_terry(undefeated)
    strength = bradley_terry(undefeated, prior=0.5)
    assert strength[0] > strength[1] > strength[2] > 0


def test_components_are_strong():
    links = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]], bool)
    assert components(links) == [[0, 1, 2], [3]]
    assert components(links | links.T) == [[0, 1, 2, 3]]
    assert components(np.zeros((0, 0), bool)) == []


def test_win_rates_count_ties_half():
    names, wins = win_table([vote("r", "m", "n", "a"), vote("r", "n", "m", "tie"), vote("r", "m", "o", "b")])
    assert names == ["m", "n", "o"]
    assert win_rates(wins) == pytest.approx([1.5 / 3, 0.25, 1.0])
    assert math.isnan(win_rates(np.zeros((1, 1)))[0])
