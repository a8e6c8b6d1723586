"""How long a resume looks at a ledger before it knows what is left: the anti-join over many committed rows.

`python jobs/bench/ledger.py [--rows 1000000] [--commit 256]` writes a ledger as a stage would, opens it again, and
prints seconds and the memory that the answer takes.
"""

import argparse
import tempfile
import time

import psutil
import pyarrow as pa

from itune_ray.config.generate import CommitConfig
from itune_ray.data.ledger import LEDGER_SCHEMA, Ledger, Outcome
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder

TEXT = "an answer of a dozen words or so, as a distilled row of a chat has them " * 4


def outcome(position: int) -> Outcome:
    """One row in twenty failed once, one in fifty was rejected."""
    messages = ({"role": "user", "content": f"question {position}"}, {"role": "assistant", "content": TEXT})
    record = Record(source="prompts", position=position, messages=messages)
    status = "failed" if position % 20 == 0 else "rejected" if position % 50 == 1 else "accepted"
    return Outcome(record=record, input_key=f"prompts:{position}:0", status=status)


def write(folder: Folder, rows: int, commit: int) -> None:
    """The commits of a stage, the rows of each a slice of one template table, so that writing is quick."""
    template = pa.Table.from_pylist([outcome(i).to_row() for i in range(commit)], schema=LEDGER_SCHEMA)
    place = LEDGER_SCHEMA.names.index("input_key")
    ledger = Ledger(folder)
    for start in range(0, rows, commit):
        keys = pa.array([f"prompts:{i}:0" for i in range(start, min(start + commit, rows))])
        part = template.slice(0, len(keys)).set_column(place, LEDGER_SCHEMA.field(place), keys)
        ledger.append(part)


def main() -> None:
    """Write, then look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--commit", type=int, default=CommitConfig().rows)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Folder.at(place)
        began = time.perf_counter()
        write(folder, arguments.rows, arguments.commit)
        written = time.perf_counter() - began
        process = psutil.Process()
        before = process.memory_info().rss
        began = time.perf_counter()
        ledger = Ledger(folder)
        settled, attempts = ledger.settled(3), ledger.attempts()
        left = [i for i in range(arguments.rows) if f"prompts:{i}:0" not in settled]
        seconds = time.perf_counter() - began
        grown = (process.memory_info().rss - before) / 2**20
        print(f"{arguments.rows:,} rows in {len(folder.names())} files, written in {written:.1f} s")
        print(f"anti-join: {seconds:.2f} s, {grown:.0f} MiB; {len(left):,} inputs left, {len(attempts):,} tried before")


if __name__ == "__main__":
    main()
