"""Image-text fine-tuning with the vision and fusion terms of survey eq. 9: L = L_text + λ_v L_vision + λ_f L_fusion.

The survey names the terms and leaves them open. Both are this project's definitions, and 0 unless a job asks for them:

    L_text   = 1/N Σ -log p(y_t | y_<t, v)                                     over supervised tokens, as in sft
    L_vision = 1/D Σ_i Σ_j softplus(-z_ij (t x̂_i·ŷ_j + b))                     z_ij = 1 for i = j, else -1
    L_fusion = 1/D Σ_i softplus(-(log p(y_i | v_i) - log p(y_i | v'_i)))

over the D rows of the global batch. L_vision is the sigmoid loss of SigLIP (Zhai et al. 2023) between images and
answers: x is the mean of the projected features of a row's images, y the mean of the input embeddings of its supervised
tokens, hats are unit length, and t = 10, b = -10 are the paper's starting values, held there.

L_fusion is image-text matching (Li et al. 2021) with one negative from the batch, as the binary cross-entropy of the
question which of two images an answer goes with: v'_i is another row's. Where either was as likely beforehand, Bayes'
rule gives σ(log p(y_i | v_i) - log p(y_i | v'_i)), so the language model is the classifier and no head is added that an
export would have to leave out. A row that finds no other image in its batch counts log 2 and has no gradient.

Rows that share an image are each other's negatives in L_vision, and never in L_fusion.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from itune_ray.config.objectives import SftConfig
from itune_ray.data.batches import Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.objectives.base import Loss, Metric
from itune_ray.train.objectives.pairs import segment_log_probs, token_segments
from itune_ray.train.objectives.sft import Sft

SCALE, BIAS = 10.0, -10.0
"""t and b."""
VISION, FUSION = "vision", "fusion"
VALUE, TO_IMAGES, TO_ANSWERS = "vision_value", "vision_to_images", "vision_to_answers"
"""Columns: a row's part of Σ_i Σ_j [D], and the gradient of that sum at its x and y [D, H]."""


class ImageText(Sft):
    """Term `nll` and, where their weights are not 0, `vision` and `fusion` over rows.

    Under `fusion` documents alternate between a row and the same with other images (`itune_ray.train.image_terms`).
    Reports the terms as `text_loss`, `vision_loss` and `fusion_loss`, and `match_accuracy`, the share of rows whose
    answer is likelier with its own images than with the others (a tie counts half).
    """

    def __init__(self, config: SftConfig):
        super().__init__(config)
        weights = {VISION: config.vision, FUSION: config.fusion}
        self.coefficients: Mapping[str, float] = {"nll": 1.0, **{n: w for n, w in weights.items() if w}}
        self._stride = 2 if config.fusion else 1

    def units(self, batch: Batch) -> dict[str, int]:
        """Supervised tokens of the rows themselves, and rows."""
        rows = sum(batch.num_segments) // self._stride
        return {name: int(self._own(batch).sum()) if name == "nll" else rows for name in self.coefficients}

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Where the vision term's means are taken."""
        if VISION not in self.coefficients:
            return {}
        counts = torch.tensor([0, *batch.num_segments[:-1]], device=batch.segments.device)
        return {"pool_at": torch.where(batch.segments < 0, -1, batch.segments + counts.cumsum(0)[:, None])}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums over the rows of a micro-batch."""
        own = self._own(batch)
        terms = {"nll": -scores.log_probs[own].double().sum()}
        metrics = {
            "entropy": Metric(scores.entropy[own].detach().sum(), "nll"),
            "text_loss": Metric(terms["nll"].detach(), "nll"),
        }
        if VISION in self.coefficients:
            terms[VISION] = _vision(scores, batch)
            metrics["vision_loss"] = Metric(terms[VISION].detach(), VISION)
        if FUSION in self.coefficients:
            log_probs = segment_log_probs(scores, batch)
            gaps = log_probs[0::2] - log_probs[1::2]
            right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
            terms[FUSION] = softplus(-gaps).sum()
            metrics["fusion_loss"] = Metric(terms[FUSION].detach(), FUSION)
            metrics["match_accuracy"] = Metric(right.detach().sum(), FUSION, proportion=True)
        return Loss(terms, metrics)

    def _own(self, batch: Batch) -> Tensor:
        """Whether each supervised token [N] is of a row itself."""
        return token_segments(batch) % self._stride == 0


def contrast(images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D · L_vision of x [D, H] and y [D, H] in fp64: its parts by image [D], and its gradients at x and y [D, H]."""
    x, y = (given.detach().double().requires_grad_() for given in (images, answers))
    with torch.enable_grad():
        signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
        parts = softplus(-signs * (SCALE * normalize(x, dim=-1) @ normalize(y, dim=-1).T + BIAS)).sum(1)
        to_x, to_y = torch.autograd.grad(parts.sum(), (x, y))
    return parts.detach(), to_x, to_y


def _vision(scores: TokenScores, batch: Batch) -> Tensor:
    """This micro-batch's part of the sum, with the gradient of the whole sum at its own means."""
    assert scores.pooled is not None
    if VALUE not in batch.columns:  # the dummy of a rank without rows
        return 0.0 * (scores.pooled.images.sum() + scores.pooled.answers.sum()).double()
    columns = batch.columns[TO_IMAGES], batch.columns[TO_ANSWERS]
    moved = [(to * (m - m.detach())).sum() for to, m in zip(columns, scores.pooled, strict=True)]
    return batch.columns[VALUE].double().sum() + moved[0] + moved[1]
