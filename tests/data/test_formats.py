"""Row layouts and files: what is understood, what is quarantined with which reason, what is one clear error."""

import gzip
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from itune_ray.data.files import RawRow, read_rows
from itune_ray.data.formats import detect, parse
from itune_ray.errors import DataError

U, A = ("user", "hi"), ("assistant", "hello")


def chat(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def records_of(rows: list[dict[str, Any]], layout) -> list[tuple[tuple[str, str], ...]]:
    records, quarantined = parse([RawRow(i, row) for i, row in enumerate(rows)], "s", layout)
    assert quarantined == []
    return [tuple((m["role"], m["content"]) for m in record.messages) for record in records]


def reasons_of(rows: list[dict[str, Any] | None], layout) -> list[tuple[str, str | None]]:
    _, quarantined = parse([RawRow(i, row) for i, row in enumerate(rows)], "s", layout)
    assert all(outcome.status == "rejected" for outcome in quarantined)
    return [(outcome.input_key, outcome.reason) for outcome in quarantined]


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output", "text"], "alpaca"),
        (["prompt", "completion"], "alpaca"),
        (["instruction", "context", "response"], "alpaca"),
        (["messages", "id"], "messages"),
        (["conversations"], "sharegpt"),
        (["prompt", "chosen", "rejected", "messages"], "preference"),
        (["prompt", "id"], "prompt"),
        (["instruction", "input"], "prompt"),
        (["text"], "text"),
        (["documents", "summary"], "documents"),
        (["key", "source", "position", "messages", "text"], "records"),
    ],
)
def test_columns_tell_the_layout(columns, layout):
    assert detect(columns) == layout


HH = "\n\nHuman: hi\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"chosen": f"{HH}hello", "rejected": f"{HH}no"},
        {"prompt": HH, "chosen": "hello", "rejected": "no"},
        {"prompt": chat(U), "chosen": chat(A), "rejected": chat(("assistant", "no"))},
        {"prompt": "hi", "chosen": chat(U, A), "rejected": chat(U, ("assistant", "no"))},
    ],
    ids=["texts", "transcripts", "transcript prompt", "messages after a prompt", "whole messages"],
)
def test_preference_rows_are_a_chat_and_the_answer_that_lost(row):
    (record,), quarantined = parse([RawRow(0, {**row, "source": "hh"})], "s", "preference")
    assert quarantined == []
    assert record.messages == tuple(chat(U, A))
    assert (record.rejected, record.meta) == ("no", {"source": "hh"})


def test_a_transcript_has_many_turns_and_a_system_message_comes_first():
    talk = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is\n\nthis?\n\nAssistant: "
    row = {"chosen": talk + "a list:\n\n1. one", "rejected": talk + "nothing", "system": "be kind"}
    (record,), _ = parse([RawRow(0, row)], "s", "preference")
    assert record.messages == tuple(
        chat(("system", "be kind"), U, A, ("user", "what is\n\nthis?"), ("assistant", "a list:\n\n1. one"))
    )


def test_no_layout_is_one_clear_error():
    with pytest.raises(DataError, match=r"got 'a, b'; allowed: records, alpaca.*`format`"):
        detect(["b", "a"])


def test_alpaca_rows_become_chats_and_the_rest_is_meta():
    rows = [{"instruction": "Add.", "input": "1 2", "output": "3", "lang": "en", "ratings": [5]}]
    ((record,), _) = parse([RawRow(7, rows[0])], "s", "alpaca")
    assert record.key == "s:7:0"
    assert record.prompt[0]["content"] == "Add.\n\n1 2"
    assert record.response == "3"
    assert record.meta == {"lang": "en", "ratings": [5]}
    assert records_of([{"prompt": "q", "completion": "a", "system": "be kind"}], "alpaca") == [
        (("system", "be kind"), ("user", "q"), ("assistant", "a"))
    ]


def test_sharegpt_speakers_become_roles():
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "s"}]
    assert records_of(rows, "sharegpt") == [(("system", "s"), U, A)]


def test_messages_keep_system_and_tool_turns():
    turns = (("system", "s"), U, A, ("tool", "42"), ("assistant", "it is 42"))
    assert records_of([{"messages": chat(*turns)}], "messages") == [turns]


def test_prompt_rows_drop_known_columns_only():
    (record,), _ = parse([RawRow(0, {"prompt": "q", "output": "not mine"})], "s", "prompt")
    assert record.response is None
    assert record.meta == {"output": "not mine"}


def test_documents_stay_a_list_and_are_a_text_together():
    ((record,), _) = parse([RawRow(0, {"documents": ["a", " ", "b"], "topic": "t"})], "s", "documents")
    assert record.meta == {"documents": ["a", "b"], "topic": "t"}
    assert (record.text, record.messages) == ("a\n\nb", ())


def test_text_rows_have_no_messages():
    (record,), _ = parse([RawRow(0, {"text": "abc", "meta": {"lang": "fr"}})], "s", "text")
    assert (record.text, record.messages, record.meta) == ("abc", (), {"lang": "fr"})


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("alpaca", {"instruction": "q", "output": ""}, "no_answer"),
        ("alpaca", {"instruction": "q", "output": None}, "no_answer"),
        ("alpaca", {"instruction": "q"}, "no_answer"),
        ("alpaca", {"instruction": "q", "output": 5}, "bad_row"),
        ("alpaca", {"instruction": "", "output": "a"}, "empty_prompt"),
        ("alpaca", {"output": "a"}, "empty_prompt"),
        ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "bad_row"),
        ("alpaca", {"instruction": ["q"], "output": "a"}, "bad_row"),
        ("alpaca", {"instruction": "q\ud800", "output": "a"}, "bad_unicode"),
        ("alpaca", {"instruction": "q", "output": "a", "note": "\udfff"}, "bad_unicode"),
        ("messages", {"messages": chat(U)}, "no_answer"),
        ("messages", {"messages": chat(U, ("assistant", " \n"))}, "no_answer"),
        ("messages", {"messages": chat(U, ("assistant", ""), U, A)}, "no_answer"),
        ("messages", {"messages": chat(A)}, "bad_roles"),
        ("messages", {"messages": chat(U, U, A)}, "bad_roles"),
        ("messages", {"messages": chat(U, A, A)}, "bad_roles"),
        ("messages", {"messages": chat(U, A, ("system", "late"), U, A)}, "bad_roles"),
        ("messages", {"messages": chat(("narrator", "x"), U, A)}, "bad_roles"),
        ("messages", {"messages": chat(("system", "only"))}, "bad_roles"),
        ("messages", {"messages": []}, "empty_prompt"),
        ("messages", {"messages": chat(("user", "  "), A)}, "empty_prompt"),
        ("messages", {"messages": "hi"}, "bad_row"),
        ("messages", {"messages": ["hi"]}, "bad_row"),
        ("messages", {"messages": chat(("user", [{"type": "text"}]), A)}, "bad_row"),
        ("messages", {"messages": [{"role": "user"}]}, "bad_row"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "hi"}]}, "bad_roles"),
        ("sharegpt", {"conversations": None}, "bad_row"),
        ("documents", {"documents": "one text"}, "bad_row"),
        ("documents", {"documents": ["a", 1]}, "bad_row"),
        ("documents", {"documents": [" "]}, "empty_text"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": None}, "no_pair"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": " "}, "no_pair"),
        ("preference", {"prompt": "q", "chosen": None, "rejected": "b"}, "no_answer"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": 1}, "bad_row"),
        ("preference", {"chosen": "a", "rejected": "b"}, "bad_roles"),
        ("preference", {"chosen": [*chat(U, A)], "rejected": [*chat(("user", "ho"), A)]}, "no_common_prompt"),
        ("preference", {"chosen": f"{HH}no", "rejected": "\n\nHuman: ho\n\nAssistant: no"}, "no_common_prompt"),
        ("prompt", {"prompt": ""}, "empty_prompt"),
        ("prompt", {"other": "x"}, "empty_prompt"),
        ("text", {"text": " "}, "empty_text"),
        ("text", {"text": 1}, "bad_row"),
        ("records", {"source": "s"}, "bad_row"),
        ("records", {"source": "s", "position": "x", "text": "a"}, "bad_row"),
        ("records", {"source": "s", "position": 1, "messages": [{"role": "user", "content": None}]}, "bad_row"),
    ],
)
def test_unusable_rows_are_quarantined_with_a_reason(layout, row, reason):
    good = {
        "alpaca": {"instruction": "q", "output": "a"},
        "messages": {"messages": chat(U, A)},
        "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "prompt": {"prompt": "q"},
        "text": {"text": "t"},
        "documents": {"documents": ["t"]},
        "records": {"source": "s", "position": 9, "text": "t"},
    }[layout]
    assert reasons_of([good, row, good | {"position": 8} if layout == "records" else good], layout) == [
        ("s:1:0", reason)
    ]


def test_quarantined_rows_keep_what_they_were():
    _, (outcome,) = parse([RawRow(0, {"instruction": 1, "output": "a"})], "s", "alpaca")
    assert json.loads(outcome.raw or "") == {"instruction": 1, "output": "a"}


def test_where_no_row_has_an_answer_they_are_prompts():
    rows = [{"instruction": "q", "output": ""}, {"instruction": "r", "output": None}]
    assert records_of(rows, "alpaca") == [(("user", "q"),), (("user", "r"),)]
    assert records_of([{"messages": chat(U)}], "messages") == [(U,)]


# --- files ---------------------------------------------------------------------------------------------------------


def test_broken_lines_are_quarantined_at_their_place(tmp_path):
    file = tmp_path / "a.jsonl"
    deep = "[" * 100_000
    lines = ['{"instruction": "q", "output": "a"}', "{broken", "", "[1]", '{"instruction": "r", "output": "b"}', deep]
    file.write_text("\n".join(lines) + "\n")
    rows = list(read_rows(str(file)))
    assert [(row.position, row.reason) for row in rows] == [
        (0, None),
        (1, "broken_json"),
        (3, "bad_row"),
        (4, None),
        (5, "broken_json"),
    ]
    records, quarantined = parse(rows, "a", "alpaca")
    assert [record.position for record in records] == [0, 4]
    assert [(o.input_key, o.reason) for o in quarantined] == [
        ("a:1:0", "broken_json"),
        ("a:3:0", "bad_row"),
        ("a:5:0", "broken_json"),
    ]
    assert quarantined[0].raw == "{broken"


def test_bytes_that_are_no_utf8_cost_one_row(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "ok"}\n{"text": "\xff\xfe"}\n{"text": "fine"}\n')
    records, (bad,) = parse(read_rows(str(file)), "a", "text")
    assert [record.text for record in records] == ["ok", "fine"]
    assert (bad.record.position, bad.reason) == (1, "bad_unicode")
    assert bad.raw is not None
    bad.raw.encode()


def test_line_separators_inside_strings_end_no_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert [row.fields for row in read_rows(str(file))] == [{"text": "a\u2028b\x85c"}]


ROWS = [{"instruction": 'Say, "hi"\nplease', "output": "hi"}, {"instruction": "ü", "output": "a,b"}]


def write(path, rows=ROWS) -> None:
    name = path.name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    if ".csv" in name:
        quoted = [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
        text = "instruction,output\n" + "\n".join(quoted) + "\n"
    elif ".jsonl" in name or name == "lines.json":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = json.dumps(rows if "array" in name else {"data": rows})
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "array.json",
        "array.json.gz",
        "data.json",
        "lines.json",
        "a.csv",
        "a.csv.gz",
        "a.parquet",
        "A.JSONL",
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    if name != "A.JSONL":
        write(tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert [(row.position, row.fields) for row in read_rows(str(tmp_path / name))] == list(enumerate(ROWS))
    assert len(list(read_rows(f"file://{tmp_path}/{name}", limit=1))) == 1


def test_a_folder_is_read_in_name_order_with_positions_running_on(tmp_path):
    write(tmp_path / "b.jsonl")
    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "SOURCE.txt").write_text("not rows")
    (tmp_path / ".hidden.partial").write_text("half")
    rows = list(read_rows(str(tmp_path)))
    assert [row.position for row in rows] == [0, 1, 2]
    assert [row.fields for row in rows] == [ROWS[0], *ROWS]


def test_csv_rows_of_the_wrong_width_are_quarantined(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('\ufeffinstruction,output\nq,a\nonly one\nq,a,too many\n\nr,b\n"open')
    rows = list(read_rows(str(file)))
    assert [row.reason for row in rows] == [None, "broken_csv", "broken_csv", None, "broken_csv"]
    assert rows[3].fields == {"instruction": "r", "output": "b"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:40], "damaged"),
        ("a.jsonl.gz", b"no gzip at all", "damaged"),
        ("a.parquet", b"PAR1 is a lie PAR1", "damaged"),
        ("a.json", b"[1, 2", "not valid JSON"),
        ("a.json", b'{"data": 3}', "no list of rows"),
        ("a.xlsx", b"", "no reader"),
        ("a.tar.gz", b"", "no reader"),
    ],
)
def test_files_that_cannot_be_read_are_one_clear_error(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(tmp_path / name)))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "list" in str(caught.value)


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"did you mean 'train\.jsonl'"):
        read_rows(f"{tmp_path}/trian.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_rows(f"{tmp_path}/nowhere/at/all.jsonl")


def test_a_folder_without_rows_names_the_payloads_it_has(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "accepted").mkdir()
    with pytest.raises(DataError, match="it holds the folders accepted"):
        read_rows(str(tmp_path))
