import random

import pyarrow as pa
import pytest

from itune_ray.data import order as order_module
from itune_ray.data.order import DOCUMENT_SCHEMA, Order, PackedTable, write_order
from itune_ray.errors import TrainError


def documents(count: int, weights: list[float] | None = None, shuffled: bool = False) -> pa.Table:
    rows = [
        {
            "key": f"d:{i}:0",
            "weight": weights[i] if weights else 1.0,
            "input_ids": [i] * (1 + i % 7),
            "supervised": [True] * (1 + i % 7),
            "lengths": [1 + i % 7],
        }
        for i in range(count)
    ]
    if shuffled:
        random.Random(1).shuffle(rows)
    return pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA)


def write(table: pa.Table, folder, **settings) -> PackedTable:
    defaults = {"digest": "x", "seed": 3, "batch": 10, "capacity": 16, "epochs": 2.0, "steps": None}
    write_order(table, str(folder), **{**defaults, **settings})
    return PackedTable(str(folder))


def keys_of(table: PackedTable, step: int, world: int = 1) -> list[str]:
    return [key for rank in range(world) for row in table.rows(step, rank, world) for key in row.keys]


def test_order_does_not_depend_on_how_the_table_is_sorted(tmp_path):
    one = write(documents(45), tmp_path / "a")
    other = write(documents(45, shuffled=True), tmp_path / "b")
    for step in range(one.plan.steps):
        assert sorted(keys_of(one, step)) == sorted(keys_of(other, step))


def test_ranks_partition_every_step_whatever_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr(order_module, "ROWS_PER_GROUP", 3)  # many groups, so that slices cross them
    table = write(documents(45), tmp_path / "a")
    for step in range(table.plan.steps):
        whole = sorted(keys_of(table, step))
        for world in (1, 2, 3, 7, 20):
            assert sorted(keys_of(table, step, world)) == whole


def test_epochs_cover_each_document_once_and_differ(tmp_path):
    table = write(documents(40), tmp_path / "a")
    assert table.plan.steps == 8
    first = [key for step in range(4) for key in keys_of(table, step)]
    second = [key for step in range(4, 8) for key in keys_of(table, step)]
    assert sorted(first) == sorted(second) == sorted(f"d:{i}:0" for i in range(40))
    assert set(keys_of(table, 0)) != set(keys_of(table, 4))
    assert table.epoch(3) == pytest.approx(1.0)
    assert table.epoch(7) == pytest.approx(2.0)


def test_steps_run_over_as_many_epochs_as_they_need(tmp_path):
    table = write(documents(15), tmp_path / "a", epochs=None, steps=7)
    assert table.plan.steps == 7
    assert all(len(keys_of(table, step)) == 10 for step in range(7))
    assert table.plan.epochs == pytest.approx(70 / 15)


def test_a_last_partial_batch_is_kept_with_epochs(tmp_path):
    table = write(documents(25), tmp_path / "a", epochs=1.0)
    assert [len(keys_of(table, step)) for step in range(table.plan.steps)] == [10, 10, 5]


def test_mixture_weights_repeat_whole_and_sample_the_rest():
    count = 4000
    order = Order([f"k{i}" for i in range(count)], [2.25] * count, seed=0, batch=1)
    drawn = order.epoch(0)
    times = [drawn.count(i) for i in range(200)]
    assert set(times) == {2, 3}
    assert len(drawn) / count == pytest.approx(2.25, abs=0.03)
    half = Order([f"k{i}" for i in range(count)], [0.5] * count, seed=0, batch=1)
    assert len(half.epoch(0)) / count == pytest.approx(0.5, abs=0.03)
    assert set(half.epoch(0)) != set(half.epoch(1))


def test_packed_rows_hold_their_documents(tmp_path):
    table = write(documents(30), tmp_path / "a")
    for row in table.rows(0):
        assert len(row.input_ids) == row.lengths.sum() <= 16
        ids = row.input_ids.tolist()
        for key, length in zip(row.keys, row.lengths, strict=True):
            number = int(key.split(":")[1])
            assert ids[:length] == [number] * length
            ids = ids[length:]


def test_an_unfinished_order_is_refused(tmp_path):
    with pytest.raises(TrainError, match="missing or unfinished"):
        PackedTable(str(tmp_path))


def test_weights_that_draw_nothing_are_refused(tmp_path):
    with pytest.raises(TrainError, match="draws no document"):
        write(documents(2, [1e-9, 1e-9]), tmp_path / "a", epochs=None, steps=1)


def test_steps_may_fill_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(order_module, "STEPS_PER_FILE", 2)
    table = write(documents(45), tmp_path / "a")
    assert len(list((tmp_path / "a").glob("part-*.parquet"))) == 5
    assert sum(len(keys_of(table, step)) for step in range(table.plan.steps)) == 90
