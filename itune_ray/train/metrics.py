"""metrics.jsonl: one line per logged step, each step once however often the run was interrupted."""

import json
from typing import Any

from itune_ray.data.storage import Folder

NAME = "metrics.jsonl"


class MetricsLog:
    """Appends to a local file line by line; object stores cannot append, so there it is written anew at checkpoints.

    Args:
        folder: Path or URI of the stage directory.
        resume_step: Lines of later steps are dropped: the resumed run writes them again.
        name: Of the file.
    """

    def __init__(self, folder: str, resume_step: int, name: str = NAME):
        self._folder, self._name = Folder.at(folder), name
        self._rows = [row for row in read_metrics(folder, name) if row["step"] <= resume_step]
        self.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Record one step; on a local disk it is there when this returns."""
        self._rows.append(row)
        if self._folder.is_local:
            self._folder.append_line(self._name, json.dumps(row))

    def flush(self) -> None:
        """Write all rows anew."""
        self._folder.write_bytes(self._name, "".join(json.dumps(row) + "\n" for row in self._rows).encode())

    def last(self) -> dict[str, Any]:
        """The newest row; empty before the first."""
        return self._rows[-1] if self._rows else {}


def read_metrics(folder: str, name: str = NAME) -> list[dict[str, Any]]:
    """The rows of a stage's metrics.jsonl; a last line cut by a crash is left out."""
    source = Folder.at(folder)
    lines = source.read_bytes(name).decode().split("\n") if source.exists(name) else [""]
    return [json.loads(line) for line in lines[:-1] if line]
