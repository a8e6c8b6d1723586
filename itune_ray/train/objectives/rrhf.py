"""Rank responses to align human feedback (Yuan et al. 2023): several answers to a prompt, ranked by a score.

    L = 1/G Σ_rows Σ_{r_i < r_j} max(0, s_i - s_j) + c/N Σ -log π_θ(y_t)
    s = 1/n^λ Σ log π_θ(y_t | y_<t)

over the G rows of the global batch, r the score of an answer and n its tokens; the second sum is over the N tokens of
each row's best answer (the first of equals). An answer should be the less likely, per token at λ = 1, the worse it is;
answers of equal score say nothing of each other. No reference is needed.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from itune_ray.config.objectives import RrhfConfig
from itune_ray.data.batches import Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import SCORE, SEGMENTS
from itune_ray.train.objectives.base import Loss, Metric
from itune_ray.train.objectives.pairs import segment_lengths, segment_log_probs


class Rrhf:
    """Terms `rank` over rows and, where its weight is not 0, `nll` over the best answers' tokens.

    Reports `rank_accuracy`, the mean over rows of the share of their ranked pairs that s orders right (a tie counts
    half).
    """

    needs: tuple[str, ...] = (SCORE, SEGMENTS)

    def __init__(self, config: RrhfConfig):
        self.config = config
        self.coefficients: Mapping[str, float] = {"rank": 1.0, **({"nll": config.nll} if config.nll else {})}

    def units(self, batch: Batch) -> dict[str, int]:
        """Rows, and tokens of their best answers."""
        units = {"rank": sum(map(len, batch.keys))}
        if "nll" in self.coefficients:
            units["nll"] = int(segment_lengths(batch)[_best(batch)].sum())
        return units

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing beside the labels."""
        return {}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the rows of a micro-batch."""
        log_probs = segment_log_probs(scores, batch)
        values = log_probs / segment_lengths(batch) ** self.config.length_power
        terms, right = {"rank": values.sum() * 0.0}, values.new_zeros(())
        for start, end in _rows(batch):
            ranks, own = batch.columns[SCORE][start:end], values[start:end]
            worse = ranks[:, None] < ranks[None, :]
            lead = (own[:, None] - own[None, :])[worse]  # of the worse over the better answer
            terms["rank"] = terms["rank"] + lead.clamp(min=0).sum()
            right = right + ((lead < 0).double() + 0.5 * (lead == 0).double()).mean().detach()
        if "nll" in self.coefficients:
            terms["nll"] = -log_probs[_best(batch)].sum()
        return Loss(terms, {"rank_accuracy": Metric(right, "rank")})


def _rows(batch: Batch) -> list[tuple[int, int]]:
    """(first, end) segment of each row."""
    ends = list(accumulate(batch.columns[SEGMENTS].tolist() if SEGMENTS in batch.columns else ()))
    return list(zip([0, *ends], ends, strict=False))


def _best(batch: Batch) -> Tensor:
    """Segment of each row's best answer."""
    best = [start + int(batch.columns[SCORE][start:end].argmax()) for start, end in _rows(batch)]
    return torch.tensor(best, dtype=torch.int64, device=batch.segments.device)
