"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are each just good or bad, not paired.

    L = 1/N Σ λ_D (1 - σ(β (Δ - z₀)))   over desirable answers
      + 1/N Σ λ_U (1 - σ(β (z₀ - Δ)))   over undesirable ones
    Δ = log π_θ(answer | prompt) - log π_ref(answer | prompt),   z₀ = max(0, mean Δ of mismatched answers)

over the N answers of the global batch, of either kind. z₀ estimates KL(π_θ || π_ref) from each prompt with the answer
to another one; it has no gradient, and is one number per global batch, measured forward only before the step. Which
prompt meets which answer is drawn once from the seed, so that the reference of both can be made beforehand. At
θ = θ_ref z₀ is 0 and every answer counts λ/2.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from itune_ray.config.objectives import KtoConfig
from itune_ray.data.batches import Batch
from itune_ray.data.order import PackedRow
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import DESIRABLE, MISMATCHED, ROLE
from itune_ray.train.objectives.base import Loss, Metric
from itune_ray.train.objectives.pairs import REFERENCE, log_ratios, segment_log_probs

Z0 = "z0"


class Kto:
    """Term `kto` over answers.

    Reports `reward_desirable` and `reward_undesirable`, the means of β Δ over either kind, `kl`, which is z₀, and
    `reward_accuracy`, the share of answers on their own side of z₀ (a tie counts half).
    """

    needs: tuple[str, ...] = (REFERENCE, ROLE)
    coefficients: Mapping[str, float] = {"kto": 1.0}
    statistic = Z0

    def __init__(self, config: KtoConfig):
        self.config = config

    def split(self, rows: Sequence[PackedRow]) -> tuple[list[PackedRow], list[PackedRow]]:
        """Mismatched answers, and the rows' own."""
        mismatched = [row.columns[ROLE] == MISMATCHED for row in rows]
        pairs = list(zip(rows, mismatched, strict=True))
        return [_only(row, flags) for row, flags in pairs], [_only(row, ~flags) for row, flags in pairs]

    def measure(self, scores: TokenScores, batch: Batch) -> tuple[Tensor, int]:
        """Σ Δ of the mismatched answers and their number."""
        return log_ratios(segment_log_probs(scores, batch), batch).sum(), sum(batch.num_segments)

    def from_mean(self, mean: float) -> float:
        """z₀; a divergence is never negative, though its estimate may be."""
        return max(mean, 0.0)

    def units(self, batch: Batch) -> dict[str, int]:
        """Answers, and those of either kind."""
        good = int(_desirable(batch).sum())
        count = sum(batch.num_segments)
        return {"kto": count, "desirable": good, "undesirable": count - good}

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing beside the labels."""
        return {}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the answers of a micro-batch."""
        ratios, good = log_ratios(segment_log_probs(scores, batch), batch), _desirable(batch)
        z0 = batch.columns[Z0]
        side = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.config.desirable, self.config.undesirable)
        gains = side * (ratios - z0)
        losses = weight * torch.sigmoid(-self.config.beta * gains)
        right = (gains > 0).double() + 0.5 * (gains == 0).double()
        rewards = self.config.beta * ratios.detach()
        metrics = {
            "reward_desirable": Metric(rewards[good].sum(), "desirable"),
            "reward_undesirable": Metric(rewards[~good].sum(), "undesirable"),
            "kl": Metric(z0[0] * len(ratios), "kto"),
            "reward_accuracy": Metric(right.detach().sum(), "kto", proportion=True),
        }
        return Loss({"kto": losses.sum()}, metrics)


def _desirable(batch: Batch) -> Tensor:
    roles = batch.columns.get(ROLE)  # none in the dummy of a rank without rows
    return torch.zeros(0, dtype=torch.bool, device=batch.segments.device) if roles is None else roles == DESIRABLE


def _only(row: PackedRow, keep: NDArray[np.bool_]) -> PackedRow:
    """The row's segments that are kept, and their columns."""
    tokens = np.repeat(keep, row.lengths)
    return row._replace(
        input_ids=row.input_ids[tokens],
        supervised=row.supervised[tokens],
        lengths=row.lengths[keep],
        columns={name: row.columns[name][keep] for name in (ROLE, REFERENCE)},
    )
