"""Loading a model takes the memory of this rank's share and one layer (more: `jobs/bench/training_state.py`)."""

import ctypes
from pathlib import Path

import pytest
import tiny
from ranks import STRATEGIES, run_ranks

from itune_ray.train.build import build_model
from itune_ray.train.renderer import load_renderer
from itune_ray.train.strategies import build_strategy
from itune_ray.train.world import current_world

pytestmark = pytest.mark.real
WIDTH, INNER, LAYERS = 768, 2048, 6
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH // 32,
    "num_key_value_heads": WIDTH // 32,
}
LAYER_BYTES = 4 * (4 * WIDTH**2 + 3 * WIDTH * INNER)


def resident(name):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def rises(small, jobs):
    """How far the resident set rises above what it was while a model is built, by job."""
    found = []
    for job in jobs:
        build(small.model_copy(update={"strategy": job.strategy}))  # what is imported and cached once
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
        kept = build(job)
        found.append((resident("VmHWM") - before, kept.report.total * 4))
        del kept
    return found


def build(job):
    world = current_world()
    strategy = build_strategy(job.strategy, world, job.precision)
    return build_model(job, load_renderer(job.model).tokenizer, strategy, world)


def test_a_rank_never_holds_more_than_its_share_and_a_layer(folder, tmp_path):
    large = tiny.llama(tmp_path, **SIZES)
    names = ("fsdp2", "zero3")  # measured: 0.2 of a layer each; ddp makes buckets for its gradients at once
    jobs = [tiny.job(large, strategy=STRATEGIES[name]) for name in names]
    for ranks in run_ranks(2, rises, tiny.job(folder), jobs):
        for (rise, weights), name in zip(ranks, names, strict=True):
            assert weights > LAYERS * LAYER_BYTES
            print(name, (rise - weights / 2) / LAYER_BYTES)
            assert weights / 4 < rise < weights / 2 + LAYER_BYTES, name
