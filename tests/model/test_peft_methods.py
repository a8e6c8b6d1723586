"""Every method: it starts where it says, it learns, and what is written computes what was trained."""

import pytest
import tiny
import torch
from methods import METHODS, OTHER_OBJECTIVE, config
from transformers import AutoModelForCausalLM

from itune_ray.config.adaptation import SUPPORT
from itune_ray.model.export import export_trained
from itune_ray.model.logprobs import install_fused_head
from itune_ray.model.peft import apply_peft
from itune_ray.model.peft.saved import has_adapter, is_mergeable, load_adapted

IDS = torch.arange(4, 40)[None]
SCORED = IDS.clone()
SCORED[:, 0] = -100
ADAPTED = [method for method in METHODS if method not in ("full", *OTHER_OBJECTIVE)]  # these have a head of their own
MOVES_AT_ONCE = {"prompt_tuning", "p_tuning", "prefix_tuning", "p_tuning_v2", "fourierft", "qlora"}
"""Methods that change the model before their first step: virtual tokens, random spectra, rounded weights."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def base_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    install_fused_head(model)
    return model


def adapted(folder, method, seed=0, **overrides):
    return apply_peft(base_of(folder), config(method, **overrides), tiny.tokenizer(), seed)


def scores(model):
    inputs = {"input_ids": IDS, "position_ids": torch.arange(IDS.shape[1])[None], "use_cache": False}
    return model(**inputs, labels=SCORED, token_scores=True).log_probs


def plain_log_probs(model):
    """By transformers and PEFT alone; virtual tokens that come back as logits are cut off."""
    with torch.no_grad():
        logits = model.eval()(IDS, use_cache=False).logits[:, -IDS.shape[1] :]
    return logits[0, :-1].log_softmax(-1).gather(-1, IDS[0, 1:, None])[:, 0]


def trained(model, steps=3, lr=0.02):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    losses = []
    for _ in range(steps):
        loss = -scores(model).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", ADAPTED)
def test_it_starts_equal_to_its_base_or_says_why_not(folder, method):
    with torch.no_grad():
        difference = (scores(adapted(folder, method)) - scores(base_of(folder))).abs().max()
    assert (difference > 1e-3) if method in MOVES_AT_ONCE else (difference < 1e-5)


@pytest.mark.parametrize("method", ADAPTED)
def test_it_learns_with_the_base_frozen_and_is_written_as_trained(folder, tmp_path, method):
    model = adapted(folder, method).train()
    share = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert share > 0
    losses = trained(model)
    assert losses[-1] < losses[0] - 1e-3
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        wanted = scores(model.eval())
    model_path, adapter_path = export_trained(
        model, tiny.tokenizer(), str(tmp_path), dtype=torch.float32, is_main=True, base_path=str(folder)
    )
    assert (model_path is not None) == (SUPPORT[method].route in ("adapter", "merged")) == is_mergeable(model)
    assert (adapter_path is not None) == has_adapter(model) == (method != "bitfit")
    if model_path is not None:
        merged = AutoModelForCausalLM.from_pretrained(model_path)
        torch.testing.assert_close(plain_log_probs(merged), wanted, rtol=0, atol=2e-5)
    if adapter_path is not None and method != "qlora":  # that one fits the rounded base alone
        again = load_adapted(AutoModelForCausalLM.from_pretrained(folder), adapter_path)
        torch.testing.assert_close(plain_log_probs(again), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ADAPTED)
def test_the_start_is_a_function_of_the_seed_whatever_torch_drew_before(folder, method):
    def start(seed):
        torch.rand(seed + 1)
        return {n: p.detach() for n, p in adapted(folder, method, seed).named_parameters() if p.requires_grad}

    before = torch.random.get_rng_state()
    one, same = start(0), start(0)
    torch.random.set_rng_state(before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    state = torch.random.get_rng_state()
    adapted(folder, method)
    assert torch.equal(torch.random.get_rng_state(), state)
