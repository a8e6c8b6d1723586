import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from itune_ray.model import logprobs
from itune_ray.model.logprobs import LogitTransform, install_fused_head, score_tokens


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 64)


def oracle(hidden, targets, head, transform):
    z = head(hidden)
    z = z * transform.scale
    z = z if transform.cap is None else transform.cap * torch.tanh(z / transform.cap)
    log_p = z.float().log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, 3.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_and_gradients_equal_those_of_the_full_logits(small_chunks, transform, bias):
    torch.manual_seed(0)
    head = nn.Linear(8, 20, bias=bias)
    hidden = torch.randn(33, 8, requires_grad=True)
    targets = torch.randint(0, 20, (33,))
    weights = torch.randn(2, 33)  # upstream gradients of both scores

    def run(scores):
        head.zero_grad()
        hidden.grad = None
        (scores[0] * weights[0] + scores[1] * weights[1]).sum().backward()
        return [*scores[:2], hidden.grad.clone(), head.weight.grad.clone()]

    expected = run(oracle(hidden, targets, head, transform))
    got = run(score_tokens(hidden, targets, head, transform))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_targets_give_empty_scores_that_still_reach_the_weights():
    head = nn.Linear(8, 20, bias=False)
    hidden = torch.randn(0, 8, requires_grad=True)
    scores = score_tokens(hidden, torch.empty(0, dtype=torch.long), head)
    scores.log_probs.sum().backward()
    assert scores.log_probs.shape == (0,)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_bf16_sums_the_heads_gradient_in_fp32(small_chunks):
    torch.manual_seed(0)
    head = nn.Linear(16, 32, bias=False)
    hidden = torch.randn(4096, 16)
    targets = torch.randint(0, 32, (4096,))
    exact = torch.autograd.grad(oracle(hidden, targets, head, LogitTransform())[0].sum(), head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        scores = score_tokens(hidden, targets, head)
    got = torch.autograd.grad(scores.log_probs.sum(), head.weight)[0]
    assert scores.log_probs.dtype == got.dtype == torch.float32
    assert (got - exact).norm() / exact.norm() < 5e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def test_forward_scores_the_supervised_positions_in_order(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(4, 300, (3, 12))
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1] = -100
    with torch.no_grad():
        logits = model(ids).logits
        install_fused_head(model)
        scores = model(ids, labels=labels, token_scores=True, use_cache=False)
        assert torch.equal(model(ids).logits, logits)
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    expected = log_p[labels[:, 1:] != -100]
    torch.testing.assert_close(scores.log_probs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", ["fp32", "bf16", "bf16 by fp32 units", "bf16 weights by fp32 units"])
def test_the_full_logits_are_never_made(folder, units, monkeypatch):
    """No tensor over the words is larger than the head itself, however many tokens there are."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2048)
    monkeypatch.setattr("itune_ray.model.cpu.has_bf16_units", lambda: units == "bf16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    if units.startswith("bf16 weights"):
        model.get_output_embeddings().to(torch.bfloat16)
    install_fused_head(model)
    ids = torch.randint(4, 300, (8, 128))
    words = model.config.vocab_size
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (words,):
                largest = max(largest, out.numel())
            return out

    with Watch(), torch.autocast("cpu", torch.bfloat16, enabled=units != "fp32"):
        model(ids, labels=ids, token_scores=True, use_cache=False).log_probs.sum().backward()
    assert 2048 // words <= largest <= words * 64 < ids.numel() * words / 8


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite", "gpt2"])
def test_families_that_scale_or_cap_their_logits(family):
    from transformers import AutoConfig

    words = len(tiny.tokenizer())
    common = {"vocab_size": words, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    own = {
        "gemma2": {**shape, "final_logit_softcapping": 0.5},
        "cohere": {**shape, "logit_scale": 0.25},
        "granite": {**shape, "logits_scaling": 4.0},
        "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2},
    }[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common, **own)).eval()
    ids = torch.randint(4, words, (2, 9))
    with torch.no_grad():
        log_p = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        install_fused_head(model)
        scores = model(ids, labels=ids, token_scores=True, use_cache=False)
    torch.testing.assert_close(scores.log_probs, log_p.flatten(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_bf16_by_fp32_units_some_words_at_a_time(weights, small_chunks, monkeypatch):
    """A bf16 head is widened in parts, an fp32 one is used as it is; neither is rounded."""
    monkeypatch.setattr("itune_ray.model.cpu.has_bf16_units", lambda: False)
    monkeypatch.setattr("itune_ray.model.logprobs.WIDENED_ELEMENTS", 7 * 16)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False).to(weights)
    hidden = torch.randn(23, 16).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (23,))
    scores = score_tokens(hidden, targets, head)
    scores.log_probs.sum().backward()
    wide_hidden = hidden.detach().double().requires_grad_()
    wide_weight = head.weight.detach().double().requires_grad_()
    exact = (wide_hidden @ wide_weight.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    exact.sum().backward()
    torch.testing.assert_close(scores.log_probs.detach().double(), exact.detach(), rtol=1e-5, atol=1e-5)
    for got, wanted in ((hidden.grad, wide_hidden.grad), (head.weight.grad, wide_weight.grad)):
        assert got is not None
        assert wanted is not None
        rough = got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, rtol=2**-7 if rough else 1e-5, atol=1e-2 if rough else 1e-5)
