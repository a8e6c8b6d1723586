"""Every recipe's job file runs on real Ray: on the playground's teacher by one vLLM engine, or without a model."""

import asyncio
import json
from pathlib import Path

import pytest
import ray
from drivers import generate

from itune_ray.config.base import load_job
from itune_ray.config.generate import GenerateJob
from itune_ray.data.sources import read_source
from itune_ray.engine.host import EngineHost
from itune_ray.engine.llm import sampling_of
from itune_ray.generate.recipes import load_recipe
from itune_ray.generate.worker import outcomes_of

JOBS = Path(__file__).parents[2] / "jobs" / "generate"
FILES = sorted(file for file in JOBS.glob("*.yaml") if "playground://teacher" in file.read_text())
"""The others name models of the Hub; tests/test_jobs.py loads them."""
ONE_WORKER = ["workers.num=1"]
"""A worker is a process that imports the stack; their number does not change a table, see test_generate_run.py."""

WHOLE = ("alpaca", "dialogue", "mosaic")
"""Run as a stage: in rounds, one by one, and on the driver."""

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def engines():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    host = EngineHost()
    yield host
    host.close()
    ray.shutdown()


@pytest.mark.parametrize("file", [file for file in FILES if file.stem in WHOLE], ids=lambda file: file.stem)
def test_the_job_file_runs(file, engines, tmp_path):
    job = load_job(GenerateJob, file, ONE_WORKER)
    funnel = generate(job, str(tmp_path), engines).manifest["funnel"]
    assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values()) > 0
    assert funnel["accepted"] >= job.min_rows
    assert not funnel["failed"]


@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in WHOLE], ids=lambda file: file.stem)
def test_the_recipe_of_the_job_file_runs(file, engines):
    """Without recipe workers, whose start would be most of the time."""
    job = load_job(GenerateJob, file)
    recipe = load_recipe(job.recipe)
    models = {"teacher": job.teacher, **job.recipe.served()}
    llms = {
        name: engines.pool(served).client.llm(sampling_of(job.sampling), job.seed, "generate", served.model.adapter)
        for name, served in models.items()
    }
    teacher = llms.pop("teacher")
    bound = recipe.bind(llms) if llms else recipe
    records = [record for source in job.prompts for record in read_source(source).records]

    async def ends():
        return await asyncio.gather(*(outcomes_of(bound, record, teacher) for record in records))

    outcomes = [outcome for outcomes in asyncio.run(ends()) for outcome in outcomes]
    assert len({outcome.record.key for outcome in outcomes}) == len(outcomes) >= len(records) > 0
    assert {outcome.status for outcome in outcomes} <= {"accepted", "rejected"}
    assert sum(outcome.status == "accepted" for outcome in outcomes) >= job.min_rows


def test_the_job_of_templates_runs_without_an_engine(engines, tmp_path):
    started = engines.starts
    manifest = generate(load_job(GenerateJob, JOBS / "templates.yaml", ONE_WORKER), str(tmp_path), engines).manifest
    assert manifest["funnel"] == {"in": 192, "accepted": 192, "rejected": {}, "failed": {}}
    assert (manifest["engine_starts"], manifest["requests"]) == (0, 0)
    assert manifest["tokens"] == {"prompt": 0, "generated": 0}
    assert json.dumps(manifest)
    assert engines.starts == started


def test_workers_augment_without_a_model_and_no_engine_starts(engines, tmp_path):
    started = engines.starts
    job = GenerateJob.model_validate(
        {
            "name": "a",
            "prompts": [{"type": "playground", "split": "chat", "rows": 100}],
            "recipe": {"type": "augment"},
        }
    )
    manifest = generate(job, str(tmp_path), engines).manifest
    assert manifest["engine_starts"] == manifest["requests"] == 0
    assert engines.starts == started
    assert manifest["funnel"]["in"] == 200
    assert not manifest["funnel"]["failed"]
