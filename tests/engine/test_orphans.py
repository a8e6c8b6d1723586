"""A child of a process that is killed does not survive it."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

PARENT = """
import subprocess, sys, time
from itune_ray.engine.orphans import kill_children_when_i_die
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
if sys.argv[1] == "watch":
    kill_children_when_i_die()
print(child.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.real
@pytest.mark.parametrize("mode", ["watch", "do not watch"])
def test_a_killed_parent_takes_its_children_along(mode):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, mode], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    try:
        child.wait(timeout=20 if mode == "watch" else 1)
        died = True
    except psutil.TimeoutExpired:
        died = False
        child.kill()
    assert died == (mode == "watch"), "without the watcher the child lives on, or this test would show nothing"
