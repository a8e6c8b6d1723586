"""What curation takes at scale: Alpaca through one job, near deduplication against other libraries, a million rows.

`python jobs/bench/alpaca.py [--parts curate,near,dedup,scale] [--rows 1000000]` finds the data sets below
$ITUNE_TEST_DATA (default ../shared) and prints JSON lines, each with the load of the machine when it began:

- curate: 52,002 rows through `itune curate`: exact and near duplicates, leaks of five benchmarks, language tags.
- near: near deduplication of the same rows at 0.7 with 128 permutations and the same shingles, one library after the
  other, ours with its own bands (32 of 4 rows), the others with those that datasketch takes by itself (14 of 9 rows)
  and then with ours. Alpaca has few near duplicates, so recall is measured on a sample of its rows and an edited copy
  of each: the share that is found of the pairs that brute force finds among them. datasketch is a development
  dependency; rensa (`pip install --target FOLDER rensa`, FOLDER on PYTHONPATH) is left out where it is missing.
  Neither checks its candidates as this project does; `false` are the candidates of the sample that are no such pairs.
- scale: a tenth of the rows, then all: Alpaca repeated with word edits through exact and near deduplication and
  language tags.
- dedup: near and exact deduplication alone of all those rows, in one process; not run unless asked for.

Rows per second are those of the whole command, the start of Python and Ray included; memory is the largest sum over
the command and its children of what each holds, shared pages divided among them (PSS).
"""

import argparse
import gzip
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pyarrow as pa

from itune_ray.data.dedup import TEXT_SCHEMA, NearSettings, exact_duplicates, near_duplicates
from itune_ray.data.minhash import (
    band_hashes,
    candidate_pairs,
    distinct_pairs,
    optimal_bands,
    signatures,
    similarities,
)
from itune_ray.data.shingles import SHORT_TEXT_TOKENS, shingle_sets

BENCHMARKS = {
    "mmlu": "mmlu/test.jsonl.gz",
    "gsm8k": "gsm8k/test.jsonl.gz",
    "hellaswag": "hellaswag_val/hellaswag_val.jsonl.gz",
    "truthfulqa": "truthfulqa/truthfulqa.jsonl.gz",
    "ifeval": "ifeval/ifeval_input_data.jsonl.gz",
}
NEAR = NearSettings()
Pair = tuple[int, int]
T = TypeVar("T")


def shared(name: str) -> Path:
    """A file of the test data."""
    return Path(os.environ.get("ITUNE_TEST_DATA", "../shared")) / "data" / name


def say(part: str, **figures: Any) -> None:
    """One JSON line."""
    told = {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps({"part": part, **told}), flush=True)


def _load() -> float:
    return round(os.getloadavg()[0], 1)


# --- a curate job and what it takes --------------------------------------------------------------------------------


class PeakMemory:
    """The most that a process and its descendants held together, sampled twice a second, and their CPU seconds."""

    def __init__(self, pid: int):
        self.peak: dict[str, int] = {}
        """By role, when all together were the most."""
        self._spent: dict[psutil.Process, float] = {}
        self._process = psutil.Process(pid)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            held: Counter[str] = Counter()
            for process in tree:
                held[self._role(process)] += _held(process)
            if held.total() > sum(self.peak.values()):
                self.peak = dict(held)
            for process in tree:
                self._spent[process] = max(self._spent.get(process, 0.0), _cpu(process))

    def _role(self, process: psutil.Process) -> str:
        """The command itself, Ray's workers, or Ray's own processes (the object store is one of them)."""
        if process == self._process:
            return "driver"
        try:
            return "workers" if process.name().startswith("ray::") else "ray"
        except psutil.Error:
            return "ray"

    @property
    def cpu_seconds(self) -> float:
        """Of all processes, as last seen."""
        return sum(self._spent.values())


def _held(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _cpu(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def curate(name: str, inputs: Path, filters: Sequence[dict[str, Any]], root: Path) -> dict[str, Any]:
    """Run `itune curate`: seconds, rows/s, peak memory, and rows that each filter ended."""
    job = {
        "name": name,
        "output": str(root),
        "inputs": [{"source": {"type": "file", "path": str(inputs), "name": "rows"}}],
        "filters": list(filters),
        "run": {"ray": {"num_cpus": 2, "dashboard": False}},
    }
    file = root / f"{name}.yaml"
    file.write_text(json.dumps(job))
    began, load = time.perf_counter(), _load()
    command = [sys.executable, "-m", "itune_ray", "curate", str(file)]
    with (
        (root / f"{name}.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
        PeakMemory(process.pid) as memory,
    ):
        process.wait()
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit((root / f"{name}.log").read_text()[-4000:])
    (path,) = (root / name).rglob("manifest.json")
    manifest = json.loads(path.read_text())
    funnel = manifest["funnel"]
    return {
        "rows": funnel["in"],
        "seconds": seconds,
        "rows_per_s": funnel["in"] / seconds,
        "cpu_seconds": memory.cpu_seconds,
        "load": load,
        "peak_gb": sum(memory.peak.values()) / 1e9,
        **{f"{role}_gb": held / 1e9 for role, held in memory.peak.items()},
        "kept": funnel["accepted"],
        "ended": funnel["rejected"],
    }


def curate_part(root: Path) -> None:
    """Every check a chat set wants, in one job."""
    against = [
        {"type": "file", "path": str(shared(file)), "format": "fields", "name": name}
        for name, file in BENCHMARKS.items()
    ]
    filters = [
        {"type": "exact_dedup"},
        {"type": "minhash_dedup", "threshold": NEAR.threshold},
        {"type": "decontaminate", "against": against},
        {"type": "language"},
    ]
    took = curate("alpaca", shared("alpaca_52k/alpaca_data.jsonl.gz"), filters, root)
    ended = took.pop("ended")
    leaks = ended.get("contaminated", 0)
    duplicates = {name: ended.get(name, 0) for name in ("duplicate", "near_duplicate")}
    say("curate", **took, **duplicates, leaks=leaks)


# --- near deduplication --------------------------------------------------------------------------------------------


def alpaca_rows() -> list[dict[str, str]]:
    """The rows as published."""
    with gzip.open(shared("alpaca_52k/alpaca_data.jsonl.gz"), "rt") as lines:
        return [json.loads(line) for line in lines]


def full_text(row: dict[str, str]) -> str:
    """What is compared."""
    return "\n".join(filter(None, (row["instruction"], row["input"], row["output"])))


def grams(text: str) -> set[str]:
    """The shingles that this project hashes, as the other libraries take them."""
    words = re.findall(r"\w+", text.lower())
    if len(words) < NEAR.min_tokens:
        return set()
    n = min(NEAR.ngram, 2) if len(words) < SHORT_TEXT_TOKENS else NEAR.ngram
    return {" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def ours(texts: Sequence[str]) -> int:
    """Texts that make way."""
    table = pa.table({"id": range(len(texts)), "text": list(texts)}, schema=TEXT_SCHEMA)
    return len(near_duplicates(table, NEAR))


def our_pairs(texts: Sequence[str]) -> set[Pair]:
    """Pairs that are candidates and pass the check."""
    sets = shingle_sets(texts)
    keys_BN = np.ascontiguousarray(band_hashes(signatures(sets, NEAR.num_perm), NEAR.bands, NEAR.rows).T)
    found = distinct_pairs(np.concatenate([candidate_pairs(keys_N, np.arange(len(sets))) for keys_N in keys_BN]))
    return {(i, j) for i, j in found[similarities(found, sets) >= NEAR.threshold].tolist()}


Found = tuple[int, Callable[[], set[Pair]]]
"""Texts that share a bucket with one before them, and all pairs that share one."""


def of_datasketch(texts: Sequence[str], bands: int, rows: int) -> Found:
    """datasketch as its documentation has it."""
    import datasketch

    index = datasketch.MinHashLSH(num_perm=NEAR.num_perm, params=(bands, rows))
    sketches: list[Any] = []
    losers = 0
    for number, text in enumerate(texts):
        sketch = datasketch.MinHash(num_perm=NEAR.num_perm)
        sketch.update_batch([gram.encode() for gram in grams(text)])
        losers += bool(index.query(sketch))
        index.insert(number, sketch)
        sketches.append(sketch)

    def pairs() -> set[Pair]:
        found: list[list[Any]] = [index.query(sketch) for sketch in sketches]
        return {(i, j) for j, others in enumerate(found) for i in others if i < j}

    return losers, pairs


def of_rensa(texts: Sequence[str], bands: int, rows: int) -> Found:
    """rensa by its batch calls; its permutations must be a multiple of its bands: 126 of the 128 for 14 bands."""
    rensa: Any = importlib.import_module("rensa")
    num_perm = bands * rows
    sketches = rensa.RMinHash.from_token_sets([list(grams(text)) for text in texts], num_perm, 1)
    index = rensa.RMinHashLSH(NEAR.threshold, num_perm, bands)
    index.insert_many(sketches)
    found = index.query_all(sketches)
    losers = sum(min(others) < number for number, others in enumerate(found))
    return losers, lambda: {(i, j) for j, others in enumerate(found) for i in others if i < j}


def brute_force(texts: Sequence[str]) -> list[Pair]:
    """All pairs of Jaccard similarity at the threshold or above, each text compared with every text."""
    sets = shingle_sets(texts)
    sizes = np.diff(sets.offsets)
    order = np.argsort(sets.values, kind="stable")
    values, owners = sets.values[order], np.repeat(np.arange(len(sets)), sizes)[order]
    found: list[Pair] = []
    for row in range(len(sets)):
        starts, ends = (np.searchsorted(values, sets[row], side) for side in ("left", "right"))
        holders = np.concatenate([owners[start:end] for start, end in zip(starts, ends, strict=True)])
        common = np.bincount(holders, minlength=len(sets))
        similar = np.flatnonzero(common >= NEAR.threshold * (sizes + sizes[row] - common))
        found += [(row, int(other)) for other in similar if other > row]
    return found


def doubled(rows: Sequence[dict[str, str]], sample: int) -> list[str]:
    """Texts of a sample of rows, and of a copy of each with up to a tenth of its words changed."""
    rng = random.Random(0)
    words = vocabulary(rows)
    chosen = rng.sample(rows, sample)
    copies = [{name: _edit(value, rng.random() / 10, words, rng) for name, value in row.items()} for row in chosen]
    return [text for text in map(full_text, [*chosen, *copies]) if grams(text)]


def near_part(sample: int) -> None:
    """Seconds and recall of each library."""
    texts = [text for text in map(full_text, alpaca_rows()) if grams(text)]
    known = doubled(alpaca_rows(), sample)
    true = set(brute_force(known))
    ours(texts[:100])
    dropped, base = timed(lambda: ours(texts))
    say(
        "near",
        library="itune_ray",
        bands=NEAR.bands,
        rows=len(texts),
        **base,
        dropped=dropped,
        **_of(true, our_pairs(known)),
    )
    for name, run in {"datasketch": of_datasketch, "rensa": of_rensa}.items():
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: left out", file=sys.stderr)
            continue
        for bands, rows in (optimal_bands(NEAR.threshold, NEAR.num_perm), (NEAR.bands, NEAR.rows)):
            (flagged, _), took = timed(partial(run, texts, bands, rows))
            _, candidates = run(known, bands, rows)
            ratios = {f"{unit}_ratio": took[unit] / base[unit] for unit in ("seconds", "cpu_seconds")}
            say("near", library=name, bands=bands, **took, **ratios, flagged=flagged, **_of(true, candidates()))


def timed(work: Callable[[], T]) -> tuple[T, dict[str, Any]]:
    """What it returns, its seconds, those of all its threads on a CPU, and the load as it began."""
    load = _load()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "load": load,
    }


def _of(true: set[Pair], found: set[Pair]) -> dict[str, Any]:
    return {"true_pairs": len(true), "recall": len(true & found) / max(1, len(true)), "false": len(found - true)}


# --- a million rows ------------------------------------------------------------------------------------------------


def edited(rows: Sequence[dict[str, str]], count: int) -> Iterator[dict[str, str]]:
    """Alpaca over and over. Of the repeats a twentieth are copies and a tenth change one word in 20; the others change
    one in 3, which leaves them unlike. A row is a function of its number."""
    words = vocabulary(rows)
    for number in range(count):
        row = rows[number % len(rows)]
        rng = random.Random(hashlib.sha256(str(number).encode()).digest())
        kind = rng.random()
        share = 0.0 if number < len(rows) or kind < 0.05 else 0.05 if kind < 0.15 else 1 / 3
        yield {name: _edit(value, share, words, rng) for name, value in row.items()}


def vocabulary(rows: Sequence[dict[str, str]]) -> list[str]:
    """All words of the answers."""
    return sorted({word for row in rows for word in row["output"].split()})


def _edit(text: str, share: float, words: Sequence[str], rng: random.Random) -> str:
    if not share or not text:
        return text
    parts = re.split(r"(\s+)", text)
    for place in range(0, len(parts), 2):
        if rng.random() < share:
            parts[place] = words[int(rng.random() * len(words))]
    return "".join(parts)


def scale_part(root: Path, most: int) -> None:
    """A tenth, then all."""
    rows = alpaca_rows()
    filters = [{"type": "exact_dedup"}, {"type": "minhash_dedup", "threshold": NEAR.threshold}, {"type": "language"}]
    first: float | None = None
    for count in (most // 10, most):
        file = root / f"rows-{count}.jsonl"
        with file.open("w") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in edited(rows, count))
        took = curate(f"rows-{count}", file, filters, root)
        first = first or took["rows_per_s"]
        say("scale", **took, of_first=took["rows_per_s"] / first)


def dedup_part(most: int) -> None:
    """CPU seconds and peak memory (resident set) of the two, the texts as a table included."""
    parts: list[pa.Table] = []
    texts = map(full_text, edited(alpaca_rows(), most))
    while part := list(itertools.islice(texts, 4096)):
        first = sum(map(len, parts))
        parts.append(pa.table({"id": range(first, first + len(part)), "text": part}, schema=TEXT_SCHEMA))
    table = pa.concat_tables(parts)
    before = _resident()
    near, took = timed(lambda: near_duplicates(table, NEAR))
    say("dedup", kind="near", rows=most, **took, dropped=len(near), before_gb=before, peak_gb=_resident())
    exact, took = timed(lambda: exact_duplicates(table, 1))
    say("dedup", kind="exact", rows=most, **took, dropped=len(exact), peak_gb=_resident())


def _resident() -> float:
    """The most that this process ever held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """The parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="curate,near,scale")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the scale part")
    parser.add_argument("--sample", type=int, default=2_000, help="rows of which the near part edits copies")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        if "curate" in parts:
            curate_part(root)
        if "near" in parts:
            near_part(arguments.sample)
        if "scale" in parts:
            scale_part(root, arguments.rows)
        if "dedup" in parts:
            dedup_part(arguments.rows)


if __name__ == "__main__":
    main()
