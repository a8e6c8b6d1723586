"""A hundred damaged configs, manifests, ledgers, checkpoints and data files: each a clear error or a quarantine."""

import json
import random
import time

import pyarrow as pa
import pytest
import yaml

from itune_ray.config.base import validate
from itune_ray.config.shared import FileSource
from itune_ray.data.artifact import open_artifact
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.data.storage import Folder
from itune_ray.errors import ITuneError
from itune_ray.jobs import JOBS, resolve
from itune_ray.pipeline.step import plan

DEADLINE_S = 5.0
ODD = [None, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 5000, "\x00", [], {}, [[]], {"a": {"b": []}}, True, "../.."]
"""What stands in place of a value."""
CONFIGS = [("train", "train/sft-qwen3-0.6b"), ("generate", "generate/distill-qwen3"), ("curate", "curate/chat")]
CONFIGS += [("pipeline", "pipeline/quickstart"), ("sweep", "sweep/qwen3-0.6b"), ("evaluate", "evaluate/responses")]


def places(tree, path=()):
    """Every place in a tree, as the path to it."""
    if isinstance(tree, (dict, list)):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield (*path, key)
            yield from places(tree[key], (*path, key))


def mutated(tree, rng):
    """One value replaced, one key renamed, or one part taken out."""
    *parents, leaf = rng.choice(list(places(tree)))
    node = tree
    for key in parents:
        node = node[key]
    change = rng.choice(["replace", "replace", "rename", "remove"])
    if change == "replace" or isinstance(node, list):
        node[leaf] = rng.choice(ODD)
    else:
        value = node.pop(leaf)
        if change == "rename":
            node[f"{leaf}{rng.choice('xyz')}"] = value
    return tree


def damaged(data: bytes, rng) -> bytes:
    """Cut off, bytes flipped, or something put in between."""
    place = rng.randrange(1, len(data))
    kind = rng.choice(["cut", "flip", "insert", "empty"])
    if kind == "flip":
        return b"".join(bytes([b ^ 0xFF]) if abs(i - place) < 3 else bytes([b]) for i, b in enumerate(data))
    return {"cut": data[:place], "insert": data[:place] + b"\xff\x00{[" + data[place:], "empty": b""}[kind]


def in_one_line(action):
    """Run it: it succeeds, or raises one of our errors in one line, and in time."""
    started, result, told = time.monotonic(), None, ""
    try:
        result = action()
    except ITuneError as error:
        told = str(error)
    assert "\n" not in told
    assert len(told) < 3000
    assert time.monotonic() - started < DEADLINE_S
    return result


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_config(seed):
    rng = random.Random(seed)
    job, file = rng.choice(CONFIGS)
    with open(f"jobs/{file}.yaml") as text:
        tree = yaml.safe_load(text)
    for _ in range(rng.randint(1, 3)):
        tree = mutated(tree, rng)
    made = in_one_line(lambda: validate(resolve(JOBS[job].schema), tree, "job.yaml"))
    if made is not None and job == "pipeline":
        in_one_line(lambda: plan(made))


def outcome(position: int) -> Outcome:
    record = Record(source="s", position=position, messages=({"role": "user", "content": f"question {position}"},))
    return Outcome(record=record, input_key=f"s:{position}:0", status="accepted")


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_artifact(seed, tmp_path):
    rng, folder = random.Random(seed), Folder.at(tmp_path)
    Ledger(folder / "ledger").commit([outcome(i) for i in range(20)])
    manifest = {"stage": "s", "id": "0" * 8, "job": "generate", "status": "complete", "seconds": 1.0, "rows": 20}
    folder.write_json("manifest.json", manifest)
    victim = rng.choice(["manifest.json", "ledger/commit-000000.parquet"])
    folder.write_bytes(victim, damaged(folder.read_bytes(victim), rng))
    in_one_line(lambda: open_artifact(str(tmp_path)))
    settled = in_one_line(lambda: Ledger(folder / "ledger").settled(1))
    assert settled is None or settled <= {f"s:{i}:0" for i in range(20)} or victim.endswith("parquet")


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_data_file(seed, tmp_path):
    """Every line that is there ends as a row or in quarantine."""
    rng = random.Random(seed)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(40)]
    kind = rng.choice(["jsonl", "json", "csv", "parquet"])
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "csv":
        file.write_text("instruction,input,output\n" + "".join(f"say {i},,it is {i}\n" for i in range(40)))
    else:
        Folder.at(tmp_path).write_table(file.name, pa.Table.from_pylist(rows))
    data = damaged(file.read_bytes(), rng)
    file.write_bytes(data)
    table = in_one_line(lambda: read_source(FileSource(path=str(file))))
    if table is not None and kind == "jsonl":
        lines = [line for line in data.split(b"\n") if line.strip()]
        assert table.rows_in == len(lines)
        assert all(row.reason for row in table.quarantined)
