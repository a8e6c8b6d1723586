"""Every recipe's job file runs on the playground's teacher, on real Ray and vLLM; one engine serves them all."""

from pathlib import Path

import pytest
import ray
from drivers import generate

from itune_ray.config.base import load_job
from itune_ray.config.generate import GenerateJob
from itune_ray.engine.pool import EngineHost

JOBS = (Path(__file__).parents[2] / "jobs" / "generate").glob("*.yaml")
FILES = sorted(file for file in JOBS if "playground://teacher" in file.read_text())
"""The others name models of the Hub; tests/test_jobs.py loads them."""

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def engines():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    host = EngineHost()
    yield host
    host.close()
    ray.shutdown()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_job_file_runs(file, engines, tmp_path):
    job = load_job(GenerateJob, file)
    funnel = generate(job, str(tmp_path), engines).manifest["funnel"]
    assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values()) > 0
    assert funnel["accepted"] >= job.min_rows
    assert not funnel["failed"]
