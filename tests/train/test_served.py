"""The vLLM part of the export gate, through a real pool: adapter and merged model, passed and refused."""

import json

import pytest
import tiny

from itune_ray.engine.host import EngineHost
from itune_ray.errors import ModelError
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local
from itune_ray.train.outcome import write_outcome
from itune_ray.train.served import check_served

pytestmark = [pytest.mark.real, pytest.mark.soak]
ENGINE = {"engine": {"type": "vllm", "max_adapters": 1, "max_adapter_rank": 8, "kv_cache_gb": 0.05}}


@pytest.fixture(scope="module")
def engines():
    import ray

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    host = EngineHost()
    yield host
    host.close()
    ray.shutdown()


def trained(folder, stage, peft):
    """A job with the gate's vLLM part, and the outcome of its training, which lies in the stage too."""
    fast = {"type": "adamw", "lr": 0.02}
    job = tiny.job(folder, **{"model.peft": peft, "optimizer": fast, "gate": {"prompts": 2, "vllm": ENGINE}})
    outcome = train_local(job, tiny.chats(24), str(stage))
    write_outcome(outcome, str(stage))
    return job, outcome


def test_vllm_is_held_against_the_trained_model_and_refuses_another(folder, tmp_path, engines):
    job, outcome = trained(folder, tmp_path, {"type": "lora", "rank": 4})
    gaps = check_served(job, outcome, str(tmp_path), engines)
    assert gaps.keys() == {"vllm adapter", "vllm merged"}
    assert max(gaps.values()) < 1e-4
    assert read_report(str(tmp_path)).gaps.keys() == {"adapter", "merged", "vllm adapter", "vllm merged"}

    file = tmp_path / "gate.json"
    report = json.loads(file.read_text())
    file.write_text(json.dumps({**report, "trained": [[p - 0.01 for p in row] for row in report["trained"]]}))
    with pytest.raises(ModelError, match=r"export is refused: the written model \(vllm adapter\)"):
        check_served(job, outcome, str(tmp_path), engines)
    assert not any((tmp_path / name).exists() for name in ("model", "adapter", "outcome.json"))


def test_vllm_scores_virtual_tokens_by_an_engine_that_takes_embeddings(folder, tmp_path, engines):
    job, outcome = trained(folder, tmp_path, {"type": "prompt_tuning", "tokens": 4})
    gaps = check_served(job, outcome, str(tmp_path), engines)
    assert gaps.keys() == {"vllm adapter"}
    assert max(gaps.values()) < 1e-4
