"""Rows from files: JSONL, JSON, CSV and Parquet, single files and folders of them, on any filesystem.

A line that cannot be read becomes a `RawRow` without fields and never ends the reading. The position of a row is its
index in the file (the line number from 0 for JSONL, blank lines counted), and runs on over the files of a folder.
"""

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from itune_ray.data.storage import Folder
from itune_ray.errors import DataError, did_you_mean

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
COMPRESSED = (".gz", ".zst", ".bz2")
"""Endings that text formats may carry besides; decompressed while reading."""
ALLOWED = "a .jsonl, .json, .csv (also .gz) or .parquet file, or a folder of them"
MAX_CSV_FIELD = 2**31 - 1


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file holds it."""

    position: int
    fields: dict[str, Any] | None
    """Columns and values; None for a row that could not be read."""
    reason: str | None = None
    """Why it could not be read, as a short word."""
    raw: str | None = None
    """The unreadable text."""


def read_rows(path: str, limit: int | None = None) -> Iterator[RawRow]:
    """Rows of a file, a folder or a URI, at most `limit` of them.

    Raises:
        DataError: Nothing is there, nothing readable is there, or a file is damaged as a whole.
    """
    return itertools.islice(_numbered(files_of(path)), limit)


def files_of(path: str) -> list[Folder]:
    """The files a path means, in the order of their names; each as a `Folder` whose path is the file's."""
    place = Folder.at(path)
    kind = place.kind()
    if kind == pafs.FileType.File:
        if not _suffix(place.path):
            raise DataError("no reader for this kind of file", got=path, allowed=ALLOWED, knob="path")
        return [place]
    if kind == pafs.FileType.NotFound:
        raise DataError(f"no such file or folder{_near(place)}", got=path, allowed=ALLOWED, knob="path")
    found = [place / name for name in place.names() if _suffix(name) and name != "manifest.json"]
    if place.exists("manifest.json") or not found:
        payloads = ", ".join([n for n in place.names() if "." not in n and not n.startswith("ledger")][:6])
        hint = f" (it holds the folders {payloads})" if payloads else ""
        raise DataError(f"the folder holds no rows{hint}", got=path, allowed=ALLOWED, knob="path")
    return found


def _near(place: Folder) -> str:
    parent = Folder(place.fs, posixpath.dirname(place.path), "")
    return did_you_mean(posixpath.basename(place.path), parent.names() if parent.exists() else [])


def _suffix(name: str) -> str | None:
    """The format's ending, compression aside; None for files that no reader takes."""
    stem, ending = posixpath.splitext(name.lower())
    if ending in COMPRESSED:
        ending = posixpath.splitext(stem)[1]
        return ending if ending in SUFFIXES and ending != ".parquet" else None
    return ending if ending in SUFFIXES else None


def _numbered(files: list[Folder]) -> Iterator[RawRow]:
    first = 0
    for file in files:
        last = -1
        try:
            for row in _read(file):
                last = row.position
                yield replace(row, position=first + row.position) if first else row
        except (OSError, pa.ArrowException) as error:
            what = f"the file is damaged after row {last + 1}: {' '.join(str(error).split())[:200]}"
            raise DataError(what, got=file.uri, knob="path") from None
        first += last + 1


def _read(file: Folder) -> Iterator[RawRow]:
    suffix = _suffix(file.path)
    if suffix == ".parquet":
        return _parquet_rows(file)
    if suffix == ".csv":
        return _csv_rows(file)
    return _json_rows(file) if suffix == ".json" else _json_lines(_text(file))


def _text(file: Folder) -> io.TextIOWrapper:
    """Bytes that are no UTF-8 come through as lone surrogates, so that one bad row does not end the file."""
    stream: Any = file.fs.open_input_stream(file.path, compression="detect")
    return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="\n")


def _json_lines(lines: Iterator[str] | io.TextIOWrapper) -> Iterator[RawRow]:
    for position, line in enumerate(lines):
        if line.strip():
            yield _json_row(position, line)


def _json_row(position: int, line: str) -> RawRow:
    try:
        return _row_of(position, json.loads(line))
    except (ValueError, RecursionError):  # ValueError also covers integers beyond Python's digit limit
        return RawRow(position, None, "broken_json", line.rstrip("\n"))


def _row_of(position: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(position, value)
    return RawRow(position, None, "bad_row", json.dumps(value))


def _json_rows(file: Folder) -> Iterator[RawRow]:
    """A JSON array of objects, `{"data": [...]}`, or JSON lines under a .json name."""
    text = _text(file).read()
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            yield from _json_lines(io.StringIO(text, newline="\n"))  # type: ignore[arg-type]
            return
        raise DataError(f"the file is not valid JSON: {error}", got=file.uri, knob="path") from None
    rows = tree.get("data", [tree]) if isinstance(tree, dict) else tree
    if not isinstance(rows, list):
        raise DataError(
            "the JSON file holds no list of rows",
            got=type(rows).__name__,
            allowed='[{...}, ...] or {"data": [...]}',
            knob="path",
        )
    yield from (_row_of(position, row) for position, row in enumerate(rows))


def _csv_rows(file: Folder) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_CSV_FIELD)
    reader = csv.reader(_text(file), strict=True)
    header = next(reader, None)
    if header is None:
        return
    for position in itertools.count():
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(position, None, "broken_csv", f"line {reader.line_num}: {error}")
            continue
        if len(cells) == len(header):
            yield RawRow(position, dict(zip(header, cells, strict=True)))
        elif cells:
            yield RawRow(position, None, "broken_csv", ",".join(cells))


def _parquet_rows(file: Folder) -> Iterator[RawRow]:
    with file.fs.open_input_file(file.path) as stream:
        rows = (row for batch in pq.ParquetFile(stream).iter_batches(4096) for row in batch.to_pylist())
        yield from (RawRow(position, row) for position, row in enumerate(rows))
