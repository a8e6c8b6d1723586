"""The loader: overrides, unknown keys, unions, and what decides identity."""

import subprocess
import sys

import pytest

from itune_ray.config.base import apply_overrides, digest, load_job, read_tree, validate
from itune_ray.config.keys import describe
from itune_ray.config.train import TrainJob
from itune_ray.errors import ConfigError, ITuneError
from itune_ray.jobs import JOBS, resolve

TREE = {"name": "x", "model": {"path": "m"}, "data": [{"source": {"path": "rows.jsonl", "type": "file"}}], "steps": 3}


def train_job(**changes):
    return validate(TrainJob, {**TREE, **changes}, where="job.yaml")


def test_override_sets_nested_values_with_yaml_types():
    tree = apply_overrides(TREE, ["optimizer.lr=1e-3", "packing=false", "model.peft={type: lora, rank: 4}"])
    assert tree["optimizer"] == {"lr": 1e-3}
    assert tree["packing"] is False
    assert tree["model"] == {"path": "m", "peft": {"type": "lora", "rank": 4}}


def test_a_template_on_the_command_line_is_taken_as_it_is():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert apply_overrides(TREE, [f"model.chat_template={template}"])["model"]["chat_template"] == template


def test_override_indexes_and_appends_to_lists():
    tree = apply_overrides(TREE, ["data.0.weight=2", "data.1.source.path=b"])
    assert tree["data"][0]["weight"] == 2
    assert tree["data"][1] == {"source": {"path": "b"}}


def test_overrides_do_not_touch_the_tree_they_are_given():
    apply_overrides(TREE, ["model.path=other", "data.0.weight=9"])
    assert TREE["model"] == {"path": "m"}
    assert "weight" not in TREE["data"][0]


@pytest.mark.parametrize("override", ["steps", "=3", "data.x.weight=1", "data.7.weight=1", "name=[a"])
def test_malformed_override_is_one_line_that_names_it(override):
    with pytest.raises(ConfigError) as error:
        apply_overrides(TREE, [override])
    assert "\n" not in str(error.value)
    assert override.split("=")[0].split(".")[-1] in str(error.value) or override in str(error.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batchh": 3}, "unknown key `batchh`; did you mean 'batch'?"),
        (
            {"model": {"path": "m", "peft": {"type": "lora", "rnk": 3}}},
            "unknown key `model.peft.rnk`; did you mean 'rank'?",
        ),
        ({"model": {"path": "m", "peft": {"type": "lor"}}}, "`model.peft.type` is 'lor'; did you mean 'lora'?"),
        ({"model": {"path": "m", "peft": {"type": "lora", "rank": 0}}}, "`model.peft.rank`"),
        ({"steps": 0}, "`steps`: input should be greater than 0; got 0"),
        ({"epochs": 1}, "exactly one of `epochs` and `steps`"),
        ({"model": {}}, "exactly one of model.path"),
        ({"optimizer": {"type": "muon"}}, "strategy.type=ddp"),
        ({"pack_length": 8}, "pack_length 8 must be at least max_length 2048"),
        ({"data": []}, "`data`"),
        ({"workers": {"num": 0}}, "`workers.num`: must be a positive number, or [fewest, most]; got 0"),
        ({"workers": {"num": [2, 1]}}, "`workers.num`: must be a positive number, or [fewest, most]; got [2, 1]"),
        ({"workers": {"num": [1, 2, 3]}}, "`workers.num`: must be"),
    ],
)
def test_bad_configs_are_one_clear_line(changes, expected):
    with pytest.raises(ConfigError) as error:
        train_job(**changes)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_job_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "train.yaml").write_text("name: x")
    with pytest.raises(ConfigError, match=r"did you mean 'train.yaml'"):
        read_tree(tmp_path / "trian.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    (tmp_path / "job.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"job\.yaml"):
        read_tree(tmp_path / "job.yaml")


def test_where_a_job_runs_is_no_part_of_what_it_is():
    moved = train_job(workers={"num": [2, 4]}, micro_batch=1, run={"output": "/elsewhere"}, name="other")
    assert digest(moved.identity()) == digest(train_job().identity())
    assert digest(train_job(batch=3).identity()) != digest(train_job().identity())


def test_output_is_a_shorthand_for_run_output(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text(
        "{name: x, model: {path: m}, data: [{source: {type: file, path: r}}], steps: 1, run: {lock_ttl_s: 9}}"
    )
    job = load_job(TrainJob, file, ["output=/some/root"])
    assert (job.run.output, job.run.lock_ttl_s) == ("/some/root", 9)


@pytest.mark.parametrize("name", JOBS)
def test_every_key_of_every_job_can_be_described(name):
    text = describe(resolve(JOBS[name].schema))
    assert "name: str  (required)" in text
    assert "FieldInfo" not in text


def test_schemas_import_nothing_heavy():
    modules = [job.schema.partition(":")[0] for job in JOBS.values()]
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {modules!r}];"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'numpy', 'pandas', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_survive_pickling():
    import pickle

    error = ConfigError("what", got=3, allowed="1", knob="a.b")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, ITuneError)
    assert (str(again), again.knob) == (str(error), "a.b")
