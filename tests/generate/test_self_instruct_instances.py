"""Self-Instruct's instances: the published parses, the order that the kind of task calls for, and every filter."""

import json

import pytest
from scripted import prompt, run
from testdata import public_data

from itune_ray.config.recipes import SelfInstructInstancesConfig
from itune_ray.generate.recipes.self_instruct_instances import (
    Instance,
    SelfInstructInstances,
    broken_instances,
    parse_examples,
    parse_labelled,
    parse_yes_no,
)

TASK = "Add the two numbers."
TWO = "Example 1\nInput: 2+2\nOutput: 4\nExample 2\nInput: 3+3\nOutput: 6"


def outcomes_of(reply, kind="No", **config):
    script = lambda turn, index: kind if "Is this task a classification?" in turn else reply  # noqa: E731
    return run(SelfInstructInstances(SelfInstructInstancesConfig(**config)), prompt(TASK), script)


@pytest.mark.parametrize(
    ("block", "parse"), [("generation_instances", parse_examples), ("classification_instances", parse_labelled)]
)
def test_the_published_cases(block, parse):
    cases = json.loads(public_data("methods/data_fixtures.json").read_text())["D08"][block]
    assert cases
    for case in cases:
        read = parse(case["raw"])
        reasons = broken_instances(read, case["finish"] == "length")
        kept = sorted(["T", *instance] for instance, reason in zip(read, reasons, strict=True) if reason is None)
        assert kept == case["expected_sorted"], case


def test_other_tasks_are_written_input_first():
    first, second = outcomes_of(TWO)
    assert [m["content"] for m in first.record.messages] == [f"{TASK}\n\n2+2", "4"]
    assert second.record.response == "6"
    assert first.record.recipe == "self_instruct_instances.input_first"
    assert first.record.parents == ("s:0:0",)
    assert first.record.key != second.record.key


def test_classification_is_written_label_first():
    reply = "Class label: good\nI love it.\nClass label: bad\nI hate it."
    outcomes = outcomes_of(reply, kind="**Yes**.")
    assert [(o.record.prompt[-1]["content"], o.record.response) for o in outcomes] == [
        (f"{TASK}\n\nI love it.", "good"),
        (f"{TASK}\n\nI hate it.", "bad"),
    ]
    assert outcomes[0].record.recipe == "self_instruct_instances.output_first"


def test_a_task_without_input_is_its_own_user_turn():
    (outcome,) = outcomes_of("Example 1\nInput:\nOutput: 4")
    assert [m["content"] for m in outcome.record.messages] == [TASK, "4"]


@pytest.mark.parametrize(
    ("instances", "is_cut", "reasons"),
    [
        ([Instance("a", "a"), Instance("b", "c")], False, ["input_is_output", None]),
        ([Instance("a", ""), Instance("b", "c")], False, ["empty_output", None]),
        ([Instance("a:", "x"), Instance("b", "y:"), Instance("c", "z")], False, ["colon_final", "colon_final", None]),
        ([Instance("a", "x"), Instance("a", "y"), Instance("b", "z")], False, ["contradictory"] * 3),
        ([Instance("a", "x"), Instance("a", "y")], True, [None, "truncated"]),
        ([Instance("a", "x"), Instance("a", "a"), Instance("b", "z")], False, [None, "input_is_output", None]),
        ([Instance("", "x"), Instance("", "y")], False, [None, None]),
        ([Instance("a", "x"), Instance("a", "x")], False, [None, "duplicate"]),
    ],
)
def test_each_filter_hits_its_instance_and_no_other(instances, is_cut, reasons):
    assert broken_instances(instances, is_cut) == reasons


def test_words_within_a_field_do_not_split_it():
    reply = "Example 1\nInput: Give an Example 2 of Input: here\nOutput: see Output: there"
    assert parse_examples(reply) == [Instance("Give an Example 2 of Input: here", "see Output: there")]
    assert parse_examples("Input: a\nOutput: b\nInput: c\nOutput: d") == [Instance("a", "b")]


def test_no_more_than_five_are_kept_and_always_the_same():
    reply = "\n".join(f"Example {i}\nInput: {i}\nOutput: {i + 100}" for i in range(12))
    outcomes = outcomes_of(reply)
    kept = [o.record.response for o in outcomes if o.status == "accepted"]
    assert len(kept) == 5
    assert sum(o.reason == "surplus" for o in outcomes) == 7
    assert kept == [o.record.response for o in outcomes_of(reply) if o.status == "accepted"]
    assert len([o for o in outcomes_of(reply, instances=12) if o.status == "accepted"]) == 12


@pytest.mark.parametrize(
    ("reply", "kind", "reason"),
    [
        ("no markers here", "No", "unparsable"),
        (("no markers here", "length"), "No", "truncated"),
        (TWO, "Yes", "unparsable"),
        (TWO, "That depends.", "unparsable"),
        (TWO, "", "empty"),
    ],
)
def test_what_cannot_be_read_ends_rejected(reply, kind, reason):
    assert [(o.status, o.reason) for o in outcomes_of(reply, kind)] == [("rejected", reason)]


def test_only_a_plain_yes_or_no_counts():
    assert [parse_yes_no(text) for text in ("Yes", "yes.", "NO", "Not sure", "yes and no")] == [
        True,
        True,
        False,
        None,
        None,
    ]


def test_a_failed_call_fails_the_input():
    assert [(o.status, o.cause) for o in outcomes_of(OSError("gone"))] == [("failed", "gone")]


def test_varied_surface_forms_are_drawn_per_instance_and_told():
    reply = "\n".join(f"Example {i}\nInput: Number: {i}\nOutput: {i + 1}" for i in range(1, 41))
    outcomes = outcomes_of(reply, instances=40, encoding="varied")
    rows = [outcome.record for outcome in outcomes]
    assert {outcome.status for outcome in outcomes} == {"accepted"}
    assert {row.meta["surface"]["form"] for row in rows} == set(range(7))
    assert {row.meta["surface"]["unlabelled"] for row in rows} == {True, False}
    for number, row in enumerate(rows, start=1):
        text = row.prompt[-1]["content"]
        assert TASK in text
        assert (f"Number: {number}" in text) != row.meta["surface"]["unlabelled"]
        assert str(number) in text
    assert [o.record for o in outcomes_of(reply, instances=40, encoding="varied")] == rows
    assert all(not outcome.record.meta for outcome in outcomes_of(reply)), "plain rows say nothing of it"


def test_instances_that_a_lost_label_makes_equal_are_one():
    reply = "".join(f"Example {i}\nInput: {'Number: ' * (i % 2)}7\nOutput: 8\n" for i in range(1, 81))
    outcomes = outcomes_of(reply, instances=80, encoding="varied")
    made = [o.record.messages[-2]["content"] for o in outcomes if o.status == "accepted"]
    assert len(set(made)) == len(made) >= 1
    assert {o.reason for o in outcomes if o.status == "rejected"} == {"duplicate"}
