"""A tracker run for each trial of a sweep, written when the trial has ended.

It is written by the driver, which has the keys, and at once: W&B holds one run per process, and trials overlap. All
runs of a sweep share the first part of their names and the setting `sweep`, by which trackers group them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from itune_ray.config.axes import AxisValues, told
from itune_ray.config.train import TrainJob
from itune_ray.data.storage import Folder
from itune_ray.errors import ConfigError
from itune_ray.sweep.ledger import Entry
from itune_ray.train.trackers import open_trackers

DONE = "tracked.json"
"""In a trial's folder once its tracker run is written."""
LONGEST_NAME = 128
"""Characters that W&B takes."""


def track_trial(
    train: TrainJob,
    axes: AxisValues,
    rows: Sequence[dict[str, Any]],
    *,
    sweep: str,
    run_id: str,
    folder: Folder,
    say: Callable[[str], None],
) -> None:
    """Show an ended trial in the trackers of its training; nothing where that was done before, or there are none.

    Trackers cannot stop a sweep: one that does not open, or fails, is told, and all of them are tried once more when
    the last trial has ended; what is not shown then is in metrics.jsonl and trials/ alone.

    Args:
        rows: See `shown_rows`.
        sweep: What people call the sweep.
        run_id: Names the tracker run for good.
        folder: Of the trial in the sweep's artifact; TensorBoard's files go there.
    """
    if not train.trackers or folder.exists(DONE):
        return
    name = f"{sweep}/{told(axes)}"[:LONGEST_NAME]
    settings = {"sweep": sweep, **axes, **train.identity()}
    try:
        tracked = open_trackers(train.trackers, folder=folder.uri, name=name, run_id=run_id, settings=settings, say=say)
    except ConfigError as error:
        say(f"  {told(axes)} is not shown: {error}")
        return
    for row in rows:
        tracked.log(row)
    tracked.close()
    if tracked.whole:
        folder.write_json(DONE, {"run": run_id})


def shown_rows(metrics: Sequence[Mapping[str, Any]], entries: Sequence[Entry], metric: str) -> list[dict[str, Any]]:
    """The rows of a trial's metrics.jsonl up to its last rung, with the scores of rungs as `score/METRIC`.

    Args:
        metrics: Rows in order of their steps; another sweep may have trained the trial further.
        entries: The trial's ledger, not empty.
        metric: Name of the score that ranks.
    """
    last = entries[-1].steps
    shown = {int(row["step"]): dict(row) for row in metrics if row["step"] <= last}
    for entry in entries:
        if entry.score is not None:
            shown.setdefault(entry.steps, {"step": entry.steps})["score"] = {metric: entry.score}
    return [shown[step] for step in sorted(shown)]
