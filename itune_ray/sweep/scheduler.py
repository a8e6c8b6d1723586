"""[Ray] Which trials go on: Tune's scheduler interface over a rule that can be replayed from the ledger.

Tune keeps its own experiment state, and nothing here reads it: what was decided stands in the sweep's ledger, and a
new driver feeds that to a fresh rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from itune_ray.config.sweep import AshaConfig, FifoConfig
from itune_ray.sweep.ledger import Ended, Entry, SweepLedger

OnEntry = Callable[[Entry], None]
"""Called after an entry is in the ledger."""


class Rule:
    """Decides about a trial when its score at a rung arrives.

    Args:
        config: asha: Ray's implementation, one bracket; fifo: every trial has its whole budget.
        steps: The budget of a trial.
        higher_is_better: Of the score.
    """

    def __init__(self, config: AshaConfig | FifoConfig, steps: int, higher_is_better: bool):
        self._steps = steps
        self._trials: dict[str, _Named] = {}
        self._asha: Any = None
        if isinstance(config, AshaConfig):
            self._asha = ASHAScheduler(
                time_attr="steps",
                metric="score",
                mode="max" if higher_is_better else "min",
                max_t=steps,
                grace_period=config.first_rung(steps),
                reduction_factor=config.reduction,
                brackets=1,
            )

    def judge(self, trial: str, steps: int, score: float) -> Ended | None:
        """How a trial ends here, or None when it goes on. Later judgements depend on this one."""
        if steps >= self._steps:
            return "completed"
        if self._asha is None:
            return None
        if trial not in self._trials:
            self._trials[trial] = _Named(trial)
            self._asha.on_trial_add(None, self._trials[trial])
        decision = self._asha.on_trial_result(None, self._trials[trial], {"steps": steps, "score": score})
        return "stopped" if decision == FIFOScheduler.STOP else None

    def replay(self, entries: Sequence[Entry]) -> None:
        """Judge again what was judged before, in the same order."""
        for entry in entries:
            if entry.score is not None:
                self.judge(entry.trial, entry.steps, entry.score)


@dataclass(frozen=True)
class _Named:
    """All that Ray's ASHA looks at of a trial."""

    trial_id: str


class SweepScheduler(FIFOScheduler):
    """Trials start in the order given; each result is judged and entered in the ledger before Tune acts on it.

    A trial whose worker died begins again and reports what it reported before: that has been decided already.

    Args:
        rule: Fresh; the ledger is replayed into it.
        ledger: Of the sweep.
        on_entry: For progress.
    """

    def __init__(self, rule: Rule, ledger: SweepLedger, on_entry: OnEntry = lambda entry: None):
        super().__init__()
        self._rule, self._ledger, self._on_entry = rule, ledger, on_entry
        rule.replay(ledger.entries)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Tune's hook: `trial.config["trial"]` is the key; a result has `steps` and `score`, or `failed`."""
        key, steps = trial.config["trial"], int(result["steps"])
        entry = self._ledger.at(key, steps)
        if entry is None:
            entry = self._judged(key, steps, result)
            self._ledger.add(entry)
            self._on_entry(entry)
        return self.CONTINUE if entry.ended is None else self.STOP

    def _judged(self, key: str, steps: int, result: Mapping[str, Any]) -> Entry:
        if result.get("failed") is not None:
            return Entry(trial=key, steps=steps, score=None, ended="failed", cause=str(result["failed"]))
        score = float(result["score"])
        return Entry(trial=key, steps=steps, score=score, ended=self._rule.judge(key, steps, score))

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes schedulers to disk; a terminal cannot be."""
        return {**self.__dict__, "_on_entry": None}
