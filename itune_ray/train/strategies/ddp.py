"""Replicated weights, gradients averaged over ranks in fp32 (torch DistributedDataParallel)."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from itune_ray.config.optimizer import OptimizerConfig
from itune_ray.config.strategies import DdpConfig
from itune_ray.model.load import parameters_on_meta
from itune_ray.train.optimizer import Optimizers, build_optimizers
from itune_ray.train.strategies.base import clip_gradients, load_torch_state, materialise, torch_state
from itune_ray.train.world import World


class Ddp:
    """Every rank holds the whole model; bf16 runs as autocast over fp32 weights. One process needs no wrapper."""

    def __init__(self, config: DdpConfig, world: World, precision: Literal["bf16", "fp32"]):
        self._world, self._bf16 = world, precision == "bf16"
        self.gradient_divisor = world.size
        self._model: nn.Module | None = None

    def init_context(self) -> AbstractContextManager[None]:
        return parameters_on_meta()

    def prepare(self, model: nn.Module) -> nn.Module:
        materialise(model, self._world.device)
        model = model.to(self._world.device)
        if self._world.size > 1:
            device_ids = [self._world.device] if self._world.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
        self._model = model
        return model

    def optimise(self, model: nn.Module, config: OptimizerConfig) -> tuple[nn.Module, Optimizers]:
        return model, build_optimizers(model, config)

    @contextlib.contextmanager
    def forward_context(self, last: bool) -> Any:
        with self._no_sync(last), torch.autocast(self._world.device.type, torch.bfloat16, enabled=self._bf16):
            yield

    def _no_sync(self, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self._model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Each gradient in the dtypes of its forward, not in what autocast would choose anew."""
        with torch.autocast(self._world.device.type, enabled=False):
            loss.backward()

    def step(self, optimizers: Optimizers, clip_norm: float | None) -> float:
        norm = clip_gradients(optimizers.parameters(), clip_norm)
        optimizers.step()
        return norm

    def state(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        return torch_state(model, optimizers)

    def load_state(self, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
        load_torch_state(model, optimizers, state)
