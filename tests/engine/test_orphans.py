"""A child of a process that is killed does not survive it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from itune_ray.engine.orphans import children_die_with_me
sleeper = [sys.executable, "-c", "import time; time.sleep(300)"]
before = subprocess.Popen(sleeper)
with children_die_with_me():
    inside = subprocess.Popen(sleeper)
print(before.pid, inside.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.real
def test_a_killed_parent_takes_the_engines_processes_along():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    before, inside = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        inside.wait(timeout=20)
        assert before.is_running(), "a process that is not the engine's is none of the watcher's business"
    finally:
        for process in (before, inside):
            if process.is_running():
                process.kill()
