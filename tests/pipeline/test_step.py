"""The plan of a pipeline is checked whole before anything runs."""

import pytest

from itune_ray.config.base import validate
from itune_ray.config.pipeline import PipelineJob
from itune_ray.errors import ConfigError
from itune_ray.pipeline.step import plan

GENERATE = {"job": "generate", "prompts": [{"type": "file", "path": "p.jsonl"}], "teacher": {"model": {"path": "m"}}}
CURATE = {"job": "curate", "inputs": [{"source": {"type": "file", "path": "step://distill/accepted"}}]}


def pipeline(**steps):
    return validate(PipelineJob, {"name": "p", "seed": 5, "steps": steps}, where="p.yaml")


def test_references_become_paths_of_earlier_steps():
    steps = plan(pipeline(distill=GENERATE, curate=CURATE))
    assert steps[1].references() == {"distill"}
    job = steps[1].resolve(lambda step, payload: f"/runs/{step}-0a/{payload}")
    assert job.inputs[0].source.path == "/runs/distill-0a/accepted"


def test_steps_inherit_name_seed_and_run():
    first, second = plan(pipeline(distill={**GENERATE, "seed": 9}, curate=CURATE))
    assert first.config["seed"] == 9
    assert second.config["seed"] == 5
    assert second.config["name"] == "p"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"curate": CURATE, "distill": GENERATE}, "does not come before"),
        ({"distil": GENERATE, "curate": CURATE}, "did you mean 'distil'?"),
        ({"distill": {**GENERATE, "job": "genrate"}}, "did you mean 'generate'?"),
        ({"distill": {**GENERATE, "job": "pipeline"}}, "names no job"),
        ({"distill": {**GENERATE, "recipee": {}}}, "step distill: unknown key `recipee`; did you mean 'recipe'?"),
        ({}, "`steps`"),
    ],
)
def test_a_plan_that_cannot_work_is_one_clear_line(steps, expected):
    with pytest.raises(ConfigError) as error:
        plan(pipeline(**steps))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
