"""Copies of the invented run."""

import shutil
from pathlib import Path

import pytest
from invented import FinishedRun, finished_run

from itune_ray.data.artifact import open_artifact


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The run that every test gets a copy of."""
    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(made_once: FinishedRun, tmp_path: Path) -> FinishedRun:
    """A finished run of five stages."""
    source = made_once.store.folder.path
    shutil.copytree(source, tmp_path / "quickstart")
    copy = FinishedRun(tmp_path)
    copy.paths = [path.replace(source, copy.store.folder.path) for path in made_once.paths]
    copy.store.opened = [open_artifact(path) for path in copy.paths]
    for artifact in copy.store.opened:
        artifact.started = artifact.manifest["finished"] - 1  # as if this command had made them
    return copy
