"""Robust DPO (Chowdhury et al. 2024): the DPO loss as it would be on clean labels, from labels flipped at a rate ε.

    ℓ = [-(1-ε) log σ(r_w - r_l) + ε log σ(r_l - r_w)] / (1-2ε),   r = β Δ as in DPO

Over the flips its expectation is the loss of the true labels, which cDPO's is not. At ε = 0 and at θ = θ_ref it is DPO;
a pair that is right by far takes it below zero, without bound.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import RobustConfig
from itune_ray.data.batches import Batch
from itune_ray.train.objectives.pairs import REFERENCE, Pairwise, log_ratios


class Robust(Pairwise):
    """Term `robust` over pairs; rewards are β Δ."""

    needs: tuple[str, ...] = (REFERENCE,)

    def __init__(self, config: RobustConfig):
        super().__init__("robust")
        self.config = config

    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """β Δ."""
        return self.config.beta * log_ratios(log_probs, batch)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """[(1-ε) ℓ(+) - ε ℓ(-)] / (1-2ε)."""
        margin, epsilon = chosen - rejected, self.config.flipped
        return (-(1 - epsilon) * logsigmoid(margin) + epsilon * logsigmoid(-margin)) / (1 - 2 * epsilon)
