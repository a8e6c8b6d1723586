"""Recording: names and tags are checked, sinks cannot stop a run, and progress and stalls are told."""

import io
import time

import pytest

from itune_ray.observe import metrics
from itune_ray.observe.names import METRICS
from itune_ray.observe.progress import Progress
from itune_ray.observe.watch import Watch, explained_by


class Kept:
    """A sink that keeps what it is given."""

    def __init__(self):
        self.records = []

    def record(self, metric, value, tags):
        self.records.append((metric.name, value, dict(tags)))

    def of(self, name):
        return [(value, tags) for known, value, tags in self.records if known == name]


@pytest.fixture
def sink(monkeypatch):
    kept = Kept()
    monkeypatch.setattr(metrics, "_sinks", [kept])
    monkeypatch.setattr(metrics, "_context", {"run": "r", "stage": "s", "job_type": "generate"})
    return kept


def test_a_record_carries_the_context_and_its_own_tags(sink):
    metrics.count("itune_rows_total", 3, status="rejected", reason="length")
    expected = {"run": "r", "stage": "s", "job_type": "generate", "status": "rejected", "reason": "length"}
    assert sink.records == [("itune_rows_total", 3, expected)]


def test_unknown_names_kinds_and_tags_are_refused(sink):
    with pytest.raises(KeyError):
        metrics.count("itune_nothing")
    with pytest.raises(ValueError, match="is a gauge"):
        metrics.count("itune_loss")
    with pytest.raises(ValueError, match="with the tags stage"):
        metrics.gauge("itune_loss", 1.0, colour="red")
    assert not sink.records


def test_a_sink_that_fails_is_switched_off_and_stops_nothing(sink):
    class Broken:
        def record(self, *_):
            raise OSError("no agent")

    metrics.send_to(Broken())
    metrics.gauge("itune_loss", 1.0)
    metrics.gauge("itune_loss", 2.0)
    assert [value for value, _ in sink.of("itune_loss")] == [1.0, 2.0]
    assert len(metrics._sinks) == 1


def test_a_funnel_is_counted_by_how_rows_ended(sink):
    metrics.count_funnel({"in": 10, "accepted": 6, "rejected": {"refusal": 3}, "failed": {"died": 1}})
    assert {(tags["status"], tags["reason"]): value for value, tags in sink.of("itune_rows_total")} == {
        ("accepted", ""): 6,
        ("rejected", "refusal"): 3,
        ("failed", "died"): 1,
    }


def test_progress_records_how_far_a_step_is(sink):
    with Progress(stream=io.StringIO()) as progress, progress.task("distill", 100) as task:
        task.update(0, 0)
        task.update(40, 800)
    assert sink.of("itune_done")[-1] == (40, {"run": "r", "stage": "s", "task": "distill"})
    assert sink.of("itune_todo")[-1][0] == 100
    assert sink.of("itune_tokens_per_s")[-1][0] > 0
    assert sink.of("itune_seconds_left")[-1][0] > 0


def test_a_step_that_stands_still_is_told_of_rarely_and_with_its_causes(sink, wait_until):
    stream = io.StringIO()
    with Progress(stream=stream) as progress, progress.task("distill", 100) as task:
        task.update(1)
        with explained_by(lambda: ["engine 0 of m (pid 7): 3 requests in the engine"]), Watch(progress, 0.2):
            wait_until(lambda: stream.getvalue().count("no progress") >= 2, "it was told twice", timeout=10)
            first = time.monotonic()
            task.update(2)
            wait_until(lambda: sink.of("itune_stalled_seconds")[-1][0] == 0, "it moves again", timeout=10)
            assert time.monotonic() - first < 5
    assert "distill: no progress for" in stream.getvalue()
    assert "engine 0 of m (pid 7): 3 requests in the engine" in stream.getvalue()


def test_names_are_what_prometheus_takes():
    for name, metric in METRICS.items():
        assert name.startswith("itune_")
        assert (metric.kind == "counter") == name.endswith("_total")
        assert len(set(metric.tags)) == len(metric.tags)
