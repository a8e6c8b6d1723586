"""The files of a checkpoint: torch DCP's reader and writer over the project's storage, with a checksum of every file.

Checksums are CRC-32 over what was handed to the storage, summed while it is written, so that a file damaged later, cut
short or lost is told from a whole one before anything is read into a model.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.fs as pafs
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemBase, FileSystemReader, FileSystemWriter

from itune_ray.data.storage import Folder, retried
from itune_ray.errors import StorageError, UnreachableError, first_line

Sums = dict[str, tuple[int, int]]
"""File name -> (bytes, CRC-32)."""
CHUNK_BYTES = 16 * 2**20


def is_whole(folder: Folder, name: str, expected: tuple[int, int]) -> bool:
    """Whether a file is there with the size and checksum it was written with.

    Raises:
        StorageError: It cannot be read, which says nothing of what it holds.
    """
    try:
        return retried(lambda: _sum_of(folder, name)) == tuple(expected)
    except FileNotFoundError:
        return False
    except OSError as error:
        what = f"a file of a checkpoint cannot be read: {first_line(error)}"
        kind = StorageError if isinstance(error, PermissionError) else UnreachableError
        raise kind(what, got=f"{folder.uri}/{name}", knob="run.output") from error


def _sum_of(folder: Folder, name: str) -> tuple[int, int]:
    size, crc = 0, 0
    with folder.fs.open_input_stream((folder / name).path, compression=None) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


class Writer(FileSystemWriter):
    """DCP's writer; `sums` are those of the files that this rank wrote."""

    def __init__(self, folder: Folder):
        super().__init__(folder.path, sync_files=folder.is_local)
        inner = FileSystem() if folder.is_local else ArrowFileSystem(folder.fs)
        self._summing = _Summing(inner)
        self.fs = self._summing
        if not folder.is_local:
            self.path = folder.path

    @property
    def sums(self) -> Sums:
        """Of everything written so far."""
        return {name: (stream.size, stream.crc) for name, stream in self._summing.written.items()}


class Reader(FileSystemReader):
    """DCP's reader."""

    def __init__(self, folder: Folder):
        super().__init__(folder.path)
        if not folder.is_local:
            self.fs, self.path = ArrowFileSystem(folder.fs), folder.path


class _SummedStream:
    """A stream that sums what is written to it."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.size, self.crc = 0, 0

    def write(self, data: Any) -> int:
        self.size, self.crc = self.size + memoryview(data).nbytes, zlib.crc32(data, self.crc)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Summing(FileSystemBase):
    """A filesystem that remembers the sums of what it wrote, under the names it was given in the end."""

    def __init__(self, inner: FileSystemBase):
        self._inner = inner
        self.written: dict[str, _SummedStream] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with self._inner.create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            summed = self.written[_name(path)] = _SummedStream(stream)
            yield summed

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._inner.rename(path, new_path)
        self.written[_name(new_path)] = self.written.pop(_name(path))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str | os.PathLike[str]:
        return self._inner.concat_path(path, suffix)

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return self._inner.init_path(path)

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._inner.mkdir(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._inner.exists(path)

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._inner.rm_file(path)


def _name(path: str | os.PathLike[str]) -> str:
    return os.path.basename(os.fspath(path))


def merged(parts: Sequence[Sums]) -> Sums:
    """The sums of all ranks, by name."""
    return {name: sums for part in parts for name, sums in sorted(part.items())}


class ArrowFileSystem(FileSystemBase):
    """What DCP asks of a filesystem, answered by pyarrow (s3://, gs://)."""

    def __init__(self, fs: pafs.FileSystem):
        self._fs = fs

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        opened = self._fs.open_input_file(str(path)) if "r" in mode else self._fs.open_output_stream(str(path))
        with opened as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._fs.move(str(path), str(new_path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._fs.create_dir(str(path), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._fs.get_file_info(str(path)).type != pafs.FileType.NotFound

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._fs.delete_file(str(path))
