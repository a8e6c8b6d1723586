"""Tasks of the playground: jobs that train its base on them, and how many fresh instructions of one a model answers."""

from collections.abc import Mapping
from typing import Any

import tiny
import torch

from itune_ray.benchmarks import benchmark
from itune_ray.benchmarks.base import Reply
from itune_ray.config.evaluate import PlaygroundBenchmark
from itune_ray.config.train import TrainJob
from itune_ray.data.chat import ChatRenderer
from itune_ray.model.load import load_model
from itune_ray.model.tokenizer import load_tokenizer
from itune_ray.train.loop import train_local
from itune_ray.train.outcome import TrainOutcome
from itune_ray.train.rows import read_held_out, read_rows

BASE = "playground://base"
LORA = {"type": "lora", "rank": 16, "train_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}


def of_families(*families: str) -> dict[str, float]:
    """Weights of the playground's families: these alone."""
    return {"default": 0.0, **dict.fromkeys(families, 1.0)}


def part(name: str, weights: Mapping[str, float], rows: int, seed: int, split: str = "chat") -> dict[str, Any]:
    """A part of a job's data."""
    source = {"type": "playground", "split": split, "rows": rows, "seed": seed, "name": name}
    return {"source": {**source, "options": {"weights": dict(weights)}}}


def lora_job(parts: list[dict[str, Any]], steps: int, lr: float, **more: Any) -> TrainJob:
    """LoRA on the base, packed; further keys as for `tiny.job`."""
    shape = {"steps": steps, "batch": 32, "packing": True, "pack_length": 512, "micro_batch": 4}
    schedule = {"type": "linear", "warmup": 0.05}
    settings = {"data": parts, "optimizer": {"type": "adamw", "lr": lr}, "schedule": schedule, "model.peft": LORA}
    return tiny.job(BASE, **{**shape, **settings, **more})


def train(job: TrainJob, out: str) -> TrainOutcome:
    """Train on the job's own rows, those it replays and holds out among them."""
    held_out = [] if job.validation is None else read_held_out(job.validation)[0]
    return train_local(job, read_rows(job)[0], out, held_out=held_out)


@torch.no_grad()
def exact_match(model_path: str, weights: Mapping[str, float], count: int) -> float:
    """Share of fresh instructions of a task that a model answers exactly, greedily."""
    measure = benchmark(PlaygroundBenchmark(rows=count, options={"weights": dict(weights)}))
    items = measure.items()
    words, model = load_tokenizer(model_path), load_model(model_path, dtype=torch.float32, attention="sdpa").eval()
    renderer = ChatRenderer(words)
    words.padding_side = "left"
    inputs = words.pad({"input_ids": [renderer.prompt_ids(item.messages) for item in items]}, return_tensors="pt")
    written = model.generate(**inputs, do_sample=False, max_new_tokens=48, eos_token_id=words.eos_token_id)
    replies = words.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [measure.grade(item, Reply(text=text)).ok for item, text in zip(items, replies, strict=True)]
    return sum(right) / count
