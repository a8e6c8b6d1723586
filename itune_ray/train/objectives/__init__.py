"""What is optimised: `type` of the objective's config -> the class that computes it, imported when asked for."""

import importlib

from itune_ray.config.objectives import ObjectiveConfig, SftConfig
from itune_ray.train.objectives.base import Objective

OBJECTIVES = {
    "sft": "itune_ray.train.objectives.sft:Sft",
    "dpo": "itune_ray.train.objectives.dpo:Dpo",
    "robust": "itune_ray.train.objectives.robust:Robust",
    "ipo": "itune_ray.train.objectives.ipo:Ipo",
    "simpo": "itune_ray.train.objectives.simpo:Simpo",
    "orpo": "itune_ray.train.objectives.orpo:Orpo",
    "reward": "itune_ray.train.objectives.reward:Reward",
    "kto": "itune_ray.train.objectives.kto:Kto",
    "rrhf": "itune_ray.train.objectives.rrhf:Rrhf",
    "classify": "itune_ray.train.objectives.classify:Classify",
    "kd": "itune_ray.train.objectives.kd:Kd",
    "domain": "itune_ray.train.objectives.domain:Domain",
}
IMAGE_TEXT = "itune_ray.train.objectives.image_text:ImageText"
"""What sft is with a vision or a fusion term."""


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective of a config."""
    compares = isinstance(config, SftConfig) and (config.vision or config.fusion)
    module, _, name = (IMAGE_TEXT if compares else OBJECTIVES[config.type]).partition(":")
    return getattr(importlib.import_module(module), name)(config)
