"""Methods inside the loop: exact resume, bf16, recomputation, and what is refused."""

import pytest
import tiny
import torch
from methods import METHODS, rows, settings
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from itune_ray.config.adaptation import CACHED
from itune_ray.errors import ModelError, TrainError
from itune_ray.model.peft.saved import load_adapted
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics

ADALORA = {"type": "adalora", "rank": 6, "target_rank": 2, "warmup": 0.2, "final": 0.2}


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def stop_after(step):
    def on_progress(done, total, row):
        if done == step:
            raise Killed

    return on_progress


def job_of(folder, peft, **overrides):
    base = {"steps": 6, "batch": 8, "checkpoint": {"every_steps": 3}, "packing": True, "pack_length": 160}
    return tiny.job(folder, **{**base, "optimizer": {"type": "adamw", "lr": 1e-2}, "model.peft": peft, **overrides})


def figures(stage):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(str(stage))]


@pytest.mark.parametrize(
    "peft", [ADALORA, *(METHODS[m] for m in ("qlora", "dora", "prefix_tuning", "houlsby"))], ids=str
)
def test_stopped_and_started_again_is_the_run_without_bit_for_bit(folder, tmp_path, peft):
    job, records = job_of(folder, peft), tiny.chats(40)
    train_local(job, records, str(tmp_path / "whole"))
    with pytest.raises(Killed):
        train_local(job, records, str(tmp_path / "parts"), stop_after(5))
    train_local(job, records, str(tmp_path / "parts"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adalora_optimises_its_penalty_and_ends_at_its_budget(folder, tmp_path):
    rows = {}
    for weight in (0.0, 0.5):
        stage = tmp_path / str(weight)
        train_local(job_of(folder, {**ADALORA, "orthogonality": weight}), tiny.chats(40), str(stage))
        rows[weight] = read_metrics(str(stage))
    assert rows[0.5][0]["loss"] == rows[0.0][0]["loss"]  # reported without the term
    assert rows[0.5][0]["grad_norm"] > 1.01 * rows[0.0][0]["grad_norm"]
    penalties = [row["penalty"] for row in rows[0.5]]
    assert penalties[-1] < penalties[0]
    values = load_file(tmp_path / "0.5/adapter/adapter_model.safetensors")
    left = [int((e != 0).sum()) for name, e in values.items() if "lora_E" in name]
    assert sum(left) == 2 * len(left) == 28


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_in_bf16_over_a_frozen_bf16_base(folder, tmp_path, method):
    short, records = {"steps": 2, **settings(method)}, rows(method, 16)
    outcome = train_local(job_of(folder, METHODS[method], precision="bf16", **short), records, str(tmp_path))
    exact = train_local(job_of(folder, METHODS[method], **short), records, str(tmp_path / "fp32"))
    assert outcome.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=3e-2)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in (*CACHED, "full", "lora")])
def test_recomputation_changes_nothing(folder, tmp_path, method):
    for name, again in (("kept", False), ("again", True)):
        job = job_of(folder, METHODS[method], steps=2, gradient_checkpointing=again, **settings(method))
        train_local(job, rows(method, 16), str(tmp_path / name))
    kept, again = figures(tmp_path / "kept"), figures(tmp_path / "again")
    torch.testing.assert_close(kept, again, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", CACHED)
def test_recomputation_would_add_a_prefix_twice(folder, method):
    with pytest.raises(ValidationError, match="gradient_checkpointing=false"):
        job_of(folder, METHODS[method], gradient_checkpointing=True, **settings(method))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_needs_a_mask_it_can_extend(tmp_path, method):
    from transformers import MistralConfig

    folder = tmp_path / "windowed"
    words = tiny.tokenizer()
    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        MistralConfig(vocab_size=len(words), num_key_value_heads=1, sliding_window=8, **settings)
    )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    with pytest.raises(TrainError, match=r"explicit mask.*model\.attention"):
        train_local(job_of(folder, METHODS[method]), tiny.chats(8), str(tmp_path / "run"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2"])
def test_a_saved_prompt_scores_as_it_was_trained(folder, tmp_path, method, attention):
    """The first loss of a run that goes nowhere, against PEFT with the saved prompt, document by document."""
    still = {"type": "adamw", "lr": 1e-12}
    job = job_of(folder, METHODS[method], steps=1, optimizer=still, **{"model.attention": attention})
    outcome = train_local(job, tiny.chats(8), str(tmp_path))
    assert outcome.model_path is None
    from itune_ray.data.chat import ChatRenderer

    model = load_adapted(AutoModelForCausalLM.from_pretrained(folder), outcome.adapter_path)
    total = count = 0
    for record in tiny.chats(8):
        ids, supervised = ChatRenderer(tiny.tokenizer()).training_ids(record.messages)
        targets = torch.tensor([[i if on else -100 for i, on in zip(ids, supervised, strict=True)]])[0, 1:]
        with torch.no_grad():
            log_p = model(torch.tensor([ids]), use_cache=False).logits[0, -len(ids) : -1].log_softmax(-1)
        on = targets != -100
        total -= float(log_p[on].gather(-1, targets[on, None]).sum())
        count += int(on.sum())
    assert outcome.metrics["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("peft", "told"),
    [
        ({"type": "peft", "method": "OFT", "args": {"oft_blocksize": 8}}, "did you mean 'oft_block_size'"),
        (
            {"type": "peft", "method": "OFT", "args": {"target_modules": ["query"]}},
            r"OFT cannot be applied.*peft\.args",
        ),
        ({"type": "houlsby", "reduction": 1000}, r"no width.*hidden size 64.*model\.peft\.reduction"),
        ({"type": "compacter", "reduction": 21}, r"no multiple of Compacter's terms; got 3"),
        ({"type": "qlora", "target": ["query"]}, r"LoRA cannot be applied.*q_proj"),
        ({"type": "prompt_tuning", "text": ""}, "no token"),
    ],
)
def test_what_cannot_be_applied_is_one_clear_line(folder, tmp_path, peft, told):
    with pytest.raises(ModelError, match=told):
        train_local(job_of(folder, peft), tiny.chats(8), str(tmp_path))


def test_a_method_of_another_name_is_refused_with_the_names(folder):
    with pytest.raises(ValidationError, match="IA3"):
        job_of(folder, {"type": "peft", "method": "IA4"})
