"""Forward passes without a step: over the same packed rows, in the same micro-batches, under the same strategy.

Every rank makes as many micro-batches as the fullest, dummies included, since sharded weights are gathered by all.
"""

from collections.abc import Iterator, Sequence

import torch

from itune_ray.data.batches import Batch, collate
from itune_ray.data.order import PackedRow
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.step import Stepper


def micro_batches(rows: Sequence[PackedRow], most: int, size: int, pad: int, stepper: Stepper) -> list[Batch]:
    """This rank's rows, `size` at a time, and dummies up to what the fullest rank's `most` rows make."""
    flat = stepper.masking == "varlen"
    return [collate(rows[i : i + size], pad, flat) for i in range(0, most, size)]


def forward_only(stepper: Stepper, batches: Sequence[Batch]) -> Iterator[tuple[Batch, TokenScores]]:
    """Each batch, on its device, with its scores: no gradient, no dropout. Collective."""
    stepper.model.eval()
    try:
        for batch in batches:
            moved = batch.to(stepper.world.device)
            with torch.no_grad(), stepper.strategy.forward_context(last=True):
                scores = stepper.scores(moved)
            yield moved, scores
    finally:
        stepper.model.train()
