"""Tasks over several documents: 384 renders, lengths, extraction, related passages, and leaving one out."""

import asyncio
import random

import numpy as np
import pytest
from scripted import Scripted, llm, prompt, run

from itune_ray.config.recipes import MultiDocumentConfig
from itune_ray.data.records import Record
from itune_ray.generate.recipes.chain import EndedError
from itune_ray.generate.recipes.multi_document import (
    DIRECTIONS,
    GENERAL,
    LENGTHS,
    SNIPPETS,
    STYLES,
    MultiDocument,
    answer_length,
    has_form,
    parse_pair,
)
from itune_ray.generate.snippets import context_of, sentences_of, snippet_pairs, word_vectors

DOCUMENTS = ["The key is\nin the red box.", "The red box is in the barn.", "The barn is by the lake."]
ROW = Record(source="c", position=2, text="x", meta={"documents": DOCUMENTS})
REPLY = "Question: Where is the key?\nAnswer: In a box in a barn by the lake."


def outcomes_of(said=REPLY, row=ROW, families=("general",), **config):
    recipe = MultiDocument(MultiDocumentConfig(families=families, **config))
    return run(recipe, row, lambda turn, index: said(turn) if callable(said) else said)


def test_384_styles_render_apart_and_leave_no_slot():
    recipe = MultiDocument(MultiDocumentConfig())
    turns = {recipe.styled(style, DOCUMENTS) for style in STYLES}
    assert len(turns) == len(STYLES) == 384
    assert not any("{" in turn or "}" in turn for turn in turns)
    assert all("do not refer to documents" in turn for turn in turns)


@pytest.mark.parametrize(
    ("words", "sentences", "length"),
    [
        (1, 1, "1-2 words"),
        (2, 1, "1-2 words"),
        (3, 1, "3-4 words"),
        (4, 1, "3-4 words"),
        (5, 1, "a phrase of 5-6 words"),
        (6, 1, "a phrase of 5-6 words"),
        (7, 1, "1-2 sentences"),
        (9, 2, "1-2 sentences"),
        (9, 3, "3-4 sentences"),
        (9, 4, "3-4 sentences"),
        (9, 5, "5-7 sentences"),
        (9, 7, "5-7 sentences"),
        (9, 8, "8-10 sentences"),
        (12, 10, "8-10 sentences"),
        (12, 11, "at least 10 sentences"),
    ],
)
def test_the_length_table(words, sentences, length):
    ends = ["."] * (sentences - 1)
    answer = " ".join("word" + (ends.pop() if ends else "") for _ in range(words))
    assert answer_length(answer) == length
    assert length in LENGTHS


def test_marks_within_a_sentence_end_none():
    assert answer_length("It cost 3.5 million in the U.S.A according to them.") == "1-2 sentences"


def test_a_task_shows_its_documents_the_question_and_the_length():
    (outcome,) = outcomes_of()
    record = outcome.record
    assert (outcome.status, record.response, record.text) == ("accepted", "In a box in a barn by the lake.", None)
    turn = record.prompt[0]["content"]
    facts = record.meta["multi_document"]
    assert all(" ".join(document.split()) in turn for document in DOCUMENTS)
    assert turn.endswith(f"\n\nWhere is the key?\n\n{facts['length']}")
    assert facts["length"] in {direction.format(length="1-2 sentences") for direction in DIRECTIONS}
    assert (facts["num_documents"], record.recipe) == (3, "multi_document.general")
    assert facts["form"] in GENERAL
    assert record.meta["documents"] == DOCUMENTS, "documents are kept as fields"


def test_documents_that_open_with_the_letters_of_a_marker_stay_whole():
    row = Record(source="c", position=0, text="x", meta={"documents": ["A question about Kafka: see it", "Answer it"]})
    (outcome,) = outcomes_of(row=row)
    assert "A question about Kafka: see it" in outcome.record.prompt[0]["content"]


@pytest.mark.parametrize(
    ("reply", "pair"),
    [
        (REPLY, ("Where is the key?", "In a box in a barn by the lake.")),
        ("Where is it?\nAnswer: Here.", ("Where is it?", "Here.")),
        ("Q: Where is it?\nA: Here.", ("Where is it?", "Here.")),
        ("**Question:** Where is it?\n**Answer:** Here.", ("Where is it?", "Here.")),
        ("Question: Which? Answer: Plan A: wait.", ("Which?", "Plan A: wait.")),
        ("Question: Which?\nA: one\nB: two\nAnswer: A", ("Which?\nA: one\nB: two", "A")),
    ],
)
def test_questions_and_answers_are_read(reply, pair):
    assert parse_pair(reply) == pair


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Where is it?", "unparsable"),
        ("Question: Where is it?\nAnswer:", "unparsable"),
        ("Question:\nAnswer: here", "unparsable"),
        (f"{REPLY}\nQuestion: And now?\nAnswer: There.", "second_marker"),
        (f"{REPLY}\nAnswer: There.", "second_marker"),
        (f"{REPLY}\nQ: And now?", "second_marker"),
        ("Question: What does Snippet 1 say?\nAnswer: Much.", "snippet_leak"),
        ("Question: What?\nAnswer: Both snippets say much.", "snippet_leak"),
    ],
)
def test_what_is_no_pair_ends_with_its_reason(reply, reason):
    with pytest.raises(EndedError) as ended:
        parse_pair(reply)
    assert ended.value.reason == reason
    assert [(o.status, o.reason) for o in outcomes_of(reply)] == [("rejected", reason)]


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (SNIPPETS["yes"], "Yes.", "No."),
        (SNIPPETS["no"], "no", "Not so."),
        (SNIPPETS["phrase"], "one two three four five six", "one two three four five six seven"),
        (SNIPPETS["long_summary"], "A. B. C. D. E.", "A. B. C. D."),
        (SNIPPETS["short_summary"], "A. B. C. D.", "A. B. C. D. E."),
        (GENERAL["choice"], "B)", "B or C"),
    ],
)
def test_an_answer_has_the_form_of_its_kind(form, right, wrong):
    assert has_form(right, form)
    assert not has_form(wrong, form)


def test_kinds_and_families_are_drawn_by_row():
    recipe = MultiDocument(MultiDocumentConfig(families=("general", "style"), samples=40))
    outcomes = run(recipe, ROW, lambda turn, index: REPLY)
    assert {o.record.recipe for o in outcomes if o.status == "accepted"} == {
        "multi_document.general",
        "multi_document.style",
    }
    assert {o.reason for o in outcomes} == {None, "wrong_form"}
    assert len({o.record.key for o in outcomes}) == 40
    again = run(recipe, ROW, lambda turn, index: REPLY)
    assert [o.to_row() for o in again] == [o.to_row() for o in outcomes]


def clusters():
    rng = random.Random(5)
    words = [f"w{i}" for i in range(60)]
    same = " ".join(rng.sample(words, 12))
    documents = [[" ".join(rng.sample(words, rng.randint(8, 16))) for _ in range(10)] for _ in range(4)]
    documents[0][0] = documents[1][0] = same
    return documents


def test_pairs_are_related_long_disjoint_and_of_two_documents():
    documents = clusters()
    vectors = word_vectors([sentence for sentences in documents for sentence in sentences])
    starts = np.cumsum([0, *map(len, documents)])
    seen = 0
    for seed in range(20):
        pairs = snippet_pairs(documents, vectors, random.Random(seed))
        places = [place for pair in pairs for place in pair]
        assert len(set(places)) == len(places)
        for one, other in pairs:
            assert one.document != other.document
            assert all(len(documents[p.document][p.sentence].split()) > 10 for p in (one, other))
            a, b = (vectors[starts[p.document] + p.sentence] for p in (one, other))
            assert a @ b < 0.7
        assert {(0, 0), (1, 0)} not in [set(pair) for pair in pairs], "duplicates are no partners"
        seen += len(pairs)
    assert seen > 100


def test_the_partner_is_the_most_similar_below_the_bound():
    documents = [["x " * 11], ["x " * 11], ["x " * 11]]
    vectors = np.array([[1.0, 0.0], [0.69, np.sqrt(1 - 0.69**2)], [0.71, np.sqrt(1 - 0.71**2)]])

    class First:
        def randrange(self, _):
            return 0

    assert snippet_pairs(documents, vectors, First()) == [((0, 0), (1, 0))]
    assert snippet_pairs(documents, np.array([[1.0, 0.0]] * 3), First()) == []
    assert snippet_pairs([[]], np.zeros((0, 0)), First()) == []


def test_vectors_are_of_length_one_and_products_cosines():
    vectors = word_vectors(["red box", "red box", "blue lake", ""])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1, 0])
    assert vectors[0] @ vectors[1] == pytest.approx(1)
    assert vectors[0] @ vectors[2] == 0


def test_context_is_three_sentences_around():
    sentences = [str(i) for i in range(10)]
    assert context_of(sentences, 5) == "2 3 4 5 6 7 8"
    assert context_of(sentences, 1) == "0 1 2 3 4"
    assert sentences_of("a\n\n  b \n") == ["a", "b"]


def test_passages_are_asked_about_and_the_task_shows_whole_documents():
    long = [
        "The old bridge of Arel over the river Lun was built of oak in the year 1931.",
        "A flood of the river Lun took the bridge of Arel away in the spring of that year.",
    ]
    row = Record(source="c", position=0, text="x", meta={"documents": [f"{long[0]}\nShort.", f"Short.\n{long[1]}"]})
    engine = Scripted(lambda turn, index: "Question: Why?\nAnswer: " + ("Yes" if "answer is yes" in turn else "No"))
    recipe = MultiDocument(MultiDocumentConfig(families=("snippets",), samples=12))
    outcomes = asyncio.run(recipe(row, llm(engine)))
    assert all("never speak of passages" in turn and long[0] in turn and long[1] in turn for turn in engine.turns)
    made = [o for o in outcomes if o.status == "accepted"]
    assert {"yes", "no"} <= {o.record.meta["multi_document"]["form"] for o in made} <= SNIPPETS.keys()
    yes = next(o for o in made if o.record.meta["multi_document"]["form"] == "yes")
    assert yes.record.prompt[0]["content"].endswith("Answer with yes or no.")
    unrelated = Record(source="c", position=0, text="x", meta={"documents": ["Short.", "Brief."]})
    assert [o.reason for o in outcomes_of(row=unrelated, families=("snippets",))] == ["no_related_passages"]


def oracle(needed):
    """Answers that a question can be answered where all of the needed words are shown."""

    def reply(turn):
        if "Can the question be answered" not in turn:
            return REPLY
        return "Yes" if all(word in turn for word in needed) else "No"

    return reply


@pytest.mark.parametrize(
    ("needed", "reason"),
    [
        (("The key", "in the barn", "the lake."), None),
        (("The key", "in the barn"), "document_not_needed"),
        (("The key", "the moon"), "unanswerable"),
    ],
)
def test_leaving_one_out_with_an_oracle(needed, reason):
    outcomes = outcomes_of(oracle(needed), families=("style",), leave_one_out=True)
    assert [o.reason for o in outcomes] == [reason]


def test_no_more_documents_are_shown_than_asked_for():
    (outcome,) = outcomes_of(families=("style",), documents=2)
    assert outcome.record.meta["multi_document"]["num_documents"] == 2
    assert outcome.record.prompt[0]["content"].count("Document ") == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (prompt(), "no_documents"),
        (prompt(meta={"documents": "text"}), "no_documents"),
        (prompt(meta={"documents": ["a", " "]}), "one_document"),
    ],
)
def test_rows_without_a_cluster_end_rejected(row, reason):
    assert [o.reason for o in outcomes_of(row=row, samples=2)] == [reason] * 2


def test_a_failed_call_fails_the_row():
    assert [o.status for o in outcomes_of(OSError("gone"))] == ["failed"]
