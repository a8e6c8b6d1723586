"""No engine outlives its actor: a watcher kills the engine's own processes when the actor ends, even by SIGKILL.

vLLM's engine core is a process of its own on accelerators, and waits for ever, holding the device, when its parent is
killed without a chance to clean up.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_WATCH = """
import os, sys
def started(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[19]
    except OSError:
        return None
children = {pid: started(pid) for pid in sys.argv[2:]}
os.read(int(sys.argv[1]), 1)
for pid, start in children.items():
    if start is not None and started(pid) == start:
        os.kill(int(pid), 9)
"""
"""Blocks until the pipe closes, that is until its only writer is gone; a reused pid has another start time."""


@contextmanager
def children_die_with_me() -> Iterator[None]:
    """Processes that start below this one inside the context end when this one does."""
    before = set(_children())
    yield
    children = [str(pid) for pid in _children() if pid not in before]
    if children:
        _watch(children)


def _children() -> list[int]:
    return [child.pid for child in psutil.Process().children(recursive=True)]


def _watch(children: list[str]) -> None:
    reader, _writer = os.pipe()  # the writer stays open as long as this process lives, and is not inherited
    subprocess.Popen(
        [sys.executable, "-S", "-c", _WATCH, str(reader), *children],
        pass_fds=(reader,),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(reader)
