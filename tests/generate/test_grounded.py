"""Grounded tasks: the published parses, the two measures of grounding, and every rule."""

import asyncio
import json
import math

import pytest
from scripted import Scripted, answered, llm, prompt, run
from testdata import public_data

from itune_ray.config.recipes import GroundedConfig
from itune_ray.data.records import Record
from itune_ray.engine.base import Completion
from itune_ray.generate.recipes.grounded import Grounded, Task, broken_task, grounding_of, parse_tagged, pieces

DOCUMENT = "Bread rises because yeast eats sugar and makes gas. The gas is caught in the dough, which grows."
OUTPUT = "Yeast eats the sugar and makes gas, and as the dough has caught it, bread rises."
TEXT = Record(source="web", position=1, text=DOCUMENT)


def reply(instruction="Why does bread rise?", input="", output=OUTPUT):
    return f"#instruction#: {instruction}\n#input#: {input}\n#output#: {output}"


def outcome_of(said=None, row=TEXT, **config):
    (outcome,) = run(Grounded(GroundedConfig(**config)), row, lambda *_: reply() if said is None else said)
    return outcome


def test_the_published_parses():
    cases = json.loads(public_data("methods/data_fixtures.json").read_text())["D18"]
    assert len(cases) == 4
    for case in cases:
        task = parse_tagged(case["text"])
        assert (None if task is None else task._asdict()) == case["ours"], case


def test_words_that_end_like_the_end_mark_stay_whole():
    assert parse_tagged("#instruction#: a\n#output#: classes</s>").output == "classes"
    assert parse_tagged("Sure!\n#Instruction# a #INPUT#: b #output# c") == Task("a", "b", "c")
    assert parse_tagged("#output#: c\n#instruction#: a") is None


def test_a_document_becomes_a_task():
    outcome = outcome_of()
    record = outcome.record
    assert (outcome.status, record.text, record.parents) == ("accepted", None, ("web:1:0",))
    assert [m["content"] for m in record.messages] == ["Why does bread rise?", OUTPUT]
    assert outcome.score == record.meta["grounding"]["recall"] == 1.0
    with_input = outcome_of(reply(input="a loaf")).record
    assert with_input.prompt[0]["content"] == "Why does bread rise?\n\na loaf"


def test_grounding_of_a_copy_a_paraphrase_and_something_else():
    assert grounding_of(DOCUMENT, DOCUMENT) == (1.0, 1.0)
    paraphrase = grounding_of(OUTPUT, DOCUMENT)
    assert paraphrase.recall == 1.0
    assert paraphrase.copied == 4 / 16, "`sugar and makes gas` is the longest run"
    assert grounding_of("Owls hunt mice at night.", DOCUMENT) == (0.0, 0.0)
    assert grounding_of("Yeast hunts mice.", DOCUMENT).recall == 1 / 3
    assert math.isnan(grounding_of("it is as it is", DOCUMENT).recall)
    assert math.isnan(grounding_of("", DOCUMENT).copied)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("no tags", "unparsable"),
        (reply(output=OUTPUT + " #output#: more"), "tag_leak"),
        ("#instruction#: a #output#: b #input#: c", "tag_leak"),
        (reply(instruction=""), "empty_instruction"),
        (reply(instruction="word " * 151), "long_instruction"),
        (reply(output="Yeast makes gas."), "short_output"),
        (reply(instruction="Say what the text above is about."), "refers_to_document"),
        (reply(instruction="According to the document, why does bread rise?"), "refers_to_document"),
        (reply(output="Owls hunt mice at night, when all the farm is asleep and still."), "ungrounded"),
        (reply(output=DOCUMENT), "copied"),
        (reply(output="it is as it is and so it is not to be"), "no_content"),
        ((reply(), "length"), "truncated"),
        ("", "empty"),
    ],
)
def test_each_rule_rejects_its_row(said, reason):
    outcome = outcome_of(said)
    assert (outcome.status, outcome.reason) == ("rejected", reason)


def test_rules_leave_alone_what_only_looks_like_them():
    assert broken_task(Task("Sum up the text below.", "Bread rises.", OUTPUT)) is None
    assert broken_task(Task("How do I send a text to a friend?", "", OUTPUT)) is None
    assert broken_task(Task("word " * 150, "", OUTPUT)) is None


def test_the_bounds_are_inclusive_of_recall_and_exclusive_of_copies():
    output = "Yeast makes gas rise while owls hunt and the gas grows."
    recall, copied = grounding_of(output, DOCUMENT)
    assert outcome_of(reply(output=output), min_recall=recall).status == "accepted"
    assert outcome_of(reply(output=output), min_recall=recall + 0.01).reason == "ungrounded"
    assert outcome_of(reply(output=output), min_recall=0.0, max_copied=copied).reason == "copied"


def test_a_document_is_cut_between_paragraphs():
    document = "a b c\n\nd e\n\n\nf g h i j k l m"
    assert list(pieces(document, 5)) == ["a b c\n\nd e", "f g h i j", "k l m"]
    assert list(pieces(document, 100)) == ["a b c\n\nd e\n\nf g h i j k l m"]
    assert " ".join(pieces(document, 4)).split() == document.split()


def test_each_piece_is_a_row_and_a_bad_one_spoils_no_other():
    row = Record(source="web", position=1, text=f"{DOCUMENT}\n\nOwls hunt.\n\n{DOCUMENT}")
    engine = Scripted(lambda turn, index: reply() if "yeast" in turn else "no tags")
    outcomes = asyncio.run(Grounded(GroundedConfig(piece_words=18, pieces=2))(row, llm(engine)))
    assert [(o.status, o.reason) for o in outcomes] == [("accepted", None), ("rejected", "unparsable")]
    assert len({o.record.key for o in outcomes}) == 2


def test_a_piece_that_is_too_long_for_the_model_spoils_no_other():
    class Narrow(Scripted):
        def _complete(self, request):
            if "Owls" in request.messages[-1]["content"]:
                return Completion(id=request.id, error="prompt_too_long: 9 tokens, max_model_len 8")
            return super()._complete(request)

    row = Record(source="web", position=1, text=f"{DOCUMENT}\n\nOwls hunt.")
    engine = Narrow(lambda turn, index: reply())
    outcomes = asyncio.run(Grounded(GroundedConfig(piece_words=18, pieces=2))(row, llm(engine)))
    assert [(o.status, o.reason) for o in outcomes] == [("accepted", None), ("rejected", "prompt_too_long")]
    assert outcomes[1].raw == "prompt_too_long: 9 tokens, max_model_len 8"


def test_an_answer_is_a_document_and_a_prompt_is_none():
    assert outcome_of(row=answered("old", DOCUMENT)).status == "accepted"
    assert outcome_of(row=prompt()).reason == "no_document"


def test_a_failed_call_fails_the_row():
    assert outcome_of(OSError("gone")).status == "failed"
