"""Bad input: one clear line and a non-zero exit, or a quarantined row with its reason; nothing hangs or is lost."""

import json
import socket
import sys

import pyarrow.parquet as pq
import pytest

from itune_ray.config.base import validate
from itune_ray.config.generate import GenerateJob
from itune_ray.config.train import TrainJob
from itune_ray.errors import ITuneError
from itune_ray.observe.progress import Progress

FAKE = {"model": {"path": "playground://base"}, "engine": {"type": "fake"}, "pool": {"cpus_each": 0.1}}
GOOD = {"messages": [{"role": "user", "content": "reverse abc"}, {"role": "assistant", "content": "cba"}]}


def one_line(seen: str) -> str:
    """The single line a person sees; anything more fails the test."""
    lines = [line for line in seen.strip().splitlines() if not line.startswith("Ray dashboard")]
    assert len(lines) == 1, seen
    assert lines[0].startswith("itune: error: ")
    return lines[0]


def generate_tree(**changes):
    tree = {"name": "g", "prompts": [{"type": "file", "path": "p.jsonl"}], "teacher": FAKE}
    return {**tree, **changes}


def train_tree(path, **changes):
    tree = {
        "name": "t",
        "model": {"path": "playground://base", "attention": "eager"},
        "data": [{"source": {"type": "file", "path": str(path)}}],
        "steps": 1,
        "batch": 2,
        "max_length": 64,
    }
    return {**tree, **changes}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["steps=1", "promts=[]"], "unknown key `promts`; did you mean 'prompts'?"),
        (["recipe.type=respnd"], "did you mean 'respond'?"),
        (["sampling.temperature=-1"], "`sampling.temperature`: input should be greater than or equal to 0; got -1"),
        (["seed"], "an override must read a.b=c"),
    ],
)
def test_a_mistyped_key_or_value(itune, arguments, expected):
    status, seen = itune.run("generate", itune.write(generate_tree()), *arguments)
    assert status == 2
    assert expected in one_line(seen)


def test_a_missing_job_file(itune):
    itune.write(generate_tree(name="generate"))
    status, seen = itune.run("generate", itune.root / "genrate.yaml")
    assert status == 2
    assert "no such job file; did you mean 'generate.yaml'?" in one_line(seen)


def test_a_missing_data_file(itune):
    (itune.root / "prompts.jsonl").write_text(json.dumps({"prompt": "hi"}))
    source = {"type": "file", "path": str(itune.root / "promts.jsonl")}
    status, seen = itune.run("generate", itune.write(generate_tree(prompts=[source])))
    assert status == 2
    assert "promts.jsonl" in one_line(seen)
    assert "did you mean" in one_line(seen)


@pytest.mark.real
def test_a_port_in_use(itune):
    (itune.root / "one.jsonl").write_text(json.dumps({"prompt": "hi"}))
    tree = generate_tree(prompts=[{"type": "file", "path": str(itune.root / "one.jsonl")}])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, seen = itune.run("generate", itune.write(tree), f"run.ray.dashboard_port={port}")
    assert status == 2
    assert f"the dashboard's port is in use; got {port}" in seen


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Runs jobs in this process on one Ray."""
    import ray

    from itune_ray.pipeline.run import run

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    root = tmp_path_factory.mktemp("runs")

    def go(job_name, schema, tree):
        job = validate(schema, {**tree, "output": str(root)}, where="job.yaml")
        return run(job_name, job, Progress(quiet=True)).opened[-1].folder

    yield go
    ray.shutdown()


def refusal(go, job_name, schema, tree):
    with pytest.raises(ITuneError) as error:
        go(job_name, schema, tree)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.real
def test_broken_lines_and_unusable_rows_are_quarantined_with_their_reason(session, tmp_path):
    file = tmp_path / "mixed.jsonl"
    file.write_text('{"prompt": "hello"}\n{"prompt": "he\n\n{"prompt": ""}\n{"prompt": "bye"}\n')
    folder = session(
        "generate", GenerateJob, generate_tree(name="mixed", prompts=[{"type": "file", "path": str(file)}])
    )
    funnel = folder.read_json("manifest.json")["funnel"]
    assert funnel["accepted"] == 2
    assert funnel["rejected"]["broken_json"] == 1
    assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) == 4
    broken = [r for r in pq.read_table(f"{folder.path}/rejected").to_pylist() if r["reason"] == "broken_json"]
    assert broken[0]["raw"] == '{"prompt": "he'
    assert broken[0]["position"] == 1


@pytest.mark.real
def test_rows_that_cannot_be_trained_on_are_quarantined(session, tmp_path):
    file = tmp_path / "chats.jsonl"
    no_answer = {"messages": GOOD["messages"][:1]}
    too_long = {"messages": [{"role": "user", "content": "reverse " + "x" * 200}, GOOD["messages"][1]]}
    file.write_text("\n".join(json.dumps(row) for row in (GOOD, no_answer, too_long, GOOD)))
    folder = session("train", TrainJob, train_tree(file, name="quarantine", trackers=[{"type": "tensorboard"}]))
    assert [name for name in folder.names() if name == "tensorboard"]  # a tracker of a run works beside
    funnel = folder.read_json("manifest.json")["funnel"]
    assert (funnel["in"], funnel["accepted"]) == (4, 2)
    assert funnel["rejected"] == {"no_answer": 1, "too_long": 1}


@pytest.mark.real
def test_zero_supervised_tokens(session, tmp_path):
    file = tmp_path / "unanswered.jsonl"
    file.write_text(json.dumps({"messages": GOOD["messages"][:1]}))
    message = refusal(session, "train", TrainJob, train_tree(file, name="silent"))
    assert "no row is left to train on: every one is rejected as no_answer" in message
    assert "data" in message


@pytest.mark.real
def test_a_tracker_without_its_package(session, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = tmp_path / "good.jsonl"
    file.write_text(json.dumps(GOOD))
    message = refusal(session, "train", TrainJob, train_tree(file, name="untracked", trackers=[{"type": "wandb"}]))
    assert "allowed: pip install wandb" in message


@pytest.mark.real
def test_a_model_path_that_is_no_model(session, tmp_path):
    file = tmp_path / "good.jsonl"
    file.write_text(json.dumps(GOOD))
    (tmp_path / "empty").mkdir()
    message = refusal(
        session, "train", TrainJob, train_tree(file, name="no-model", model={"path": str(tmp_path / "empty")})
    )
    assert str(tmp_path / "empty") in message
    assert "config.json" in message
    message = refusal(session, "train", TrainJob, train_tree(file, name="no-hub", model={"path": "nobody/nothing"}))
    assert "nobody/nothing" in message
    teacher = {"model": {"path": str(tmp_path / "empty")}}
    prompts = [{"type": "file", "path": str(file)}]
    message = refusal(
        session, "generate", GenerateJob, generate_tree(name="no-teacher", prompts=prompts, teacher=teacher)
    )
    assert "config.json" in message


@pytest.mark.real
def test_too_few_cpus_for_the_actors(session, tmp_path):
    file = tmp_path / "good.jsonl"
    file.write_text(json.dumps(GOOD))
    crowded = {**FAKE, "pool": {"replicas": 9, "cpus_each": 1}}
    prompts = [{"type": "file", "path": str(file)}]
    message = refusal(session, "generate", GenerateJob, generate_tree(name="crowd", prompts=prompts, teacher=crowded))
    assert "CPU" in message
    assert "the cluster has 8" in message
    message = refusal(session, "train", TrainJob, train_tree(file, name="crowd-train", workers={"num": 9}))
    assert "9 training workers" in message


@pytest.mark.real
def test_a_prompt_longer_than_the_context_is_quarantined(session, tmp_path):
    file = tmp_path / "long.jsonl"
    rows = [{"prompt": "reverse abc"}, {"prompt": "reverse " + "x" * 300}]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    served = {"model": {"path": "playground://base"}, "engine": {"type": "vllm", "max_model_len": 128}}
    tree = generate_tree(
        name="context", prompts=[{"type": "file", "path": str(file)}], teacher=served, sampling={"max_tokens": 16}
    )
    funnel = session("generate", GenerateJob, tree).read_json("manifest.json")["funnel"]
    assert funnel["in"] == 2
    assert funnel["rejected"] == {"prompt_too_long": 1}
