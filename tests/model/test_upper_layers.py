"""LLaMA-Adapter and LLaMA-Excitor against their formulas, their published sizes, and what a key edit promises."""

import math

import pytest
import tiny
import torch
from methods import config
from test_peft_methods import adapted, base_of, scores
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding, apply_rotary_pos_emb

from itune_ray.errors import ModelError
from itune_ray.model.peft import apply_peft
from itune_ray.model.peft.excitor import NAME, apply_excitor
from itune_ray.model.peft.llama_adapter import apply_llama_adapter

IDS = torch.arange(4, 24)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def of_7b(**overrides):
    """Llama 7B's shapes, without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**{"num_hidden_layers": 32, **overrides}))


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def disturbed(model, scale=1.0):
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn_like(parameter)
    return model.eval()


def attention_inputs(attention, dtype=torch.float32, tokens=6) -> dict[str, object]:
    torch.manual_seed(2)
    x = torch.randn(2, tokens, attention.config.hidden_size, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(attention.config)(x, torch.arange(tokens)[None])
    mask = torch.full((tokens, tokens), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    return {"hidden_states": x, "position_embeddings": (cos, sin), "attention_mask": mask}


def projected(attention, inputs, repeat=True) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, heads, T, d], rotated."""
    x = inputs["hidden_states"]
    matrices = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (m(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for m in matrices)
    q, k = apply_rotary_pos_emb(q, k, *inputs["position_embeddings"])
    groups = attention.num_key_value_groups if repeat else 1
    return q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def test_adapter_and_excitor_of_7b_have_the_published_sizes():
    """30 layers of 10 prompts; and of 30 prompts and one pair of rank 16, with one gate per layer as published."""
    assert trainable(apply_llama_adapter(of_7b(), config("llama_adapter", tokens=10, layers=None))) == (
        30 * (10 * 4096 + 1)
    )
    settings = config("llama_excitor", tokens=30, rank=16, layers=None)
    one_gate = of_7b(num_attention_heads=1, num_key_value_heads=1, head_dim=4096)
    assert trainable(apply_excitor(one_gate, settings)) == 7_618_590
    assert trainable(apply_excitor(of_7b(), settings)) == 7_618_590 + 30 * 31  # a gate per key head


@pytest.mark.parametrize("method", ["llama_adapter", "llama_excitor"])
def test_a_closed_gate_is_the_base_exactly_and_only_its_gate_moves_first(folder, method):
    model = adapted(folder, method)
    with torch.no_grad():
        assert torch.equal(scores(model), scores(base_of(folder)))
    scores(model).sum().backward()
    moved = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"adaption_gate" if method == "llama_adapter" else "gate"}


@pytest.mark.parametrize("method", ["llama_adapter", "llama_excitor"])
def test_layers_are_adapted_from_the_top(tmp_path, method):
    folder = tiny.llama(tmp_path, num_hidden_layers=4)

    def layers(**settings):
        names = (n for n, p in adapted(folder, method, **settings).named_parameters() if p.requires_grad)
        return sorted({int(name.partition("layers.")[2].partition(".")[0]) for name in names})

    assert layers(layers=3) == [1, 2, 3]
    assert layers(layers=None) == [2, 3]
    with pytest.raises(ModelError, match=r"fewer layers.*got 5.*at most 4.*model\.peft\.layers"):
        adapted(folder, method, layers=5)


def test_prompts_have_a_softmax_and_a_gate_of_their_own(folder):
    """o = (Attn(x) + g softmax(Q K_Pᵀ / √d) V_P) W_o, with two query heads on one key head."""
    model = disturbed(adapted(folder, "llama_adapter"))
    wrapped = model.base_model.model.model.layers[1].self_attn
    attention, inputs = wrapped.model, attention_inputs(wrapped.model)
    with torch.no_grad():
        q, k, v = projected(attention, inputs)
        plain = ((q @ k.mT / math.sqrt(32)) + inputs["attention_mask"]).softmax(-1) @ v
        prompt = wrapped.adaption_prompt
        p_k, p_v = (m(prompt).unflatten(-1, (1, 32)).transpose(1, 2) for m in (attention.k_proj, attention.v_proj))
        seen = wrapped.adaption_gate * (q @ p_k.mT / math.sqrt(32)).softmax(-1) @ p_v
        expected = attention.o_proj((plain + seen).transpose(1, 2).flatten(2))
        torch.testing.assert_close(wrapped(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
        assert (attention(**inputs)[0] - expected).abs().max() > 0.1


def test_families_and_heads_that_the_library_cannot_do_are_refused():
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    qwen = AutoModelForCausalLM.from_config(Qwen3Config(**settings, **heads, head_dim=16))
    with pytest.raises(ModelError, match=r"got 'qwen3'.*llama or mistral.*model\.peft\.type"):
        apply_llama_adapter(qwen, config("llama_adapter"))
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**settings, **heads, head_dim=24))
    with pytest.raises(ModelError, match=r"2 heads of 24.*allowed: 32"):
        apply_llama_adapter(wide, config("llama_adapter"))


def test_the_edited_key_is_the_logit_form(folder):
    """softmax((Q Kᵀ + g Q K_Eᵀ) / √d) V by hand, K_E from the definition."""
    model = disturbed(adapted(folder, "llama_excitor"))
    attention = model.model.layers[1].self_attn
    own, inputs = getattr(attention, NAME), attention_inputs(attention)
    with torch.no_grad():
        q, k, v = projected(attention, inputs)
        x, p = inputs["hidden_states"], own.prompts
        k_extra = ((x @ own.down.weight.T @ own.up.weight.T @ p.T) / math.sqrt(p.shape[1])).softmax(-1) @ p
        s, s_extra = q @ k.mT / math.sqrt(32), q @ k_extra[:, None].mT / math.sqrt(32)
        weights = (s + own.gate * s_extra + inputs["attention_mask"]).softmax(-1)
        expected = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attention(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
        assert (weights - (s + inputs["attention_mask"]).softmax(-1)).abs().max() > 0.1


def test_an_excitor_generates_with_a_cache_what_it_generates_without(folder):
    model = disturbed(adapted(folder, "llama_excitor"))
    asked = {"input_ids": IDS, "do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    cached, plain = (model.generate(**asked, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, base_of(folder).eval().generate(**asked))


def test_what_comes_later_changes_nothing_before_it(folder):
    model = disturbed(adapted(folder, "llama_excitor"))
    other = IDS.clone()
    other[0, 12:] = 7
    with torch.no_grad():
        one, two = (model(ids, use_cache=False).logits for ids in (IDS, other))
    assert torch.equal(one[:, :12], two[:, :12])
    assert not torch.equal(one[:, 12:], two[:, 12:])


def test_gradients_of_the_key_edit_are_right_in_double_precision():
    """Through attention, with gates far from zero; sdpa, since eager attention rounds its weights to fp32."""
    settings = LlamaConfig(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=2, num_hidden_layers=1, vocab_size=8
    )
    model = AutoModelForCausalLM.from_config(settings, attn_implementation="sdpa").double()
    disturbed(apply_excitor(model, config("llama_excitor", tokens=3, rank=2, layers=1)).double())
    attention: LlamaAttention = model.model.layers[0].self_attn
    own = getattr(attention, NAME)
    own.gate.data.fill_(1.5)
    inputs = attention_inputs(attention, torch.float64, tokens=4)
    names = [name for name, p in attention.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in attention.parameters() if p.requires_grad]
    assert len(values) == 4

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        replaced = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, replaced, (), {**inputs, "hidden_states": x})[0]

    x = inputs["hidden_states"]
    assert isinstance(x, Tensor)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *values))
    with torch.no_grad():
        gradients = torch.autograd.functional.jacobian(lambda p: run(x, *values[:2], p, values[3]).sum(), values[2])
    assert gradients.abs().max() > 1e-4  # a check of zeros would prove nothing


def test_an_excitor_works_where_keys_are_normed_and_heads_are_wide():
    settings = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    qwen = Qwen3Config(**settings, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
    model = AutoModelForCausalLM.from_config(qwen)
    before = model(IDS, use_cache=False).logits
    wrapped = disturbed(apply_peft(model, config("llama_excitor", layers=1), tiny.tokenizer(), 0))
    assert (wrapped(IDS, use_cache=False).logits - before).abs().max() > 1e-3


def test_attention_without_a_key_matrix_is_refused():
    from transformers import GPT2Config

    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(ModelError, match=r"no `self_attn\.k_proj`.*got 'gpt2'"):
        apply_excitor(model, config("llama_excitor", layers=1))
