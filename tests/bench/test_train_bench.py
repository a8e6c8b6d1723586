"""The train bench: its inputs are the same on both sides, and a tiny run of every part ends in its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from itune_ray.bench.head import HeadTask
from itune_ray.bench.inputs import write_inputs
from itune_ray.bench.train_loop import records, train_job
from itune_ray.bench.turns import Side, Task, Turn, alternate
from itune_ray.config.base import validate
from itune_ray.config.bench import BenchJob
from itune_ray.data.artifact import RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, TrainError
from itune_ray.observe.progress import Progress
from itune_ray.train.prepare import renderer_for

ROOT = Path(__file__).parents[2]
TINY = {
    "peer": str(ROOT / "jobs/bench/train_trl.py"),
    "peer_micro_batches": {"sft": [1], "dpo": [2]},
    "config": {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
    "documents": 24,
    "prompt_tokens": 4,
    "answer_tokens": 6,
    "pack_length": 48,
    "rows_per_step": 2,
    "rounds": 1,
    "steps": 1,
    "threads": 1,
}


def job(**train):
    return validate(BenchJob, {"name": "bench", "train": {**TINY, **train}}, "test")


def test_a_bench_has_one_stage():
    with pytest.raises(ConfigError, match="exactly one of `stage`"):
        validate(BenchJob, {"name": "bench"}, "test")


def test_a_peer_that_is_not_there_is_one_line(tmp_path):
    from itune_ray.bench.run import run

    with pytest.raises(ConfigError, match=r"train\.peer"):
        run(job(peer="nowhere.py"), RunStore(str(tmp_path), "bench"), "bench", EngineHost("auto"), Progress(quiet=True))


def test_both_sides_read_the_same_tokens(tmp_path):
    """Ids and labels that the peer is given are those that our loop makes of the chats."""
    inputs = write_inputs(job().train, tmp_path / "sft", pairs=False, seed=1)
    task = Task("sft", inputs.folder, inputs.documents_per_step, 2, 48, 1, 16, 1, 3)
    ours = train_job(task)
    renderer = renderer_for(ours.model.model_dump_json())
    given = [json.loads(line) for line in (tmp_path / "sft/documents.jsonl").read_text().splitlines()]
    for record, row in zip(records(task), given, strict=True):
        rendered = renderer.record_ids(record)
        assert row["input_ids"] == rendered.input_ids
        assert [label != -100 for label in row["labels"]] == rendered.supervised
        words = len(record.response.split())
        assert sum(rendered.supervised) == words + 1  # and the end of the turn
    tokens = sum(len(row["input_ids"]) for row in given) / len(given) * ours.batch
    assert 48 < tokens <= 96


def test_pairs_are_the_same_texts_on_both_sides(tmp_path):
    inputs = write_inputs(job().train, tmp_path / "dpo", pairs=True, seed=1)
    task = Task("dpo", inputs.folder, inputs.documents_per_step, 2, 48, 1, 16, 1, 3)
    renderer = renderer_for(train_job(task).model.model_dump_json())
    given = [json.loads(line) for line in (tmp_path / "dpo/documents.jsonl").read_text().splitlines()]
    for record, row in zip(records(task), given, strict=True):
        for side, answer in (("chosen", record.response), ("rejected", record.rejected)):
            chat = [*record.prompt, {"role": "assistant", "content": answer}]
            assert renderer._encode(row["prompt"] + row[side]) == renderer.training_ids(chat).input_ids


def test_turns_alternate_and_change_who_begins():
    log = []

    def side(name):
        def work():
            log.append(name)
            return Turn(1, 10, 2.0, 1.0, 0.0)

        return work

    mine, other = alternate(side("a"), side("b"), 3)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert (len(mine), len(other), mine[0].rate, mine[0].cpu_rate) == (3, 3, 5.0, 10.0)


def test_a_side_that_dies_is_told_of_with_its_last_line(tmp_path):
    code = "import sys; print('{}', flush=True); sys.stdin.readline(); sys.exit('out of luck')"
    command = [sys.executable, "-c", code]
    with (
        Side("peer", command, tmp_path / "log.txt", {}) as side,
        pytest.raises(TrainError, match="the side peer ended: out of luck"),
    ):
        side.turn(1)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_tiny_bench_against_trl(method, tmp_path):
    from itune_ray.bench.run import run

    pytest.importorskip("trl")
    store = RunStore(str(tmp_path), "bench")
    artifact = run(job(parts=[method]), store, "bench", EngineHost("auto"), Progress(quiet=True))
    facts = json.loads((Path(artifact.path()) / "bench.json").read_text())
    assert facts["ratio"] == facts[method]["ratio"] > 0
    assert facts[method]["cpu_ratio"] > 0
    ours, theirs = facts[method]["tokens_per_step"], facts[method]["peer_tokens_per_step"]
    assert 0.5 < ours / theirs < 2
    assert facts[method]["losses"][0] == pytest.approx(facts[method]["losses"][1], rel=0.1)


def test_memory_of_a_head_is_measured(tmp_path):
    """In processes of their own, as the bench does: this one's memory is what other tests have left of it."""
    task = HeadTask(vocabulary=2000, tokens=256, hidden=64, threads=1)
    task.write(tmp_path / "task.json")
    assert HeadTask.read(str(tmp_path / "task.json")) == task
    command = [sys.executable, "-m", "itune_ray.bench.head"]
    fused, full = (
        json.loads(subprocess.check_output([*command, way, str(tmp_path / "task.json")], text=True).splitlines()[-1])
        for way in ("fused", "full")
    )
    assert fused["loss"] == pytest.approx(full["loss"], rel=1e-2)
    assert full["peak_mib"] > 0
