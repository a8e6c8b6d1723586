"""Norms, gates and attention between products by fp32 units: nearer to fp32 than what rounds there, and as fp32 itself
where nothing is to be done."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from itune_ray.data.batches import collate, model_inputs
from itune_ray.data.order import PackedRow
from itune_ray.model import cpu
from itune_ray.model.cpu import install_wide_products
from itune_ray.model.documents import install_document_attention
from itune_ray.model.wide_blocks import _Gate, _ScalingNorm, install_wide_blocks

WORDS, LENGTHS = 64, (5, 12, 1, 9)
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]}
KNOWN = {
    "llama": {"norms": 7, "gates": 3},
    "mistral": {"norms": 7, "gates": 3},
    "qwen2": {"norms": 7, "gates": 3},
    "qwen3": {"norms": 13, "gates": 3},
    "qwen3_moe": {"norms": 13, "gates": 1},
}
"""Norms and gates of each family that are replaced; a router takes an expert's gate apart itself."""
OTHERS = ("gemma", "granite", "olmo2")


@pytest.fixture(autouse=True)
def no_bf16_units(monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)


def random_model(family):
    torch.manual_seed(0)
    own = {"qwen3_moe": EXPERTS, "mistral": {"sliding_window": None}}.get(family, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **own))
    tiny.spread(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    install_document_attention(model)
    return model


def with_blocks(model):
    wide = copy.deepcopy(model)
    install_wide_products(wide)
    install_wide_blocks(wide)
    return wide


def logits_and_gradients(model, autocast=False):
    """Of a flat row of documents."""
    ids = np.random.default_rng(1).integers(1, WORDS, sum(LENGTHS)).astype(np.int32)
    row = PackedRow(ids, np.ones(len(ids), dtype=bool), np.array(LENGTHS, dtype=np.int32), tuple("abcd"))
    batch = collate([row], 0, flat=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model.train()(**model_inputs(batch, "varlen", torch.bfloat16)).logits.float()
        nn.functional.cross_entropy(logits[0], batch.labels[0].roll(-1), ignore_index=-100).backward()
    return logits.detach(), {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}


def distance(one, other):
    squares = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (squares / sum(float(grad.square().sum()) for grad in other.values())) ** 0.5


@pytest.mark.parametrize("family", KNOWN)
def test_known_families_have_theirs_replaced(family):
    model = with_blocks(random_model(family))
    replaced = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    assert sum(name.endswith("RMSNorm") for name in replaced) == KNOWN[family]["norms"]
    assert sum(name.endswith("MLP") for name in replaced) == KNOWN[family]["gates"]
    assert all(layer.self_attn.unrounded for layer in model.model.layers)


@pytest.mark.parametrize("family", KNOWN)
def test_nearer_to_fp32_than_rounding_between_products(family):
    """And that is nearer than autocast, which `test_documents` shows."""
    model = random_model(family)
    rounding = copy.deepcopy(model)
    install_wide_products(rounding)
    found_logits, found = logits_and_gradients(with_blocks(model), autocast=True)
    rounded_logits, rounded = logits_and_gradients(rounding, autocast=True)
    logits, gradients = logits_and_gradients(model)
    assert found.keys() == rounded.keys() == gradients.keys()
    assert distance(found, gradients) < distance(rounded, gradients) < 0.05
    assert (found_logits - logits).norm() < (rounded_logits - logits).norm()


@pytest.mark.parametrize("units", [False, True], ids=["fp32 units", "bf16 units"])
@pytest.mark.parametrize("family", [*KNOWN, *OTHERS])
def test_bf16_weights_without_autocast(family, units, monkeypatch):
    """As fsdp2 runs them: whatever reaches a product must have its weight's dtype."""
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: units)
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    model = random_model(family).bfloat16()
    exact = copy.deepcopy(model).float()
    found_logits, found = logits_and_gradients(with_blocks(model))
    rounded_logits, rounded = logits_and_gradients(model)
    logits, gradients = logits_and_gradients(exact)
    assert distance(found, gradients) < 1.1 * distance(rounded, gradients) < 0.1
    assert (found_logits - logits).norm() < 1.1 * (rounded_logits - logits).norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fp32_is_left_as_it_is(family):
    model = random_model(family)
    same_logits, same = logits_and_gradients(with_blocks(model))
    logits, gradients = logits_and_gradients(model)
    assert torch.equal(logits, same_logits)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_a_layer_with_another_in_it_keeps_its_own_way():
    model = random_model("llama")
    first = model.model.layers[0]
    first.mlp.up_proj, first.self_attn.v_proj = nn.Sequential(first.mlp.up_proj), nn.Sequential(first.self_attn.v_proj)
    wide = with_blocks(model)
    one, other = wide.model.layers[:2]
    assert ("forward" in vars(one.mlp), one.self_attn.unrounded) == (False, False)
    assert ("forward" in vars(other.mlp), other.self_attn.unrounded) == (True, True)
    found = logits_and_gradients(wide, autocast=True)[1]
    assert distance(found, logits_and_gradients(model)[1]) < 0.05


def test_attention_through_a_mask_is_left_alone():
    model = random_model("llama")
    model.config._attn_implementation = "sdpa"
    assert not any(hasattr(layer.self_attn, "unrounded") for layer in with_blocks(model).model.layers)


def test_norm_and_gate_by_autograd():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    gate, up = (torch.randn(2, 7, 24, requires_grad=True) for _ in range(2))
    towards, through = torch.randn(2, 7, 16), torch.randn(2, 7, 24)
    normed = _ScalingNorm.apply(hidden, weight, 1e-3)
    gated = _Gate.apply(gate, up)
    found = torch.autograd.grad((normed, gated), (hidden, weight, gate, up), (towards, through))
    expected_norm = weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-3)
    expected_gate = nn.functional.silu(gate) * up
    torch.testing.assert_close(normed, expected_norm)
    torch.testing.assert_close(gated, expected_gate)
    wanted = torch.autograd.grad((expected_norm, expected_gate), (hidden, weight, gate, up), (towards, through))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_frozen_norm_has_no_gradient():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8)
    _ScalingNorm.apply(hidden, weight, 1e-6).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


PROGRAM = """
import resource, sys, torch
from itune_ray.model.cpu import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        [torch.ones(12_500_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_kept_memory_is_not_faulted_in_again():
    """In processes of their own, since it cannot be undone, whose malloc gives back all it can until told otherwise."""

    def faults(what: str) -> int:
        command = [sys.executable, "-c", PROGRAM, what]
        environment = {**os.environ, **GIVES_BACK}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    assert 10 * faults("keep") < faults("give back")
