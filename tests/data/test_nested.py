"""Rows that hold many, and public files as they are: message trees, task files, transcripts, questions."""

import gzip
import json
from collections import Counter
from typing import Any

import pytest
from testdata import public_data

from itune_ray.config.shared import FileSource
from itune_ray.data.files import RawRow
from itune_ray.data.formats import detect, parse
from itune_ray.data.sources import SourceTable, read_source


def message(name: str, role: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"message_id": name, "text": f"text {name}", "role": role, "lang": "en", "replies": list(replies), **fields}


def user(name: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return message(name, "prompter", *replies, **fields)


def bot(name: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return message(name, "assistant", *replies, **fields)


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": user(
        "a",
        bot("b", user("c", bot("d", rank=1), bot("e", rank=0)), user("f"), rank=1),
        bot("g", user("h"), rank=0),
        bot("i", rank=2, deleted=True),
        bot("j", rank=3, review_result=False),
        bot("k", text=" "),
    ),
}


def paths(rows: list[Any], layout: Any) -> list[tuple[str, str]]:
    """(key, names of the messages of the path)."""
    records, _ = parse([RawRow(i, row) for i, row in enumerate(rows)], "s", layout)
    return [(r.key, "".join(m["content"].removeprefix("text ") for m in r.messages)) for r in records]


def test_every_path_ends_in_an_answer_and_none_is_the_beginning_of_another():
    assert paths([TREE], "oasst") == [("s:0:0", "abcd"), ("s:0:1", "abce"), ("s:0:2", "ag")]


def test_the_best_path_follows_the_ranks():
    assert paths([TREE], "oasst_best") == [("s:0:0", "ag")]
    unranked = {"message_tree_id": "t", "prompt": user("a", bot("b"), bot("c"), bot("d", rank=5))}
    assert paths([unranked], "oasst_best") == [("s:0:0", "ad")]


def test_a_path_carries_its_facts():
    (record, *_), _ = parse([RawRow(0, TREE)], "s", "oasst")
    assert record.meta == {"tree": "t", "message": "d", "lang": "en", "ranks": [1, 1]}
    assert [m["role"] for m in record.messages] == ["user", "assistant", "user", "assistant"]


def flat(node: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    own = {k: v for k, v in node.items() if k != "replies"} | {"parent_id": parent, "message_tree_id": "t"}
    return [own, *(row for reply in node["replies"] for row in flat(reply, node["message_id"]))]


def test_messages_one_a_row_make_the_same_chats_at_their_roots_position():
    rows = flat(TREE["prompt"])
    assert paths([{"message_id": 3, "parent_id": None}, *rows], "oasst") == [
        ("s:1:0", "abcd"),
        ("s:1:1", "abce"),
        ("s:1:2", "ag"),
    ]
    assert {names for _, names in paths(rows[::-1], "oasst")} == {"abcd", "abce", "ag"}


@pytest.mark.parametrize(
    ("row", "layout", "reason"),
    [
        ({"message_tree_id": "t", "prompt": "x"}, "oasst", "bad_row"),
        ({"message_tree_id": "t", "prompt": user("a", deleted=True)}, "oasst", "empty_prompt"),
        ({"message_tree_id": "t", "prompt": user("a", user("b"))}, "oasst", "no_answer"),
        ({"message_tree_id": "t", "prompt": user("a", user("b"))}, "oasst_best", "no_answer"),
        ({"message_tree_id": "t", "prompt": user("a", user("b", bot("c")))}, "oasst", "bad_roles"),
        ({"message_tree_id": "t", "prompt": user("a", bot("b"), replies="x")}, "oasst", "bad_row"),
        ({"message_id": "z", "parent_id": "lost", "text": "x", "role": "assistant"}, "oasst", "no_parent"),
        ({"Definition": ["d"], "Instances": "x"}, "superni", "bad_row"),
        ({"Definition": [], "Instances": [{"input": "i", "output": ["o"]}]}, "superni", "empty_prompt"),
        ({"Definition": ["d"], "Instances": []}, "superni", "no_answer"),
        ({"Definition": ["d"], "Instances": [{"input": "i", "output": [3]}]}, "superni", "bad_row"),
        ({"Definition": ["d"], "Instances": [{"input": "i", "output": []}]}, "superni", "no_answer"),
        ({"question": "", "answer": "a"}, "qa", "empty_prompt"),
        ({"question": "q", "answer": 3}, "qa", "bad_row"),
    ],
)
def test_what_cannot_be_used_is_quarantined(row, layout, reason):
    good = {
        "oasst": {"message_tree_id": "g", "prompt": user("a", bot("b"))},
        "oasst_best": {"message_tree_id": "g", "prompt": user("a", bot("b"))},
        "superni": {"Definition": "d", "Instances": [{"input": "i", "output": "o"}]},
        "qa": {"question": "q", "answer": "a"},
    }[layout]
    records, quarantined = parse([RawRow(0, good), RawRow(1, row)], "s", layout)
    assert [record.key for record in records] == ["s:0:0"]
    assert [(outcome.input_key, outcome.reason) for outcome in quarantined] == [("s:1:0", reason)]
    assert quarantined[0].raw or quarantined[0].record.messages, "what it was is kept"


TASK = {
    "task": "task1_x",
    "Categories": ["Question Answering"],
    "Definition": ["Say it backwards."],
    "Positive Examples": [{"input": "ab", "output": "ba", "explanation": "e"}] * 3,
    "Negative Examples": [],
    "Instances": [
        {"id": "i0", "input": "abc", "output": ["cba", "CBA"]},
        {"id": "i1", "input": "x", "output": [""]},
        {"id": "i2", "input": "", "output": "y"},
    ],
    "Instance License": ["MIT"],
}


def test_instances_of_a_task():
    records, quarantined = parse([RawRow(0, TASK)], "s", "superni")
    assert [(r.key, r.prompt[0]["content"], r.response) for r in records] == [
        ("s:0:0", "Say it backwards.\n\nabc", "cba"),
        ("s:0:2", "Say it backwards.", "y"),
    ]
    assert [(o.input_key, o.reason) for o in quarantined] == [("s:0:1", "no_answer")]
    assert records[0].meta == {
        "task": "task1_x",
        "categories": ["Question Answering"],
        "definition": "Say it backwards.",
        "positive": [{"input": "ab", "output": "ba", "explanation": "e"}] * 2,
        "negative": [],
        "license": "MIT",
        "input": "abc",
        "references": ["cba", "CBA"],
        "instance": "i0",
    }


def test_a_task_file_of_its_own_is_read(tmp_path):
    (tmp_path / "task1_x.json").write_text(json.dumps(TASK))
    table = read_source(FileSource(path=str(tmp_path / "task1_x.json")))
    assert (table.layout, table.rows_in) == ("superni", 3)


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["message_tree_id", "tree_state", "prompt"], "oasst"),
        (["message_id", "parent_id", "user_id", "text", "role", "rank", "message_tree_id"], "oasst"),
        (["task", "Definition", "Instances"], "superni"),
        (["question", "answer"], "qa"),
        (["id", "answer", "question"], "qa"),
        (["instruction", "context", "response", "category"], "alpaca"),
        (["question", "answer", "instruction"], "prompt"),
    ],
)
def test_columns_tell_the_layout(columns, layout):
    assert detect(columns) == layout


def test_dolly_rows():
    row = {"instruction": "Who?", "context": "Ann did.", "response": "Ann.", "category": "closed_qa"}
    (record, bare), quarantined = parse([RawRow(0, row), RawRow(1, {**row, "context": ""})], "s", "alpaca")
    assert quarantined == []
    assert (record.prompt[0]["content"], record.response) == ("Who?\n\nAnn did.", "Ann.")
    assert bare.prompt[0]["content"] == "Who?"
    assert record.meta == {"category": "closed_qa"}


# --- public files --------------------------------------------------------------------------------------------------


def read(path: str, **source: Any) -> SourceTable:
    return read_source(FileSource(path=str(public_data(f"data/{path}.jsonl.gz")), **source))


def test_oasst_trees():
    table, best = (read("oasst_en_100_trees/en_100_tree", format=layout) for layout in ("auto", "oasst_best"))
    assert (table.layout, best.layout) == ("oasst", "oasst_best")
    assert {record.position for record in table.records} == {record.position for record in best.records}
    assert len(best.records) == 100
    assert {o.reason for o in [*table.quarantined, *best.quarantined]} <= {"no_answer"}
    every = {json.dumps(r.messages) for r in table.records}
    assert len(every) > 400
    assert all(any(whole.startswith(json.dumps(r.messages)[:-1]) for whole in every) for r in best.records)
    assert all(r.response and r.messages[0]["role"] == "user" for r in table.records)


@pytest.mark.parametrize(("language", "instances"), [("en", 21391), ("fi", 9000)])
def test_natural_instructions(language, instances):
    table = read(f"natural_instructions_v2/ni_{language}_tasks")
    assert (table.layout, table.rows_in) == ("superni", instances)
    assert len(table.records) > 0.99 * instances
    assert set(Counter(o.reason for o in table.quarantined)) <= {"no_answer", "empty_prompt"}
    assert all(r.response == r.meta["references"][0] for r in table.records)


def test_hh_rlhf_pairs():
    table = read("hh_rlhf_harmless_base_test/harmless-base_test")
    assert (table.layout, table.rows_in) == ("preference", 2312)
    assert len(table.records) > 0.99 * 2312
    assert all(r.rejected and r.response and r.prompt[-1]["role"] == "user" for r in table.records)
    with gzip.open(public_data("data/hh_rlhf_harmless_base_test/harmless-base_test.jsonl.gz"), "rt") as lines:
        first = json.loads(next(lines))
    record = table.records[0]
    assert first["chosen"].endswith(record.response or "")
    assert first["rejected"].endswith(record.rejected or "")


def test_gsm8k():
    table = read("gsm8k/train")
    assert (table.layout, len(table.records), table.quarantined) == ("qa", 7473, [])
    assert all("####" in (r.response or "") for r in table.records)
