"""Attention by document and bf16 products by fp32 units: the same numbers as the masked row and as autocast."""

import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from itune_ray.data.batches import collate, model_inputs
from itune_ray.data.order import PackedRow
from itune_ray.errors import ModelError
from itune_ray.model import cpu, documents
from itune_ray.model.cpu import install_wide_products
from itune_ray.model.documents import BY_DOCUMENT, attend_by_document, install_document_attention
from itune_ray.model.load import load_model, masking_for
from itune_ray.model.logprobs import install_fused_head

LENGTHS = (5, 1, 17, 2, 30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.llama(tmp_path_factory.mktemp("model")))


@pytest.fixture(params=["wide", "bf16 units", "amx"])
def wide(request, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: request.param != "wide")
    monkeypatch.setattr(cpu, "has_amx", lambda: request.param == "amx")
    return request.param == "wide"


def rows(first=3):
    rng = np.random.default_rng(0)
    ids = [np.full(1, first), rng.integers(4, 300, sum(LENGTHS) - 1)]
    flags = rng.random(sum(LENGTHS)) < 0.7
    packed = np.array(LENGTHS, dtype=np.int32)
    return PackedRow(np.concatenate(ids).astype(np.int32), flags, packed, tuple("abcde"))


def masked_and_by_document(folder, bf16):
    """(scores, gradients) of the same rows, two to a batch, through the mask and by document."""
    found = []
    for by_document in (False, True):
        model = load_model(folder, dtype=torch.float32, attention="sdpa")
        install_fused_head(model)
        if by_document:
            install_document_attention(model)
            install_wide_products(model)
        assert masking_for(model) == ("varlen" if by_document else "mask_4d_if_packed")
        batch = collate([rows(), rows(7)], 0, flat=by_document)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            inputs = model_inputs(batch, masking_for(model), torch.bfloat16 if bf16 else torch.float32)
            scores = model.train()(**inputs, labels=batch.labels, token_scores=True)
            (scores.log_probs.sum() / len(scores.log_probs)).backward()
        found.append((scores.log_probs.detach(), {n: p.grad for n, p in model.named_parameters()}))
    return found


def test_by_document_equals_the_masked_row(folder):
    (masked, masked_grads), (apart, apart_grads) = masked_and_by_document(folder, bf16=False)
    torch.testing.assert_close(apart, masked, rtol=1e-5, atol=1e-5)
    for name, grad in masked_grads.items():
        torch.testing.assert_close(apart_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_long_documents_take_torchs_kernel_and_give_the_same(folder, monkeypatch):
    taken = []
    apply = documents._ShortDocuments.apply
    monkeypatch.setattr(documents._ShortDocuments, "apply", lambda *given: (taken.append(1), apply(*given))[1])
    short = masked_and_by_document(folder, bf16=False)[1]
    assert taken
    taken.clear()
    monkeypatch.setattr(documents, "SHORT", max(LENGTHS) - 1)
    long = masked_and_by_document(folder, bf16=False)[1]
    assert not taken
    torch.testing.assert_close(long[0], short[0], rtol=1e-5, atol=1e-5)
    for name, grad in short[1].items():
        torch.testing.assert_close(long[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("asked", [{"dropout": 0.5}, {"is_causal": False}])
def test_what_is_not_plain_attention_is_left_to_torch(asked):
    module = nn.Module().train()
    module.num_key_value_groups = 2
    q, k, v = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    plain = attend_by_document(module, q, k, v, None, ends)[0]
    torch.manual_seed(0)
    other = attend_by_document(module, q, k, v, None, ends, **asked)[0]
    torch.manual_seed(0)
    parts = [
        sdpa_attention_forward(module, *(t[:, :, a:b] for t in (q, k, v)), None, **asked)[0]
        for a, b in ((0, 5), (5, 12))
    ]
    torch.testing.assert_close(other, torch.cat(parts, 1))
    assert not torch.allclose(other, plain)


def test_values_of_another_width_than_keys_are_left_to_torch():
    module = nn.Module()
    module.num_key_value_groups = 1
    q, k, v = (torch.randn(1, 2, 12, width) for width in (8, 8, 4))
    out = attend_by_document(module, q, k, v, None, torch.tensor([0, 5, 12], dtype=torch.int32))[0]
    parts = [sdpa_attention_forward(module, *(t[:, :, a:b] for t in (q, k, v)), None)[0] for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(out, torch.cat(parts, 1))


def test_documents_whose_weights_would_take_much_memory_are_left_to_torch():
    assert documents._short([100, 28], 64)
    assert not documents._short([130, 1], 64)  # 130² + 1 weights of a head, 2 · 64 · 131 kept at most
    assert not documents._short([documents.SHORT + 1, *[1] * 10000], 64)


def test_its_gradient_is_that_of_its_formula(monkeypatch):
    """Not what autocast would make of the backward pass; in fp64 against torch's derivative of softmax(q kᵀ) v."""
    tensors = [torch.randn(1, heads, 12, 8, requires_grad=True) for heads in (6, 2, 2)]
    ends = torch.tensor([0, 5, 12], dtype=torch.int32)
    module = nn.Module()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_by_document(module, *(t * 1.0 for t in tensors), None, ends)[0].float()
        (out**2).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    q, k, v = exact[0], *(t.repeat_interleave(3, 1) for t in exact[1:])
    causal = torch.block_diag(*(torch.ones(n, n, dtype=torch.double).tril() for n in (5, 7))).log()
    expected = (((q @ k.mT) * 8**-0.5 + causal).softmax(-1) @ v).transpose(1, 2)
    expected.backward(2 * out.detach().double().to(torch.bfloat16).double())
    torch.testing.assert_close(out, expected.float(), rtol=1e-2, atol=1e-2)
    for got, want in zip(tensors, exact, strict=True):
        torch.testing.assert_close(got.grad, want.grad.float(), rtol=1e-4, atol=1e-5)


def test_bf16_by_fp32_units_is_nearer_to_fp32_than_autocast_is(folder, wide):
    exact = masked_and_by_document(folder, bf16=False)[0]
    autocast, ours = masked_and_by_document(folder, bf16=True)

    def error(got):
        grads = torch.cat([(got[1][n] - g).flatten() for n, g in exact[1].items()])
        return float((got[0] - exact[0]).norm()), float(grads.norm())

    for got, bar in zip(error(ours), error(autocast), strict=True):
        assert got < (bar if wide else 1.5 * bar)


@pytest.mark.parametrize(
    ("found", "products", "attention"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Another"}, torch.bfloat16, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16, torch.float32),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Another"}, torch.float32, torch.float32),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32, torch.float32),
        ({}, torch.float32, torch.float32),
    ],
)
def test_what_a_cpu_is_decides_the_dtype(found, products, attention, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(cpu, "has_amx", cpu.has_amx.__wrapped__)
    monkeypatch.setattr(cpu, "has_bf16_units", cpu.has_bf16_units.__wrapped__)
    device = torch.device("cpu")
    assert cpu.wide(device, torch.bfloat16) == (products == torch.float32)
    assert cpu.attention_dtype(device, torch.bfloat16, cpu.SHORT - 1) == attention
    assert cpu.attention_dtype(device, torch.bfloat16, cpu.SHORT) == products
    assert not cpu.wide(device, torch.float32)
    assert cpu.attention_dtype(torch.device("meta"), torch.bfloat16, 1) == torch.bfloat16


def test_documents_do_not_see_each_other(folder):
    model = load_model(folder, dtype=torch.float32, attention="sdpa")
    install_document_attention(model)
    with torch.no_grad():
        first, other = (
            model(**model_inputs(collate([rows(id_)], 0, flat=True), "varlen", torch.float32)).logits for id_ in (3, 9)
        )
    assert not torch.equal(first[:, :5], other[:, :5])
    assert torch.equal(first[:, 5:], other[:, 5:])


def test_a_call_without_lengths_is_refused(folder):
    model = load_model(folder, dtype=torch.float32, attention="sdpa")
    install_document_attention(model)
    with pytest.raises(ModelError, match="documents' lengths"):
        model(torch.ones(1, 4, dtype=torch.long))


def test_the_saved_config_does_not_name_it(folder, tmp_path):
    model = load_model(folder, dtype=torch.float32, attention="sdpa")
    install_document_attention(model)
    model.save_pretrained(tmp_path)
    assert BY_DOCUMENT not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_product_rounds_its_sums_once(weights, bias, monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)
    torch.manual_seed(0)
    linear = nn.Linear(48, 24, bias=bias).to(weights)
    install_wide_products(linear)
    hidden = torch.randn(2, 9, 48).bfloat16().float().requires_grad_()
    grad = torch.randn(2, 9, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(hidden)
    out.backward(grad)
    exact = hidden.detach().double() @ linear.weight.detach().double().T
    if linear.bias is not None:
        exact = exact.bfloat16().double() + linear.bias.detach().bfloat16().double()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.detach().double(), exact, rtol=2**-8, atol=1e-3)
    wanted = grad.double().flatten(0, 1).T @ hidden.detach().double().flatten(0, 1)
    assert linear.weight.grad is not None
    rtol, atol = (1e-5, 1e-5) if weights == torch.float32 else (2**-8, 1e-3)
    torch.testing.assert_close(linear.weight.grad.double(), wanted, rtol=rtol, atol=atol)


def test_a_cast_is_made_once_and_again_after_a_change():
    cast, hidden = cpu._Cast(), torch.randn(3, 4)
    once = cast(hidden, torch.bfloat16)
    assert cast(hidden, torch.bfloat16) is once
    assert torch.equal(once, hidden.bfloat16())
    hidden += 1
    assert torch.equal(cast(hidden, torch.bfloat16), hidden.bfloat16())
    assert torch.equal(cast(hidden.T, torch.bfloat16), hidden.T.bfloat16())
    assert cast(once, torch.bfloat16) is once


def test_projections_of_one_input_sum_its_gradient_in_fp32(monkeypatch):
    """Rounded one by one, as autocast does, the sum of these two would be 0."""
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)
    one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    for linear, weight in ((one, 1.0), (other, -1.0 - 2.0**-12)):
        linear.weight.data.fill_(weight)
        install_wide_products(linear)
    hidden = torch.ones(1, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (one(hidden) + other(hidden)).backward(torch.ones(1, 1, dtype=torch.bfloat16))
    assert hidden.grad is not None
    assert hidden.grad.item() == -(2.0**-12)


def test_fp32_and_machines_with_bf16_units_keep_torchs_own(monkeypatch):
    calls = []
    monkeypatch.setattr(cpu._WideProduct, "apply", lambda *args: calls.append(args))
    linear = nn.Linear(4, 4)
    install_wide_products(linear)
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: False)
    linear(torch.ones(1, 4))
    monkeypatch.setattr(cpu, "has_bf16_units", lambda: True)
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.ones(1, 4))
    assert not calls
