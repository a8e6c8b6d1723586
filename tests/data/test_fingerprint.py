"""What an input is: its content, not its place."""

import os
import sys

import pytest

from itune_ray.data.fingerprint import content_identity, fingerprint, source_identity
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError


def test_a_file_is_its_bytes_wherever_it_lies(tmp_path):
    for place in ("a", "b"):
        Folder.at(tmp_path / place).write_bytes("rows.jsonl", b"{}\n")
    assert fingerprint(f"{tmp_path}/a/rows.jsonl") == fingerprint(f"{tmp_path}/b/rows.jsonl")
    assert fingerprint(f"{tmp_path}/a") == fingerprint(f"{tmp_path}/b/")


def test_changed_content_is_another_input_in_the_same_process(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}')
    before = fingerprint(str(file))
    file.write_text('{"a": 2}')
    os.utime(file, ns=(1, 1))
    assert fingerprint(str(file)) != before


def test_a_folder_is_its_names_and_contents(tmp_path):
    folder = Folder.at(tmp_path / "f")
    folder.write_bytes("a", b"1")
    first = fingerprint(folder.uri)
    folder.write_bytes("b", b"")
    second = fingerprint(folder.uri)
    folder.delete("a")
    folder.write_bytes("c", b"1")
    assert len({first, second, fingerprint(folder.uri)}) == 3


def test_a_payload_of_an_artifact_is_the_artifacts_id_wherever_its_root_is(tmp_path):
    for root in ("here", "moved"):
        stage = Folder.at(tmp_path / root / "run" / "distill-1234abcd")
        stage.write_json("manifest.json", {"id": "1234abcd", "stage": "distill", "status": "complete"})
        stage.write_bytes("accepted/part-0.parquet", root.encode())
    here, moved = (fingerprint(f"{tmp_path}/{r}/run/distill-1234abcd/accepted") for r in ("here", "moved"))
    assert here == moved == "artifact:1234abcd/accepted"
    assert fingerprint(f"{tmp_path}/here/run/distill-1234abcd/rejected") != here


@pytest.mark.parametrize("manifest", [{"whatever": 1}, [1], None])
def test_a_manifest_of_someone_elses_is_no_artifact(tmp_path, manifest):
    Folder.at(tmp_path / "my-data").write_json("manifest.json", manifest)
    assert fingerprint(f"{tmp_path}/my-data").startswith("sha256:")


def test_names_that_are_no_paths_stand_for_themselves():
    assert fingerprint("org/some-model") == "org/some-model"


@pytest.mark.parametrize("template", ["{{ x }}: {% if y %}a{% endif %}" * 40, "line\nline: two"])
def test_inline_templates_stand_for_themselves(template):
    assert fingerprint(template) == template


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path):
    (tmp_path / "a:b.jsonl").write_text("{}")
    assert fingerprint(f"{tmp_path}/a:b.jsonl").startswith("sha256:")


def test_an_import_path_is_its_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_rows_for_identity.py"
    module.write_text("def rows(): return []\n")
    before = source_identity("my_rows_for_identity:rows")
    assert before.endswith(":rows")
    module.write_text("def rows(): return [1]\n")
    assert source_identity("my_rows_for_identity:rows") != before
    assert "my_rows_for_identity" not in sys.modules, "naming it must not import it"


@pytest.mark.parametrize("path", ["no.such.module:f", "json", "os.path.nowhere.at.all:x"])
def test_an_import_path_that_leads_nowhere_is_a_config_error(path):
    with pytest.raises(ConfigError, match=r"package\.module:name"):
        source_identity(path)


def test_only_input_keys_are_replaced(tmp_path):
    (tmp_path / "x").write_text("1")
    tree = {"name": str(tmp_path / "x"), "inputs": [{"source": {"path": str(tmp_path / "x")}}], "n": 1}
    identity = content_identity(tree)
    assert identity["name"] == tree["name"]
    assert identity["inputs"][0]["source"]["path"].startswith("sha256:")
    assert content_identity({"import_path": "json:loads"})["import_path"].startswith("source:")


def test_large_weights_are_named_by_samples_and_rows_by_every_byte(tmp_path, monkeypatch):
    from itune_ray.data import fingerprint as module

    monkeypatch.setattr(module, "SAMPLED_ABOVE", 2**21)
    module._file_digest.cache_clear()
    digests: dict[str, list[str]] = {}
    for suffix in ("safetensors", "parquet"):
        for place in (b"\x00", b"\x01"):
            file = tmp_path / f"{place.hex()}.{suffix}"
            data = bytearray(2**22)
            data[2**20 + 2**15] = place[0]  # between two samples
            file.write_bytes(data)
            digests.setdefault(suffix, []).append(fingerprint(str(file)))
    assert digests["safetensors"][0] == digests["safetensors"][1]
    assert digests["parquet"][0] != digests["parquet"][1]


def test_a_playground_source_changes_with_the_world():
    identity = content_identity({"type": "playground", "split": "chat"})
    assert len(identity["world"]) == 16
