import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from itune_ray.config.train import LoraConfig
from itune_ray.errors import ModelError
from itune_ray.model.logprobs import install_fused_head
from itune_ray.model.merge import merged_tensors
from itune_ray.model.peft import apply_peft, parameter_report


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


def adapted(folder, seed=0, **settings):
    model = AutoModelForCausalLM.from_pretrained(folder)
    install_fused_head(model)
    return apply_peft(model, LoraConfig(**settings), tiny.tokenizer(), seed)


def disturb(model):
    """Give every adapter weight a value, as training would."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


IDS = torch.arange(4, 40)[None]


def test_trainable_parameters_are_the_sum_of_r_times_d_plus_k(folder):
    model = adapted(folder, rank=4)
    report = parameter_report(model)
    linear = [
        m
        for n, m in AutoModelForCausalLM.from_pretrained(folder).named_modules()
        if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    expected = sum(4 * (m.out_features + m.in_features) for m in linear)
    assert report.trainable == expected == sum(m.trainable for m in report.matrices)
    assert len(report.matrices) == len(linear) == 14
    assert report.ratio == report.trainable / report.total
    query = next(m for m in report.matrices if m.name == "model.layers.0.self_attn.q_proj")
    assert query.ratio == pytest.approx(4 * (1 / query.out_features + 1 / query.in_features))


def test_an_untrained_adapter_changes_nothing(folder):
    base = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(adapted(folder, rank=4)(IDS).logits, base(IDS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"rank": 4, "rslora": True, "alpha": 8.0},
        {"rank": 2, "train_tokens": ("<|im_start|>", "<|im_end|>")},
    ],
)
def test_merged_weights_compute_what_the_adapter_computes(folder, settings):
    model = adapted(folder, **settings)
    disturb(model)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    missing = merged.load_state_dict(dict(merged_tensors(model, torch.float32)), strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        difference = (model(IDS).logits - merged(IDS).logits).abs().max()
        change = (merged(IDS).logits - AutoModelForCausalLM.from_pretrained(folder)(IDS).logits).abs().max()
    assert difference < 1e-5 * max(1.0, float(change))
    assert change > 0.1


def test_scaling_is_alpha_over_r_or_its_root(folder):
    for rslora, expected in ((False, 32 / 4), (True, 32 / math.sqrt(4))):
        model = adapted(folder, rank=4, alpha=32.0, rslora=rslora)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == expected
    assert adapted(folder, rank=4).base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 2.0


def test_trained_tokens_learn_their_rows_alone(folder):
    tokens = ("<|im_start|>", "<|im_end|>")
    model = adapted(folder, rank=2, train_tokens=tokens)
    labels = IDS.clone()
    model(IDS, labels=labels, token_scores=True, use_cache=False).log_probs.sum().backward()
    rows = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    tied = model.config.tie_word_embeddings
    assert [tuple(p.shape) for p in rows] == [(2, 64)] * (1 if tied else 2)
    assert all(p.grad is not None for p in rows)
    with pytest.raises(ModelError, match=r"did you mean '<\|im_start\|>'"):
        adapted(folder, rank=2, train_tokens=("<im_start>",))


def test_starting_weights_depend_on_seed_and_name_only(folder):
    one, same, other = (dict(adapted(folder, seed=s, rank=4).named_parameters()) for s in (0, 0, 1))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert one[name].abs().max() <= 1 / math.sqrt(64)


def test_a_target_that_matches_nothing_names_what_there_is(folder):
    with pytest.raises(ModelError, match="q_proj"):
        adapted(folder, rank=4, target=("query",))
