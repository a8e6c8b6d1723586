"""[Ray] Records become Ray's application metrics, which every node exports to Prometheus."""

from collections.abc import Mapping
from typing import Any

from itune_ray.observe.names import Metric


class RaySink:
    """To be used in a process that has joined Ray; picklable, so that a driver can give one to its actors."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_made": {}}

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter, or set a gauge."""
        from ray.util import metrics

        made: Any = self._made.get(metric.name)
        if made is None:
            kind: Any = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            made = kind(metric.name, description=metric.help, tag_keys=("run", *metric.tags))
            self._made[metric.name] = made
        if metric.kind == "gauge":
            made.set(value, tags=dict(tags))
        elif value > 0:
            made.inc(value, tags=dict(tags))


RAY_SINK = RaySink()
"""The one of this process."""
