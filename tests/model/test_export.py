import json

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from itune_ray.config.train import LoraConfig
from itune_ray.model.export import export_trained, write_model
from itune_ray.model.merge import merge_adapter
from itune_ray.model.peft import apply_peft

IDS = torch.arange(4, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("model"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_an_exported_model_opens_with_equal_logits_tokenizer_and_template(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    path, adapter = export_trained(
        model, tiny.tokenizer(), str(tmp_path), dtype=torch.float32, is_main=True, base_path=None
    )
    assert adapter is None
    again = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(again), logits(model))
    words = AutoTokenizer.from_pretrained(path)
    assert words.chat_template == tiny.CHATML
    assert words("apple river")["input_ids"] == tiny.tokenizer()("apple river")["input_ids"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"


def test_bf16_export_rounds_once(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_model(model, tiny.tokenizer(), str(tmp_path / "m"), dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert again.dtype == torch.bfloat16
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b), name


def test_large_models_are_split_into_indexed_shards(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_model(model, tiny.tokenizer(), str(tmp_path / "m"), dtype=torch.float32, shard_bytes=60_000)
    files = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))


@pytest.mark.parametrize("tokens", [(), ("<|im_start|>",)])
def test_adapter_and_merged_model_agree(folder, tmp_path, tokens):
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = apply_peft(base, LoraConfig(rank=4, train_tokens=tokens), tiny.tokenizer(), seed=0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    path, adapter = export_trained(
        model, tiny.tokenizer(), str(tmp_path), dtype=torch.float32, is_main=True, base_path=str(folder)
    )
    merged = logits(AutoModelForCausalLM.from_pretrained(path))
    reloaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    assert reloaded.peft_config["default"].base_model_name_or_path == str(folder)
    torch.testing.assert_close(logits(reloaded), merged, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(model), merged, rtol=0, atol=2e-5)
    again = merge_adapter(str(folder), adapter, str(tmp_path / "again"), dtype=torch.float32)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(again)), merged, rtol=0, atol=1e-6)


def test_a_second_export_leaves_nothing_of_the_first(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_model(model, tiny.tokenizer(), str(tmp_path / "m"), dtype=torch.float32, shard_bytes=60_000)
    write_model(model, tiny.tokenizer(), str(tmp_path / "m"), dtype=torch.float32)
    assert [f.name for f in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]


def test_fused_experts_are_exported_under_the_checkpoints_names(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "mixtral",
        vocab_size=len(tiny.tokenizer()),
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    write_model(model, tiny.tokenizer(), str(tmp_path / "m"), dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    from safetensors import safe_open

    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as tensors:
        assert any("experts.0.w1" in name for name in tensors.keys())  # noqa: SIM118  a safe_open is no dict
