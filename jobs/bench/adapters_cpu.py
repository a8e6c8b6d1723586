"""Answers under a LoRA adapter on a CPU engine: vLLM's own operators against tokens grouped by adapter.

`python jobs/bench/adapters_cpu.py [--operators own|grouped] [--rank 64]`; each engine needs a process of its own, so
compare two calls.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from itune_ray.config.shared import ModelRef, VllmEngineConfig
from itune_ray.data.hub import resolve
from itune_ray.engine import backends
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.vllm import VllmEngine
from itune_ray.playground.sets import rows

BASE = "playground://base"


def adapter(target: Path) -> Path:
    """A rank-16 adapter of every linear layer and three token rows, its weights random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(resolve(BASE).path, dtype=torch.float32)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", trainable_token_indices={"embed_tokens": [2, 3, 4]}
    )
    tuned = get_peft_model(model, config)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    tuned.save_pretrained(str(target))
    return target


async def answer(engine: VllmEngine, folder: Path, count: int, seed: int) -> tuple[float, int]:
    """Seconds and generated tokens of greedy answers to playground instructions."""
    sampling = Sampling(max_tokens=24)
    requests = [
        Request(id=row.key, messages=row.prompt, sampling=sampling, adapter=str(folder))
        for row in rows("test", count, seed)
    ]
    began = time.perf_counter()
    completions = await engine.generate(requests)
    tokens = sum(len(sample.token_ids) for completion in completions for sample in completion.samples)
    return time.perf_counter() - began, tokens


async def main() -> None:
    """One warm-up, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operators", choices=("own", "grouped"), default="grouped")
    parser.add_argument("--rank", type=int, default=64, help="max_adapter_rank of the engine")
    arguments = parser.parse_args()
    if arguments.operators == "own":
        backends.group_by_adapter = lambda: None
    folder = adapter(Path(tempfile.mkdtemp()))
    engine = VllmEngine(VllmEngineConfig(max_adapters=1, max_adapter_rank=arguments.rank), ModelRef(path=BASE), 1)
    await answer(engine, folder, 64, 1)
    seconds, tokens = await answer(engine, folder, 400, 7)
    print(f"{arguments.operators}, rank {arguments.rank}: {seconds:.2f} s for 400 answers, {tokens} tokens")
    engine.close()


if __name__ == "__main__":
    asyncio.run(main())
