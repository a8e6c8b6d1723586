"""What tests read from the folder of a run."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq


def table_hash(folder: Path) -> str:
    """Hash of a published table, sorted by key: equal tables, equal hash."""
    rows = sorted(pq.read_table(folder).to_pylist(), key=lambda r: r["key"])
    return hashlib.sha256(json.dumps(rows, default=str, sort_keys=True).encode()).hexdigest()


def losses(stage: Path) -> list[tuple[int, float, float]]:
    """(step, loss, grad norm) of a training, each step once, the last writing of a step counting."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    last = {line["step"]: (line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line}
    return [last[step] for step in sorted(last)]


def commits(stages: Iterable[Path]) -> list[Path]:
    """Ledger commits of stages under way."""
    return [file for stage in stages for file in sorted(stage.rglob("commit-*.parquet"))]


def rated_answer(messages: Sequence[dict[str, str]]) -> str:
    """The answer that a judge is asked to rate, by the built-in template's marks."""
    found = re.search(r"\[Answer (\w+)\]\n(.*?)\n\[End of answer \1\]", messages[-1]["content"], re.DOTALL)
    assert found is not None
    return found[2]


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of TensorBoard's one event file in a folder, as written."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:  # length, its checksum, the record, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    return found
