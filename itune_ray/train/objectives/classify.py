"""Classification as one yes-or-no question per label (Kowsher et al. 2024, after classification by entailment).

    L = 1/D Σ_x 1/Y Σ_y -log σ(±s(x, y)),   + for the text's own label, - for the Y - 1 others

over the D texts of the global batch. Equal scores of 0 give log 2. The label taken is the one of the largest s.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from itune_ray.config.classify import ClassifyConfig
from itune_ray.data.batches import Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.classes import CLASS, LABEL
from itune_ray.train.objectives.base import Loss, Metric
from itune_ray.train.objectives.reward import last_tokens


class Classify:
    """Term `entail` over texts; reports `accuracy`, the share of texts whose own label scores highest."""

    needs: tuple[str, ...] = (LABEL, CLASS)
    coefficients: Mapping[str, float] = {"entail": 1.0}

    def __init__(self, config: ClassifyConfig):
        self.config = config

    def units(self, batch: Batch) -> dict[str, int]:
        """Texts."""
        return {"entail": sum(map(len, batch.keys))}

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Places of the segments' last tokens, and the label [B, T] that each token is read behind."""
        labels = batch.columns.get(LABEL, batch.segments.new_zeros(0))
        at = torch.full_like(batch.segments, -1)
        starts = [sum(batch.num_segments[:row]) for row in range(len(batch.num_segments))]
        for row, start in enumerate(starts):
            inside = batch.segments[row] >= 0
            at[row, inside] = labels[start + batch.segments[row, inside]].to(at.dtype)
        return {"value_at": last_tokens(batch), "label_at": at}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the texts of a micro-batch."""
        assert scores.values is not None
        texts = sum(map(len, batch.keys))
        if not texts:  # a rank without rows still takes part
            zero = scores.values.sum() * 0.0
            return Loss({"entail": zero}, {"accuracy": Metric(zero.detach(), "entail", proportion=True)})
        values = scores.values.double().view(texts, -1)
        right = batch.columns[CLASS].to(values.device)
        own = torch.arange(values.shape[1], device=values.device) == right[:, None]
        loss = -logsigmoid(torch.where(own, values, -values)).mean(1).sum()
        hits = (values.detach().argmax(1) == right).double().sum()
        return Loss({"entail": loss}, {"accuracy": Metric(hits, "entail", proportion=True)})
