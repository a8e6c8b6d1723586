"""Artifacts: asking twice is a no-op, where it ran is not what it is, a half-done one is never trusted."""

import pytest

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.data.artifact import Artifact, RunStore, open_artifact
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError


def job(path, name="run", **more) -> CurateJob:
    return validate(CurateJob, {"name": name, "inputs": [{"source": {"type": "file", "path": str(path)}}], **more}, "x")


def make(root, given: CurateJob, version=None, stage="curate") -> Artifact:
    return RunStore(str(root), given.name).artifact(stage, "curate", given, version)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n')
    return file


def test_asking_twice_gives_the_same_artifact(tmp_path, rows):
    first = make(tmp_path / "out", job(rows))
    assert not first.complete
    assert first.manifest["status"] == "running"
    first.finish(rows=1)
    second = make(tmp_path / "out", job(rows))
    assert second.complete
    assert second.manifest == first.manifest


def test_where_it_ran_is_not_what_it_is(tmp_path, rows):
    here = make(tmp_path / "here", job(rows))
    elsewhere = make(tmp_path / "elsewhere", job(rows, name="other", blocks=3, run={"lock_ttl_s": 5}), stage="step")
    assert here.id == elsewhere.id


@pytest.mark.parametrize("change", [{"seed": 1}, {"min_rows": 2}, {"filters": [{"type": "length"}]}])
def test_what_decides_the_content_changes_the_id(tmp_path, rows, change):
    assert make(tmp_path, job(rows)).id != make(tmp_path, job(rows, **change)).id


def test_other_content_or_another_version_changes_the_id(tmp_path, rows):
    before = make(tmp_path, job(rows), {"filters": 1})
    assert make(tmp_path, job(rows), {"filters": 2}).id != before.id
    rows.write_text('{"text": "b"}\n')
    assert make(tmp_path, job(rows), {"filters": 1}).id != before.id


def test_a_moved_output_root_keeps_the_ids_downstream(tmp_path, rows):
    ids = []
    for root in ("a", "b"):
        upstream = make(tmp_path / root, job(rows), stage="first")
        upstream.folder.write_bytes("kept/part-0.parquet", root.encode())
        upstream.finish()
        ids.append(make(tmp_path / root, job(upstream.path("kept")), stage="second").id)
    assert ids[0] == ids[1]


def test_seconds_of_all_attempts_add_up(tmp_path, rows):
    first = make(tmp_path, job(rows))
    first.folder.write_json("manifest.json", {**first.manifest, "seconds": 100.0})
    again = make(tmp_path, job(rows))
    again.finish(rows=3)
    assert again.manifest["seconds"] >= 100
    assert again.manifest["rows"] == 3


def test_metrics_are_appended_and_the_config_is_written_resolved(tmp_path, rows):
    artifact = make(tmp_path, job(rows))
    artifact.log({"step": 1, "loss": 0.5})
    artifact.log({"step": 2, "loss": 0.4})
    assert len(artifact.folder.read_bytes("metrics.jsonl").splitlines()) == 2
    assert b"min_rows: 1" in artifact.folder.read_bytes("config.yaml")


def test_an_artifact_is_opened_by_its_folder(tmp_path, rows):
    made = make(tmp_path, job(rows))
    opened = open_artifact(made.path())
    assert (opened.id, opened.stage, opened.job_type) == (made.id, "curate", "curate")
    with pytest.raises(StorageError, match=r"manifest\.json"):
        open_artifact(str(tmp_path))


def test_paths_are_absolute(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact = make("out", job(rows))
    assert artifact.path("kept") == f"{tmp_path}/out/run/curate-{artifact.id}/kept"
    assert Folder.at(artifact.path()).exists("manifest.json")


def test_a_damaged_manifest_is_one_clear_error(tmp_path, rows):
    artifact = make(tmp_path, job(rows))
    artifact.folder.write_bytes("manifest.json", b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        make(tmp_path, job(rows))
