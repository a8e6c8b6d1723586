"""The file of an offline W&B run. `Run.finish` tells the service to close it and does not wait until it has."""

import struct
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7
"""Bytes of a block, and of the file's header as of that of each piece in a block: checksum, length, kind."""
WHOLE, LAST = 1, 4
"""Kinds of pieces that end a record; 2 and 3 are its first and those between."""
POLL_S = 0.05


def wait_for_end(file: Path, timeout_s: float) -> None:
    """Return once the run's end is in the file.

    Raises:
        TimeoutError: It does not come; what is there may be less than the run.
    """
    until = time.monotonic() + timeout_s
    while not (file.is_file() and has_end(file.read_bytes())):
        if time.monotonic() > until:
            raise TimeoutError(f"W&B has not written the end of the run to {file} in {timeout_s:.0f} s")
        time.sleep(POLL_S)


def has_end(data: bytes) -> bool:
    """Whether the record of the run's end is in the file, whole."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    return any(Record.FromString(record).WhichOneof("record_type") == "exit" for record in records(data))


def records(data: bytes) -> Iterator[bytes]:
    """The complete records of a LevelDB log behind the file's header; a last one that is not whole yet is left out."""
    at, parts = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        piece = data[at + HEADER : at + HEADER + length]
        if len(piece) < length:
            return
        parts += piece
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
