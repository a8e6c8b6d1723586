"""What one driver takes: rows per second of a generate stage as replicas are added, with engines that only wait.

`python jobs/bench/control_plane.py [--replicas 1,2,4,8,16,32] [--latency 1.0] [--slots 32]` runs the stage as a job
does (Ray Data, recipe workers, pool, ledger) with fake engines that hold `slots` requests for `latency` seconds each,
so that one replica gives slots / latency rows/s and all beyond that is the control plane. The rate is that of the rows
between a tenth and nine tenths of the stage; starts are left out. One JSON line per count of replicas, with what a
row costs the driver.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from itune_ray import cluster
from itune_ray.config.generate import GenerateJob
from itune_ray.data.artifact import RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.generate.run import run
from itune_ray.observe import metrics
from itune_ray.observe.names import Metric
from itune_ray.observe.progress import Progress

ROWS_PER_BLOCK = 32
WORKERS = 2


class Arrivals:
    """When rows reached the driver."""

    def __init__(self) -> None:
        self.at: list[tuple[float, int]] = []

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Keep the counts of rows."""
        if metric.name == "itune_rows_total":
            self.at.append((time.perf_counter(), int(value)))

    @property
    def rows(self) -> int:
        """All of them."""
        return sum(rows for _, rows in self.at)

    def rate(self) -> float:
        """Rows per second in the middle of the stage."""
        total, seen = self.rows, 0
        low: tuple[float, int] | None = None
        high = (0.0, 0)
        for when, rows in self.at:
            seen += rows
            if low is None and seen >= total * 0.1:
                low = when, seen
            if seen <= total * 0.9:
                high = when, seen
        assert low is not None
        return (high[1] - low[1]) / (high[0] - low[0])


def job(replicas: int, arguments: argparse.Namespace, root: str) -> GenerateJob:
    """The stage: enough rows for `--seconds`, enough blocks in flight to fill every slot and a queue beside it."""
    rate = replicas * arguments.slots / arguments.latency
    rows = int(rate * arguments.seconds)
    in_flight = max(2, int(replicas * arguments.slots * 2.5 / ROWS_PER_BLOCK / WORKERS) + 1)
    file = Path(root) / f"prompts-{replicas}.jsonl"
    with file.open("w") as lines:
        for i in range(rows):
            lines.write(
                json.dumps({"prompt": f"Question {i}: say in a dozen words what the number {i} reminds you of."}) + "\n"
            )
    return GenerateJob.model_validate(
        {
            "name": f"replicas-{replicas}",
            "output": root,
            "prompts": [{"type": "file", "path": str(file)}],
            "teacher": {
                "model": {"path": "fake"},
                "engine": {"type": "fake", "latency_s": arguments.latency},
                "pool": {"replicas": replicas, "cpus_each": 0.1, "max_outstanding": arguments.slots},
            },
            "workers": {
                "num": WORKERS,
                "cpus_each": 0.5,
                "rows_per_block": ROWS_PER_BLOCK,
                "blocks_in_flight": in_flight,
            },
        }
    )


def main() -> None:
    """Each count of replicas in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", default="1,2,4,8,16,32")
    parser.add_argument("--latency", type=float, default=1.0)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15.0)
    arguments = parser.parse_args()
    first: float | None = None
    with tempfile.TemporaryDirectory() as root, Progress(quiet=True) as progress:
        for replicas in map(int, arguments.replicas.split(",")):
            settings = job(replicas, arguments, root)
            assert settings.teacher is not None
            arrivals = Arrivals()
            metrics.send_to(arrivals)
            cluster.connect(settings.run.ray)
            engines = EngineHost()
            try:
                engines.pool(settings.teacher)
                before = time.process_time()
                run(settings, RunStore(root, settings.name), "respond", engines, progress)
                spent = time.process_time() - before
            finally:
                engines.close()
            rate = arrivals.rate()
            first = first or rate / replicas
            told = {
                "replicas": replicas,
                "rows_per_s": round(rate, 1),
                "asked": round(replicas * arguments.slots / arguments.latency, 1),
                "of_linear": round(rate / (first * replicas), 3),
                "driver_ms_per_row": round(spent * 1000 / arrivals.rows, 2),
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
