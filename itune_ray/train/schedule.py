"""Learning-rate factor as a pure function of the step, so that nothing of it needs to be saved."""

import math

from itune_ray.config.optimizer import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor for optimizer step `step` in 0..total-1.

    Warm-up rises linearly over ceil(warmup * total) steps and never starts at 0 (the first step would do nothing);
    then `linear` or `cosine` decays from 1 to `final`, which the last step reaches.
    """
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup if config.type == "constant" or warmup < total else (step + 1) / total
    if config.type == "constant":
        return 1.0
    progress = (step - warmup + 1) / max(1, total - warmup)
    decay = 1 - progress if config.type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final + (1 - config.final) * decay
