"""summary.json: a run's scores, funnels, stages and artifacts, for machines. Written after every job."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from itune_ray.data.artifact import Artifact, RunStore

Scores = dict[str, dict[str, dict[str, Any]]]
"""Model -> benchmark -> score, as scores.json has it."""

SCORE_KEYS = ("value", "low", "high", "n")


def write_summary(artifacts: Sequence[Artifact], runs: RunStore, skipped: Collection[str]) -> None:
    """Write `<run folder>/summary.json`.

    Args:
        artifacts: Of the run, in order; those still under way are left out.
        skipped: Names of the stages that were complete before this command.
    """
    runs.folder.write_json("summary.json", summarise(artifacts, skipped))


def summarise(artifacts: Sequence[Artifact], skipped: Collection[str]) -> dict[str, Any]:
    """Exactly `scores`, `funnel`, `stages` and `artifacts`.

    `scores`: model -> benchmark -> {value, low, high, n}. `funnel`: stage -> {in, accepted, rejected: {reason: n},
    failed: {cause: n}}. `stages`: stage -> {job, seconds, rows, tokens, status: skipped | run}. `artifacts`: stage ->
    path.
    """
    manifests = {a.stage: a.manifest for a in artifacts if a.complete}
    done = [a for a in artifacts if a.stage in manifests]
    return {
        "scores": {
            model: {name: {key: score[key] for key in SCORE_KEYS} for name, score in per.items()}
            for model, per in merged_scores(done).items()
        },
        "funnel": {stage: manifest["funnel"] for stage, manifest in manifests.items() if manifest.get("funnel")},
        "stages": {
            stage: {
                "job": manifest["job"],
                "seconds": manifest["seconds"],
                "rows": manifest.get("rows"),
                "tokens": total_tokens(manifest),
                "status": "skipped" if stage in skipped else "run",
            }
            for stage, manifest in manifests.items()
        },
        "artifacts": {artifact.stage: artifact.path() for artifact in done},
    }


def merged_scores(artifacts: Sequence[Artifact]) -> Scores:
    """The scores of all evaluate artifacts in order.

    A model that two stages scored on the same benchmark keeps both scores: the later one is listed under
    `model (stage)`.
    """
    merged: Scores = {}
    for artifact in artifacts:
        if not artifact.folder.exists("scores.json"):
            continue
        for model, per in artifact.folder.read_json("scores.json").items():
            name = shown_name(merged, model, artifact.stage, per)
            merged.setdefault(name, {}).update(per)
    return merged


def shown_name(merged: Scores, model: str, stage: str, scores: Mapping[str, Any]) -> str:
    """The model's own name, unless it would hide an earlier stage's score."""
    return f"{model} ({stage})" if set(merged.get(model, {})) & set(scores) else model


def total_tokens(manifest: Mapping[str, Any]) -> int | None:
    """A stage's tokens: one count, or the sum of its parts (prompt, generated)."""
    tokens = manifest.get("tokens")
    return sum(tokens.values()) if isinstance(tokens, dict) else tokens
