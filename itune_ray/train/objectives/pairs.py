"""What losses over preference pairs share: an answer's summed log-probability, rewards, units and metrics.

    L = 1/P Σ ℓ(r_w, r_l) [+ c · 1/N Σ -log π_θ(y_t)]

over the P pairs of the global batch, r the reward that an objective reads off an answer, w the chosen and l the
rejected one; the optional second term, with a unit of its own, is over the N tokens of the chosen answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from itune_ray.data.batches import IGNORED, Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.base import Loss, Metric

REFERENCE = "reference"
"""Column of an answer's summed log-probability before the first step, per segment."""


class Pairwise(ABC):
    """Term `name` over pairs and, where its weight is not 0, `nll` over the chosen answers' tokens.

    Reports means over pairs: `reward_chosen`, `reward_rejected`, their difference `reward_margin`, and
    `reward_accuracy`, the share of pairs whose margin is positive (a tie counts half).
    """

    needs: tuple[str, ...] = ()

    def __init__(self, name: str, weight: float = 1.0, nll: float = 0.0):
        self.name = name
        self.coefficients: Mapping[str, float] = {name: weight, **({"nll": nll} if nll else {})}

    @abstractmethod
    def rewards(self, log_probs: Tensor, batch: Batch) -> Tensor:
        """Reward [S] of each segment, given its summed log-probability [S] fp64."""

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """ℓ [P], given the rewards [P] of either side."""

    def units(self, batch: Batch) -> dict[str, int]:
        """Pairs, and tokens of chosen answers."""
        pairs = {self.name: sum(map(len, batch.keys))}
        if "nll" in self.coefficients:
            pairs["nll"] = int((token_segments(batch) % 2 == 0).sum())
        return pairs

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing beside the labels."""
        return {}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the pairs of a micro-batch; segments alternate between chosen and rejected."""
        log_probs = segment_log_probs(scores, batch)
        rewards = self.rewards(log_probs, batch)
        chosen, rejected = rewards[0::2], rewards[1::2]
        terms = {self.name: self.losses(chosen, rejected).sum()}
        if "nll" in self.coefficients:
            terms["nll"] = -log_probs[0::2].sum()
        return Loss(terms, reward_metrics(chosen.detach(), rejected.detach(), self.name))


def log_ratios(log_probs: Tensor, batch: Batch) -> Tensor:
    """Δ [S] = log π_θ(answer | prompt) - log π_ref(answer | prompt), given the first."""
    return log_probs - batch.columns.get(REFERENCE, log_probs.new_zeros(0))  # none in the dummy of a rank without rows


def token_segments(batch: Batch) -> Tensor:
    """Segment [N] of each supervised token, counted over the rows of the micro-batch."""
    counts = batch.num_segments or (0,)
    offsets = torch.tensor([0, *accumulate(counts[:-1])], device=batch.segments.device)
    return (batch.segments + offsets[:, None])[:, 1:][batch.labels[:, 1:] != IGNORED]


def segment_log_probs(scores: TokenScores, batch: Batch) -> Tensor:
    """Log-probability [S] of the supervised tokens of each segment, summed in fp64: a difference of two such sums is
    all that DPO sees, and it is small."""
    sums = scores.log_probs.new_zeros(sum(batch.num_segments), dtype=torch.float64)
    return sums.index_add(0, token_segments(batch), scores.log_probs.double())


def segment_lengths(batch: Batch) -> Tensor:
    """Supervised tokens [S] of each segment."""
    return torch.bincount(token_segments(batch), minlength=sum(batch.num_segments))


def reward_metrics(chosen: Tensor, rejected: Tensor, unit: str) -> dict[str, Metric]:
    """The metrics of `Pairwise` from the rewards [P] of either side."""
    margin = chosen - rejected
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "reward_chosen": Metric(chosen.sum(), unit),
        "reward_rejected": Metric(rejected.sum(), unit),
        "reward_margin": Metric(margin.sum(), unit),
        "reward_accuracy": Metric(right.sum(), unit, proportion=True),
    }
