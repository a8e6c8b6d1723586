"""Folders, ledgers and the run lock over a real S3 protocol; and what is said when the store is gone."""

import signal
import time

import pyarrow as pa
import pytest
from stores import s3

from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.lock import NAME, RunLock
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError


@pytest.fixture(scope="module")
def store():
    with s3():
        yield Folder.at("s3://bucket/runs")


def test_files_and_tables_come_back_as_they_went(store):
    folder = store / "files"
    assert (folder.exists(), folder.names(), folder.is_local) == (False, [], False)
    folder.write_json("a.json", {"x": [1, 2]})
    table = pa.table({"key": ["a", "b"], "n": [1, 2]})
    folder.write_table("part/0.parquet", table)
    folder.append_line("log", "one")
    folder.append_line("log", "two")
    assert folder.read_json("a.json") == {"x": [1, 2]}
    assert folder.read_table("part").equals(table)
    assert folder.read_bytes("log") == b"one\ntwo\n"
    assert folder.names() == ["a.json", "log", "part"]
    folder.delete("part")
    folder.delete("nothing")
    assert folder.names() == ["a.json", "log"]
    with pytest.raises(StorageError, match="no such file; got 's3://bucket/runs/files/b'"):
        folder.read_bytes("b")


def test_a_ledger_resumes(store):
    record = Record(source="s", position=0, messages=({"role": "user", "content": "x"},))
    Ledger(store / "ledger").commit([Outcome(record=record, input_key="s:0:0", status="accepted")])
    assert Ledger(store / "ledger").settled(1) == {"s:0:0"}


def test_a_second_driver_is_refused(store):
    with RunLock(store / "run"), pytest.raises(StorageError, match="another driver is working on this run"):
        RunLock(store / "run").__enter__()
    assert not (store / "run").exists(NAME)


def another() -> dict[str, object]:
    return {"host": "elsewhere", "pid": 7, "born": 1.0, "renewed": time.time()}


def test_of_two_who_found_it_free_the_last_to_write_has_it(store, monkeypatch):
    lock = RunLock(store / "race")
    write = lock._write

    def and_then_somebody_else() -> None:
        write()
        lock._folder.write_json(NAME, another())

    monkeypatch.setattr(lock, "_write", and_then_somebody_else)
    with pytest.raises(StorageError, match="pid 7 on elsewhere"):
        lock.__enter__()


def test_a_driver_whose_lock_was_taken_over_is_stopped(store):
    said = []

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # as the command line does
    with pytest.raises(KeyboardInterrupt), RunLock(store / "lost", ttl_s=0.4, say=said.append) as lock:  # noqa: PT012
        lock._folder.write_json(NAME, another())
        time.sleep(10)
    signal.signal(signal.SIGTERM, before)
    assert "taken over by pid 7 on elsewhere" in said[0]
    assert (store / "lost").exists(NAME), "the other's lock stays"


def test_a_bucket_that_is_not_there_is_one_line(store):
    gone = Folder.at("s3://nowhere/runs")
    for action in (lambda: gone.write_bytes("a", b"x"), lambda: gone.read_bytes("a"), lambda: gone.read_table("t")):
        with pytest.raises(StorageError) as error:
            action()
        assert "\n" not in str(error.value)
        assert "s3://nowhere/runs" in str(error.value)
