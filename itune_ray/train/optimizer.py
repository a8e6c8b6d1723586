"""AdamW, and Muon for hidden matrices with AdamW for the rest, behind one small front."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from itune_ray.config.optimizer import AdamwConfig, MuonConfig, OptimizerConfig
from itune_ray.errors import TrainError
from itune_ray.model.reward import reward_head
from itune_ray.model.sharding import full_shape


class Optimizers:
    """One or two torch optimizers that step together; learning rates are set from the schedule at every step."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        self.after_update: list[Callable[[], None]] = []
        """Called between an update and the dropping of its gradients."""
        self._base_lrs = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in optimizers]

    def set_lr(self, factor: float) -> float:
        """Scale every group's configured learning rate; returns that of the first group, for the log."""
        for optimizer, rates in zip(self.optimizers, self._base_lrs, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        return float(self.optimizers[0].param_groups[0]["lr"])

    def parameters(self) -> list[nn.Parameter]:
        """All parameters that are trained."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        """Update the parameters and drop the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
        for call in self.after_update:
            call()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> Optimizers:
    """Optimizers over the trainable parameters of a prepared (wrapped, sharded) model."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise TrainError("the model has no trainable parameter", knob="model.peft")
    if isinstance(config, MuonConfig):
        return Optimizers(_muon(model, trainable, config))
    return Optimizers([_adamw(trainable.values(), config)])


def _adamw(parameters: Iterable[nn.Parameter], config: AdamwConfig) -> torch.optim.Optimizer:
    """Weight decay acts on matrices only: pulling norms and biases to zero has no meaning."""
    chosen = list(parameters)
    matrices = [p for p in chosen if len(full_shape(p)) >= 2]
    vectors = [p for p in chosen if len(full_shape(p)) < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def _muon(model: nn.Module, trainable: dict[str, nn.Parameter], config: MuonConfig) -> list[torch.optim.Optimizer]:
    """Muon orthogonalises the update of hidden matrices; embeddings and the head are look-up tables, not such maps."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    plain: Any = getattr(model, "module", model)
    head = plain.get_output_embeddings() or reward_head(plain)
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    hidden = [p for p in trainable.values() if p.ndim == 2 and id(p) not in tables]
    rest = [p for p in trainable.values() if p.ndim != 2 or id(p) in tables]
    if not hidden:
        raise TrainError("muon found no hidden matrix to train", knob="optimizer.type")
    muon = torch.optim.Muon(hidden, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return [muon, _adamw(rest, config.adamw)] if rest else [muon]
