"""Every metric there is: its name, what it counts and by which tags. Dashboards and alerts may use these and no others.

Ray exports a metric `NAME` as `ray_NAME`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One metric; every one also carries the tag `run`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    tags: tuple[str, ...] = ("stage",)

    @property
    def exported(self) -> str:
        """Its name at Prometheus."""
        return f"ray_{self.name}"


_ALL = (
    # Every long step.
    Metric("itune_done", "gauge", "Rows, steps, items or trials that are finished.", ("stage", "task")),
    Metric("itune_todo", "gauge", "The same, in all.", ("stage", "task")),
    Metric("itune_tokens_per_s", "gauge", "Tokens per second since the step began.", ("stage", "task")),
    Metric("itune_seconds_left", "gauge", "Time left at the rate so far.", ("stage", "task")),
    Metric("itune_stalled_seconds", "gauge", "Seconds without progress, 0 while there is some.", ("stage", "task")),
    Metric("itune_stage_seconds", "gauge", "Wall time of a finished stage, all attempts.", ("stage", "job_type")),
    # Rows and tokens.
    Metric("itune_rows_total", "counter", "Rows by how they ended.", ("stage", "job_type", "status", "reason")),
    Metric("itune_tokens_total", "counter", "Tokens by what was done with them.", ("stage", "job_type", "kind")),
    # Engines, said by the replicas.
    Metric("itune_engine_starts_total", "counter", "Engine replicas that were started.", ("model",)),
    Metric("itune_engine_requests_total", "counter", "Requests that reached an engine.", ("model", "replica")),
    Metric("itune_engine_failures_total", "counter", "Requests that an engine refused.", ("model", "replica")),
    Metric("itune_engine_running", "gauge", "Requests at an engine, queued ones included.", ("model", "replica")),
    Metric(
        "itune_engine_tokens_total",
        "counter",
        "Tokens an engine read (prompt), of these had in its prefix cache (cached), and wrote (generated).",
        ("model", "replica", "kind"),
    ),
    # Training.
    Metric("itune_loss", "gauge", "Training loss of the newest step that was logged."),
    Metric("itune_held_out_loss", "gauge", "Loss on held-out rows, where there are any."),
    Metric("itune_grad_norm", "gauge", "Gradient norm before clipping."),
    Metric("itune_learning_rate", "gauge", "Learning rate."),
    Metric("itune_packing_efficiency", "gauge", "Share of a packed row's places that hold a token."),
    Metric("itune_checkpoint_seconds", "gauge", "Seconds that the newest checkpoint took."),
    Metric("itune_mfu", "gauge", "Model FLOPs per second over those of the devices (workers.peak_tflops)."),
    # Results.
    Metric("itune_score", "gauge", "A model's score on a benchmark.", ("stage", "model", "benchmark", "bound")),
    Metric("itune_trials", "gauge", "Trials of a sweep by how they ended.", ("stage", "ended")),
    # What rows cost.
    Metric("itune_per_accepted_row", "gauge", "Of a finished stage.", ("stage", "job_type", "unit")),
    Metric(
        "itune_recipe_tokens_per_row",
        "gauge",
        "Tokens that a recipe generated, those of rejected rows included, per accepted row.",
        ("stage", "job_type", "recipe"),
    ),
    Metric("itune_cost", "gauge", "Cost of the cluster since the run began, by run.prices.", ()),
)
METRICS = {metric.name: metric for metric in _ALL}
