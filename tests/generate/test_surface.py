"""Surface forms: every form is drawn, what the task says is in each, and single labels go half of the time."""

import random
from collections import Counter

import pytest

from itune_ray.generate.surface import WITH_INPUT, WITHOUT_INPUT, encode, without_label


@pytest.mark.parametrize(("input", "forms"), [("Text: a {b} c", WITH_INPUT), ("", WITHOUT_INPUT)])
def test_every_form_is_as_likely_and_holds_the_task(input, forms):
    assert len(forms) == {WITH_INPUT: 7, WITHOUT_INPUT: 6}[forms] == len(set(forms))
    drawn = [encode("Sort {input} and {instruction}.", input, random.Random(i)) for i in range(1400)]
    counts = Counter(made.form for made in drawn)
    mean = len(drawn) / len(forms)
    assert sum((counts[form] - mean) ** 2 / mean for form in range(len(forms))) < 22.5  # χ², 6 degrees, p = 0.001
    for made in drawn:
        assert "Sort {input} and {instruction}." in made.prompt, "braces of the task are its own"
        assert "a {b} c" in made.prompt or not input
        assert made.prompt == made.prompt.strip()
    unlabelled = sum(made.is_unlabelled for made in drawn)
    assert abs(unlabelled - 700) < 75 if input else unlabelled == 0
    assert all(("Text:" in made.prompt) != made.is_unlabelled for made in drawn if input)


@pytest.mark.parametrize(
    ("input", "bare"),
    [
        ("Text: one\n\ntwo", "one\ntwo"),
        ("Movie review: fine", "fine"),
        ("no label", None),
        ("A: one\nB: two", None),
        ("one\nText: two", None),
        ("12: thirty", None),
        ("Text:", None),
        ("", None),
    ],
)
def test_a_single_label_at_the_start_is_one(input, bare):
    assert without_label(input) == bare


def test_the_same_generator_draws_the_same():
    one, two = (encode("Do it.", "Text: x", random.Random(5)) for _ in range(2))
    assert one == two
