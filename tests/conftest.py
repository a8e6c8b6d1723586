"""The order of the test modules, and how tests run the command line as a person would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

LONGEST_FIRST = (
    "pipeline/test_loop.py",
    "sweep/test_sweep_run.py",
    "generate/test_recipe_jobs.py",
    "test_submit.py",
    "train/test_loss_invariance.py",
)
"""Modules that take minutes: started last, one of them would run on alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests run module by module on two processes: the longest modules first."""

    def rank(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(LONGEST_FIRST) if str(item.path).endswith(name)), len(LONGEST_FIRST))

    items.sort(key=rank)


class CommandLine:
    """Runs `itune` in its own process group, with an output root of its own, and never leaves one behind."""

    def __init__(self, root: Path):
        self.root = root
        self._running: list[subprocess.Popen[str]] = []

    def write(self, tree: dict[str, Any]) -> Path:
        """A job file."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / f"{tree['name']}.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        return file

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command; its output goes to a file beside its runs."""
        self.root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "itune_ray", *map(str, arguments)]
        environment = {**os.environ, "ITUNE_OUTPUT": str(self.root), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        self._running.append(process)
        return process

    def run(self, *arguments: str | Path, timeout: float = 240) -> tuple[int, str]:
        """Run a command to its end: exit status and what a person saw."""
        process = self.start(*arguments)
        seen, _ = process.communicate(timeout=timeout)
        return process.returncode, seen

    def summary(self, name: str) -> dict[str, Any]:
        """summary.json of a run."""
        return json.loads((self.root / name / "summary.json").read_text())

    def stage(self, run: str, stage: str) -> Path:
        """The one artifact folder of a stage."""
        (folder,) = (p for p in (self.root / run).glob(f"{stage}-*") if (p / "manifest.json").exists())
        return folder

    def close(self) -> None:
        """Kill what still runs."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture(scope="module")
def itune(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line with an output root for this test module."""
    command_line = CommandLine(tmp_path_factory.mktemp("runs"))
    yield command_line
    command_line.close()


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., None]:
    """Poll a condition, failing with a message when it does not come true."""
    import time

    def wait(condition: Callable[[], bool], what: str, timeout: float = 120, every: float = 0.02) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"timed out waiting until {what}"
            time.sleep(every)

    return wait
