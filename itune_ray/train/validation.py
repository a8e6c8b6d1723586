"""Held-out rows scored by the objective itself, forward only, along the run: validation.jsonl.

Every number is a sum over the held-out units divided once by their count, like the training loss, and so as independent
of ranks and packing. A metric that counts units, such as the share of pairs ranked right, gets Wilson's interval.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from itune_ray.config.train import TrainJob
from itune_ray.data.intervals import wilson
from itune_ray.data.order import PackedRow, PackedTable
from itune_ray.train.forward import forward_only
from itune_ray.train.metrics import MetricsLog
from itune_ray.train.statistic import step_batches
from itune_ray.train.step import Stepper

LOG = "validation.jsonl"


class Validation:
    """The held-out rows of a run.

    Args:
        table: Their packed rows.
        attach: Adds the columns that the objective needs.
        stage_dir: Where validation.jsonl is; rank 0 writes.
        start: Steps done before this attempt: later lines, and at 0 all, are dropped and written anew.
    """

    def __init__(
        self,
        job: TrainJob,
        table: PackedTable,
        stepper: Stepper,
        pad: int,
        attach: Callable[[Sequence[PackedRow]], list[PackedRow]],
        stage_dir: str,
        start: int,
    ):
        assert job.validation is not None
        self._every, self._micro_batch = job.validation.every_steps, job.micro_batch
        self._table, self._stepper, self._pad, self._attach = table, stepper, pad, attach
        self._log = MetricsLog(stage_dir, start or -1, LOG) if stepper.world.is_main else None

    def due(self, step: int, total: int) -> bool:
        """Whether the rows are scored after so many steps: before the first, every N, and at the end."""
        return step in (0, total) or (self._every is not None and step % self._every == 0)

    def run(self, step: int) -> dict[str, Any]:
        """Score the rows and write a line. Collective."""
        row = {"step": step, **self._scores()}
        if self._log is not None:
            self._log.write(row)
            self._log.flush()
        return row

    def _scores(self) -> dict[str, Any]:
        objective, world = self._stepper.objective, self._stepper.world
        sums: dict[str, float] = defaultdict(float)
        units: dict[str, float] = defaultdict(float)
        of: dict[str, tuple[str, bool]] = {}
        for step in range(self._table.plan.steps):
            rows = self._attach(self._table.rows(step, world.rank, world.size))
            most = -(-self._table.num_rows(step) // world.size)
            batches = step_batches(rows, most, self._micro_batch, self._pad, self._stepper)
            for batch, scores in forward_only(self._stepper, batches):
                loss = objective(scores, batch)
                for term, count in objective.units(batch).items():
                    units[term] += count
                for term, total in loss.terms.items():
                    sums[f"loss/{term}"] += float(total)
                for name, metric in loss.metrics.items():
                    sums[name] += float(metric.total)
                    of[name] = metric.unit, metric.proportion
        totals = dict(zip(sums, world.sum(list(sums.values())), strict=True))
        counts = dict(zip(units, world.sum(list(units.values())), strict=True))
        terms = objective.coefficients.items()
        row: dict[str, Any] = {
            "loss": sum(c * totals[f"loss/{term}"] / max(counts[term], 1.0) for term, c in terms),
            **{name: totals[name] / counts[unit] for name, (unit, _) in of.items() if counts[unit]},
            "n": int(counts[next(iter(objective.coefficients))]),
        }
        for name, (unit, proportion) in of.items():
            if proportion and counts[unit]:
                row["low"], row["high"] = wilson(totals[name], int(counts[unit]))
        return row
