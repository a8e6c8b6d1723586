"""How a mixture of experts spreads its tokens: what the load-balancing (auxiliary) loss is made of.

Switch Transformer (Fedus et al. 2022, eq. 4-6), as transformers computes it, over the N = tokens × layers places where
a router chose k of E experts: L = E Σ_e f_e p_e, f_e = C_e / N the choices of expert e per place, p_e = P_e / N its
mean probability. L is k where all experts are used alike and larger where some are preferred; only p has a gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from itune_ray.errors import ModelError


class RouterLoad(NamedTuple):
    """Sums over the places of a micro-batch, padding left out."""

    choices: Tensor
    """[E] fp32, C_e: how often each expert was chosen."""
    probabilities: Tensor
    """[E] fp32, P_e: its summed probability, differentiable."""
    places: Tensor
    """[] fp32, N."""


def router_load(model: Any, logits: tuple[Tensor, ...], real: Tensor) -> RouterLoad:
    """The load of a micro-batch.

    Args:
        model: Whose config says how many experts a token is given to.
        logits: [B · T, E] of each layer that has a router.
        real: [B, T] bool: the tokens that count.
    """
    top_k = int(model.config.get_text_config().num_experts_per_tok)
    kept = real.reshape(-1).float()
    choices = probabilities = torch.zeros(logits[0].shape[-1], device=kept.device)
    for layer in logits:
        p = layer.reshape(len(kept), -1).float().softmax(-1)
        chosen = torch.zeros_like(p).scatter_(-1, p.topk(top_k, -1).indices, 1.0)
        choices = choices + kept @ chosen
        probabilities = probabilities + kept @ p
    return RouterLoad(choices.detach(), probabilities, kept.sum() * len(logits))


def router_loss_weight(model: Any, wanted: float | None) -> float:
    """The weight of the load-balancing loss: as wanted, else the model's own; 0 for a model without routers.

    Raises:
        ModelError: A weight is wanted, and the model has no router that tells its logits.
    """
    own = getattr(model.config.get_text_config(), "router_aux_loss_coef", None)
    if own is None or not _tells_router_logits(model):
        if wanted:
            raise ModelError(
                "a router loss needs a mixture of experts whose routers tell their logits",
                got=f"{wanted}, and a {model.config.model_type}",
                allowed="0, or leave it out",
                knob="router_loss",
            )
        return 0.0
    return float(own) if wanted is None else wanted


def _tells_router_logits(model: Any) -> bool:
    parts: list[Any] = [m for m in model.modules() if hasattr(type(m), "_can_record_outputs")]
    return any("router_logits" in (type(part)._can_record_outputs or {}) for part in parts)


EXPERT_LAYERS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3"})
"""What the layers of an expert and its router are called where each is a module of its own."""


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a layer's experts are one tensor [E, ...], as in transformers, and no linear layers."""
    return any(p.ndim == 3 and any("experts" in part for part in n.split(".")) for n, p in model.named_parameters())
