"""Every job file in the repository loads; every registry and schema agree."""

from pathlib import Path

import pytest

from itune_ray.config.base import load_job
from itune_ray.config.pipeline import PipelineJob
from itune_ray.jobs import JOBS, job_type, resolve
from itune_ray.pipeline.step import plan

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("jobs/**/*.yaml"))


def kind_of(file: Path) -> str:
    """A job file's folder is its job; the playground's models are made by train jobs."""
    folder = file.relative_to(ROOT / "jobs").parts[0]
    return "train" if folder == "playground" else folder


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_job_file_loads_and_plans(file):
    job = load_job(resolve(job_type(kind_of(file)).schema), file)
    if isinstance(job, PipelineJob):
        assert [step.name for step in plan(job)] == list(job.steps)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_job_file_says_what_it_needs(file):
    head = file.read_text().splitlines()[0]
    assert head.startswith("# "), "a job file opens with what it does, on what hardware, how long, and what to expect"


@pytest.mark.parametrize("name", JOBS)
def test_job_functions_exist(name):
    assert callable(resolve(JOBS[name].function))
