"""Sources: where rows come from, under which keys, and one clear error where they do not."""

import json
from collections.abc import Iterator

import pytest
from hubs import hub

from itune_ray.config.shared import CustomSource, FileSource, HubSource, PlaygroundSource
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError, DataError

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(5)]


@pytest.fixture
def alpaca(tmp_path):
    file = tmp_path / "my.alpaca.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_a_file_is_named_by_its_stem_and_says_its_layout(alpaca):
    table = read_source(FileSource(path=str(alpaca)))
    assert (table.name, table.layout, table.rows_in) == ("my", "alpaca", 5)
    assert [record.key for record in table.records] == [f"my:{i}:0" for i in range(5)]


def test_name_format_and_limit_are_obeyed(alpaca):
    table = read_source(FileSource(path=str(alpaca), name="x", format="prompt", limit=2))
    assert [record.key for record in table.records] == ["x:0:0", "x:1:0"]
    assert all(record.response is None for record in table.records)


def test_a_limit_counts_unreadable_rows_so_that_positions_stay(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken\n{"text": "c"}\n')
    table = read_source(FileSource(path=f"{tmp_path}/a.jsonl", limit=2))
    assert ([r.key for r in table.records], [o.reason for o in table.quarantined]) == (["a:0:0"], ["broken_json"])


def test_all_lines_broken_is_a_table_of_rejects(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    table = read_source(FileSource(path=f"{tmp_path}/a.jsonl"))
    assert (len(table.records), len(table.quarantined)) == (0, 2)


def test_an_empty_file_is_one_clear_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_source(FileSource(path=f"{tmp_path}/a.jsonl"))


def test_no_fitting_layout_names_file_columns_and_knob(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"stem": "x", "key": "y"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: no row layout.*key, stem.*`format`"):
        read_source(FileSource(path=f"{tmp_path}/a.jsonl"))


@pytest.fixture
def payload(tmp_path) -> Folder:
    """A finished artifact with one prompt's two samples."""
    stage = Folder.at(tmp_path / "run" / "distill-12345678")
    ledger = Ledger(stage / "ledger")
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    records = [
        Record(source="prompts", position=4, sample=s, messages=messages, model="m@1", weight=2.0) for s in (0, 1)
    ]
    ledger.commit([Outcome(record=r, input_key="prompts:4:0", status="accepted", score=0.5) for r in records])
    ledger.publish(stage)
    stage.write_json("manifest.json", {"id": "12345678", "stage": "distill", "status": "complete"})
    return stage


def test_a_payload_keeps_keys_and_provenance(payload):
    table = read_source(FileSource(path=(payload / "accepted").uri, name="distilled"))
    assert table.name == "distilled"
    assert [record.key for record in table.records] == ["prompts:4:0", "prompts:4:1"]
    assert {(record.model, record.weight) for record in table.records} == {("m@1", 2.0)}
    assert read_source(FileSource(path=(payload / "accepted").uri)).name == "distill"


def test_an_empty_payload_is_an_empty_table(payload):
    assert read_source(FileSource(path=(payload / "rejected").uri)).rows_in == 0


def test_an_unfinished_artifact_is_refused(payload):
    payload.write_json("manifest.json", {"id": "12345678", "stage": "distill", "status": "running"})
    with pytest.raises(DataError, match="not finished"):
        read_source(FileSource(path=(payload / "accepted").uri))


def test_playground_rows_take_the_given_name():
    table = read_source(PlaygroundSource(split="chat", rows=3, name="world"))
    assert [record.key for record in table.records] == ["world:0:0", "world:1:0", "world:2:0"]
    assert read_source(PlaygroundSource(split="chat", rows=3)).name == "playground-chat"
    with pytest.raises(ConfigError, match="weigths"):
        read_source(PlaygroundSource(split="chat", rows=3, options={"weigths": {}}))


def test_a_saved_dataset_is_read_with_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "valid": rows.select([0])}).save_to_disk(str(tmp_path / "two"))
    table = read_source(HubSource(path=str(tmp_path / "one"), limit=3))
    assert (table.name, table.layout, len(table.records)) == ("one", "alpaca", 3)
    assert len(read_source(HubSource(path=str(tmp_path / "two"), split="valid")).records) == 1
    with pytest.raises(DataError, match=r"did you mean 'valid'.*train, valid"):
        read_source(HubSource(path=str(tmp_path / "two"), split="vald"))
    with pytest.raises(DataError, match="save_to_disk"):
        read_source(HubSource(path=str(tmp_path)))


def test_the_hub_offline_is_one_clear_error(monkeypatch):
    pytest.importorskip("datasets")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot be reached.*no-such-org/no-such-set") as caught:
        read_source(HubSource(path="no-such-org/no-such-set"))
    assert "\n" not in str(caught.value)


def test_a_dataset_or_revision_that_the_hub_lacks_is_told_as_such(monkeypatch, tmp_path):
    from huggingface_hub import HfApi

    (tmp_path / "rows.jsonl").write_text("{}")
    original = HfApi.__init__
    with hub() as server:
        server.repos["org/rows"] = tmp_path
        monkeypatch.setattr(
            HfApi, "__init__", lambda self, *a, **k: original(self, *a, **{**k, "endpoint": server.endpoint})
        )
        with pytest.raises(DataError, match=r"the Hub dataset has no such revision; got 'v9'.*set by `revision`"):
            read_source(HubSource(path="org/rows", revision="v9"))
        with pytest.raises(DataError, match=r"no such dataset on the Hub.*got 'org/none'"):
            read_source(HubSource(path="org/none"))


def custom_rows(count: int = 2) -> Iterator[Record]:
    for i in range(count):
        yield Record(source="mine", position=i, text=str(i))


def twice() -> list[Record]:
    return [*custom_rows(), *custom_rows()]


def wrong() -> list[dict[str, str]]:
    return [{"text": "x"}]


def test_a_function_of_the_users_is_a_source():
    source = CustomSource(import_path=f"{__name__}:custom_rows", args={"count": 3}, name="own")
    assert [record.key for record in read_source(source).records] == ["own:0:0", "own:1:0", "own:2:0"]
    assert read_source(CustomSource(import_path=f"{__name__}:custom_rows")).name == "custom_rows"


@pytest.mark.parametrize(
    ("path", "args", "error", "message"),
    [
        (f"{__name__}:nothing", {}, ConfigError, "cannot import"),
        ("no.module:f", {}, ConfigError, "cannot import"),
        (f"{__name__}:custom_rows", {"n": 1}, ConfigError, "arguments do not fit"),
        (f"{__name__}:wrong", {}, DataError, "must yield"),
        (f"{__name__}:twice", {}, DataError, "same key"),
    ],
)
def test_a_function_that_does_not_fit_is_one_clear_error(path, args, error, message):
    with pytest.raises(error, match=message):
        read_source(CustomSource(import_path=path, args=args))
