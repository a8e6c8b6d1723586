"""Simple preference optimisation (Meng et al. 2024): no reference, and answers of any length compare.

    ℓ = -log σ(r_w - r_l - γ),   r = β/n Σ log π_θ(y_t | y_<t)

n the tokens of the answer, γ the margin by which the chosen answer's reward should lead. Two answers that are equally
likely per token give log(1 + exp γ).
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import SimpoConfig
from itune_ray.data.batches import Batch
from itune_ray.train.objectives.pairs import Pairwise, segment_lengths


class Simpo(Pairwise):
    """Term `simpo` over pairs; rewards are β times the mean log-probability of an answer's tokens."""

    def __init__(self, config: SimpoConfig):
        super().__init__("simpo")
        self.config = config

    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """β/n log π_θ(answer | prompt)."""
        return self.config.beta * log_probs / segment_lengths(batch)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """-log σ(r_w - r_l - γ)."""
        return -logsigmoid(chosen - rejected - self.config.gamma)
