"""Domain adaptation (survey eq. 10): learn a domain, keep what general rows are answered with.

    L = 1/N_gen Σ_gen -log p_θ(y_n) + α/N_dom Σ_dom -log p_θ(y_n) + β/N_gen Σ_gen KL(p_base || p_θ)

over the N_gen supervised tokens of the global batch's general rows, which are the replayed ones, and the N_dom of the
domain's: α weighs the two, not how many rows there are of either. Base is the model before its first step. There KL and
its gradient are 0; a step ε away it is O(ε²). It is taken over the base's k likeliest tokens and one bucket for all
others (`tail_bucket_kl`): a lower bound of the whole divergence, and equal to it at k = V. β = 0 is supervised
fine-tuning on two sets, each with its own mean. A batch without rows of one kind is without its terms.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from itune_ray.config.objectives import DomainConfig
from itune_ray.data.batches import IGNORED, Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import GENERAL
from itune_ray.train.objectives.base import Loss, Metric
from itune_ray.train.objectives.kd import tail_bucket_kl
from itune_ray.train.objectives.pairs import token_segments

BASE_IDS, BASE_LOG_PROBS = "base_ids", "base_log_probs"
"""Columns of the base's k likeliest tokens and their log-probabilities: k values per general supervised token, flat."""


class Domain:
    """Terms `domain`, `general` and, where its weight is not 0, `kl`, each per supervised token of its rows.

    Reports them as `domain_loss`, `general_loss` and `kl`.
    """

    def __init__(self, config: DomainConfig):
        self.config = config
        kept = {"kl": config.beta} if config.beta else {}
        self.coefficients: Mapping[str, float] = {"domain": config.alpha, "general": 1.0, **kept}
        self.needs: tuple[str, ...] = (BASE_IDS, BASE_LOG_PROBS) if kept else ()

    def units(self, batch: Batch) -> dict[str, int]:
        """Supervised tokens of the domain's rows, and of the general ones for the other terms."""
        tokens = int((batch.labels[:, 1:] != IGNORED).sum())
        general = int(general_tokens(batch).sum())
        return {term: tokens - general if term == "domain" else general for term in self.coefficients}

    def head_inputs(self, batch: Batch) -> dict[str, Tensor | int]:
        """The base's tokens, whose probability is asked for; before there are any, that the head name the likeliest."""
        if not self.needs:
            return {}
        if GENERAL in batch.columns and BASE_IDS not in batch.columns:
            return {"top_k": self.config.k}
        ids = torch.arange(self.config.k, device=batch.input_ids.device)  # of the domain's tokens: any k distinct ones
        return {"score_ids": self._spread(BASE_IDS, batch, ids)}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums of one micro-batch."""
        general = general_tokens(batch)
        nll = -scores.log_probs
        terms = {"domain": nll.masked_fill(general, 0.0).sum(), "general": nll.masked_fill(~general, 0.0).sum()}
        metrics = {f"{name}_loss": Metric(total.detach(), name) for name, total in terms.items()}
        if self.needs:
            assert scores.at is not None
            assert scores.tail is not None
            log_p = self._spread(BASE_LOG_PROBS, batch, scores.at.new_zeros(self.config.k, dtype=torch.float64))
            kl = tail_bucket_kl(log_p, scores.at, scores.tail).masked_fill(~general, 0.0).sum()
            terms["kl"] = kl
            metrics["kl"] = Metric(kl.detach(), "kl")
        return Loss(terms, metrics)

    def _spread(self, name: str, batch: Batch, filler: Tensor) -> Tensor:
        """A column's values [N, k] at the general tokens and `filler` [k] at all others."""
        general = general_tokens(batch)
        values = batch.columns.get(name, filler.new_zeros(0)).to(filler.dtype)
        return filler.expand(len(general), -1).masked_scatter(general[:, None], values)


def general_tokens(batch: Batch) -> Tensor:
    """Whether each supervised token [N] is of a general row."""
    of_segments = batch.columns.get(GENERAL, batch.segments.new_zeros(1))  # the dummy of a rank without rows has none
    return of_segments[token_segments(batch)] == 1
