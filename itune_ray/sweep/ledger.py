"""The ledger of a sweep: every score in the order in which it was decided on, and how each trial ended.

Successive halving compares a trial with those that arrived before it, so this order is the state of a sweep: a driver
that is started again judges the same scores in the same order and stands where the first one stood.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from itune_ray.data.storage import Folder

NAME = "ledger.jsonl"
Ended = Literal["completed", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One trial at one rung."""

    trial: str
    """Key of the trial."""
    steps: int
    """Optimizer steps it has been trained for."""
    score: float | None
    """None where training failed for a reason that no retry mends."""
    ended: Ended | None = None
    """completed: it had its whole budget; stopped: successive halving took it out; None: it goes on."""
    cause: str | None = None
    """Why it failed."""


class SweepLedger:
    """Append-only: one line per entry, written before anything is done about it."""

    def __init__(self, folder: Folder):
        self._folder = folder
        self.entries = _read(folder)
        if folder.exists(NAME):  # a line that a crash cut off must not run into the next one
            folder.write_bytes(NAME, "".join(_line(entry) + "\n" for entry in self.entries).encode())

    def add(self, entry: Entry) -> None:
        """Record one entry."""
        self._folder.append_line(NAME, _line(entry))
        self.entries.append(entry)

    def at(self, trial: str, steps: int) -> Entry | None:
        """What was decided about a trial at a rung, or None."""
        return next((e for e in self.entries if (e.trial, e.steps) == (trial, steps)), None)

    def of(self, trial: str) -> list[Entry]:
        """A trial's entries in order."""
        return [entry for entry in self.entries if entry.trial == trial]

    def ends(self) -> dict[str, Entry]:
        """The last entry of every trial that has ended."""
        return {entry.trial: entry for entry in self.entries if entry.ended is not None}


def _line(entry: Entry) -> str:
    return json.dumps(asdict(entry))


def _read(folder: Folder) -> list[Entry]:
    if not folder.exists(NAME):
        return []
    whole = folder.read_bytes(NAME).decode().split("\n")[:-1]
    return [Entry(**json.loads(line)) for line in whole if line]
