"""Planned shares of inputs, after the filters, as weights of rows."""

import json
from typing import Any

import pytest

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate import run as stage
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, DataError
from itune_ray.observe.progress import Progress


def curate(root: Any, sizes: dict[str, int], weights: dict[str, float] | None = None, **more: Any) -> Artifact:
    inputs = []
    for name, size in sizes.items():
        rows = [{"instruction": f"{name} {i}", "output": "x" * (1 + i % 2)} for i in range(size)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"type": "file", "path": str(root / f"{name}.jsonl")}
        inputs.append({"source": source, "weight": (weights or {}).get(name, 1.0)})
    job = validate(CurateJob, {"name": "run", "inputs": inputs, **more}, "x")
    return stage.run(job, RunStore(str(root), "run"), "curate", EngineHost(), Progress(quiet=True))


def weights_of(artifact: Artifact) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for row in artifact.folder.read_table("kept").to_pylist():
        found.setdefault(row["source"], set()).add(round(row["weight"], 6))
    return found


def report(artifact: Artifact) -> dict[str, dict[str, Any]]:
    return {row["source"]: row for row in artifact.folder.read_json("mix_report.json")}


def test_equal_shares(tmp_path):
    artifact = curate(tmp_path, {"big": 30, "small": 10}, mixing={"type": "equal"})
    assert weights_of(artifact) == {"big": {round(2 / 3, 6)}, "small": {2.0}}
    assert {name: row["share"] for name, row in report(artifact).items()} == pytest.approx({"big": 0.5, "small": 0.5})
    assert report(artifact)["small"]["rows_per_epoch"] == 20


@pytest.mark.parametrize(
    ("mixing", "shares"),
    [
        ({"type": "temperature", "temperature": 2}, (0.6, 0.4)),
        ({"type": "temperature", "temperature": 1}, (9 / 13, 4 / 13)),
        ({"type": "capped", "cap": 4}, (0.5, 0.5)),
        ({"type": "manual", "rates": {"a": 3, "b": 1}}, (0.75, 0.25)),
    ],
)
def test_shares_by_rule(tmp_path, mixing, shares):
    artifact = curate(tmp_path, {"a": 9, "b": 4}, mixing=mixing)
    found = report(artifact)
    assert (found["a"]["share"], found["b"]["share"]) == pytest.approx(shares)
    assert (found["a"]["planned_share"], found["b"]["planned_share"]) == pytest.approx(shares)


def test_no_row_is_repeated_more_often_than_allowed_and_the_report_tells(tmp_path):
    artifact = curate(tmp_path, {"big": 96, "tiny": 4}, {"tiny": 2.0}, mixing={"type": "equal"}, max_repeats=3)
    assert weights_of(artifact)["tiny"] == {3.0}
    found = report(artifact)["tiny"]
    assert found["planned_share"] == 0.5
    assert found["share"] == pytest.approx(12 / (12 + 52))


def test_filters_change_sizes_before_shares_are_planned(tmp_path):
    short = {"type": "diverse", "by": "length", "rows": 1, "min_chars": 9, "only": ["a"]}
    artifact = curate(tmp_path, {"a": 8, "b": 4}, mixing={"type": "equal"}, filters=[short])
    assert report(artifact)["b"]["share"] == 1.0, "nothing of a is left to be half of it"
    assert weights_of(artifact) == {"b": {1.0}}
    everything = {**short, "only": []}
    with pytest.raises(DataError, match=r"only 0 of 12 rows are kept.*`short_answer`"):
        curate(tmp_path, {"a": 8, "b": 4}, mixing={"type": "equal"}, filters=[everything])


@pytest.mark.parametrize(
    ("rates", "message"), [({"a": 1, "bb": 1}, "did you mean 'b'"), ({"a": 1}, "leaves out an input.*'b'")]
)
def test_shares_of_no_input_are_told_before_anything_runs(tmp_path, monkeypatch, rates, message):
    monkeypatch.setattr(stage, "unite", lambda *_: pytest.fail("rows were united"))
    with pytest.raises(ConfigError, match=message):
        curate(tmp_path, {"a": 1, "b": 1}, mixing={"type": "manual", "rates": rates})


# --- replay --------------------------------------------------------------------------------------------------------


def kept(artifact: Artifact) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in artifact.folder.read_table("kept").to_pylist():
        found.setdefault(row["source"], set()).add(row["key"])
    return found


def replayed(root: Any, name: str, sizes: dict[str, int], **more: Any) -> Artifact:
    (root / name).mkdir()
    return curate(root / name, sizes, mixing={"type": "replay", "old": ["one", "two"], **more})


SIZES = {"new": 100, "one": 60, "two": 4}


def test_old_inputs_give_rows_in_proportion_to_what_is_new(tmp_path):
    artifact = replayed(tmp_path, "a", SIZES, rate=0.07)
    assert {name: len(keys) for name, keys in kept(artifact).items()} == {"new": 100, "one": 7, "two": 4}
    assert artifact.manifest["funnel"]["rejected"] == {"not_replayed": 53}
    assert weights_of(artifact) == {"new": {1.0}, "one": {1.0}, "two": {1.0}}
    planned = {name: row["planned_share"] for name, row in report(artifact).items()}
    assert planned == pytest.approx({"new": 100 / 114, "one": 7 / 114, "two": 7 / 114})
    assert report(artifact)["two"]["share"] == pytest.approx(4 / 111), "what an input cannot give is told"


def test_a_larger_rate_holds_the_smaller_and_a_memory_bounds_it(tmp_path):
    few, many = (kept(replayed(tmp_path, f"r{rate}", SIZES, rate=rate))["one"] for rate in (0.05, 0.2))
    assert len(few) == 5
    assert len(many) == 20
    assert few < many
    assert kept(replayed(tmp_path, "m", SIZES, rate=0.2, memory=5))["one"] == few
    assert len(kept(replayed(tmp_path, "least", SIZES, rate=0.001))["one"]) == 1


def test_each_task_gives_its_quota(tmp_path):
    rows = [{"instruction": f"q {i}", "output": "a", "task": f"t{i % 3}"} for i in range(30)]
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({**row, "output": "b"}) + "\n" for row in rows))
    inputs = [{"source": {"type": "file", "path": str(tmp_path / f"{name}.jsonl")}} for name in ("old", "new")]
    mixing = {"type": "replay", "old": ["old"], "rate": 0.1, "by": "meta.task"}
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "mixing": mixing}, "x")
    artifact = stage.run(job, RunStore(str(tmp_path), "run"), "curate", EngineHost(), Progress(quiet=True))
    drawn = [row for row in artifact.folder.read_table("kept").to_pylist() if row["source"] == "old"]
    assert sorted(json.loads(row["meta"])["task"] for row in drawn) == sorted(["t0", "t1", "t2"] * 3)


@pytest.mark.parametrize(
    ("old", "message"), [(["twoo"], "names no input.*did you mean 'two'"), (["new", "one", "two"], "nothing new")]
)
def test_old_inputs_are_some_of_the_inputs(tmp_path, old, message):
    with pytest.raises(ConfigError, match=message):
        curate(tmp_path, {"new": 1, "one": 1, "two": 1}, mixing={"type": "replay", "old": old})
