"""How weights, gradients and optimizer state are spread: `type` of the strategy's config -> its class."""

import importlib
from typing import Literal

from itune_ray.config.strategies import StrategyConfig
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

STRATEGIES = {
    "ddp": "itune_ray.train.strategies.ddp:Ddp",
    "fsdp2": "itune_ray.train.strategies.fsdp2:Fsdp2",
    "deepspeed": "itune_ray.train.strategies.deepspeed:Deepspeed",
}


def build_strategy(config: StrategyConfig, world: World, precision: Literal["bf16", "fp32"]) -> Strategy:
    """The strategy of a config on this process."""
    module, _, name = STRATEGIES[config.type].partition(":")
    return getattr(importlib.import_module(module), name)(config, world, precision)
