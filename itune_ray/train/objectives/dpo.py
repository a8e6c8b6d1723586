"""Direct preference optimisation (survey eq. 12; Rafailov et al. 2023).

    L = -(1/P) Σ log σ(β (Δ_w - Δ_l)),   Δ = log π_θ(answer | prompt) - log π_ref(answer | prompt)

over the P pairs of the global batch, w the chosen and l the rejected answer, log-probabilities summed over an answer's
tokens. With label smoothing ε a pair counts (1-ε) as it stands and ε the wrong way round (Mitchell 2023). The reference
is the policy before its first step, so L starts at log 2. An optional second term, with a unit of its own, is the
chosen answers' negative log-likelihood per token.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.train import DpoConfig
from itune_ray.data.batches import IGNORED, Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.base import Loss, Metric

REFERENCE = "reference"


class Dpo:
    """Terms `dpo` over pairs and, where its weight is not 0, `nll` over the chosen answers' tokens.

    Reports what the policy implies as rewards, β Δ, as means over pairs: `reward_chosen`, `reward_rejected`, their
    difference `reward_margin`, and `reward_accuracy`, the share of pairs whose margin is positive (a tie counts half).
    """

    needs: tuple[str, ...] = (REFERENCE,)

    def __init__(self, config: DpoConfig):
        self.config = config
        self.coefficients: Mapping[str, float] = {"dpo": 1.0, **({"nll": config.nll} if config.nll else {})}

    def units(self, batch: Batch) -> dict[str, int]:
        """Pairs, and tokens of chosen answers."""
        pairs = {"dpo": sum(map(len, batch.keys))}
        if "nll" in self.coefficients:
            pairs["nll"] = int((token_segments(batch) % 2 == 0).sum())
        return pairs

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing beside the labels."""
        return {}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the pairs of a micro-batch; segments alternate between chosen and rejected."""
        log_probs = segment_log_probs(scores, batch)
        reference = batch.columns.get(REFERENCE, log_probs.new_zeros(0))  # none in the dummy of a rank without rows
        rewards = self.config.beta * (log_probs - reference)
        chosen, rejected = rewards[0::2], rewards[1::2]
        margin = chosen - rejected
        epsilon = self.config.label_smoothing
        losses = -(1 - epsilon) * logsigmoid(margin) - epsilon * logsigmoid(-margin)
        terms = {"dpo": losses.sum()}
        if "nll" in self.coefficients:
            terms["nll"] = -log_probs[0::2].sum()
        return Loss(terms, _metrics(chosen.detach(), rejected.detach()))


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


def _metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Metric]:
    margin = chosen - rejected
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return {
        "reward_chosen": Metric(chosen.sum(), "dpo"),
        "reward_rejected": Metric(rejected.sum(), "dpo"),
        "reward_margin": Metric(margin.sum(), "dpo"),
        "reward_accuracy": Metric(right.sum(), "dpo", proportion=True),
    }
