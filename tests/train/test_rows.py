import json

import pytest

from itune_ray.config.shared import FileSource, MixturePart
from itune_ray.config.train import ValidationConfig
from itune_ray.errors import DataError
from itune_ray.train.rows import read_held_out, read_mixture


@pytest.fixture
def part(tmp_path):
    def make(name, questions, **settings):
        file = tmp_path / f"{name}.jsonl"
        rows = [{"instruction": question, "output": "answer"} for question in questions]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return MixturePart(source=FileSource(path=str(file), format="alpaca"), **settings)

    return make


def test_a_part_weighs_its_rows_and_unreadable_lines_are_counted(part, tmp_path):
    manual = part("manual", ["a", "b"], weight=2.5)
    with (tmp_path / "manual.jsonl").open("a") as file:
        file.write("{broken\n")
    rows, rejected = read_mixture([manual, part("distilled", ["c"])])
    assert {row.key: row.weight for row in rows} == {"manual:0:0": 2.5, "manual:1:0": 2.5, "distilled:0:0": 1.0}
    assert len(rejected) == 1
    assert rejected[0].status == "rejected"


def test_on_equal_content_the_row_of_the_higher_priority_stays(part):
    rows, rejected = read_mixture([part("low", ["a", "b", "b"]), part("high", ["b"], priority=1)])
    assert sorted(row.key for row in rows) == ["high:0:0", "low:0:0"]
    assert [(outcome.input_key, outcome.reason) for outcome in rejected] == [
        ("low:1:0", "duplicate"),
        ("low:2:0", "duplicate"),
    ]
    rows, rejected = read_mixture([part("low", ["b", "b"]), part("high", ["b"])])
    assert (len(rows), rejected) == (3, [])


def test_the_same_source_twice_is_refused(part):
    with pytest.raises(DataError, match="rows of the same key"):
        read_mixture([part("one", ["a"]), part("one", ["a"])])


def test_a_held_out_row_counts_once_whatever_its_weight(part):
    parts = part("manual", ["a", "b"], weight=2.5), part("other", ["c"], weight=0.1)
    rows, _ = read_held_out(ValidationConfig(data=parts))
    assert [row.weight for row in rows] == [1.0] * 3


def test_held_out_rows_of_what_was_learned_before_are_marked(part):
    new, old = part("new", ["a"]), part("old", ["b"], weight=3.0)
    rows, _ = read_held_out(ValidationConfig(data=(new,), replayed=(old,)))
    assert [(row.source, row.weight, row.meta.get("replayed")) for row in rows] == [("new", 1, None), ("old", 1, "old")]
    assert "replayed" not in ValidationConfig(data=(new,)).identity()
    with pytest.raises(DataError, match="rows of the same key"):
        read_held_out(ValidationConfig(data=(new,), replayed=(new,)))
