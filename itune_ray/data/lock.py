"""One driver per run: a lock file that its owner renews, and that nobody else may take while it lives."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import psutil

from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError

NAME = "driver.lock"
SETTLE_S = 1.0
"""Longer than a write to an object store takes to be seen by all."""


class RunLock:
    """Held by a run's driver from start to end.

    A lock whose owner died is taken over: at once where this machine can see that the process is gone, else when it
    was not renewed for `ttl_s` seconds. On a local filesystem two drivers can never both have it. Object stores are
    written to without a condition: there the last to write has it, each looks again after `SETTLE_S`, and a driver
    that finds another's name while it renews is interrupted.
    """

    def __init__(self, folder: Folder, ttl_s: float = 60.0, say: Callable[[str], None] = lambda line: None):
        self._folder, self._ttl_s, self._say = folder, ttl_s, say
        self._stop = threading.Event()
        self._renewer = threading.Thread(target=self._renew, daemon=True, name="run-lock")
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "born": psutil.Process().create_time()}

    def __enter__(self) -> Self:
        self._wait_for_the_dead()
        self._write()
        if not self._folder.is_local:
            time.sleep(SETTLE_S)
            if (other := self._other()) is not None:
                raise _taken(other)
        self._renewer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewer.join()
        owner = self._owner()
        if owner is not None and _same(owner, self._me):
            self._folder.delete(NAME)

    def _wait_for_the_dead(self) -> None:
        """Return when the lock is free; raise when its owner lives."""
        owner = first = self._claim()
        deadline = time.monotonic() + self._ttl_s
        while owner is not None and not self._is_dead(owner):
            if self._seen_alive(owner) or owner != first:
                raise _taken(owner)
            if time.monotonic() > deadline:
                return
            self._say(f"the run is locked by pid {owner['pid']} on {owner['host']}; waiting to see whether it lives")
            time.sleep(min(5.0, self._ttl_s / 4))
            owner = self._owner()

    def _claim(self) -> dict[str, Any] | None:
        """Create the lock if there is none (atomically on a local filesystem); else its owner."""
        if not self._folder.is_local:
            return self._owner()
        os.makedirs(self._folder.path, exist_ok=True)
        try:
            descriptor = os.open(f"{self._folder.path}/{NAME}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return self._owner()
        with os.fdopen(descriptor, "w") as file:
            json.dump({**self._me, "renewed": time.time()}, file)
        return None

    def _seen_alive(self, owner: dict[str, Any]) -> bool:
        return owner["host"] == self._me["host"] and psutil.pid_exists(owner["pid"])

    def _is_dead(self, owner: dict[str, Any]) -> bool:
        if time.time() - owner["renewed"] > self._ttl_s:
            return True
        if owner["host"] != self._me["host"]:
            return False
        try:
            return abs(psutil.Process(owner["pid"]).create_time() - owner["born"]) > 1.0
        except psutil.NoSuchProcess:
            return True

    def _owner(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._folder.read_bytes(NAME))
        except (StorageError, ValueError):  # not there, or torn: then its writer died while writing it
            return None

    def _write(self) -> None:
        self._folder.write_json(NAME, {**self._me, "renewed": time.time()})

    def _other(self) -> dict[str, Any] | None:
        """The owner, where it is not this driver."""
        owner = self._owner()
        return None if owner is None or _same(owner, self._me) else owner

    def _renew(self) -> None:
        while not self._stop.wait(self._ttl_s / 4):
            other = self._other()
            if other is not None:
                self._say(f"the run's lock was taken over by pid {other['pid']} on {other['host']}: this driver stops")
                os.kill(os.getpid(), signal.SIGTERM)  # the command line ends as for an interrupt
                return
            try:
                self._write()
            except StorageError as error:  # the next one may succeed; until `ttl_s` nobody else takes the lock
                self._say(f"the run's lock could not be renewed: {error}")


def _taken(owner: dict[str, Any]) -> StorageError:
    return StorageError(
        "another driver is working on this run",
        got=f"pid {owner['pid']} on {owner['host']}",
        allowed="one driver per run; stop it, or choose another name or output root",
        knob="name or run.output",
    )


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return (one["host"], one["pid"], one["born"]) == (other["host"], other["pid"], other["born"])
