"""Going on from somewhere: an adapter that is trained further, and a run that pauses."""

import shutil

import pytest
import tiny
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from itune_ray.data.chat import ChatRenderer
from itune_ray.data.fingerprint import content_identity
from itune_ray.errors import ModelError, TrainError
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics

LORA = {"type": "lora", "rank": 4, "train_tokens": ["<|im_start|>", "<|im_end|>"]}
IDS = torch.arange(4, 40)[None]


def lora_job(folder, **overrides):
    return tiny.job(folder, **{"steps": 6, "batch": 8, "packing": True, "model.peft": LORA, **overrides})


def figures(stage):
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_metrics(str(stage))]


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    stage = tmp_path_factory.mktemp("first")
    train_local(lora_job(folder, optimizer={"type": "adamw", "lr": 1e-2}), tiny.chats(40), str(stage))
    return stage / "adapter"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_goes_on_from_an_adapter(folder, adapter, tmp_path, strategy):
    """The first loss is that of base plus adapter by PEFT, and an unmoved adapter is exported as it was."""
    still = {"type": "adamw", "lr": 1e-12}
    job = lora_job(folder, steps=1, optimizer=still, strategy={"type": strategy}, **{"model.adapter": str(adapter)})
    train_local(job, tiny.chats(8), str(tmp_path))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()
    total, count = 0.0, 0
    for record in tiny.chats(8):
        ids, supervised = ChatRenderer(tiny.tokenizer()).training_ids(record.messages)
        labels = torch.tensor([[i if on else -100 for i, on in zip(ids, supervised, strict=True)]])
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=labels, use_cache=False).loss
        total, count = (
            total + float(loss) * int((labels[:, 1:] != -100).sum()),
            count + int((labels[:, 1:] != -100).sum()),
        )
    assert figures(tmp_path)[0][1] == pytest.approx(total / count, rel=1e-5)
    before, after = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)


@pytest.mark.parametrize(
    ("peft", "told"),
    [
        ({"rank": 8}, "another r than the job; got 8; allowed: 4.*model.peft.rank"),
        ({"alpha": 5.0}, "another lora_alpha.*model.peft.alpha"),
        ({"rslora": True}, "another use_rslora.*model.peft.rslora"),
        ({"target": ["q_proj"]}, "other matrices.*model.peft.target"),
        ({"train_tokens": []}, "another trainable_token_indices.*model.peft.train_tokens"),
    ],
    ids=str,
)
def test_an_adapter_of_another_shape_is_one_clear_line(folder, adapter, tmp_path, peft, told):
    job = lora_job(folder, **{"model.adapter": str(adapter), "model.peft": {**LORA, **peft}})
    with pytest.raises(ModelError, match=told):
        train_local(job, tiny.chats(8), str(tmp_path))


def test_an_adapter_of_another_base_is_one_clear_line(adapter, tmp_path):
    wider = tiny.llama(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(ModelError, match="belongs to another model"):
        train_local(lora_job(wider, **{"model.adapter": str(adapter)}), tiny.chats(8), str(tmp_path / "run"))


def test_an_adapter_needs_lora(folder):
    with pytest.raises(ValidationError, match=r"model\.peft\.type=lora"):
        tiny.job(folder, **{"model.adapter": "somewhere"})


def test_what_an_adapter_holds_is_part_of_the_identity(folder, adapter, tmp_path):
    def identity(path):
        return content_identity(lora_job(folder, **{"model.adapter": str(path)}).identity())

    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert identity(copy) == identity(adapter)
    (copy / "adapter_model.safetensors").write_bytes(b"other")
    assert identity(copy) != identity(adapter)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_with_pauses_is_the_run_without(folder, tmp_path, strategy):
    job, records = lora_job(folder, schedule={"type": "cosine"}, strategy={"type": strategy}), tiny.chats(40)
    train_local(job, records, str(tmp_path / "whole"))
    paused = train_local(job, records, str(tmp_path / "parts"), stop_at=2)
    assert (paused.steps, paused.metrics["step"], paused.model_path) == (2, 2, None)
    assert paused.adapter_path == str(tmp_path / "parts/at-000002/adapter")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), paused.adapter_path)
    assert train_local(job, records, str(tmp_path / "parts"), stop_at=2).metrics == paused.metrics
    train_local(job, records, str(tmp_path / "parts"), stop_at=5)
    with pytest.raises(TrainError, match="beyond"):
        train_local(job, records, str(tmp_path / "parts"), stop_at=3)
    train_local(job, records, str(tmp_path / "parts"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pause_of_full_training_leaves_a_model(folder, tmp_path):
    outcome = train_local(tiny.job(folder, steps=2), tiny.chats(40), str(tmp_path), stop_at=1)
    AutoModelForCausalLM.from_pretrained(outcome.model_path)
    with pytest.raises(TrainError, match="no such step to stop at; got 3; allowed: 1 to 2"):
        train_local(tiny.job(folder, steps=2), tiny.chats(40), str(tmp_path), stop_at=3)
