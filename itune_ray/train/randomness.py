"""Randomness inside the model (dropout, router noise) that belongs to a packed row, not to the rank that computes it.

torch draws from one generator, whose stream a micro-batch cannot share out: how many rows lie in it, and how wide they
are padded, decides which draw falls on which element. So where a model draws, a micro-batch is one row, and the
generator is seeded from (seed, step, place of the row in the step) before its forward. Loss and gradient then depend
neither on the number of ranks nor on `micro_batch`, in any module, attention's own dropout included, and no state needs
saving. A model that draws nothing keeps its micro-batches; where one draws, `pack_length` says how much is computed at
once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, cast

from torch import nn

from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow
from itune_ray.data.records import row_seed

NAMES = ("drop", "jitter")
"""What attributes that hold a probability or an amplitude of noise are called, in transformers and PEFT alike."""


def draws(model: nn.Module) -> bool:
    """Whether a forward of the model in training draws random numbers."""
    return any(_positive(value) for module in model.modules() for value in _amounts(module))


def _amounts(module: nn.Module) -> list[Any]:
    named = [value for name, value in vars(module).items() if any(part in name.lower() for part in NAMES)]
    return [*named, getattr(module, "p", 0.0)] if "Dropout" in type(module).__name__ else named


def _positive(value: Any) -> bool:
    if isinstance(value, Mapping):  # PEFT: by adapter
        return any(_positive(item) for item in cast(Mapping[Any, Any], value).values())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def seeded(batches: Sequence[Batch], rows: Sequence[PackedRow], seed: int, step: int) -> list[Batch]:
    """Micro-batches of one row each with their rows' seeds; dummies beyond the last row have no target and no seed."""
    return [
        batch if row is None else replace(batch, seed=row_seed(seed, "train.dropout", str(row.position), step))
        for batch, row in zip_longest(batches, rows)
    ]
