"""The stage on real Ray and vLLM: the smaller model says in vLLM what it says in transformers."""

import asyncio

import pytest
import ray
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.compress.run import run
from itune_ray.config.compress import CompressJob
from itune_ray.config.shared import ServedModel
from itune_ray.data.artifact import RunStore
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.host import EngineHost
from itune_ray.errors import CompressError
from itune_ray.observe.progress import Progress

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def engines():
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    host = EngineHost()
    yield host
    host.close()
    ray.shutdown()


def job(folder, **overrides) -> CompressJob:
    tree = {
        "name": "small",
        "model": {"path": str(folder), "dtype": "float32"},
        "calibration": {"data": [{"type": "playground", "split": "chat", "rows": 24}], "rows": 16},
        "speed": {"prompts": 8, "tokens": 8, "rounds": 1, "engine": {"type": "vllm", "max_model_len": 256}},
    }
    return CompressJob.model_validate({**tree, **overrides})


def test_the_smaller_model_is_the_same_in_vllm(engines, tmp_path):
    folder = tiny.llama(tmp_path / "llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    asked = job(folder)
    artifact = run(asked, RunStore(str(tmp_path), "small"), "prune", engines, Progress(quiet=True))
    facts = artifact.folder.read_json("compression.json")
    assert facts["architecture"] == {"before": "LlamaForCausalLM", "after": "MistralForCausalLM"}
    assert facts["tokens_per_s"]["before"] > 0
    assert facts["tokens_per_s"]["after"] > 0
    assert engines.starts == 2

    path = artifact.path("model")
    served = ServedModel(model={"path": path, "dtype": "float32"}, engine=asked.speed.engine)
    sampling = Sampling(max_tokens=12, logprobs=0)
    requests = [Request(id=f"r{i}", sampling=sampling, text=" ".join(tiny.WORDS[i : i + 4])) for i in range(6)]
    completions = asyncio.run(engines.pool(served).client.generate(requests))
    assert engines.starts == 2, "a later step with the same engine section goes on with the engine"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for completion in completions:
        prompt, (sample,) = torch.tensor([completion.prompt_token_ids]), completion.samples
        with torch.no_grad():
            logits = model(torch.cat([prompt, torch.tensor([sample.token_ids])], 1)).logits[0, prompt.shape[1] - 1 : -1]
        wanted = logits.log_softmax(-1).max(-1)
        assert sample.token_ids == tuple(wanted.indices.tolist())
        got = [entry[token] for entry, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        assert got == pytest.approx(wanted.values.tolist(), abs=1e-4)

    again = run(asked, RunStore(str(tmp_path), "small"), "prune", engines, Progress(quiet=True))
    assert again.manifest["finished"] == artifact.manifest["finished"]


def test_a_share_no_head_count_allows_is_the_users_error(engines, tmp_path):
    folder = tiny.llama(tmp_path / "llama", hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
    method = {"type": "structured", "sparsity": 0.3}
    with pytest.raises(CompressError, match=r"0.3 of 4 key-value heads is 1.2 heads"):
        run(job(folder, method=method), RunStore(str(tmp_path), "bad"), "prune", engines, Progress(quiet=True))
