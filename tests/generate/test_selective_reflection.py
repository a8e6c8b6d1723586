"""The truth table of selective reflection, over all sign patterns, guards and NaN."""

import itertools
import json
import math
from dataclasses import replace

import pytest
from testdata import public_data

from itune_ray.generate.selective_reflection import Difficulty, select_version

FIXTURE = json.loads(public_data("methods/data_fixtures.json").read_text())["D12"]
LOW, HIGH = 0.3, 0.6


def scores(q_harder=True, qa_lower=True, a_lower=True):
    """Versions all below 1 with these signs: IFD(Q) > IFD(ori), rIFD(QA) < rIFD(Q), rIFD(A) < rIFD(ori)."""
    return {
        "ori": Difficulty(0.5, HIGH if a_lower else LOW),
        "Q": Difficulty(0.7 if q_harder else 0.4, HIGH if qa_lower else LOW),
        "A": Difficulty(0.5, LOW if a_lower else HIGH),
        "QA": Difficulty(0.7, LOW if qa_lower else HIGH),
    }


def expected(signs):
    for pattern, version in FIXTURE["choice"].items():
        if all(want in ("*", str(int(sign))) for want, sign in zip(pattern.split(","), signs, strict=True)):
            return version
    raise AssertionError(signs)


@pytest.mark.parametrize("signs", itertools.product([True, False], repeat=3), ids=str)
def test_every_sign_pattern(signs):
    version = expected(signs)
    assert select_version(scores(*signs), mode="full") == version
    assert select_version(scores(*signs)) == (version if version in FIXTURE["released_keeps"] else None)


def test_equal_ratios_take_nothing_new():
    same = dict.fromkeys(("ori", "Q", "A", "QA"), Difficulty(0.5, 0.5))
    assert select_version(same, mode="full") == "ori"
    assert select_version(same) is None


@pytest.mark.parametrize("signs", itertools.product([True, False], repeat=3), ids=str)
@pytest.mark.parametrize("ratio", ["ifd", "reversed_ifd"])
def test_the_version_taken_must_be_below_one(signs, ratio):
    raised = {version: replace(s, **{ratio: getattr(s, ratio) + 1}) for version, s in scores(*signs).items()}
    assert select_version(raised, mode="full") is None, "all rise, so the order is the same"


@pytest.mark.parametrize("version", ["ori", "Q", "A", "QA"])
@pytest.mark.parametrize("ratio", ["ifd", "reversed_ifd"])
def test_a_ratio_that_was_not_scored_excludes_the_row(version, ratio):
    for signs in itertools.product([True, False], repeat=3):
        holed = scores(*signs)
        holed[version] = replace(holed[version], **{ratio: math.nan})
        assert select_version(holed, mode="full") is None
