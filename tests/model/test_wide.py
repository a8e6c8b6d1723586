"""Norms, gates and attention that stay in fp32 between products by fp32 units: nearer to fp32 than autocast is."""

import copy
import subprocess
import sys

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from itune_ray.model import cpu
from itune_ray.model.cpu import install_wide_products

WORDS = 64
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
    "gemma3_text": {},  # none of its norms and gates are known
}


@pytest.fixture(autouse=True)
def no_bf16_units(monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)


def random_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **FAMILIES[family]))
    tiny.spread(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
    return model


def logits_and_gradients(model, dtype):
    torch.manual_seed(1)
    ids = torch.randint(0, WORDS, (2, 12))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach().float(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(one, other):
    squares = sum(float((one[name] - other[name]).square().sum()) for name in other)
    return (squares / sum(float(grad.square().sum()) for grad in other.values())) ** 0.5


@pytest.mark.parametrize("low_rank", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nearer_to_fp32_than_autocast(family, low_rank):
    if low_rank:
        model = get_peft_model(random_model(family), LoraConfig(target_modules=["q_proj", "o_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1)
    else:
        model = random_model(family)
    exact, wide = copy.deepcopy(model), copy.deepcopy(model)
    install_wide_products(wide)
    logits, gradients = logits_and_gradients(exact, torch.float32)
    plain_logits, plain = logits_and_gradients(model, torch.bfloat16)
    wide_logits, found = logits_and_gradients(wide, torch.bfloat16)
    assert found.keys() == gradients.keys()
    assert all(found[name].dtype == gradients[name].dtype for name in found)
    assert distance(found, gradients) < distance(plain, gradients) < 0.1
    assert (wide_logits - logits).norm() < (plain_logits - logits).norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bf16_weights_without_autocast(family):
    wide = random_model(family).bfloat16()
    exact = copy.deepcopy(wide).float()
    install_wide_products(wide)
    logits, gradients = logits_and_gradients(exact, torch.float32)
    found_logits, found = logits_and_gradients(wide, torch.float32)
    assert (found_logits - logits).norm() < 0.02 * logits.norm()
    assert distance({name: grad.float() for name, grad in found.items()}, gradients) < 0.05


def test_fp32_is_left_as_it_is():
    model = random_model("llama")
    wide = copy.deepcopy(model)
    install_wide_products(wide)
    logits, gradients = logits_and_gradients(model, torch.float32)
    same_logits, same = logits_and_gradients(wide, torch.float32)
    assert torch.equal(logits, same_logits)
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)


def test_an_mlp_with_another_layer_in_it_keeps_its_own_gate():
    model = random_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = nn.Sequential(mlp.up_proj)
    exact = copy.deepcopy(model)
    install_wide_products(model)
    assert "forward" not in vars(mlp)
    assert "forward" in vars(model.model.layers[1].mlp)
    assert (
        distance(logits_and_gradients(model, torch.bfloat16)[1], logits_and_gradients(exact, torch.float32)[1]) < 0.05
    )


def test_norm_and_gate_by_autograd():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    gate, up = (torch.randn(2, 7, 24, requires_grad=True) for _ in range(2))
    towards, through = torch.randn(2, 7, 16), torch.randn(2, 7, 24)
    normed = cpu._ScalingNorm.apply(hidden, weight, 1e-3)
    gated = cpu._Gate.apply(gate, up)
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
    cpu._ScalingNorm.apply(hidden, weight, 1e-6).sum().backward()
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
        [torch.ones(7_500_000) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
@pytest.mark.parametrize("kept", [True, False])
def test_kept_memory_is_not_faulted_in_again(kept):
    """In processes of their own, since it cannot be undone."""
    command = [sys.executable, "-c", PROGRAM, "keep" if kept else "give back"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pages = 7_500_000 * 4 // 4096
    assert (int(done.stdout) < pages) is kept
