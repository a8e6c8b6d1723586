"""The report stage: artifacts in, report.html, tables.csv and summary.json out."""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from itune_ray.config.report import ReportJob
from itune_ray.data.artifact import Artifact, RunStore, open_artifact
from itune_ray.observe.progress import Progress
from itune_ray.report.collect import collect
from itune_ray.report.page import pairs_of, render
from itune_ray.report.summary import summarise
from itune_ray.report.tables import tables_csv

VERSION = "4"
"""Of the page's content: part of the artifact's identity."""


def run(job: ReportJob, runs: RunStore, stage: str, engines: object, progress: Progress) -> Artifact:
    """Collect finished artifacts into one page, one table and one summary.

    The page and the summary are also copied to the run's folder, where people look first.

    Args:
        engines: Unused; every stage is called alike.
    """
    artifact = runs.artifact(stage, "report", job, {"report": VERSION})
    inputs = [open_artifact(uri) for uri in job.inputs]
    skipped = _finished_before(inputs, runs)
    if not artifact.complete:
        with progress.task("report", len(inputs), "stages") as task:
            collected = collect(inputs, skipped)
            pairs = pairs_of(collected, job)
            page = render(collected, job, pairs, command_line(sys.argv), time.strftime("%Y-%m-%d %H:%M"))
            artifact.folder.write_bytes("report.html", page.encode())
            artifact.folder.write_bytes("tables.csv", tables_csv(collected, pairs, job.continual).encode())
            artifact.folder.write_json("summary.json", summarise(inputs, skipped))
            task.update(len(inputs))
        artifact.finish(rows=len(inputs))
    runs.folder.write_bytes("report.html", artifact.folder.read_bytes("report.html"))
    runs.folder.write_json("summary.json", summarise([*inputs, artifact], skipped))
    return artifact


def command_line(argv: Sequence[str]) -> str:
    """The command as a person would type it again: `itune pipeline FILE ...`."""
    program = Path(argv[0])
    arguments = argv[1:] if program.name in ("itune", "__main__.py") else []
    return shlex.join(["itune", *arguments]) if arguments else "itune report … (started from Python)"


def _finished_before(inputs: Sequence[Artifact], runs: RunStore) -> set[str]:
    """Stages that were complete before this command asked for them, or that another command made."""
    asked = {artifact.path(): artifact.started for artifact in runs.opened}
    return {a.stage for a in inputs if a.complete and a.manifest["finished"] < asked.get(a.path(), float("inf"))}
