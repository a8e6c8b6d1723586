"""The load-balancing loss of a mixture of experts, over the whole global batch of a step.

L = E Σ_e (C_e / N) (P_e / N) (see `itune_ray.model.router`) is no sum over tokens: a mean of the micro-batches' own
losses would depend on how the work is divided. The counts C_e and N have no gradient, so a pass without gradients first
sums them over all micro-batches and ranks; given them, L is linear in P_e, and each micro-batch hands Σ_e (E C_e / N²)
P_e to backward. Loss and gradient are then those of the undivided batch, packed or not. What can still differ: with
dropout the counts are those of the pass without it, and where two experts tie, rounding decides which is counted.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from itune_ray.data.batches import Batch
from itune_ray.errors import TrainError
from itune_ray.model.logprobs import TokenScores
from itune_ray.model.router import RouterLoad

if TYPE_CHECKING:
    from itune_ray.train.step import Stepper

ROUTER_LOSS = "router_loss"
"""The loss, unweighted, in metrics.jsonl."""
FACTORS = "router_factors"
"""Column of a batch: [E] fp64, E C_e / N² over the global batch."""


def router_share(scores: TokenScores, batch: Batch) -> Tensor:
    """This micro-batch's part of the loss."""
    load = _load_of(scores)
    return load.probabilities @ batch.columns[FACTORS].to(load.probabilities)


def with_router_factors(batches: Sequence[Batch], stepper: "Stepper") -> list[Batch]:
    """The micro-batches of one global batch with the column that `router_share` needs. Collective."""
    from itune_ray.train.forward import forward_only

    summed: list[float] = []
    for _, scores in forward_only(stepper, batches):
        load = _load_of(scores)
        own = [*load.choices.tolist(), float(load.places)]
        summed = [a + b for a, b in zip(summed, own, strict=True)] if summed else own
    *choices, places = stepper.world.sum(summed)
    factors = torch.tensor(choices, dtype=torch.float64) * len(choices) / max(places, 1.0) ** 2
    return [replace(batch, columns={**batch.columns, FACTORS: factors}) for batch in batches]


def _load_of(scores: TokenScores) -> RouterLoad:
    if scores.router is None:
        raise TrainError("the model's forward pass told no router load", knob="router_loss")
    return scores.router
