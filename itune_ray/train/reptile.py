"""Reptile's outer step around the one loop: every k steps, trained weights go part of the way that they have come."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from itune_ray.config.course import Reptile
from itune_ray.train.optimizer import Optimizers

START = "reptile_start"
"""Entry of a parameter's optimizer state: θ at the start of the block, so that checkpoints hold it."""


class OuterSteps:
    """θ ← θ + ε (θ_k - θ) after each block of k steps, and after the last step of the run (Nichol et al. 2018).

    The inner optimizer keeps its moments over blocks. With k = 1 the run is that of the inner optimizer at ε times its
    learning rate, weight decay apart.

    Args:
        step: The step that is being taken, counted from 1.
        steps: All steps of the run.
    """

    def __init__(self, optimizers: Optimizers, config: Reptile, step: Callable[[], int], steps: int):
        self._optimizers, self._config, self._step, self._steps = optimizers, config, step, steps
        self._starts: dict[Tensor, Tensor] = {}
        for optimizer in optimizers.optimizers:
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._store)
        optimizers.after_update.append(self._update)

    def _remember(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        begins = (self._step() - 1) % self._config.inner_steps == 0
        for parameter in _parameters(optimizer):
            if begins or START not in optimizer.state[parameter]:
                self._starts[parameter] = parameter.detach().clone()

    def _store(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Into the state only now: optimizers fill an empty one at their first step."""
        for parameter in _parameters(optimizer):
            if (start := self._starts.pop(parameter, None)) is not None:
                optimizer.state[parameter][START] = start

    @torch.no_grad()
    def _update(self) -> None:
        step = self._step()
        if step % self._config.inner_steps and step != self._steps:
            return
        for optimizer in self._optimizers.optimizers:
            for parameter in _parameters(optimizer):
                start = optimizer.state[parameter][START]
                parameter.copy_(start + self._config.rate * (parameter - start))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those that take part in this update."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
