"""Supervised fine-tuning (survey eq. 6): L = -(1/N) Σ log p(y_t | y_<t), N the supervised tokens of the global batch.

Counts are taken after the shift, so a document's first token is in neither sum nor count. With no supervised token in
a micro-batch both sums are zero and stay connected to the graph.
"""

from collections.abc import Mapping

from torch import Tensor

from itune_ray.config.objectives import SftConfig
from itune_ray.data.batches import IGNORED, Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.base import Loss, Metric


class Sft:
    """Negative log-likelihood per supervised token; reports the mean entropy of the predictions beside it."""

    needs: tuple[str, ...] = ()
    coefficients: Mapping[str, float] = {"nll": 1.0}

    def __init__(self, config: SftConfig):
        self.config = config

    def units(self, batch: Batch) -> dict[str, int]:
        return {"nll": int((batch.labels[:, 1:] != IGNORED).sum())}

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing beside the labels."""
        return {}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        entropy = Metric(scores.entropy.detach().sum(), "nll")
        return Loss({"nll": -scores.log_probs.sum()}, {"entropy": entropy})
