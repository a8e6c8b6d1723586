"""Numbers and identities that do not come from the code under test."""

import json
import math

import pytest
import tiny
import torch
from methods import METHODS, config
from test_peft_methods import adapted, base_of, scores, trained
from test_upper_layers import attention_inputs, projected
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AutoModelForCausalLM, LlamaConfig

from itune_ray.config.adaptation import SUPPORT
from itune_ray.model.export import write_adapter
from itune_ray.model.nf4 import Nf4Linear
from itune_ray.model.peft import apply_peft, parameter_report
from itune_ray.model.peft.bottleneck import BottleneckAdapter, CompacterAdapter, PhmLinear
from itune_ray.model.peft.prompts import prefix_cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def llama(**overrides):
    settings = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **overrides}))


def trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_rank_4_on_8_square_matrices_of_256_trains_16384_weights_3_percent_of_each():
    base = llama(hidden_size=256, num_hidden_layers=4, num_key_value_heads=4)
    report = parameter_report(apply_peft(base, config("lora", target=["q_proj", "v_proj"]), tiny.tokenizer(), 0))
    assert report.trainable == sum(m.trainable for m in report.matrices) == 16_384
    assert {m.ratio for m in report.matrices} == {4 * (1 / 256 + 1 / 256)}
    assert report.ratio < 0.03125 / 2  # eq. 8 holds per matrix, not per model


def test_the_scale_is_2_and_with_rslora_5_657(folder):
    for method, expected in (("lora", 2.0), ("rslora", 5.657)):
        model = adapted(folder, method, rank=8, alpha=16.0)
        scale = model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]
        assert scale == pytest.approx(expected, abs=5e-4)
        assert scale == (16 / 8 if method == "lora" else 16 / math.sqrt(8))


@pytest.mark.parametrize(("method", "extra"), [("dora", "out_features"), ("adalora", "rank"), ("lora", None)])
def test_the_report_counts_what_a_variant_trains_beside_a_and_b(folder, method, extra):
    model = adapted(folder, method)
    report = parameter_report(model)
    assert report.trainable == trainable(model) == sum(m.trainable for m in report.matrices)
    for matrix in report.matrices:
        assert matrix.extra == (getattr(matrix, extra) if extra else 0)


def test_four_bits_hide_no_weight_from_the_report(folder):
    assert parameter_report(adapted(folder, "qlora")) == parameter_report(adapted(folder, "lora"))


def test_dora_is_its_closed_form(folder):
    """W' = m (W0 + s B A) / |W0 + s B A|, lengths of rows; m starts as those of W0."""
    model = adapted(folder, "dora")
    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    w0, m = layer.base_layer.weight, layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(m, w0.norm(dim=1))
    torch.manual_seed(0)
    with torch.no_grad():
        m.mul_(1.3)
        layer.lora_B["default"].weight.normal_()
        changed = w0 + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected = m[:, None] * changed / changed.norm(dim=1, keepdim=True)
        x = torch.randn(5, w0.shape[1])
        assert (layer(x) - x @ expected.T).abs().max() < 1e-5


def test_ia3_scales_keys_values_and_what_goes_into_the_second_mlp_matrix(folder):
    names = {n.split(".")[-3] for n, p in adapted(folder, "ia3").named_parameters() if p.requires_grad}
    assert names == {"k_proj", "v_proj", "down_proj"}
    model = adapted(folder, "ia3")
    assert trainable(model) == 2 * (32 + 32 + 96)


def test_a_prefix_of_10_tokens_in_3_layers_with_2_heads_of_8_has_960_numbers():
    base = llama(num_hidden_layers=3, num_key_value_heads=2)
    assert trainable(apply_peft(base, config("p_tuning_v2", tokens=10), tiny.tokenizer(), 0)) == 960


def test_a_family_whose_heads_are_wider_than_its_hidden_size_gets_prefixes_of_the_heads_width():
    base = llama(num_hidden_layers=2, num_key_value_heads=2, head_dim=24)
    assert trainable(apply_peft(base, config("p_tuning_v2", tokens=3), tiny.tokenizer(), 0)) == 3 * 2 * 2 * 2 * 24


def test_attention_over_a_prefix_is_a_gated_sum(folder):
    """softmax(Q [P_K; K]) [P_V; V] = (1 - λ) Attn(x) + λ Attn(P), λ the share of the weights on the prefix; of a layer
    of the model, behind the keys and values that prefix tuning puts into its cache."""
    model = adapted(folder, "p_tuning_v2", tokens=3)
    layer = model.get_base_model().model.layers[1].self_attn
    inputs = {**attention_inputs(layer), "hidden_states": 3 * torch.randn(1, 6, 64)}
    mask = torch.cat([torch.zeros(1, 1, 6, 3), inputs["attention_mask"]], -1)
    prompt = torch.randn(3, 2 * 2 * 32)
    layer.o_proj = torch.nn.Identity()
    with torch.no_grad():
        q, k, v = projected(layer, inputs)
        cache = prefix_cache(prompt, layers=2, heads=1, size=1)
        joined = layer(**{**inputs, "attention_mask": mask}, past_key_values=cache)[0]
        p_k, p_v = prompt[:, 2 * 32 : 3 * 32], prompt[:, 3 * 32 :]  # of the second layer
        weights = ((q @ torch.cat([p_k.expand(1, 2, -1, -1), k], 2).mT / math.sqrt(32)) + mask).softmax(-1)
        gate = weights[..., :3].sum(-1, keepdim=True)
        own = attention(q, k, v, attn_mask=inputs["attention_mask"])
        expected = (1 - gate) * own + gate * attention(q, p_k.expand(1, 2, -1, -1), p_v.expand(1, 2, -1, -1))
    assert 0.01 < float(gate.mean()) < 0.99
    torch.testing.assert_close(joined, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


def test_ia3_is_its_closed_form(folder):
    """k' = l_k ⊙ k, and what goes into the second MLP matrix is l_ff ⊙ (gate · up)."""
    model = adapted(folder, "ia3")
    layer = model.base_model.model.model.layers[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for module, size in ((layer.self_attn.k_proj, 64), (layer.mlp.down_proj, 96)):
            (scale,) = module.ia3_l.values()
            scale.normal_()
            x, own, weight = torch.randn(5, size), scale.flatten(), module.base_layer.weight
            expected = (x * own) @ weight.T if module is layer.mlp.down_proj else (x @ weight.T) * own
            torch.testing.assert_close(module(x), expected)


def test_an_adapter_takes_4_operations_per_weight_and_token_and_6_per_own_weight():
    """Where full training takes 6: frozen matrices get no weight gradients. The lowest q, k and v, of whose input
    nothing is trained, get none at their input either."""
    from torch.utils.flop_counter import FlopCounterMode

    def operations(method):
        base = llama(vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_key_value_heads=4)
        model = apply_peft(base, config(method), tiny.tokenizer(), 0)
        ids = torch.arange(64)[None]
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids, use_cache=False).loss.backward()
        return counter.get_total_flops(), trainable(model)

    (adapter, own), (full, weights) = operations("lora"), operations("full")
    matrices = weights - 512 * 256 - 9 * 256  # all but the input embedding and the norms
    expected = (4 * matrices + 6 * own - 2 * 3 * 256 * 256) / (6 * matrices)
    assert adapter / full == pytest.approx(expected, abs=2e-3)


def test_a_prompt_starts_at_the_words_it_is_told(folder):
    words = tiny.tokenizer()
    model = adapted(folder, "prompt_tuning", text="apple river", tokens=7)
    table = model.get_base_model().get_input_embeddings().weight
    ids = words("apple river", add_special_tokens=False)["input_ids"]
    wanted = (ids * 7)[:7]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[wanted])


def test_added_biases_change_nothing_until_they_are_trained(folder):
    model = adapted(folder, "bitfit")
    with torch.no_grad():
        assert torch.equal(scores(model), scores(base_of(folder)))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7
    assert all(n.endswith(".bias") for n in names)
    assert model.config.attention_bias
    assert model.config.mlp_bias


def test_a_family_without_biases_in_its_config_is_refused(folder):
    from transformers import MistralConfig

    from itune_ray.errors import ModelError

    settings = {"vocab_size": 340, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(MistralConfig(**settings, num_attention_heads=2, num_key_value_heads=1))
    with pytest.raises(ModelError, match=r"no biases.*attention_bias.*model\.peft\.type"):
        apply_peft(model, config("bitfit"), tiny.tokenizer(), 0)


def test_the_hypercomplex_map_is_a_sum_of_kronecker_products():
    torch.manual_seed(0)
    layer, shared = PhmLinear(4, 16, 24), torch.randint(-9, 9, (4, 4, 4)).float()
    for parameter in (layer.s, layer.t):  # whole numbers, whose sums no order can round
        parameter.data = torch.randint(-9, 9, parameter.shape).float()
    expected = sum(torch.kron(shared[i], layer.s[i] @ layer.t[i]) for i in range(4))
    assert torch.equal(layer.matrix(shared), expected)


def test_a_bottleneck_of_128_over_4096_has_1048576_weights_and_compacter_8448():
    dense = BottleneckAdapter(4096, 128)
    assert sum(p.numel() for p in dense.parameters() if p.ndim > 1) == 1_048_576
    compact = CompacterAdapter(4096, 128, 4, torch.nn.Parameter(torch.zeros(4, 4, 4)))
    assert sum(p.numel() for n, p in compact.named_parameters() if n != "shared" and "bias" not in n) == 8_448


def test_compacters_adapters_share_one_a(folder):
    model = adapted(folder, "compacter")
    shared = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(".shared")}
    assert len(shared) == 1


def test_compacter_starts_in_the_published_ranges(folder):
    """adapter-hub's: A by N(0, (1e-4)²); s_i and t_i uniform within sqrt(6 / (rows + columns)); biases zero."""
    model = adapted(folder, "compacter")  # hidden size 64, bottleneck 8, 4 terms; four adapters
    started = dict(model.named_parameters())
    shared = [p for n, p in started.items() if n.endswith(".shared")]
    assert [p.numel() for p in shared] == [64]
    assert 0.7e-4 < float(shared[0].std()) < 1.3e-4
    assert abs(float(shared[0].mean())) < 0.5e-4
    for name, long in (("down.s", 16), ("down.t", 2), ("up.s", 2), ("up.t", 16)):
        values = torch.cat([p.flatten() for n, p in started.items() if n.endswith(f"adapter.{name}")])
        bound = math.sqrt(6 / (long + 1))
        assert len(values) == 4 * 4 * long
        assert 0.85 * bound < float(values.abs().max()) <= bound
        assert float(values.square().mean()) == pytest.approx(bound**2 / 3, rel=0.45)
    biases = [p for n, p in started.items() if "adapter" in n and n.endswith(".bias")]
    assert len(biases) == 8
    assert not any(p.any() for p in biases)


def test_every_part_of_compacter_has_a_gradient_at_the_start(folder):
    """A zero in one factor would stop the other and A."""
    model = adapted(folder, "compacter")
    scores(model).sum().backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert still == []


def test_pfeiffer_is_houlsby_without_attention(folder):
    def places(method):
        return sorted(n for n, _ in adapted(folder, method).named_modules() if n.endswith("bottleneck_adapter"))

    assert places("pfeiffer") == [f"model.layers.{i}.mlp.bottleneck_adapter" for i in (0, 1)]
    assert len(places("houlsby")) == 4


def test_a_bottleneck_sits_inside_the_residual(folder):
    model = adapted(folder, "pfeiffer")
    mlp = model.model.layers[0].mlp
    trained(model)
    x = torch.randn(1, 3, 64)
    with torch.no_grad():
        plain = type(mlp).forward(mlp, x)
        adapter = mlp.bottleneck_adapter
        by_hand = plain + adapter.up(torch.nn.functional.silu(adapter.down(plain)))
        torch.testing.assert_close(mlp(x), by_hand)
        assert (mlp(x) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_gradients_of_bottlenecks_are_right_in_double_precision(kind):
    torch.manual_seed(0)
    shared = torch.nn.Parameter(torch.randn(2, 2, 2))
    module = (BottleneckAdapter(6, 4) if kind == "dense" else CompacterAdapter(6, 4, 2, shared)).double()
    names = [name for name, _ in module.named_parameters()]
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


def test_only_the_head_and_embeddings_of_a_qlora_base_keep_their_bits(folder):
    model = adapted(folder, "qlora")
    rounded = [n for n, m in model.named_modules() if isinstance(m, Nf4Linear)]
    assert len(rounded) == 14
    assert not [n for n in rounded if "lm_head" in n]


@pytest.mark.real
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "adalora", "ia3", "oft", "vera", "p_tuning_v2"])
def test_vllm_takes_an_adapter_exactly_where_the_table_says(folder, tmp_path, method):
    """By the check that vLLM itself makes of an adapter folder."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    write_adapter(adapted(folder, method), tiny.tokenizer(), str(tmp_path), base_path=str(folder))

    def accepted():
        try:
            PEFTHelper.from_local_dir(str(tmp_path), None).validate_legal(LoRAConfig(max_lora_rank=16))
        except (ValueError, TypeError):
            return False
        return json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"

    assert accepted() == (SUPPORT[method].route == "adapter")


def test_every_method_has_a_config_here():
    assert METHODS.keys() == SUPPORT.keys()
