"""What dropout per packed row costs: tokens per second of the playground's LoRA job with and without dropout, in turns.

`python jobs/bench/dropout.py [--steps 20]`; one process, no Ray. A model that draws is computed a packed row at a time.
"""

import argparse
import statistics
import tempfile

from itune_ray.config.train import TrainJob
from itune_ray.train.loop import train_local
from itune_ray.train.metrics import read_metrics
from itune_ray.train.rows import read_mixture

CASES = {
    "no dropout, micro_batch 8, rows of 128 tokens": (0.0, 128),
    "dropout, rows of 128 tokens": (0.05, 128),
    "dropout, rows of 512 tokens": (0.05, 512),
    "no dropout, micro_batch 8, rows of 512 tokens": (0.0, 512),
}


def speed(dropout: float, pack_length: int, steps: int) -> float:
    """Median tokens per second of a step."""
    job = TrainJob.model_validate(
        {
            "name": "dropout",
            "model": {
                "path": "playground://base",
                "attention": "eager",
                "peft": {"type": "lora", "rank": 16, "dropout": dropout},
            },
            "data": [{"source": {"type": "playground", "split": "chat", "rows": 2000}}],
            "strategy": {"type": "ddp"},
            "steps": steps,
            "batch": 64,
            "max_length": 128,
            "pack_length": pack_length,
            "micro_batch": 8,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        train_local(job, read_mixture(job.data)[0], folder)
        return statistics.median(row["tokens_per_s"] for row in read_metrics(folder))


def main() -> None:
    """Each case twice, in turns; the better run counts, since other work can only slow one down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    runs = [{name: speed(*case, steps) for name, case in CASES.items()} for _ in range(2)]
    for name in CASES:
        print(f"{name}: {max(run[name] for run in runs):,.0f} tokens/s")


if __name__ == "__main__":
    main()
