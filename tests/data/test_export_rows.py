"""Exports: what others read is what was kept, and the card tells where it is from and what was left out."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from itune_ray.cli import main
from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import FileSource, HubSource
from itune_ray.curate import run as stage
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.export import export
from itune_ray.data.records import Message, Record
from itune_ray.data.sources import read_source
from itune_ray.engine.host import EngineHost
from itune_ray.errors import DataError, StorageError
from itune_ray.observe.progress import Progress

ROWS = [
    {"instruction": "q | one", "output": "a\nline", "license": "MIT"},
    {"instruction": "ünï", "output": "b", "license": "CC0"},
    {"instruction": "q | one", "output": "a\nline", "license": "MIT"},
    {"instruction": "empty", "output": ""},
]
PAIRS = [{"prompt": "p", "chosen": "good", "rejected": "bad"}]
TEXTS = [{"text": "once upon"}]


def curated(root: Path, *, weight: float = 1.0, **files: list[dict[str, Any]]) -> Artifact:
    inputs = []
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs.append({"source": {"type": "file", "path": str(root / f"{name}.jsonl")}, "weight": weight})
    tree = {"name": "run", "inputs": inputs, "filters": [{"type": "exact_dedup"}]}
    job = validate(CurateJob, tree, "x")
    return stage.run(job, RunStore(str(root / "runs"), "run"), "curate", EngineHost(), Progress(quiet=True))


def chats(records: list[Record]) -> dict[str, tuple[Message, ...]]:
    return {record.key: record.messages for record in records}


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    return curated(tmp_path, chat=ROWS, pairs=PAIRS, texts=TEXTS)


def test_json_lines_of_each_kind_read_back_as_the_rows_they_were(tmp_path, artifact):
    kept = {r.key: r for r in read_source(FileSource(path=artifact.path("kept"))).records}
    folder = export(artifact.path(), str(tmp_path / "out"), "jsonl")
    assert folder.names() == ["README.md", "chat.jsonl", "preference.jsonl", "text.jsonl"]
    found = [
        r
        for kind in ("chat", "preference", "text")
        for r in read_source(FileSource(path=f"{folder.path}/{kind}.jsonl")).records
    ]
    assert len(found) == len(kept) == 4
    for record in found:
        before = kept[record.meta["id"]]
        assert (record.messages, record.rejected, record.text) == (before.messages, before.rejected, before.text)
    lines = Path(folder.path, "chat.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "messages": [{"role": "user", "content": "q | one"}, {"role": "assistant", "content": "a\nline"}],
        "id": "chat:0:0",
        "meta": {"license": "MIT"},
    }


def test_parquet_and_dataset_folders_hold_the_same_rows(tmp_path, artifact):
    from datasets import load_from_disk

    kept = read_source(FileSource(path=artifact.path("kept"))).records
    parquet = export(artifact.path(), str(tmp_path / "parquet"), "parquet")
    table = pq.read_table(f"{parquet.path}/data/train.parquet")
    assert "status" not in table.column_names
    assert "recipe" not in table.column_names, "a column without a value says nothing"
    assert chats(read_source(FileSource(path=f"{parquet.path}/data")).records) == chats(kept)
    saved = export(artifact.path(), str(tmp_path / "hf"), "hf")
    assert load_from_disk(saved.path).num_rows == 4
    assert chats(read_source(HubSource(path=saved.path)).records) == chats(kept)
    assert (tmp_path / "hf" / "README.md").exists()


def test_a_weight_goes_along(tmp_path):
    artifact = curated(tmp_path, weight=2.0, chat=ROWS[:1])
    folder = export(artifact.path(), str(tmp_path / "out"), "jsonl")
    assert json.loads(Path(folder.path, "chat.jsonl").read_text())["weight"] == 2.0


def test_the_card_tells_sources_licences_filters_and_the_funnel(tmp_path, artifact):
    folder = export(artifact.path(), str(tmp_path / "out"), "jsonl", license="cc-by-4.0")
    card = Path(folder.path, "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0",
        "size_categories": ["n<1K"],
        "configs": [
            {"config_name": kind, "data_files": [{"split": "train", "path": f"{kind}.jsonl"}]}
            for kind in ("chat", "preference", "text")
        ],
    }
    assert f"# curate {artifact.id}" in body
    assert "4 rows, made by `itune curate`" in body
    assert "| chat | alpaca |  | 4 | 2 | MIT (1), CC0 (1) |" in body
    assert "| pairs | preference |  | 1 | 1 | not stated (1) |" in body
    assert '| 1 | exact_dedup | 1 | {"compared": 5} |' in body
    assert "| read | 6 |" in body
    assert "| rejected: duplicate | 1 |" in body
    assert "| rejected: no_answer | 1 |" in body
    assert "| read | none named | 4 |" in body
    without = export(artifact.path(), str(tmp_path / "bare"), "parquet")
    assert "No licence of the whole is stated" in Path(without.path, "README.md").read_text()


def test_equal_artifacts_give_equal_exports(tmp_path, artifact):
    folders = [export(artifact.path(), str(tmp_path / name), "jsonl") for name in "ab"]
    for name in ("README.md", "chat.jsonl"):
        assert folders[0].read_bytes(name) == folders[1].read_bytes(name)


def test_what_cannot_be_exported_is_one_clear_error(tmp_path, artifact):
    with pytest.raises(StorageError, match="not an artifact"):
        export(str(tmp_path), str(tmp_path / "out"), "jsonl")
    with pytest.raises(DataError, match=r"no such rows.*did you mean 'kept'.*allowed: failed, kept, rejected"):
        export(artifact.path(), str(tmp_path / "out"), "jsonl", payload="kep")
    with pytest.raises(DataError, match="holds no rows"):
        export(artifact.path(), str(tmp_path / "out"), "jsonl", payload="failed")
    with pytest.raises(StorageError, match="holds files already"):
        export(artifact.path(), str(tmp_path), "jsonl")
    artifact.folder.write_json("manifest.json", {**artifact.manifest, "status": "running"})
    with pytest.raises(DataError, match="not finished"):
        export(artifact.path(), str(tmp_path / "out"), "jsonl")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, artifact, capsys):
    assert main(["export", artifact.path(), str(tmp_path / "out"), "--as", "parquet", "--payload", "rejected"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "data" / "train.parquet").num_rows == 2
    assert main(["export", artifact.path(), str(tmp_path / "out")]) == 2
    assert "holds files already" in capsys.readouterr().err
