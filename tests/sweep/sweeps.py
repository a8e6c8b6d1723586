"""Sweep configs that the tests of sweeps share."""

import copy
from typing import Any

CHATS = {"type": "playground", "split": "chat", "rows": 400, "seed": 6}
TREE: dict[str, Any] = {
    "name": "s",
    "axes": {"compress.method.sparsity": [0, 0.5], "train.model.peft.rank": [2, 8]},
    "compress": {
        "model": {"path": "playground://teacher"},
        "calibration": {"data": [{**CHATS, "rows": 64, "seed": 5}], "rows": 64, "max_length": 128},
    },
    "train": {
        "model": {"attention": "eager", "peft": {"type": "lora"}},
        "data": [{"source": CHATS}],
        "optimizer": {"type": "adamw", "lr": 3e-3},
        "schedule": {"type": "linear", "warmup": 0.05},
        "strategy": {"type": "ddp"},
        "steps": 12,
        "batch": 16,
        "max_length": 128,
        "checkpoint": {"every_steps": 2},
        "trackers": [{"type": "tensorboard"}],
    },
    "evaluate": {
        "benchmarks": [{"type": "playground", "rows": 100, "name": "exact match"}],
        "sampling": {"temperature": 0, "top_p": 1.0, "max_tokens": 48},
    },
    "scheduler": {"type": "asha", "grace": 4, "reduction": 2},
    "max_concurrent": 1,
}
"""Two ranks on two sizes of the playground's teacher: it knows the task, so a few steps show who was hurt."""


def tree(**changes: Any) -> dict[str, Any]:
    """The config with some keys changed; double underscores lead into sections, None takes a key out."""
    made = copy.deepcopy(TREE)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        node = made
        for parent in parents:
            node = node[parent]
        node[leaf] = value
        if value is None:
            del node[leaf]
    return made
