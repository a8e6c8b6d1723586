"""A number over a whole global batch that a loss is not linear in: measured forward only, before the step's own passes.

Σ S_k / N_k cannot carry such a loss, since its micro-batches would each need what only all of them together know. A
pass without gradients over all micro-batches and ranks measures it once; it then travels as a column of every
micro-batch, so that the loss stays independent of how the work is divided.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.forward import forward_only, micro_batches
from itune_ray.train.image_terms import image_text_batches
from itune_ray.train.objectives.image_text import ImageText
from itune_ray.train.router import with_router_factors
from itune_ray.train.step import Stepper


@runtime_checkable
class BatchStatistic(Protocol):
    """An objective whose loss bends with a mean over the global batch."""

    statistic: str
    """Column that the number becomes, [1] fp64."""

    def split(self, rows: Sequence[PackedRow]) -> tuple[list[PackedRow], list[PackedRow]]:
        """What the number is measured on, and what is trained on: one row each for every row."""
        ...

    def measure(self, scores: TokenScores, batch: Batch) -> tuple[Tensor, int]:
        """Sum and count of one micro-batch of the former."""
        ...

    def from_mean(self, mean: float) -> float:
        """The number, from the mean over the global batch."""
        ...


def step_batches(rows: Sequence[PackedRow], most: int, size: int, pad: int, stepper: Stepper) -> list[Batch]:
    """`micro_batches` of one global batch, with what objective and router loss need of all of it. Collective."""
    batches = _measured_batches(rows, most, size, pad, stepper)
    return with_router_factors(batches, stepper) if stepper.router_weight else batches


def _measured_batches(rows: Sequence[PackedRow], most: int, size: int, pad: int, stepper: Stepper) -> list[Batch]:
    objective = stepper.objective
    if isinstance(objective, ImageText):
        return image_text_batches(rows, most, size, pad, stepper)
    if not isinstance(objective, BatchStatistic):
        return micro_batches(rows, most, size, pad, stepper)
    measured, trained = objective.split(rows)
    total, count = 0.0, 0
    for batch, scores in forward_only(stepper, micro_batches(measured, most, size, pad, stepper)):
        summed, units = objective.measure(scores, batch)
        total, count = total + float(summed), count + units
    total, all_units = stepper.world.sum([total, count])
    column = {
        objective.statistic: torch.tensor([objective.from_mean(total / max(all_units, 1.0))], dtype=torch.float64)
    }
    return [
        replace(batch, columns={**batch.columns, **column})
        for batch in micro_batches(trained, most, size, pad, stepper)
    ]
