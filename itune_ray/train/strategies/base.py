"""The contract of a strategy: it places a model and moves gradients. No data, no logging, no files, no printing."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from itune_ray.config.optimizer import OptimizerConfig
from itune_ray.model.sharding import whole
from itune_ray.train.optimizer import Optimizers


class Strategy(Protocol):
    """What the loop knows of a strategy."""

    gradient_divisor: int
    """What the strategy divides summed gradients by; the loop multiplies the loss with it."""

    def init_context(self) -> AbstractContextManager[Any]:
        """Around the construction of a pretrained model, whose weights are read after `prepare`."""
        ...

    def prepare(self, model: nn.Module) -> nn.Module:
        """Place the model: wrap or shard it in the one order that works, then give meta parameters memory."""
        ...

    def optimise(self, model: nn.Module, config: OptimizerConfig) -> tuple[nn.Module, Optimizers]:
        """Optimizers over the trained parameters, once the weights are in place, and the model to call from then on."""
        ...

    def forward_context(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients cross ranks only in the `last` one of a step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        ...

    def step(self, optimizers: Optimizers, clip_norm: float | None) -> float:
        """Clip by the global norm, update, and return the norm before clipping."""
        ...

    def state(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Trainable weights and optimizer state by name, sharded where they are."""
        ...

    def load_state(self, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        ...


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give meta parameters and buffers (uninitialised) memory and move the real buffers, whose values no checkpoint
    holds.

    `to_empty` makes every module a parameter of its own, so tied weights are tied again afterwards.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
    if any(p.is_meta for p in model.parameters()):
        buffers = {id(module): dict(module._buffers) for module in model.modules()}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module, name))
        model.to_empty(device=device)
        for (first, first_name), *others in (tied for tied in places.values() if len(tied) > 1):
            for module, name in others:
                module._parameters[name] = first._parameters[first_name]
        for module in model.modules():
            module._buffers.update(buffers[id(module)])


def torch_state(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """State by parameter name, the same for DDP and FSDP2, so that one can resume what the other saved.

    Trained weights that are tied are there under each name, their optimizer state under the first.
    """
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimizers.optimizers, options=options)
    every_name = model.named_parameters(remove_duplicate=False)  # torch leaves out frozen ones under the first alone
    frozen = {name.removeprefix("module.") for name, parameter in every_name if not parameter.requires_grad}
    return {"model": {n: w for n, w in weights.items() if n not in frozen}, "optimizer": moments}


def load_torch_state(model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
    """Put `torch_state` back."""
    set_state_dict(
        model,
        optimizers.optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(ignore_frozen_params=True, strict=False),
    )


def clip_gradients(parameters: list[nn.Parameter], clip_norm: float | None) -> float:
    """Scale gradients down to `clip_norm` (None: leave them) and return their global L2 norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return float(whole(norm))
