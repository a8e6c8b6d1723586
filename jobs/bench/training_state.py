"""Peak host memory of loading and exporting a model, and the seconds a run stands still for a checkpoint.

`torchrun --nproc-per-node 2 jobs/bench/training_state.py [--strategy fsdp2|ddp|deepspeed] [--width 768] [--layers 8]`;
a random model is made once, in a process of its own. Memory is each rank's peak resident set (VmHWM) above what it held
before, files mapped while they are read included.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from itune_ray.config.train import CheckpointConfig, TrainJob
from itune_ray.model.export import write_model
from itune_ray.train.build import build_model
from itune_ray.train.checkpoint import Checkpoints
from itune_ray.train.renderer import load_renderer
from itune_ray.train.strategies import build_strategy
from itune_ray.train.world import start_from_environment

MB = 1e6
VOCABULARY = 16_000
SHARD_BYTES = 100 * 2**20


def make(folder: Path, width: int, layers: int) -> None:
    """A random Llama in fp32, in files of 100 MB."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="100MB")


def peak_mb(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it returns, and how far the resident set rose above its size before."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
    before = _status("VmRSS")
    result = work()
    return result, (_status("VmHWM") - before) / MB


def _status(name: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(lines[name].split()[0]) * 1024


def main() -> None:
    """Load, fill the optimizer's state, save both ways, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=("ddp", "fsdp2", "deepspeed"), default="fsdp2")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--make", type=Path)
    arguments = parser.parse_args()
    if arguments.make is not None:
        make(arguments.make, arguments.width, arguments.layers)
        return
    torch.set_num_threads(1)
    world = start_from_environment(600)
    scratch = [tempfile.mkdtemp(prefix="itune-bench-") if world.is_main else ""]
    if world.size > 1:
        dist.broadcast_object_list(scratch)
    root = Path(scratch[0])
    if world.is_main:
        size = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
        command = [sys.executable, __file__, "--make", str(root / "base"), *size]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    world.barrier()
    job = TrainJob.model_validate(
        {
            "name": "bench",
            "model": {"path": str(root / "base"), "tokenizer": "playground://tokenizer", "attention": "eager"},
            "data": [{"source": {"type": "playground", "split": "chat", "rows": 1}}],
            "strategy": {"type": arguments.strategy},
            "steps": 1,
        }
    )
    strategy = build_strategy(job.strategy, world, job.precision)
    tokenizer = load_renderer(job.model).tokenizer
    built, loading = peak_mb(lambda: build_model(job, tokenizer, strategy, world))
    weights = 4 * built.report.total / MB
    layer = 4 * (4 * arguments.width**2 + 3 * arguments.width * (arguments.width * 8 // 3)) / MB
    table = 4 * VOCABULARY * arguments.width / MB
    figures = {
        "model MB": weights,
        "share MB": weights if arguments.strategy == "ddp" else weights / world.size,
        "layer MB": layer,
        "largest tensor MB": table,
        "peak of loading MB": loading,
    }
    model, optimizers = strategy.optimise(built.model, job.optimizer)
    for step, background in enumerate((False, True), 1):
        config = CheckpointConfig(background=background)
        checkpoints = Checkpoints(str(root / f"checkpoint-{background}"), config, world)
        if not background:  # makes the optimizer's state, which the first step would
            strategy.state(model, optimizers)
        world.barrier()
        began = time.perf_counter()
        checkpoints.save(step, model, optimizers, strategy)
        blocked = time.perf_counter() - began
        checkpoints.wait()
        name = "in the background" if background else "at once"
        figures |= {f"blocked {name} s": blocked, f"written {name} s": time.perf_counter() - began}
    state = sum(f.stat().st_size for f in (root / "checkpoint-True").rglob("*") if f.is_file()) / MB
    out, is_main = str(root / "model"), world.is_main
    _, exporting = peak_mb(
        lambda: write_model(model, tokenizer, out, dtype=built.dtype, is_main=is_main, shard_bytes=SHARD_BYTES)
    )
    figures |= {"checkpoint MB": state, "peak of exporting MB": exporting}
    for rank in range(world.size):
        world.barrier()
        if rank == world.rank:
            print(f"rank {rank}:", ", ".join(f"{name} {value:.1f}" for name, value in figures.items()), flush=True)
    world.barrier()
    if world.is_main:
        subprocess.run(["rm", "-r", str(root)], check=True)


if __name__ == "__main__":
    main()
