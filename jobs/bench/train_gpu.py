"""The training loop on one GPU: is the loss still the same however it is cut up, how fast is it, what does it hold?

`python jobs/bench/train_gpu.py [--size 1b]`. Random weights of a Llama-3.2 shape, documents of very unequal lengths, no
network, no Ray. Prints one JSON line per figure. "plain" is what most scripts do: padded batches, full logits.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from itune_ray.config.base import validate
from itune_ray.config.train import TrainJob
from itune_ray.data.records import Record
from itune_ray.model.logprobs import score_tokens
from itune_ray.model.tokenizer import load_tokenizer
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.prepare import renderer_for

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
TOKENIZER = "playground://base"
VOCABULARY = 128_256
SKIPPED = 4
"""Steps that warm up."""


def say(name: str, **figures: Any) -> None:
    """One line, and never one that waits in a buffer."""
    print(json.dumps({"figure": name, **figures}), flush=True)


def model_folder(size: str, target: Path) -> Path:
    """A folder of random weights in bf16."""
    tokenizer = load_tokenizer(str(Path(__file__).parents[2] / "itune_ray/playground/models/base"))
    shape = SHAPES[size]
    settings: dict[str, Any] = {
        **shape,
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 8,
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(**settings)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    del model
    torch.cuda.empty_cache()
    return target


def chats(count: int, longest: int, seed: int = 0) -> list[Record]:
    """Chats of log-uniform length up to `longest` tokens: a letter is a token of this tokenizer."""
    rng, rows = random.Random(seed), []
    for position in range(count):
        letters = max(4, int(longest ** rng.uniform(0.55, 1.0)) - 24)
        answer = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(letters))
        messages = ({"role": "user", "content": "reverse ate"}, {"role": "assistant", "content": answer})
        rows.append(Record(source="bench", position=position, messages=messages, rejected=answer[::-1]))
    return rows


def job(folder: Path, **overrides: Any) -> TrainJob:
    """A training job of the loop on this GPU."""
    peft = overrides.pop("peft", {"type": "full"})
    tree = {
        "name": "bench",
        "model": {"path": str(folder), "peft": peft},
        "data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}],
        "optimizer": {"type": "adamw", "lr": 1e-5},
        "strategy": {"type": "fsdp2"},
        "steps": 12,
        "batch": 48,
        "max_length": 4096,
        "pack_length": 8192,
        "micro_batch": 1,
        "checkpoint": {"every_steps": 1000},
        **overrides,
    }
    return validate(TrainJob, tree, "bench")


def timed(name: str, folder: Path, records: list[Record], flops: float, **overrides: Any) -> float:
    """Tokens per second of the loop after warming up, documents' own tokens only."""
    out = tempfile.mkdtemp(prefix="bench-")
    torch.cuda.reset_peak_memory_stats()
    train_local(job(folder, **overrides), records, out)
    rows = read_metrics(out)
    steady = rows[SKIPPED:]
    rate = sum(row["tokens"] for row in steady) / sum(row["seconds"] for row in steady)
    say(
        name,
        tokens_per_s=round(rate),
        mfu=round(rate * flops / 989e12, 4),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        loss=[round(row["loss"], 5) for row in rows[:2]],
    )
    shutil.rmtree(out, ignore_errors=True)
    torch.cuda.empty_cache()
    return rate


def plain_loop(folder: Path, records: list[Record], steps: int = 8, micro: int = 2) -> float:
    """Padded batches, full logits, transformers' own loss, autocast: the same documents, the same optimizer."""
    renderer = renderer_for(job(folder).model.model_dump_json())
    ids = [renderer.training_ids(record.messages).input_ids for record in records]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    torch.cuda.reset_peak_memory_stats()
    tokens, began = 0, 0.0
    for step in range(steps):
        if step == 2:
            torch.cuda.synchronize()
            tokens, began = 0, time.perf_counter()
        for batch in padded(ids[step * 16 : step * 16 + 16], micro):
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**batch, use_cache=False).loss
            (loss / 8).backward()
            tokens += int(batch["attention_mask"].sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    rate = tokens / (time.perf_counter() - began)
    say("plain loop", tokens_per_s=round(rate), peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2))
    del model, optimizer
    torch.cuda.empty_cache()
    return rate


def padded(rows: list[list[int]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Right-padded batches in the order given."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device="cuda")
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device="cuda")
        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def head_memory(tokens: int = 8192, width: int = 2048) -> None:
    """Forward and backward of the head alone: fused against full logits, in one run."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, VOCABULARY, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (tokens,), device="cuda")

    def dense() -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    def fused() -> torch.Tensor:
        return -score_tokens(hidden, targets, head).log_probs.sum()

    found: dict[str, Any] = {}
    for name, function in (("dense", dense), ("fused", fused), ("dense", dense), ("fused", fused)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held, began = torch.cuda.memory_allocated(), time.perf_counter()
        loss = function()
        loss.backward()
        torch.cuda.synchronize()
        gradient = head.weight.grad
        assert gradient is not None
        found[name] = {
            "gib": round((torch.cuda.max_memory_allocated() - held) / 2**30, 2),
            "ms": round(1000 * (time.perf_counter() - began), 1),
            "loss": float(loss.detach()),
            "grad_norm": float(gradient.float().norm()),
        }
        head.weight.grad, hidden.grad = None, None
    say("head of 8,192 tokens, 128,256 words", **found)


def invariance(folder: Path) -> None:
    """Loss and gradient norm of two steps in fp32, however the work is cut up, per objective."""
    records = chats(24, 300)
    for objective in ({"type": "sft"}, {"type": "dpo"}):
        figures: dict[str, list[float]] = {}
        for name, cut in {
            "ddp": {"strategy": {"type": "ddp"}, "packing": False, "micro_batch": 12},
            "fsdp2": {"packing": False, "micro_batch": 12},
            "accumulated": {"packing": False, "micro_batch": 3},
            "packed": {"packing": True, "micro_batch": 2},
        }.items():
            out = tempfile.mkdtemp(prefix="bench-")
            settings = {"precision": "fp32", "batch": 12, "steps": 2, "max_length": 512, "pack_length": 1024}
            train_local(job(folder, objective=objective, **settings, **cut), records, out)
            figures[name] = [value for row in read_metrics(out) for value in (row["loss"], row["grad_norm"])]
            shutil.rmtree(out, ignore_errors=True)
        plain = figures["ddp"]
        worst = {
            name: max(abs(a - b) / abs(b) for a, b in zip(values, plain, strict=True))
            for name, values in figures.items()
        }
        say(f"invariance, {objective['type']}, fp32", loss_and_norm=plain, largest_relative_difference=worst)


def main() -> None:
    """All figures, the checks first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="1b")
    size = parser.parse_args().size
    torch.backends.cuda.matmul.allow_tf32 = False
    say("machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    root = Path(tempfile.mkdtemp(prefix="bench-models-"))
    invariance(model_folder("tiny", root / "tiny"))
    head_memory()
    folder = model_folder(size, root / size)
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    say("model", parameters=parameters)
    records = chats(160, 4000)
    lora = {"type": "lora", "rank": 16}
    plain = plain_loop(folder, records)
    ours = timed("full, fsdp2, packed", folder, records, 6.0 * parameters)
    say("full tuning against the plain loop", ratio=round(ours / plain, 2))
    timed("full, ddp, packed", folder, records, 6.0 * parameters, strategy={"type": "ddp"})
    timed("full, fsdp2, not packed", folder, records, 6.0 * parameters, packing=False, micro_batch=2)
    timed("lora 16, fsdp2, packed", folder, records, 4.0 * parameters, peft=lora)
    timed(
        "dpo, lora 16, fsdp2, packed", folder, records, 4.0 * parameters, peft=lora, objective={"type": "dpo"}, batch=24
    )


if __name__ == "__main__":
    main()
