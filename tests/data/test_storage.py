"""Folders: writes are whole or not at all, errors are one clear kind, local and remote behave alike."""

import gzip
import json
import os
import threading

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from stores import disk

from itune_ray.data import storage
from itune_ray.data.storage import Folder, retried
from itune_ray.errors import StorageError

TABLE = pa.table({"a": [1, 2, 3], "b": ["x", None, "ü"]})


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path) -> Folder:
    """A local folder, and one on a filesystem that has no rename and no append."""
    if request.param == "local":
        return Folder.at(tmp_path / "root")
    fs, _ = pafs.FileSystem.from_uri("mock:///bucket")
    return Folder(fs, "bucket/root", "mock:///bucket/root")


def test_what_is_written_is_read(folder):
    folder.write_bytes("a.bin", b"\x00\x01")
    folder.write_json("deep/er/a.json", {"ü": [1, None]})
    folder.write_table("t/part-0.parquet", TABLE)
    assert folder.read_bytes("a.bin") == b"\x00\x01"
    assert folder.read_json("deep/er/a.json") == {"ü": [1, None]}
    assert folder.read_table("t/part-0.parquet").equals(TABLE)
    assert folder.read_table("t", columns=["b"]).equals(TABLE.select(["b"]))
    assert folder.names() == ["a.bin", "deep", "t"]


def test_compressed_names_hold_the_bytes_given(folder):
    data = gzip.compress(b"payload")
    folder.write_bytes("a.json.gz", data)
    assert folder.read_bytes("a.json.gz") == data


def test_a_folder_of_parts_is_read_in_name_order(folder):
    for name, value in (("part-10", 2), ("part-02", 1)):
        folder.write_table(f"t/{name}.parquet", pa.table({"a": [value]}))
    folder.write_bytes("t/_SUCCESS", b"")
    assert folder.read_table("t")["a"].to_pylist() == [1, 2]


def test_lines_are_appended(folder):
    name = "metrics.jsonl"
    folder.append_line(name, '{"a": 1}')
    folder.append_line(name, '{"a": 2}')
    assert [json.loads(line) for line in folder.read_bytes(name).splitlines()] == [{"a": 1}, {"a": 2}]


def test_missing_things_are_storage_errors(folder):
    for read in (folder.read_bytes, folder.read_json, folder.read_table):
        with pytest.raises(StorageError, match="no such file"):
            read("nothing")
    assert not folder.exists("nothing")
    assert (folder / "nothing").names() == []
    folder.delete("nothing")


def test_damaged_files_are_storage_errors(folder):
    folder.write_bytes("a.json", b"{")
    folder.write_bytes("a.parquet", b"PAR1 but no more")
    with pytest.raises(StorageError, match="not valid JSON"):
        folder.read_json("a.json")
    with pytest.raises(StorageError, match="cannot read the table"):
        folder.read_table("a.parquet")


def test_delete_takes_files_and_folders(folder):
    folder.write_bytes("x/a", b"1")
    folder.write_bytes("b", b"1")
    folder.delete("x")
    folder.delete("b")
    assert folder.names() == []


@pytest.fixture
def quick(monkeypatch):
    """Attempts without long pauses."""
    monkeypatch.setattr(storage, "PAUSES_S", (0.01, 0.01))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, quick):
    folder = Folder.at(tmp_path)
    folder.write_bytes("a", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=r"No space left on device.*run\.output"):
        folder.write_bytes("a", b"new")
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_a_storage_error_and_leaves_the_old_file(tmp_path, quick):
    with disk(tmp_path / "disk", 64) as small:
        folder = Folder.at(small)
        folder.write_bytes("a", b"old")
        with pytest.raises(StorageError, match=r"cannot write .*No space left on device.*run\.output"):
            folder.write_bytes("a", b"x" * 100_000)
        assert folder.read_bytes("a") == b"old"
        assert os.listdir(small) == ["a"]


def test_a_disk_that_is_full_for_a_moment_costs_nothing(tmp_path):
    with disk(tmp_path / "disk", 64) as small:
        (small / "other").write_bytes(b"x" * 60_000)
        freed = threading.Timer(0.5, (small / "other").unlink)
        freed.start()
        Folder.at(small).write_bytes("a", b"x" * 30_000)
        freed.join()
        assert len(Folder.at(small).read_bytes("a")) == 30_000


def test_what_no_attempt_can_mend_is_not_tried_again(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    for error in (PermissionError(13, "no"), FileNotFoundError(2, "no"), OSError("AWS Error ACCESS_DENIED during X")):
        asked = []

        def fail(error=error, asked=asked):
            asked.append(None)
            raise error

        with pytest.raises(OSError, match=r"no|DENIED"):
            retried(fail)
        assert len(asked) == 1


def test_an_outage_is_waited_out(quick):
    asked = []

    def fail():
        asked.append(None)
        if len(asked) < 3:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject")
        return "there"

    assert retried(fail) == "there"


def test_an_outage_that_lasts_is_told(quick):
    asked = []

    def fail():
        asked.append(None)
        raise OSError("AWS Error NETWORK_CONNECTION during PutObject")

    with pytest.raises(OSError, match="NETWORK"):
        retried(fail)
    assert len(asked) == 1 + len(storage.PAUSES_S)


def test_a_path_below_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"):
        Folder.at(tmp_path / "file").write_bytes("a", b"x")


def test_half_written_files_are_invisible(tmp_path):
    (tmp_path / ".a.parquet.12345678.partial").write_bytes(b"half")
    assert Folder.at(tmp_path).names() == []


def test_a_storage_that_cannot_be_asked_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match=r"cannot reach the storage: .*stat"):
        Folder.at(tmp_path / ("x" * 400)).exists()


def test_unknown_schemes_say_what_is_allowed():
    with pytest.raises(StorageError, match="s3://"):
        Folder.at("nosuch://bucket/x")


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Folder.at("runs/").uri == f"{tmp_path}/runs"
    assert Folder.at(f"file://{tmp_path}/runs").is_local
