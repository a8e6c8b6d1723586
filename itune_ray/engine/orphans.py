"""No engine outlives its actor: a watcher kills this process's children when it ends, even by SIGKILL.

vLLM's engine core is a process of its own on accelerators, and waits for ever, holding the device, when its parent is
killed without a chance to clean up.
"""

import os
import subprocess
import sys

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


def kill_children_when_i_die() -> None:
    """Watch the processes that are below this one now."""
    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    if not children:
        return
    reader, _writer = os.pipe()  # the writer stays open as long as this process lives, and is not inherited
    subprocess.Popen(
        [sys.executable, "-S", "-c", _WATCH, str(reader), *children], pass_fds=(reader,), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    os.close(reader)
