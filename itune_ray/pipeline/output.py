"""The output root: where a run's artifacts go."""

import os
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

from itune_ray.cluster import in_submitted_job
from itune_ray.config.shared import Job, RunSettings
from itune_ray.data.storage import Folder
from itune_ray.errors import StorageError


def output_root(settings: RunSettings) -> str:
    """The output root as an absolute path or URI.

    Raises:
        StorageError: A submitted job names none: its working directory is thrown away with everything in it.
    """
    root = settings.output or os.environ.get("ITUNE_OUTPUT")
    if in_submitted_job() and (root is None or not (root.startswith("/") or "://" in root)):
        raise StorageError(
            "a submitted job needs an output root that outlives it",
            got=root,
            allowed="an absolute path on shared storage or a URI",
            knob="output=... or ITUNE_OUTPUT",
        )
    return Folder.at(root or "runs").uri


STORES = {"s3": "s3.amazonaws.com", "gs": "storage.googleapis.com", "gcs": "storage.googleapis.com"}
"""Scheme -> host, where no endpoint says otherwise."""


def receivers(job: Job) -> list[str]:
    """One line for every host outside this machine that rows of the run will be sent to."""
    settings, lines = job.run, list[str]()
    root = settings.output or os.environ.get("ITUNE_OUTPUT") or ""
    scheme, separator, rest = root.partition("://")
    if separator and scheme != "file":
        lines.append(f"rows go to {_store_host(scheme, rest)} (run.output)")
    # A submitted job's driver is on the cluster already.
    address = "" if in_submitted_job() else settings.ray.address or os.environ.get("RAY_ADDRESS") or ""
    host = address.rpartition("://")[2].rpartition(":")[0]
    if host and host not in ("127.0.0.1", "localhost"):
        lines.append(f"rows go to the Ray cluster at {host} (run.ray.address or RAY_ADDRESS)")
    lines += [f"rows go to {host} (an http engine)" for host in sorted(set(_endpoints(job.model_dump(mode="json"))))]
    return lines


def _endpoints(tree: Any) -> Iterator[str]:
    """Hosts of all http engines in a job's config."""
    if isinstance(tree, dict):
        values = cast(dict[str, Any], tree)
        if values.get("type") == "http" and isinstance(values.get("url"), str):
            yield urlsplit(values["url"]).hostname or values["url"]
        for value in values.values():
            yield from _endpoints(value)
    elif isinstance(tree, list):
        for value in cast(list[Any], tree):
            yield from _endpoints(value)


def _store_host(scheme: str, rest: str) -> str:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") if scheme == "s3" else None
    if endpoint:
        return endpoint.rpartition("://")[2].split("/")[0]
    return STORES.get(scheme) or rest.split("/")[0]
