"""The board and the verdicts of blocks: every row ends once, in a table that no order changes."""

import json
import math
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import FileSource, MixturePart
from itune_ray.curate.board import Board
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.curate.publish import balanced
from itune_ray.curate.run import _note
from itune_ray.curate.steps import check_steps, make_steps, passes
from itune_ray.curate.verdicts import VERDICT_SCHEMA, Link, block_table, judge_block
from itune_ray.data.dedup import slices
from itune_ray.data.formats import quarantine
from itune_ray.data.ledger import LEDGER_SCHEMA, Outcome, publish_parts
from itune_ray.data.mixture import Mixture, unite
from itune_ray.data.records import Record
from itune_ray.data.sources import SourceTable
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError, DataError


def mixture(counts: tuple[int, ...] = (4,), unread: int = 0, priorities: tuple[int, ...] = (0, 0, 0)) -> Mixture:
    tables = [
        SourceTable(
            f"s{part}",
            [Record(source=f"s{part}", position=i, text=f"{part} {i}") for i in range(count)],
            [quarantine(Record(source=f"s{part}", position=count + i), "broken_json", "{") for i in range(unread)],
        )
        for part, count in enumerate(counts)
    ]
    parts = [MixturePart(source=FileSource(path="x"), priority=priorities[i]) for i in range(len(counts))]
    return unite(parts, tables)


def test_every_row_has_one_outcome_with_its_reason():
    board = Board(mixture((3, 2), unread=1))
    board.reject(0, "bad", "f", score=0.2, raw="said", of="s0:1:0")
    board.fail(1, "dead", "f", attempts=2)
    board.score("judge", 2, 4.5)
    table = board.outcomes()
    assert table.schema.names[: len(LEDGER_SCHEMA)] == LEDGER_SCHEMA.names
    rows = {row["key"]: row for row in table.to_pylist()}
    assert rows["s0:0:0"]["duplicate_of"] == "s0:1:0"
    assert (rows["s0:0:0"]["status"], rows["s0:0:0"]["score"], rows["s0:0:0"]["raw"]) == ("rejected", 0.2, "said")
    assert (rows["s0:1:0"]["status"], rows["s0:1:0"]["cause"], rows["s0:1:0"]["attempts"]) == ("failed", "dead", 2)
    assert (rows["s0:2:0"]["score"], rows["s0:2:0"]["score_judge"], rows["s0:2:0"]["input"]) == (4.5, 4.5, "s0")
    assert math.isnan(rows["s1:0:0"]["score_judge"])
    assert (rows["s0:3:0"]["reason"], rows["s0:3:0"]["raw"]) == ("broken_json", "{")
    assert Outcome.from_row(rows["s0:0:0"]).reason == "bad"
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    assert balanced(table, board.mixture).to_json() == {
        "in": 7,
        "accepted": 3,
        "rejected": {"bad": 1, "broken_json": 2},
        "failed": {"dead": 1},
    }


def test_parts_are_the_table_cut_up(monkeypatch, tmp_path):
    board = Board(mixture((7, 4), unread=2))
    board.reject(0, "bad", "f", score=0.2)
    board.score("judge", 10, 4.5)
    whole = board.outcomes()
    monkeypatch.setattr("itune_ray.curate.board.ROWS_PER_PART", 3)
    parts = list(board.outcome_parts())
    assert [part.num_rows for part in parts] == [3, 3, 3, 3, 3]
    assert repr(pa.concat_tables(parts).to_pylist()) == repr(whole.to_pylist())
    assert whole["key"].to_pylist() == sorted(whole["key"].to_pylist())
    publish_parts(parts, Folder.at(tmp_path))
    written = [Folder.at(tmp_path).read_table(status) for status in ("accepted", "rejected", "failed")]
    assert [table.num_rows for table in written] == [10, 5, 0]
    assert written[2].schema.equals(whole.schema)
    assert repr(sorted(map(str, pa.concat_tables(written).to_pylist()))) == repr(sorted(map(str, whole.to_pylist())))


def test_a_lost_or_doubled_row_is_noticed():
    board = Board(mixture((3,)))
    table = board.outcomes()
    with pytest.raises(DataError, match="does not balance: 3 rows in, 2 out"):
        balanced(table.slice(0, 2), board.mixture)
    with pytest.raises(DataError, match="ended twice; got 's0:0:0'"):
        balanced(type(table).from_batches(table.to_batches() + table.slice(0, 1).to_batches()), board.mixture)


def test_the_keep_rule_is_priority_then_score_then_key():
    board = Board(mixture((3, 1), priorities=(0, 1)))
    board.score("f", 2, 0.9)
    board.score("f", 1, 0.1)
    assert board.best_first(board.alive()) == [3, 2, 1, 0]
    assert board.best_first(reversed(board.alive())) == [3, 2, 1, 0]


def test_rows_of_named_inputs_only():
    board = Board(mixture((2, 1)))
    assert board.alive(["s1"]) == [2]
    board.reject(2, "x", "f")
    assert (board.alive(["s1"]), board.alive()) == ([], [0, 1])
    board.reprieve(2)
    assert board.alive(["s1"]) == [2]


# --- verdicts ------------------------------------------------------------------------------------------------------


class Divisible(RowFilter):
    def __init__(self, by: int):
        self.by = by

    def keep(self, record: Record) -> Verdict:
        if record.position % 10 == 9:
            return Verdict(False, failure="nine")
        good = record.position % self.by == 0
        return (
            Verdict(good, None if good else f"not_{self.by}", record.position / 100)
            if self.by == 3
            else (KEEP if good else Verdict(False, f"not_{self.by}"))
        )


def block_of(board: Board) -> Any:
    rows = board.alive()
    return block_table(rows, [board.record(row) for row in rows], [board.source(row) for row in rows])


def test_a_chain_stops_at_the_first_that_rejects():
    board = Board(mixture((12,)))
    found = judge_block(block_of(board), [Link("two", Divisible(2)), Link("three", Divisible(3))])
    assert found.schema.equals(VERDICT_SCHEMA)
    by_position = {board.record(v["row"]).position: v for v in found.to_pylist() if not v["keep"]}
    assert {p: v["link"] for p, v in by_position.items()} == {
        1: 0,
        2: 1,
        3: 0,
        4: 1,
        5: 0,
        7: 0,
        8: 1,
        9: 0,
        10: 1,
        11: 0,
    }
    assert by_position[9]["failure"] == "nine"
    assert by_position[4]["reason"] == "not_3"
    kept = {board.record(v["row"]).position: v["score"] for v in found.to_pylist() if v["keep"]}
    assert kept == {0: 0.0, 6: 0.06}


def test_a_link_for_some_inputs_leaves_the_others_alone():
    board = Board(mixture((3, 3)))
    found = judge_block(block_of(board), [Link("two", Divisible(2), ("s1",))])
    assert [board.record(v["row"]).key for v in found.to_pylist()] == ["s1:1:0"]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 12))
def test_how_a_table_is_cut_into_blocks_does_not_show(rows, blocks):
    board, chain = Board(mixture((rows,))), [Link("two", Divisible(2)), Link("three", Divisible(3))]
    table = block_of(board)
    parts = list(slices(table, blocks))
    assert len(parts) <= blocks
    assert sum(part.num_rows for part in parts) == rows
    whole = [{**v, "score": str(v["score"])} for v in judge_block(table, chain).to_pylist()]
    assert [{**v, "score": str(v["score"])} for part in parts for v in judge_block(part, chain).to_pylist()] == whole


# --- steps ---------------------------------------------------------------------------------------------------------


def steps_of(*filters: dict[str, Any]) -> Any:
    job = {"name": "x", "inputs": [{"source": {"type": "file", "path": "x"}}], "filters": list(filters)}
    return make_steps(validate(CurateJob, job, "x").filters)


def test_row_filters_share_a_pass_up_to_one_that_settles():
    made = steps_of(
        {"type": "length"},
        {"type": "refusal"},
        {"type": "human_rating"},
        {"type": "length"},
        {"type": "exact_dedup"},
        {"type": "minhash_dedup"},
        {"type": "refusal", "keep_share": 0.1},
    )
    assert [[step.name for step in group] for group in passes(made)] == [
        ["length_1", "refusal_1", "human_rating"],
        ["length_2"],
        ["exact_dedup"],
        ["minhash_dedup"],
        ["refusal_2"],
    ]


def test_a_filter_for_an_unknown_input_is_told():
    table = SourceTable("manual", [Record(source="manual", position=0, text="x")], [])
    with pytest.raises(ConfigError, match="did you mean 'manual'"):
        check_steps(steps_of({"type": "length", "only": ["manuel"]}), [table])


def test_a_filter_without_what_it_needs_is_told():
    table = SourceTable("s", [Record(source="s", position=0, text="x")], [])
    with pytest.raises(DataError, match=r"human_rating\) needs meta\.ratings, and no row of s"):
        check_steps(steps_of({"type": "length"}, {"type": "human_rating"}), [table])


class Tagging(RowFilter):
    def keep(self, record: Record) -> Verdict:
        return Verdict(True, meta={"seen": record.meta.get("seen", 0) + 1})


class SeenTwice(RowFilter):
    def keep(self, record: Record) -> Verdict:
        return KEEP if record.meta["seen"] == 2 else Verdict(False, "unseen")


def test_facts_reach_the_next_link_the_board_and_the_table():
    board = Board(mixture((2,)))
    links = [Link("a", Tagging()), Link("b", Tagging()), Link("c", SeenTwice())]
    found = judge_block(block_of(board), links).to_pylist()
    assert [(v["row"], v["link"], v["keep"], v["meta"]) for v in found] == [
        (row, link, True, json.dumps({"seen": link + 1})) for row in (0, 1) for link in (0, 1)
    ]
    board.annotate(1, {"seen": 2})
    assert [board.record(row).meta for row in (0, 1)] == [{}, {"seen": 2}]
    assert [row["meta"] for row in board.outcomes().to_pylist()] == ["{}", '{"seen": 2}']


class Redacting(RowFilter):
    def keep(self, record: Record) -> Verdict:
        return Verdict(True, changed=replace(record, text=(record.text or "").replace("0 ", "X "), weight=9.0))


class Clean(RowFilter):
    def keep(self, record: Record) -> Verdict:
        return KEEP if record.text == "X 1" else Verdict(False, record.text)


def test_rewritten_texts_reach_the_next_link_the_board_and_the_table():
    board = Board(mixture((2,)))
    links = [Link("a", Redacting()), Link("b", Clean())]
    for verdict in judge_block(block_of(board), links).to_pylist():
        _note(board, verdict, links[verdict["link"]].name)
    rows = board.outcomes().to_pylist()
    assert [(row["text"], row["reason"], row["weight"]) for row in rows] == [("X 0", "X 0", 1.0), ("X 1", None, 1.0)]
    assert rows[1]["content_hash"] == Record(source="x", position=0, text="X 1").content_hash
