"""The export gate: what every method writes says what was trained, and what does not is refused and gone."""

import pytest
import tiny
from methods import METHODS, OTHER_OBJECTIVE
from methods import settings as of_method

from itune_ray.config.adaptation import SUPPORT
from itune_ray.errors import ConfigError, ModelError
from itune_ray.model.gate import check_routes, gap
from itune_ray.train.gate import read_report
from itune_ray.train.loop import train_local

FAST = {"type": "adamw", "lr": 0.02}
"""So that a change that was lost is seen."""


def job_of(folder, method="lora", **overrides):
    settings = {"steps": 3, "batch": 8, "packing": True, "pack_length": 160, "micro_batch": 4, "optimizer": FAST}
    return tiny.job(folder, **{**settings, **of_method(method), "gate": {"prompts": 3}, **overrides})


def written(method: str) -> set[str]:
    """What a method writes that can be held against the trained model."""
    if method in ("full", "bitfit", "qlora"):  # a QLoRA adapter fits the rounded base, which is nowhere by itself
        return {"merged"}
    return {"adapter", "merged"} if SUPPORT[method].route in ("adapter", "merged") else {"adapter"}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in OTHER_OBJECTIVE])  # a head of scores has no gate
def test_what_a_method_writes_says_what_was_trained(folder, tmp_path, method):
    train_local(job_of(folder, method), tiny.chats(24), str(tmp_path))
    report = read_report(str(tmp_path))
    assert report.gaps.keys() == written(method)
    assert max(report.gaps.values()) < 1e-5
    assert len(report.documents) == 3
    assert [len(scores) for scores in report.trained] == [len(ids) - 1 for ids in report.documents]


def test_the_scores_are_those_of_plain_transformers(folder, tmp_path):
    """Of the untrained model, by its own loss over all tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    train_local(job_of(folder, optimizer={"type": "adamw", "lr": 1e-12}), tiny.chats(24), str(tmp_path))
    report, plain = read_report(str(tmp_path)), AutoModelForCausalLM.from_pretrained(folder)
    for ids, scores in zip(report.documents, report.trained, strict=True):
        loss = plain(torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert -sum(scores) / len(scores) == pytest.approx(loss.item(), rel=1e-5)


def test_attention_that_caps_its_scores_is_no_reason_to_refuse(tmp_path):
    """transformers' sdpa leaves the cap out, eager attention has it, on both sides of the gate."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    words = tiny.tokenizer()
    capped = {"attn_logit_softcapping": 0.05, "query_pre_attn_scalar": 32, "sliding_window": 64}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **{**tiny.shape(words), **capped}))
    tiny.spread(model)
    for part in (model, words):
        part.save_pretrained(tmp_path / "gemma2")
    job = job_of(tmp_path / "gemma2", packing=False, **{"model.attention": "eager"})
    train_local(job, tiny.chats(24), str(tmp_path / "out"))
    assert max(read_report(str(tmp_path / "out")).gaps.values()) < 1e-5


def refused(folder, out, match):
    with pytest.raises(ModelError, match=match) as caught:
        train_local(job_of(folder), tiny.chats(24), str(out))
    assert caught.value.knob == "gate.tolerance"
    assert not any((out / name).exists() for name in ("model", "adapter", "gate.json"))


def test_an_adapter_with_a_wrong_scale_is_refused(folder, tmp_path, monkeypatch):
    from itune_ray.model import export

    right = export.adapter_settings
    monkeypatch.setattr(export, "adapter_settings", lambda *a: {**right(*a), "lora_alpha": 1})
    refused(folder, tmp_path, r"export is refused: the written model \(adapter\)")


def test_a_merge_that_leaves_the_change_out_is_refused(folder, tmp_path, monkeypatch):
    from itune_ray.model import merge

    def unmerged(layer):
        return dict(merge.whole_copy(layer).get_base_layer().state_dict())

    monkeypatch.setattr(merge, "_merged_layer", unmerged)
    refused(folder, tmp_path, r"export is refused: the written model \(merged\)")


@pytest.mark.parametrize("strategy", [{"type": "fsdp2"}, {"type": "deepspeed", "stage": 3}], ids=["fsdp2", "zero3"])
def test_two_ranks_write_the_same_report(folder, tmp_path, strategy):
    from ranks import run_ranks

    from itune_ray.train.prepare import prepare_locally

    job = job_of(folder, strategy=strategy)
    for ranks, name in ((1, "one"), (2, "two")):
        prepare_locally(job, tiny.chats(24), str(tmp_path / name))
        run_ranks(ranks, _train, job, str(tmp_path / name))
    one, two = (read_report(str(tmp_path / name)) for name in ("one", "two"))
    assert one.documents == two.documents
    assert gap(one.trained, two.trained) < 1e-4
    assert max(two.gaps.values()) < 1e-5


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_in_bf16_a_gap_is_what_the_export_rounds(folder, tmp_path, method):
    """By bf16 arithmetic a right export would be off by what two kernels differ in, which can be nats at one token."""
    train_local(job_of(folder, method, precision="bf16"), tiny.chats(24), str(tmp_path))
    report = read_report(str(tmp_path))
    assert report.gaps.keys() == written(method)
    assert 0 < max(report.gaps.values()) < 0.01


def _train(job, stage):
    from itune_ray.train.loop import train_rank
    from itune_ray.train.prepare import prepare_locally

    train_rank(job, prepare_locally(job, [], stage), stage)


def test_the_worst_document_and_undefined_numbers_decide():
    trained = [[-1.0, -2.0], [-3.0]]
    assert gap(trained, [[-1.1, -2.1], [-3.4]]) == pytest.approx(0.4)
    assert check_routes(trained, {"merged": [[-1.0, -2.0], [-3.01]]}, 0.02) == {"merged": pytest.approx(0.01)}
    with pytest.raises(ModelError, match="inf nats"):
        check_routes(trained, {"merged": [[-1.0, float("nan")], [-3.0]]}, 0.02)


def test_the_gate_is_no_part_of_what_a_training_is(folder):
    assert job_of(folder).identity() == job_of(folder, gate=None).identity()


@pytest.mark.parametrize("method", [m for m in METHODS if SUPPORT[m].route == "none"])
def test_vllm_is_not_asked_about_what_it_cannot_load(folder, method):
    with pytest.raises((ValueError, ConfigError), match=f"gate.vllm cannot be asked about method {method}"):
        job_of(folder, method, gate={"vllm": {}})


def test_vllm_is_not_asked_about_virtual_tokens_without_a_base(folder):
    init = {"config": {"model_type": "llama", "hidden_size": 32}, "tokenizer": str(folder)}
    overrides = {"model.path": None, "model.init": init, "gate": {"vllm": {}}}
    with pytest.raises((ValueError, ConfigError), match="needs a base to serve method prompt_tuning on"):
        job_of(folder, "prompt_tuning", **overrides)
