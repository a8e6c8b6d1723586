"""AdaLoRA's rank budget (Zhang et al. 2023): which singular triplets stay, and the term that keeps them orthogonal.

W' = W + (alpha / r) B (e A): rows of A and columns of B are singular vectors, e the singular values. After each step
    I = |w dL/dw|,   Ī = β1 Ī + (1-β1) I,   Ū = β2 Ū + (1-β2) |I - Ī|,   s(w) = Ī Ū
and a triplet scores s(e_i) + mean s(A_i) + mean s(B_i). The least important ones over the budget of the step lose their
singular value, and may win it back until the final phase. Ī, Ū and what stays are buffers of the layers, so that a
checkpoint of the model holds them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from itune_ray.config.adaptation import AdaloraConfig
from itune_ray.model.peft.names import ADAPTER

_FACTORS = ("lora_A", "lora_E", "lora_B")


class RankBudget:
    """The budget over all adapted matrices of a model.

    Args:
        model: The model as PEFT wrapped it; the layers get their buffers, which training then moves with them.
    """

    def __init__(self, model: nn.Module, config: AdaloraConfig):
        from peft.tuners.adalora import SVDLinear

        self._config = config
        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, SVDLinear)]
        for layer in self._layers:
            for factor in _FACTORS:
                for kind in ("importance", "deviation"):
                    layer.register_buffer(f"adalora_{kind}_{factor}", torch.zeros_like(_of(layer, factor).data))
            layer.register_buffer("adalora_kept", torch.ones(config.rank, dtype=torch.bool))

    def penalty(self) -> Tensor:
        """γ · mean over A and B of |AAᵀ - I| and |BᵀB - I| (Frobenius)."""
        norms: list[Tensor] = []
        for layer in self._layers:
            a, b = _of(layer, "lora_A"), _of(layer, "lora_B")
            for gram in (a @ a.T, b.T @ b):
                norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)))
        return self._config.orthogonality * torch.stack(norms).mean()

    def budget(self, step: int, total: int) -> int:
        """Triplets that stay after `step` of `total` steps: a cubic from rank to target_rank per matrix."""
        first, last = self._phases(total)
        full, target = (rank * len(self._layers) for rank in (self._config.rank, self._config.target_rank))
        if step <= first:
            return full
        if step >= last:
            return target
        return int((full - target) * (1 - (step - first) / (last - first)) ** 3 + target)

    @torch.no_grad()
    def allocate(self, step: int, total: int) -> None:
        """After the update of `step`, counted from 1, while its gradients are there: who loses its singular value."""
        first, last = self._phases(total)
        if step < last:
            self._observe()
        if step == last or (first < step < last and step % self._config.every_steps == 0):
            self._choose(self.budget(step, total))
        elif step > last:
            for layer in self._layers:
                _of(layer, "lora_E").masked_fill_(~layer.adalora_kept[:, None], 0.0)

    def _phases(self, total: int) -> tuple[int, int]:
        """Steps after which ranks begin to shrink, and after which they stay; at least one step lies between."""
        first = int(self._config.warmup * total)
        return first, max(first + 1, total - int(self._config.final * total))

    def _observe(self) -> None:
        smooth, deviate = self._config.beta
        for layer in self._layers:
            for factor in _FACTORS:
                parameter = _of(layer, factor)
                if parameter.grad is None:
                    continue
                now = (parameter * parameter.grad).abs()
                importance = getattr(layer, f"adalora_importance_{factor}")
                importance.mul_(smooth).add_(now, alpha=1 - smooth)
                deviation = getattr(layer, f"adalora_deviation_{factor}")
                deviation.mul_(deviate).add_((now - importance).abs(), alpha=1 - deviate)

    def _choose(self, budget: int) -> None:
        scores = [_triplets(layer) for layer in self._layers]
        lost = sum(map(len, scores)) - budget
        if lost <= 0:
            return
        threshold = torch.kthvalue(torch.cat(scores), lost).values
        for layer, score in zip(self._layers, scores, strict=True):
            layer.adalora_kept.copy_(score > threshold)
            _of(layer, "lora_E").masked_fill_(~layer.adalora_kept[:, None], 0.0)


def _of(layer: Any, factor: str) -> Any:
    return getattr(layer, factor)[ADAPTER]


def _triplets(layer: Any) -> Tensor:
    """Score [r] of every triplet of a layer."""
    a, e, b = (
        getattr(layer, f"adalora_importance_{factor}") * getattr(layer, f"adalora_deviation_{factor}")
        for factor in _FACTORS
    )
    return e[:, 0] + a.mean(1) + b.mean(0)
