"""Weights, gradients and optimizer state sharded per decoder layer (torch `fully_shard`)."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from itune_ray.config.optimizer import OptimizerConfig
from itune_ray.config.strategies import Fsdp2Config
from itune_ray.errors import TrainError
from itune_ray.model.compiled import decoder_layers
from itune_ray.model.load import parameters_on_meta
from itune_ray.train.optimizer import Optimizers, build_optimizers
from itune_ray.train.strategies.base import clip_gradients, load_torch_state, materialise, torch_state
from itune_ray.train.world import World, ensure_process_group


class Fsdp2:
    """Each rank holds 1/S of everything, S ranks one copy of the model: all W, or those of a node. A layer is gathered
    for its own forward and backward only.

    With S < W (HSDP) ranks form a W/S x S mesh: gradients are reduced and scattered within a row, then summed over the
    rows, so that per layer and step only 1/S of its gradient leaves a node.

    bf16 gathers and computes in bf16 over fp32 shards and reduces gradients in fp32.
    """

    def __init__(self, config: Fsdp2Config, world: World, precision: Literal["bf16", "fp32"]):
        ensure_process_group()
        self._config, self._world = config, world
        self._policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if precision == "bf16"
            else MixedPrecisionPolicy()
        )
        self.gradient_divisor = world.size
        self._root: FSDPModule | None = None
        self._mesh = _mesh(config, world)

    def init_context(self) -> AbstractContextManager[None]:
        return parameters_on_meta()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Decoder layers first, then the root, which takes what is left: embeddings, final norm and head."""
        if not any(p.is_meta for p in model.parameters()):
            model = model.to(self._world.device)
        for layer in decoder_layers(model):
            reshard = self._config.reshard_after_forward
            fully_shard(layer, mesh=self._mesh, mp_policy=self._policy, reshard_after_forward=reshard)
        self._root = fully_shard(model, mesh=self._mesh, mp_policy=self._policy)
        materialise(model, self._world.device)
        return model

    def optimise(self, model: nn.Module, config: OptimizerConfig) -> tuple[nn.Module, Optimizers]:
        return model, build_optimizers(model, config)

    @contextlib.contextmanager
    def forward_context(self, last: bool) -> Iterator[None]:
        assert self._root is not None
        self._root.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, optimizers: Optimizers, clip_norm: float | None) -> float:
        norm = clip_gradients(optimizers.parameters(), clip_norm)
        optimizers.step()
        return norm

    def state(self, model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        return torch_state(model, optimizers)

    def load_state(self, model: nn.Module, optimizers: Optimizers, state: dict[str, Any]) -> None:
        load_torch_state(model, optimizers, state)


def _mesh(config: Fsdp2Config, world: World) -> DeviceMesh | None:
    """Copies x shards of a copy, neighbours by rank together; None where one copy takes all ranks."""
    shards = world.size if config.shard_over == "all" else config.shard_over
    if shards == "node":
        shards = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        total, squares = world.sum([shards, shards**2])
        if squares * world.size != total**2:  # all ranks see alike whether all are equal
            raise TrainError(
                "one copy of the model per node needs as many workers on every node",
                got=f"{shards} on this one, {total / world.size:g} on average",
                allowed="nodes alike, or strategy.shard_over=all",
                knob="strategy.shard_over",
            )
    if world.size % shards:
        raise TrainError(
            "the workers do not divide into whole copies of the model",
            got=f"{world.size} workers, {shards} per copy",
            allowed="a number of workers that is a multiple",
            knob="strategy.shard_over or workers.num",
        )
    if shards == world.size:
        return None
    shape, names = (world.size // shards, shards), ("replicate", "shard")
    return init_device_mesh(world.device.type, shape, mesh_dim_names=names)
