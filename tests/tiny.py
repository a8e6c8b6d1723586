"""Tiny real models, tokenizers, rows and jobs that the tests of data, model and train share."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from testdata import public_data
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record, TopK

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ["apple", "river", "stone", "cloud", "maple", "tiger", "lemon", "piano", "rocket", "garden", "violet", "copper"]


def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([" ".join(WORDS), "user\nassistant\nsystem\n", "hello there\n\n"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = template
    return fast


def split_as_published(words: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """With the pieces of Llama 3's and Qwen's tokenizers: line breaks before a word stay one piece whatever follows,
    which decides where an answer begins."""
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_byte])
    return words


def shape(words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config of a two-layer decoder with grouped queries; head_dim 32 is what vLLM's CPU attention takes."""
    return {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def spread(model: torch.nn.Module) -> None:
    """Random weights larger than the usual init, so that differences show; global random state."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
        elif parameter.abs().sum() == 0:  # biases, and Gemma's norms, which are scales minus one
            torch.nn.init.normal_(parameter, std=0.2)


def llama(folder: Path, seed: int = 1, **overrides: Any) -> Path:
    """A random two-layer Llama with grouped queries, and its tokenizer, as a Hugging Face folder."""
    words = tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**shape(words), **overrides}))
    spread(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def public_model(name: str) -> Path:
    """A model folder of the test data; skips the test where it is absent."""
    return public_data(f"models/{name}")


def chats(count: int, longest: int = 24, seed: int = 0) -> list[Record]:
    """Chats whose answers have very unequal lengths: 1 to `longest` words."""
    rng = random.Random(seed)
    rows: list[Record] = []
    for position in range(count):
        answer = rng.choices(WORDS, k=1 if position % 3 else rng.randint(longest // 2, longest))
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        rows.append(chat(question, " ".join(answer), position=position))
    return rows


def chat(question: str, answer: str, position: int = 0, **fields: Any) -> Record:
    """One question, one answer."""
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(source="tiny", position=position, messages=messages, **fields)


def classes(count: int, labels: list[str]) -> list[Record]:
    """Chats whose answer is a label: it is told by the question's first word."""
    rng = random.Random(3)
    drawn = [rng.randrange(len(labels)) for _ in range(count)]
    return [
        chat(" ".join([WORDS[label], *rng.choices(WORDS, k=position % 5)]), labels[label], position=position)
        for position, label in enumerate(drawn)
    ]


def pairs(count: int) -> list[Record]:
    """Preference rows: the same chats, each with a worse answer of another length."""
    return [
        replace(record, rejected=" ".join([*(record.response or "").split()[::-1], *WORDS[: 1 + record.position % 5]]))
        for record in chats(count)
    ]


def ranked(count: int) -> list[Record]:
    """Pairs, and chats with three or four answers, two of which may score alike."""
    made = []
    for record in pairs(count):
        words = WORDS[record.position % 6 :]
        listed = [{"response": " ".join(words[: 1 + i]), "score": s} for i, s in enumerate((0.5, 2, -1, 0.5))]
        kept = listed[: 2 + record.position % 3]
        made.append(replace(record, rejected=None, meta={"responses": kept}) if record.position % 3 else record)
    return made


def distributions(count: int, k: int = 4) -> list[Record]:
    """Distillation rows: the same chats, each with made-up top-k distributions over its answer."""
    renderer, rows = ChatRenderer(tokenizer()), []
    for record in chats(count):
        ids, supervised = renderer.record_ids(record)
        positions = tuple(i for i, flag in enumerate(supervised) if flag and i > 0)
        rng = np.random.default_rng(record.position)
        top = np.stack([rng.permutation(300)[:k] for _ in positions])
        log_probs = np.log(-np.sort(-rng.dirichlet(np.ones(k), len(positions)), axis=1) * 0.9 + 1e-3)
        teacher = TopK(
            input_ids=tuple(ids),
            positions=positions,
            k=k,
            ids=top.astype("<i4").tobytes(),
            log_probs=log_probs.astype("<f2").tobytes(),
            tokenizer=renderer.vocabulary_hash,
        )
        rows.append(replace(record, teacher=teacher))
    return rows


def job(model: Path | str, **overrides: Any) -> TrainJob:
    """A small fp32 training job on a model folder; dotted keys are nested, e.g. {"model.peft": {...}}."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(model), "attention": "eager"},
        "data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}],
        "optimizer": {"type": "adamw", "lr": 1e-3},
        "schedule": {"type": "constant", "warmup": 0.0},
        "strategy": {"type": "ddp"},
        "precision": "fp32",
        "steps": 3,
        "batch": 16,
        "max_length": 128,
        "packing": False,
        "micro_batch": 16,
        "gate": None,  # its own tests, and those of whole runs, have it
    }
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return TrainJob.model_validate(tree)
