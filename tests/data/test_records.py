"""The row: keys, content hashes, round trips through Arrow, and per-row randomness."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.data.records import RECORD_SCHEMA, Record, records_table, row_rng, row_seed

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": text}),
    max_size=4,
).map(tuple)
records = st.builds(
    Record,
    source=text,
    position=st.integers(0, 2**60),
    sample=st.integers(0, 2**31 - 1),
    messages=messages,
    text=st.none() | text,
    meta=st.dictionaries(text, json_values, max_size=3),
    weight=st.floats(0, 100),
    parents=st.lists(text, max_size=2).map(tuple),
    recipe=st.none() | text,
    round=st.integers(0, 100),
    seed=st.none() | st.integers(0, 2**63 - 1),
    model=st.none() | text,
    sampling=st.none() | st.dictionaries(text, json_values, max_size=2),
    finish_reason=st.none() | text,
    num_prompt_tokens=st.none() | st.integers(0, 2**31 - 1),
    num_tokens=st.none() | st.integers(0, 2**31 - 1),
)


@settings(max_examples=150, deadline=None)
@given(records)
def test_a_record_survives_the_trip_through_arrow(record):
    (row,) = records_table([record]).to_pylist()
    assert Record.from_row(row) == record
    assert row["key"] == record.key
    assert row["content_hash"] == record.content_hash


def test_a_record_survives_parquet(tmp_path):
    record = Record(source="a", position=2**40, messages=({"role": "user", "content": "héllo\n"},), meta={"x": [1, {}]})
    pq.write_table(records_table([record]), tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.equals(RECORD_SCHEMA)
    assert Record.from_row(table.to_pylist()[0]) == record


def test_columns_of_later_stages_are_left_out():
    row = Record(source="a", position=0).to_row() | {"status": "accepted", "score_judge": math.nan}
    assert Record.from_row(row) == Record(source="a", position=0)


def chat(*contents: str, position: int = 0) -> Record:
    roles = ("user", "assistant")
    turns = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return Record(source="s", position=position, messages=turns)


def test_equal_texts_share_a_hash_and_never_a_key():
    one, other = chat("hi", "yes", position=1), chat("hi", "yes", position=2)
    assert one.content_hash == other.content_hash
    assert one.key != other.key


@pytest.mark.parametrize(("a", "b"), [("café", "cafe\u0301"), ("x\r\ny", "x\ny"), ("x  \ny", "x\ny"), ("x\n\n", "x")])
def test_the_hash_ignores_what_nobody_sees(a, b):
    assert chat(a).content_hash == chat(b).content_hash


def test_the_hash_tells_roles_turns_and_texts_apart():
    different = [
        chat("a", "b"),
        chat("ab"),
        chat("a"),
        Record(source="s", position=0, text="a"),
        Record(source="s", position=0, messages=({"role": "system", "content": "a"},)),
        chat("  a"),
        chat("A"),
    ]
    assert len({record.content_hash for record in different}) == len(different)


def test_prompt_and_response_split_at_the_final_answer():
    assert chat("q", "a").response == "a"
    assert chat("q", "a").prompt == chat("q").messages
    assert chat("q").response is None
    assert chat("q", "a", "more").prompt == chat("q", "a", "more").messages


def test_randomness_is_a_function_of_its_four_arguments():
    assert row_seed(0, "generate", "a:1:0") == row_seed(0, "generate", "a:1:0", 0)
    seeds = {
        row_seed(0, "generate", "a:1:0"),
        row_seed(1, "generate", "a:1:0"),
        row_seed(0, "curate", "a:1:0"),
        row_seed(0, "generate", "a:1:1"),
        row_seed(0, "generate", "a:1:0", 1),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    draws = [row_rng(7, "x", f"k{i}").random() for i in range(2000)]
    assert abs(sum(draws) / 2000 - 0.5) < 0.03


def test_records_are_an_arrow_table_even_when_there_are_none():
    assert records_table([]).schema.equals(RECORD_SCHEMA)
    assert isinstance(records_table([]), pa.Table)
