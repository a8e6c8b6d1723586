"""Folders on any filesystem: a local path, s3://, gs:// — one small surface over pyarrow.fs.

Writes are atomic: a local file is written beside its place and renamed; an object store makes a PUT visible whole.
What may mend by itself (a full disk, a store that is busy or away) is tried again for some seconds before it is told.
"""

import contextlib
import errno
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from itune_ray.errors import StorageError, UnreachableError

log = logging.getLogger(__name__)
T = TypeVar("T")
PAUSES_S = (0.2, 0.8, 3.0)
"""Between attempts, the storage client's own ones not counted."""
_PASSING = {"ENOSPC", "EDQUOT", "EIO", "ESTALE", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "ECONNRESET", "EREMOTEIO"}
"""Names of errors of filesystems that another attempt may mend."""
_BUSY = re.compile(
    r"network|timed? ?out|timeout|slow_?down|throttl|unavailable|internal_failure|connection|curl|http status 5\d\d",
    re.IGNORECASE,
)
"""The same in the words of object stores, which give no number."""


def retried(operation: Callable[[], T]) -> T:
    """Do it, again after each of `PAUSES_S` while it fails in a way that may mend; the last `OSError` is raised."""
    for pause in PAUSES_S:
        try:
            return operation()
        except OSError as error:
            named = errno.errorcode.get(error.errno or 0)
            if not (named in _PASSING or (named is None and _BUSY.search(str(error)))):
                raise
            log.warning("storage: %s; trying again in %g s", " ".join(str(error).split())[:200], pause)
            time.sleep(pause)
    return operation()


@dataclass(frozen=True)
class Folder:
    """A folder by its filesystem and its path there."""

    fs: pafs.FileSystem
    path: str
    uri: str
    """What a person would write: an absolute path or a URI."""

    @classmethod
    def at(cls, uri: str | Path) -> Self:
        """The folder of an absolute or relative path, or of a URI."""
        text = str(uri)
        if "://" not in text:
            absolute = os.path.abspath(os.path.expanduser(text))
            return cls(pafs.LocalFileSystem(), absolute, absolute)
        if "@" in text.split("://", 1)[1].split("/", 1)[0]:
            raise StorageError(
                "the URI carries credentials, which would end up in logs and manifests",
                got=f"{text.split('://', 1)[0]}://...@{text.rsplit('@', 1)[1]}",
                allowed="credentials in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, ...)",
            )
        try:
            fs, path = pafs.FileSystem.from_uri(text)
        except (pa.ArrowInvalid, OSError) as error:
            raise StorageError(
                f"cannot open the storage: {error}", got=text, allowed="an absolute path, file://, s3:// or gs://"
            ) from None
        return cls(fs, path, text.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the files are on this machine's own filesystem."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def __truediv__(self, name: str) -> "Folder":
        return type(self)(self.fs, f"{self.path}/{name}", f"{self.uri}/{name}")

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        return self.kind(name) != pafs.FileType.NotFound

    def kind(self, name: str = "") -> pafs.FileType:
        """File, directory or nothing; a storage that cannot be asked is a `StorageError`."""
        try:
            return retried(lambda: self.fs.get_file_info(self._at(name))).type
        except OSError as error:
            raise self._unreachable(name, error) from None

    def names(self) -> list[str]:
        """Sorted names of the files and folders in it; empty when it does not exist."""
        try:
            infos = retried(lambda: self.fs.get_file_info(pafs.FileSelector(self.path, allow_not_found=True)))
        except OSError as error:
            raise self._unreachable("", error) from None
        return sorted(info.base_name for info in infos if not _is_partial(info.base_name))

    def read_bytes(self, name: str) -> bytes:
        """The whole file."""

        def read() -> bytes:
            with self.fs.open_input_stream(self._at(name), compression=None) as stream:
                return stream.read()

        try:
            return retried(read)
        except FileNotFoundError:
            raise StorageError("no such file", got=f"{self.uri}/{name}") from None
        except OSError as error:
            kind = StorageError if isinstance(error, PermissionError) else UnreachableError
            raise kind(f"cannot read the file: {error.strerror or error}", got=f"{self.uri}/{name}") from None

    def write_bytes(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write the file whole or not at all."""

        def write() -> None:
            with self._published(name) as sink, self.fs.open_output_stream(sink, compression=None) as stream:
                stream.write(data)

        try:
            retried(write)
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"cannot write {self.uri}/{name}: {reason}", knob="run.output") from error

    def read_json(self, name: str) -> Any:
        """A JSON file's value."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(f"the file is not valid JSON: {error}", got=f"{self.uri}/{name}") from None

    def write_json(self, name: str, value: Any) -> None:
        """A value as indented JSON."""
        self.write_bytes(name, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode() + b"\n")

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file, or every Parquet file of a folder in the order of their names."""
        if self.kind(name) == pafs.FileType.Directory:
            inside = self / name
            parts = [inside.read_table(part, columns) for part in inside.names() if part.endswith(".parquet")]
            if not parts:
                raise StorageError("the folder holds no Parquet file", got=inside.uri)
            return pa.concat_tables(parts, promote_options="default")
        try:
            return retried(lambda: pq.read_table(self._at(name), columns=columns, filesystem=self.fs))
        except FileNotFoundError:
            raise StorageError("no such file", got=f"{self.uri}/{name}") from None
        except (pa.ArrowInvalid, OSError) as error:
            what = f"cannot read the table: {' '.join(str(error).split())[:200]}"
            raise StorageError(what, got=f"{self.uri}/{name}") from None

    def write_table(self, name: str, table: pa.Table) -> None:
        """A Parquet file, whole or not at all; encoded in memory, since a store publishes even a stream that broke."""
        file = TableFile()
        file.add(table)
        self.write_bytes(name, file.finished())

    def append_line(self, name: str, line: str) -> None:
        """Add a line to a small log; on an object store, which cannot append, the file is written anew."""
        if self.is_local:
            Path(self.path).mkdir(parents=True, exist_ok=True)
            with open(self._at(name), "a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        before = self.read_bytes(name) if self.exists(name) else b""
        self.write_bytes(name, before + line.encode() + b"\n")

    def delete(self, name: str = "") -> None:
        """Remove a file or a folder with all in it; nothing happens when it is not there."""
        kind = self.kind(name)
        try:
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(self._at(name))
            elif kind == pafs.FileType.File:
                self.fs.delete_file(self._at(name))
        except FileNotFoundError:  # somebody else was faster
            return
        except OSError as error:
            raise self._unreachable(name, error) from None

    def _unreachable(self, name: str, error: OSError) -> StorageError:
        reason = " ".join(str(error).split())[:200]
        got = f"{self.uri}/{name}".rstrip("/")
        kind = StorageError if isinstance(error, PermissionError) else UnreachableError
        return kind(f"cannot reach the storage: {reason}", got=got, knob="run.output")

    def _at(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path

    @contextlib.contextmanager
    def _published(self, name: str) -> Iterator[str]:
        """The path to write to; what was written there becomes visible under `name` when the block ends well."""
        target = self._at(name)
        self.fs.create_dir(os.path.dirname(target), recursive=True)
        if not self.is_local:
            yield target
            return
        partial = f"{os.path.dirname(target)}/.{os.path.basename(target)}.{uuid.uuid4().hex[:8]}.partial"
        try:
            yield partial
            os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)


class TableFile:
    """A Parquet file in memory, made of one or more tables of one schema; each is a row group or several."""

    def __init__(self) -> None:
        self._sink = pa.BufferOutputStream()
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Encode a table."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, table.schema, compression="zstd")
        if table.num_rows:
            self._writer.write_table(table)

    def finished(self) -> pa.Buffer:
        """The file, after at least one table."""
        assert self._writer is not None
        self._writer.close()
        return self._sink.getvalue()


def _is_partial(name: str) -> bool:
    return name.startswith(".") and name.endswith(".partial")
