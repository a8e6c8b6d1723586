"""Identity preference optimisation (Azar et al. 2023, eq. 17), per token.

    ℓ = (r_w - r_l - 1/(2τ))²,   r = Δ / n,   Δ = log π_θ(answer | prompt) - log π_ref(answer | prompt)

n the tokens of the answer. The paper's formula has no n, and then the loss grows with the answers' lengths; its authors
divided by them, and so does TRL. A finite margin is aimed at, so pairs that are all alike cannot drive the policy off
without bound as in DPO. At θ = θ_ref it is 1/(4τ²).
"""

from torch import Tensor

from itune_ray.config.objectives import IpoConfig
from itune_ray.data.batches import Batch
from itune_ray.train.objectives.pairs import REFERENCE, Pairwise, log_ratios, segment_lengths


class Ipo(Pairwise):
    """Term `ipo` over pairs; rewards are Δ per token."""

    needs: tuple[str, ...] = (REFERENCE,)

    def __init__(self, config: IpoConfig):
        super().__init__("ipo")
        self.config = config

    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Δ / n."""
        return log_ratios(log_probs, batch) / segment_lengths(batch)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(r_w - r_l - 1/(2τ))²."""
        return (chosen - rejected - 1 / (2 * self.config.tau)) ** 2
