"""Knowledge distillation from stored distributions (survey eq. 3; Hinton et al. 2015).

    L = alpha/N Σ_n D_n + (1-alpha)/N Σ_n -log q_n(y_n)
    forward  KL(p||q) = Σ_{v in top k} p_v log(p_v / q_v) + p_tail log(p_tail / q_tail)
    reverse  KL(q||p)
    jsd      β KL(p||m) + (1-β) KL(q||m),   m = β p + (1-β) q     (Agarwal et al. 2024, eq. 1)

over the N supervised tokens of the global batch, p the teacher's and q the student's distribution. The bucket for all
other tokens keeps D_n a lower bound of the whole divergence that grows with k (data processing inequality);
renormalising the k would be no bound and points elsewhere (methods T17: cosine with the full gradient 0.98 against 0.90
at k = 20). p_tail is taken in fp64, where 1 - Σ p does not cancel, q_tail from the head's own logarithm. D_n is 0 where
p = q; divided by β, or by 1-β, jsd tends to forward or reverse as β tends to 0 or 1.

A stored teacher may leave nothing to the tail, since its log-probs are rounded to fp16. The reverse divergence would
then be infinite for any student, so there p_tail counts as at least 1e-6: log(q_tail / p_tail) stays below 14.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from itune_ray.config.objectives import KdConfig
from itune_ray.data.batches import IGNORED, Batch
from itune_ray.model.logprobs import TokenScores
from itune_ray.train.documents import TEACHER_IDS, TEACHER_LOG_PROBS
from itune_ray.train.objectives.base import Loss, Metric

TAIL_FLOOR = 1e-6
"""Least mass of the teacher's tail in the reverse divergence."""
SMALLEST = 1e-300
"""A mass that adds nothing to a sum, and whose logarithm is finite."""


class Kd:
    """Terms `kl`, whichever divergence it is, and, below alpha 1, `nll`, both per supervised token.

    Reports `kl`, `nll` and `teacher_mass`, the mean probability that the k tokens hold.
    """

    needs: tuple[str, ...] = (TEACHER_IDS, TEACHER_LOG_PROBS)

    def __init__(self, config: KdConfig):
        self.config = config
        rest = {"nll": 1.0 - config.alpha} if config.alpha < 1 else {}
        self.coefficients: Mapping[str, float] = {"kl": config.alpha, **rest}

    def units(self, batch: Batch) -> dict[str, int]:
        """Supervised tokens, for both terms."""
        tokens = int((batch.labels[:, 1:] != IGNORED).sum())
        return dict.fromkeys(self.coefficients, tokens)

    def head_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's tokens, whose probability under the student is asked for."""
        ids = batch.columns.get(TEACHER_IDS)
        if ids is None:  # the dummy of a rank that has run out of rows
            return {"score_ids": batch.input_ids.new_zeros(0, self.config.k)}
        return {"score_ids": ids.long().unflatten(0, (-1, self.config.k))}

    def __call__(self, scores: TokenScores, batch: Batch) -> Loss:
        """Sums of one micro-batch."""
        assert scores.at is not None
        assert scores.tail is not None
        stored = batch.columns.get(TEACHER_LOG_PROBS, scores.at.new_zeros(0))
        log_p = stored.double().unflatten(0, (-1, self.config.k))
        divergence = self._divergence(log_p, scores.at, scores.tail)
        nll = -scores.log_probs.sum()
        terms = {"kl": divergence.sum(), "nll": nll}
        metrics = {
            "kl": Metric(divergence.detach().sum(), "kl"),
            "nll": Metric(nll.detach(), "kl"),
            "teacher_mass": Metric(log_p.exp().sum(), "kl"),
        }
        return Loss({name: terms[name] for name in self.coefficients}, metrics)

    def _divergence(self, log_p: Tensor, at: Tensor, tail: Tensor) -> Tensor:
        match self.config.divergence:
            case "forward":
                return tail_bucket_kl(log_p, at, tail)
            case "reverse":
                return tail_bucket_reverse_kl(log_p, at, tail)
            case "jsd":
                return tail_bucket_jsd(log_p, at, tail, self.config.beta)


def tail_bucket_kl(log_p: Tensor, at: Tensor, tail: Tensor) -> Tensor:
    """KL [N] of a teacher's top-k with tail bucket against a student's.

    Args:
        log_p: [N, k] fp64, the teacher's natural logarithms.
        at: [N, k] the student's at the same tokens.
        tail: [N] logarithm of the student's mass elsewhere.
    """
    p = log_p.exp()
    p_tail = (1 - p.sum(-1)).clamp(min=0.0)
    inside = (p * (log_p - at)).sum(-1)
    others = torch.isfinite(tail)  # with k = V there are none
    log_q_tail = torch.where(others, tail.double(), 0.0)
    return inside + torch.where(others, torch.special.xlogy(p_tail, p_tail) - p_tail * log_q_tail, 0.0)


def tail_bucket_reverse_kl(log_p: Tensor, at: Tensor, tail: Tensor) -> Tensor:
    """KL [N] of a student's distribution against a teacher's top-k with tail bucket; arguments of `tail_bucket_kl`."""
    log_q, log_p = _with_buckets(log_p, at, tail, floor=TAIL_FLOOR)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def tail_bucket_jsd(log_p: Tensor, at: Tensor, tail: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence [N] of the same distributions; arguments of `tail_bucket_kl`."""
    log_q, log_p = _with_buckets(log_p, at, tail, floor=SMALLEST)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    return beta * teacher + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


def _with_buckets(log_p: Tensor, at: Tensor, tail: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(student's, teacher's) logarithms [N, k + 1], the bucket last; an empty one, at k = V, holds `SMALLEST`."""
    others = torch.isfinite(tail)
    p_tail = (1 - log_p.exp().sum(-1)).clamp(min=floor)
    nothing = math.log(SMALLEST)
    log_q_tail = torch.where(others, tail.double(), nothing)
    log_p_tail = torch.where(others, p_tail.log(), nothing)
    return torch.cat([at.double(), log_q_tail[:, None]], -1), torch.cat([log_p, log_p_tail[:, None]], -1)
