"""The playground benchmark: its own references are right, few-shot prompts are fair and hold no answer."""

import itertools

import pytest

from itune_ray.benchmarks import benchmark
from itune_ray.benchmarks.base import Reply
from itune_ray.config.evaluate import PlaygroundBenchmark
from itune_ray.errors import ConfigError
from itune_ray.playground.parser import grade as exact_grade
from itune_ray.playground.parser import parse


def made(**config):
    return benchmark(PlaygroundBenchmark(rows=300, **config))


@pytest.mark.parametrize("split", ["test", "test_paraphrase"])
@pytest.mark.parametrize("shots", [0, 4])
def test_references_grade_themselves_as_right_and_others_as_wrong(split, shots):
    measure = made(split=split, shots=shots)
    items = measure.items()
    assert len(items) == len({item.key for item in items}) == 300
    for item in items:
        assert measure.grade(item, Reply(text=f" {item.reference}\n")).ok
        for wrong in ("", item.reference + " .", item.reference[:-1]):
            assert not measure.grade(item, Reply(text=wrong)).ok


def test_grades_agree_with_the_worlds_own_grader():
    measure = made()
    items = measure.items()
    for item, other in itertools.pairwise(items):
        assert exact_grade(item.prompt, item.reference).correct
        swapped = measure.grade(item, Reply(text=other.reference)).ok
        assert swapped == exact_grade(item.prompt, other.reference).correct


def test_categories_are_families_and_safety_has_groups_of_its_own():
    items = made().items()
    assert len({item.category for item in items}) >= 20
    assert {item.category for item in items if "unsafe requests refused" in item.groups} == {"refuse"}
    assert {item.category for item in items if "safe look-alikes answered" in item.groups} == {"safe"}
    refused = [item for item in items if item.category == "refuse"]
    assert not made().grade(refused[0], Reply(text="To do that, take your time.")).ok


def test_items_are_the_same_every_time_and_differ_by_seed():
    assert made(shots=2).items() == made(shots=2).items()
    assert [i.prompt for i in made().items()] != [i.prompt for i in made(seed=778).items()]


def test_shots_are_solved_examples_of_the_family_and_never_the_question():
    for item in made(shots=4, options={"shot_format": "chat"}).items():
        turns = item.messages
        assert [m["role"] for m in turns] == ["user", "assistant"] * 4 + ["user"]
        question = turns[-1]["content"]
        for asked, answered in zip(turns[:-1:2], turns[1::2], strict=True):
            found = parse(asked["content"])
            assert (found.family, found.answer) == (item.category, answered["content"])
            assert asked["content"] != question


def test_shots_as_text_end_where_the_answer_begins():
    for item in made(shots=4).items():
        assert item.messages is None
        lines = item.text.split("\n ")
        assert item.text.startswith(" ")
        assert lines[-1].endswith("\n")
        assert len(lines) == 9
        assert parse(lines[-1].strip()).answer == item.reference
        # An answer of several lines is never cut by the stop string, and the next line always is.
        assert all(stop not in f" {item.reference}" for stop in item.stop)
        assert item.stop[0] in f" {item.reference}\n {lines[0]}"


def test_zero_shot_is_the_chat_alone():
    item = made().items()[0]
    assert [m["role"] for m in item.messages] == ["user"]
    assert item.stop == ()


def test_unknown_options_are_refused_by_name():
    with pytest.raises(ConfigError, match="shot_format"):
        made(options={"shot_format": "xml"})
    with pytest.raises(ConfigError, match="wieghts"):
        made(options={"wieghts": {}}).items()


def test_sentence_shots_end_where_the_answer_begins():
    for item in made(shots=2, options={"shot_format": "sentence"}).items():
        lines = item.text.split("\n ")
        assert len(lines) >= 3
        assert item.text.endswith(" and you get")
        assert item.text.count(" and you get") == 3
