"""Recording: code says what happened, a sink that was installed carries it away, and without one nothing happens.

Only names of `names.METRICS` with exactly their tags are taken, so that a dashboard can rely on them; a sink that fails
is switched off, since watching must never stop a run.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from itune_ray.observe.names import METRICS, Metric

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go."""

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Add to a counter, or set a gauge."""
        ...


_sinks: list[Sink] = []
_context: dict[str, str] = {"run": "", "stage": "", "job_type": ""}


def send_to(sink: Sink) -> None:
    """Send records of this process to one more sink, once."""
    if sink not in _sinks:
        _sinks.append(sink)


@contextlib.contextmanager
def sent_to(sink: Sink) -> Iterator[None]:
    """The same while the block runs."""
    _sinks.append(sink)
    try:
        yield
    finally:
        if sink in _sinks:
            _sinks.remove(sink)


def in_context(**tags: str) -> None:
    """Tags that all records of this process get from now on where their metric has them: run, stage, job_type."""
    _context.update(tags)


def count(name: str, amount: float = 1, **tags: object) -> None:
    """Add to a counter."""
    _record(name, "counter", amount, tags)


def gauge(name: str, value: float, **tags: object) -> None:
    """Set a gauge."""
    _record(name, "gauge", value, tags)


def count_funnel(funnel: Mapping[str, Any]) -> None:
    """Rows of a finished stage by how they ended: `Funnel.to_json()`."""
    count("itune_rows_total", funnel["accepted"], status="accepted", reason="")
    for status in ("rejected", "failed"):
        for reason, rows in funnel[status].items():
            count("itune_rows_total", rows, status=status, reason=reason)


def _record(name: str, kind: str, value: float, tags: Mapping[str, object]) -> None:
    metric = METRICS[name]
    given = {key: str(tag) for key, tag in tags.items()}
    full = {key: given.pop(key, _context.get(key, "")) for key in ("run", *metric.tags)}
    if metric.kind != kind or given:
        raise ValueError(f"{name} is a {metric.kind} with the tags {', '.join(metric.tags)}, not {kind} {dict(tags)}")
    for sink in list(_sinks):
        try:
            sink.record(metric, value, full)
        except Exception as error:  # noqa: BLE001  whatever a metrics library can raise
            _sinks.remove(sink)
            log.warning("metrics are switched off: %s", error)
