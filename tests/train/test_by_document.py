"""On a CPU, sdpa in the loop goes document by document: the losses are those of eager attention under the mask."""

import pytest
import tiny

from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


CASES = {
    "sft": ({}, tiny.chats),
    "lora": ({"model.peft": {"type": "lora", "rank": 4}}, tiny.chats),
    "dpo": ({"objective": {"type": "dpo"}}, tiny.pairs),
    "reward": ({"objective": {"type": "reward"}}, tiny.pairs),
    "prompts": ({"model.peft": {"type": "prompt_tuning", "tokens": 3}}, tiny.chats),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_eager_attention(case, folder, tmp_path):
    settings, rows = CASES[case]
    found = []
    for attention in ("eager", "sdpa"):
        job = tiny.job(folder, packing=True, micro_batch=2, steps=2, **{"model.attention": attention, **settings})
        train_local(job, rows(16), str(tmp_path / attention))
        told = read_metrics(str(tmp_path / attention))
        found.append([value for row in told for value in (row["loss"], row["grad_norm"])])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
