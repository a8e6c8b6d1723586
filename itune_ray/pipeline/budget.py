"""What a run may spend: tokens and money over all its attempts, and a clean stop when they are spent."""

import os
import signal
import threading
from collections.abc import Mapping

from itune_ray.config.shared import Budget
from itune_ray.data.storage import Folder
from itune_ray.errors import BudgetError, StorageError
from itune_ray.observe.names import Metric

NAME = "spent.json"


class Purse:
    """Counts what a run spends, as a sink of its metrics, and ends the driver as an interrupt does once it is too much.

    What earlier attempts spent is in the run's folder; a killed attempt's last seconds may be missing there.

    Args:
        folder: The run's.
        budget: The caps; a cap that is None holds nothing back.
    """

    def __init__(self, folder: Folder, budget: Budget):
        self._folder, self._budget = folder, budget
        self._lock = threading.Lock()
        earlier = folder.read_json(NAME) if folder.exists(NAME) else {}
        self.tokens: int = earlier.get("tokens", 0)
        """Prompt, generated and trained tokens."""
        self.cost: float = earlier.get("cost", 0.0)
        """By `run.prices`."""
        self._stopping = False

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Count tokens."""
        if metric.name == "itune_tokens_total":
            self.spend(tokens=int(value))

    def spend(self, tokens: int = 0, cost: float = 0.0) -> None:
        """Add to the bill; over a cap, the driver's own interrupt ends it, from whatever thread this is called."""
        with self._lock:
            self.tokens, self.cost = self.tokens + tokens, self.cost + cost
            stop = self._error() is not None and not self._stopping
            self._stopping = self._stopping or stop
        if stop:
            os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        """Go on counting, but interrupt nothing any more: all work is done or stopped."""
        with self._lock:
            self._stopping = True

    def check(self) -> None:
        """To be called before anything is started; raises `BudgetError` when a cap is reached."""
        if (error := self._error()) is not None:
            raise error

    def save(self) -> None:
        """Write what was spent; whatever goes wrong, the run matters more."""
        try:
            self._folder.write_json(NAME, {"tokens": self.tokens, "cost": round(self.cost, 6)})
        except StorageError:
            return

    def _error(self) -> BudgetError | None:
        caps = {"tokens": (self.tokens, self._budget.tokens), "cost": (self.cost, self._budget.cost)}
        for name, (spent, cap) in caps.items():
            if cap is not None and spent >= cap:
                return BudgetError(
                    f"the run's budget is spent; what it made is kept, and the same command goes on with a larger one "
                    f"({NAME} in the run's folder counts all its attempts)",
                    got=f"{spent:,.10g} {name}",
                    allowed=f"less than {cap:,.10g}",
                    knob=f"run.budget.{name}",
                )
        return None
