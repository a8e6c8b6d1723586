"""What a hostile model, template, config or row may try, and what it gets: one line, and nothing run or overwritten."""

import json
import pickle
import time

import jinja2
import pytest
import tiny

from itune_ray.config.base import load_job, validate
from itune_ray.config.generate import GenerateJob
from itune_ray.config.pipeline import PipelineJob
from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.hub import resolve
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError, ITuneError, ModelError, StorageError
from itune_ray.generate.recipes.base import render
from itune_ray.pipeline.step import plan

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% for i in range(10000000000) %}x{% endfor %}",
]


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self._target = target

    def __reduce__(self):
        return open, (self._target, "w")


@pytest.mark.parametrize(
    ("kind", "config", "weights"),
    [
        ("model", "config.json", "pytorch_model.bin"),
        ("model", "config.json", "model.pt"),
        ("adapter", "adapter_config.json", "adapter_model.bin"),
    ],
)
def test_pickled_weights_are_refused_unopened(tmp_path, kind, config, weights):
    folder, fuse = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / config).write_text(json.dumps({"model_type": "llama"}))
    (folder / weights).write_bytes(pickle.dumps(Bomb(str(fuse))))
    with pytest.raises(ModelError, match=f"the weights are pickled .{weights}."):
        resolve(str(folder), kind=kind)
    assert not fuse.exists()


@pytest.mark.parametrize("template", ESCAPES)
def test_a_models_chat_template_cannot_leave_its_sandbox(template):
    started = time.monotonic()
    with pytest.raises(ITuneError) as error:
        ChatRenderer(tiny.tokenizer(), template).prompt_text([{"role": "user", "content": "hello"}])
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("template", ESCAPES)
def test_a_prompt_template_cannot_leave_its_sandbox(template):
    with pytest.raises((jinja2.TemplateError, OverflowError)):
        render(template, messages=[])


def test_a_row_is_never_a_template():
    assert render("{{ prompt }}", prompt="{{ 7 * 7 }}") == "{{ 7 * 7 }}"


@pytest.mark.parametrize("name", ["../up", "/etc/run", "a/b", "", ".hidden", "a b", "x\n"])
def test_names_of_runs_and_steps_cannot_leave_the_output_root(name):
    step = {"job": "report", "inputs": ["runs/x"]}
    for tree in ({"name": name, "steps": {"a": step}}, {"name": "run", "steps": {name: step}}):
        with pytest.raises(ConfigError):
            validate(PipelineJob, tree, "x")


@pytest.mark.parametrize("payload", ["../../secret", "accepted/../../../x", "/etc/passwd"])
def test_a_reference_stays_inside_its_artifact(payload):
    first = {
        "job": "generate",
        "prompts": [{"type": "playground", "split": "prompts", "rows": 1}],
        "teacher": {"model": {"path": "playground://teacher"}},
    }
    second = {"job": "curate", "inputs": [{"source": {"type": "file", "path": f"step://a/{payload}"}}]}
    job = validate(PipelineJob, {"name": "x", "steps": {"a": first, "b": second}}, "x")
    with pytest.raises(ConfigError, match="refers to something outside an artifact"):
        plan(job)


def test_credentials_in_a_uri_are_refused_and_not_repeated():
    with pytest.raises(StorageError) as error:
        Folder.at("s3://AKIAEXAMPLE:verysecret@bucket/runs")
    assert "verysecret" not in str(error.value)
    assert "AKIAEXAMPLE" not in str(error.value)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"])
def test_secrets_in_a_config_are_refused(variable):
    for schema, file, key in (
        (TrainJob, "jobs/train/sft-qwen3-0.6b.yaml", "workers.env"),
        (GenerateJob, "jobs/generate/distill-qwen3.yaml", "teacher.pool.env"),
    ):
        with pytest.raises(ConfigError, match=f"the variable {variable} looks like a secret") as error:
            load_job(schema, file, [f"{key}={{{variable}: hush}}"])
        assert "hush" not in str(error.value)
        assert load_job(schema, file, [f"{key}={{NCCL_DEBUG: INFO}}"])
