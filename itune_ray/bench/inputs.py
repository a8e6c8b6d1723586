"""What both sides of the train bench read: a random model, a tokenizer of whole words, documents of random words."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from itune_ray.config.bench import TrainBench
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.records import Record, row_rng

SPREAD = 0.5
"""Standard deviation of the logarithm of a length."""
SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


@dataclass(frozen=True)
class Inputs:
    """A folder as `turns.Task` describes it, and how many of its documents fill a step."""

    folder: str
    documents_per_step: int
    parameters: int


def write_inputs(bench: TrainBench, folder: Path, pairs: bool, seed: int) -> Inputs:
    """Write model, tokenizer and documents.

    Args:
        pairs: Preference pairs instead of chats.
    """
    words = tokenizer(int(bench.config["vocab_size"]))
    renderer = ChatRenderer(words)
    rows = [record(bench, position, pairs, seed) for position in range(bench.documents)]
    folder.mkdir(parents=True)
    kept = [{"messages": list(row.messages), "rejected": row.rejected} for row in rows]
    _write_lines(folder / "records.jsonl", [{k: v for k, v in row.items() if v is not None} for row in kept])
    _write_lines(folder / "documents.jsonl", [peer_row(row, renderer) for row in rows])
    parameters = _write_model(bench.config, words, folder / "model", seed)
    return Inputs(str(folder), _documents_per_step(bench, rows, renderer), parameters)


def tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """One token per word: `w5` is the sixth that is not special."""
    names = [*SPECIAL, *(f"w{i}" for i in range(num_words - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=list(SPECIAL[2:]),
    )
    fast.chat_template = TEMPLATE
    return fast


def record(bench: TrainBench, position: int, pairs: bool, seed: int) -> Record:
    """One chat, its text a function of (seed, position)."""
    rng = row_rng(seed, "bench", str(position))
    num_words = int(bench.config["vocab_size"]) - len(SPECIAL)
    asked, answered, other = (
        _text(rng, median, num_words, bench.pack_length // 2)
        for median in (bench.prompt_tokens, bench.answer_tokens, bench.answer_tokens)
    )
    messages = ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    return Record(source="bench", position=position, messages=messages, rejected=other if pairs else None)


def _text(rng: random.Random, median: float, num_words: int, most: int) -> str:
    length = min(max(1, round(rng.lognormvariate(math.log(median), SPREAD))), most - 4)
    return " ".join(f"w{rng.randrange(num_words)}" for _ in range(length))


def peer_row(row: Record, renderer: ChatRenderer) -> dict[str, Any]:
    """The document as ids and labels; a pair as texts, which TRL's trainer tokenises itself."""
    if row.rejected is not None:
        prompt = renderer.prompt_text(row.prompt).rstrip()
        return {"prompt": f"{prompt} ", "chosen": f"{row.response} <|end|>", "rejected": f"{row.rejected} <|end|>"}
    ids, supervised = renderer.record_ids(row)
    labels = [i if flag else -100 for i, flag in zip(ids, supervised, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _documents_per_step(bench: TrainBench, rows: list[Record], renderer: ChatRenderer) -> int:
    lengths = [len(renderer.record_ids(row).input_ids) for row in rows]
    mean = sum(lengths) / len(lengths) * (1 if rows[0].rejected is None else 2)
    return max(1, int(bench.rows_per_step * bench.pack_length / mean))


def _write_model(config: dict[str, Any], words: PreTrainedTokenizerFast, folder: Path, seed: int) -> int:
    kind, fields = str(config["model_type"]), {k: v for k, v in config.items() if k != "model_type"}
    special = {name: getattr(words, name) for name in ("eos_token_id", "pad_token_id")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **special, **fields), dtype=torch.float32)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
