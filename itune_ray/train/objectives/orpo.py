"""Odds ratio preference optimisation (Hong et al. 2024): fine-tuning and preference in one stage, without a reference.

    L = 1/N Σ -log π_θ(y_t) + λ/P Σ -log σ(r_w - r_l),   r = log p/(1-p),   log p = 1/n Σ log π_θ(y_t | y_<t)

the first sum over the N tokens of the chosen answers, the second over pairs; p is the geometric mean of an answer's
token probabilities, n its tokens. (TRL takes the first sum over the prompts' tokens too.) An answer that is certain,
p = 1, counts as p = 1 - 1e-7 and has no gradient.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.objectives import OrpoConfig
from itune_ray.data.batches import Batch
from itune_ray.train.objectives.pairs import Pairwise, segment_lengths

CERTAIN = math.log1p(-1e-7)


class Orpo(Pairwise):
    """Terms `orpo` over pairs and `nll` over the chosen answers' tokens; rewards are log odds."""

    def __init__(self, config: OrpoConfig):
        super().__init__("orpo", weight=config.weight, nll=1.0)

    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Log odds of an answer's mean token."""
        return log_odds(log_probs / segment_lengths(batch))

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """-log σ(r_w - r_l)."""
        return -logsigmoid(chosen - rejected)


def log_odds(log_p: Tensor) -> Tensor:
    """log p/(1-p) from log p <= 0, exact at both ends: 1-p is -expm1(log p), which does not cancel near p = 1."""
    log_p = log_p.clamp(max=CERTAIN)
    return log_p - torch.log(-torch.expm1(log_p))
