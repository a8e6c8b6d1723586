"""metrics.jsonl: one line per logged step, each step once however often the run was interrupted."""

import json
import posixpath
from typing import Any

import fsspec


class MetricsLog:
    """Appends to a local file line by line; object stores cannot append, so there it is rewritten at checkpoints.

    Args:
        folder: Path or URI of the stage directory.
        resume_step: Lines of this step and later are dropped: the resumed run writes them again.
    """

    def __init__(self, folder: str, resume_step: int):
        self._fs, root = fsspec.core.url_to_fs(folder)
        self._path = posixpath.join(root, "metrics.jsonl")
        self._appends = "file" in self._fs.protocol
        self._fs.makedirs(root, exist_ok=True)
        self._rows = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        self.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Record one step; on a local disk it is there when this returns."""
        self._rows.append(row)
        if self._appends:
            with self._fs.open(self._path, "a") as stream:
                stream.write(json.dumps(row) + "\n")

    def last(self) -> dict[str, Any]:
        """The newest row; empty before the first."""
        return self._rows[-1] if self._rows else {}

    def flush(self) -> None:
        """Write all rows anew."""
        with self._fs.open(self._path, "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in self._rows)


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl; a last line cut by a crash is left out."""
    fs, root = fsspec.core.url_to_fs(folder)
    path = posixpath.join(root, "metrics.jsonl")
    if not fs.exists(path):
        return []
    with fs.open(path) as stream:
        lines = stream.read().decode().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
