"""The run lock: a living driver keeps it, a dead one does not."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from itune_ray.data.lock import NAME, RunLock
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError

HOLD = "import sys, time; from itune_ray.data.lock import RunLock; from itune_ray.data.storage import Folder\n"
HOLD += "with RunLock(Folder.at(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_driver_is_refused_and_told_who_holds_it(tmp_path, holder):
    with pytest.raises(StorageError, match=f"pid {holder.pid}"), RunLock(Folder.at(tmp_path)):
        pass


def test_a_killed_drivers_lock_is_taken_over_at_once(tmp_path, holder):
    holder.kill()
    holder.wait()
    started = time.monotonic()
    with RunLock(Folder.at(tmp_path)):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < 5
    assert not (tmp_path / NAME).exists()


def foreign(tmp_path, renewed):
    owner = {"host": "elsewhere", "pid": 1, "born": 0.0, "renewed": renewed}
    (tmp_path / NAME).write_text(json.dumps(owner))


def test_a_foreign_lock_that_is_not_renewed_is_waited_for_then_taken(tmp_path):
    foreign(tmp_path, time.time())
    said = []
    with RunLock(Folder.at(tmp_path), ttl_s=1.0, say=said.append):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert "elsewhere" in said[0]


def test_a_foreign_lock_that_is_renewed_is_refused(tmp_path):
    foreign(tmp_path, time.time())
    said = []

    def renew(line):
        said.append(line)
        foreign(tmp_path, time.time())

    with pytest.raises(StorageError, match="elsewhere"), RunLock(Folder.at(tmp_path), ttl_s=2.0, say=renew):
        pass


def test_a_pid_that_was_given_to_another_process_does_not_hold_the_lock(tmp_path):
    me = psutil.Process()
    import socket

    owner = {"host": socket.gethostname(), "pid": me.pid, "born": me.create_time() - 1000, "renewed": time.time()}
    (tmp_path / NAME).write_text(json.dumps(owner))
    with RunLock(Folder.at(tmp_path)):
        pass
