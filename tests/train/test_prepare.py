import json

import pyarrow.parquet as pq
import pytest
import tiny

from itune_ray.data.ledger import Outcome
from itune_ray.data.order import PackedTable
from itune_ray.data.records import Record
from itune_ray.errors import TrainError
from itune_ray.train.prepare import prepare_locally

QUESTION = {"role": "user", "content": "apple?"}


def test_unusable_rows_are_quarantined_with_their_reason(folder, tmp_path):
    good = tiny.chats(6)
    bad = [
        Record(source="bad", position=0, messages=(QUESTION,)),
        Record(source="bad", position=1, messages=(QUESTION, {"role": "assistant", "content": " \n"})),
        tiny.chat("apple?", "river " * 500, position=2),
        Record(source="bad", position=3, text=""),
        tiny.chat("apple?", "river", position=4, meta={"unsafe": True}),
    ]
    prepared = prepare_locally(tiny.job(folder), [*good, *bad], str(tmp_path))
    assert prepared.accepted == 6
    assert prepared.rejected == {"no_answer": 2, "no_supervised_tokens": 1, "too_long": 1, "unsafe": 1}
    rejected = pq.read_table(tmp_path / "rejected" / "part-0.parquet").to_pylist()
    assert {row["key"]: row["reason"] for row in rejected} == {
        "bad:0:0": "no_answer",
        "bad:1:0": "no_answer",
        "tiny:2:0": "too_long",
        "bad:3:0": "no_supervised_tokens",
        "tiny:4:0": "unsafe",
    }
    assert all(json.loads(row["meta"])["detail"] for row in rejected)
    too_long = next(row for row in rejected if row["reason"] == "too_long")
    assert too_long["score"] > 128
    assert Outcome.from_row(too_long).record.response == "river " * 500
    keys = {key for row in PackedTable(prepared.folder).rows(0) for key in row.keys}
    assert keys == {row.key for row in good}


def test_a_template_that_rewrites_history_quarantines_only_what_it_breaks(folder, tmp_path):
    answer = {"role": "assistant", "content": "river"}
    rows = [
        Record(source="t", position=0, messages=(QUESTION, answer)),
        Record(source="t", position=1, messages=(QUESTION, answer, QUESTION, answer)),
    ]
    job = tiny.job(folder, **{"model.chat_template": tiny.REWRITING})
    prepared = prepare_locally(job, rows, str(tmp_path))
    assert (prepared.accepted, prepared.rejected) == (1, {"template_rewrites_history": 1})


@pytest.mark.parametrize("rows", [[], [Record(source="bad", position=0, messages=(QUESTION,))]])
def test_nothing_to_train_on_is_refused_before_anything_starts(folder, tmp_path, rows):
    with pytest.raises(TrainError, match="no row is left to train on"):
        prepare_locally(tiny.job(folder), rows, str(tmp_path))


def test_a_finished_order_is_used_again_and_another_setting_makes_a_new_one(folder, tmp_path):
    records = tiny.chats(20)
    first = prepare_locally(tiny.job(folder), records, str(tmp_path))
    assert prepare_locally(tiny.job(folder), [], str(tmp_path)) == first
    other = prepare_locally(tiny.job(folder, batch=4), records, str(tmp_path))
    assert other.plan.digest != first.plan.digest


def test_the_same_rows_in_another_order_give_the_same_steps(folder, tmp_path):
    records = tiny.chats(20)
    one = prepare_locally(tiny.job(folder, packing=True), records, str(tmp_path / "a"))
    other = prepare_locally(tiny.job(folder, packing=True), records[::-1], str(tmp_path / "b"))
    for step in range(one.plan.steps):
        a, b = (sorted(k for row in PackedTable(p.folder).rows(step) for k in row.keys) for p in (one, other))
        assert a == b
