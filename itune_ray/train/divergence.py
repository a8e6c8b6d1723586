"""Giving up on a run that gets worse: by the mean loss of a window of steps, since single steps are noisy.

The window fills from the first step on, so that a run which is lost at once is measured by where it began.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

from itune_ray.config.train import DivergenceConfig
from itune_ray.errors import TrainError


class Divergence:
    """Watches the losses of consecutive steps; see `DivergenceConfig`.

    Args:
        seen: `state` of the watch that this one goes on from.
    """

    def __init__(self, config: DivergenceConfig, seen: Mapping[str, Any] | None = None):
        self._config = config
        self._window: deque[float] = deque((seen or {}).get("window", ()), maxlen=config.steps)
        self._best: float | None = (seen or {}).get("best")

    @property
    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON."""
        return {"window": list(self._window), "best": self._best}

    def see(self, step: int, loss: float) -> None:
        """Take the loss of the next step into account.

        Raises:
            TrainError: The run has diverged.
        """
        self._window.append(loss)
        mean = sum(self._window) / len(self._window)
        best = mean if self._best is None else min(self._best, mean)
        self._best = best
        limit = best + (self._config.factor - 1) * abs(best) + self._config.slack
        if len(self._window) == self._config.steps and mean > limit:
            raise TrainError(
                f"the run has diverged at step {step}: its loss over {self._config.steps} steps is far over its lowest",
                got=f"mean loss {mean:.4g}, lowest {best:.4g}",
                allowed=f"up to {limit:.4g}; train with a lower optimizer.lr, or go on regardless with divergence=null",
                knob="divergence",
            )
