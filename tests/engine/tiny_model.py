"""A model small enough for tests that vLLM's CPU attention can run: public stories260K, else random weights."""

import json
from pathlib import Path

from testdata import TEST_DATA

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def model_folder(target: Path) -> Path:
    """A float32 Llama of head_dim 32 with tokenizer and context 512."""
    public = TEST_DATA / "models" / "stories260K"
    return public if public.exists() else random_llama(target)


def random_llama(target: Path) -> Path:
    """Random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save(str(target / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))
    return target


def lora_folder(base: Path, target: Path, seed: int, trained_tokens: tuple[int, ...] = ()) -> Path:
    """A LoRA adapter that changes what the model says, by matrices and by whole rows of tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = {"embed_tokens": list(trained_tokens)} if trained_tokens else None
    targets = ["q_proj", "v_proj", "o_proj"]
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, trainable_token_indices=rows))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
        if "trainable_tokens" in name:
            weight.data += 0.5 * torch.randn_like(weight)
    tuned.save_pretrained(str(target))
    return target
