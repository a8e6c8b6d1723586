"""What a finished training says about itself, in memory and as outcome.json, which is written last."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from itune_ray.data.storage import Folder
from itune_ray.model.costs import MatrixCost, ParameterReport

NAME = "outcome.json"


@dataclass(frozen=True)
class TrainOutcome:
    """What a finished training left behind."""

    model_path: str | None
    """Hugging Face folder, the adapter merged in; None for an adapter at a pause."""
    adapter_path: str | None
    """PEFT folder; None after full training."""
    steps: int
    metrics: dict[str, Any]
    """The last row of metrics.jsonl."""
    parameters: ParameterReport
    accepted: int
    rejected: dict[str, int]
    checkpoint_path: str


def pause_folder(stage_dir: str, step: int) -> str:
    """Where a run that pauses after `step` steps leaves what it exports."""
    return (Folder.at(stage_dir) / f"at-{step:06d}").uri


def references_beside(stage_dir: str) -> str:
    """Folder beside a run's stages by which its trainings find each other's reference passes."""
    return f"{Folder.at(stage_dir).uri.rstrip('/').rpartition('/')[0]}/references"


def write_outcome(outcome: TrainOutcome, stage_dir: str) -> None:
    """Publish the outcome: from now on the stage is finished."""
    Folder.at(stage_dir).write_json(NAME, dataclasses.asdict(outcome))


def read_outcome(stage_dir: str) -> TrainOutcome | None:
    """The outcome of a finished stage, or None."""
    stage = Folder.at(stage_dir)
    if not stage.exists(NAME):
        return None
    tree = stage.read_json(NAME)
    report = tree["parameters"]
    matrices = tuple(MatrixCost(**matrix) for matrix in report["matrices"])
    return TrainOutcome(**{**tree, "parameters": ParameterReport(report["total"], report["trainable"], matrices)})
