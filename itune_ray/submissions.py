"""[Ray] Submitted runs by name: how they stand, what they said, and how to stop them.

A run's name is in the metadata that `itune submit` sends along; of several submissions of one name the newest is meant.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from itune_ray.data.storage import Folder
from itune_ray.errors import ClusterError, StorageError, did_you_mean
from itune_ray.submit import connect_to, follow

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUNNING = ("PENDING", "RUNNING")
STOP_TIMEOUT_S = 60.0


def show_status(name: str | None, address: str) -> int:
    """Print a line per submission, of one name the stages too."""
    jobs = _named(connect_to(address), name)
    for job in jobs if name else sorted(jobs, key=_started):
        print(_line(job))
    if name:
        for line in _stages(jobs[0]):
            print(f"  {line}")
    return 0


def show_logs(name: str, address: str, wait: bool) -> int:
    """Print the newest submission's log; with `wait` until it ends, and return 0 when it SUCCEEDED."""
    client = connect_to(address)
    job = _named(client, name)[0]
    if wait and job.status.value in RUNNING:
        return asyncio.run(follow(client, _id(job)))
    print(client.get_job_logs(_id(job)), end="")
    return 0


def stop(name: str, address: str) -> int:
    """Stop the newest submission and wait until it has ended; its artifacts can be resumed."""
    client = connect_to(address)
    job = _named(client, name)[0]
    if job.status.value not in RUNNING:
        print(f"{_id(job)} has ended: {job.status.value}")
        return 0
    client.stop_job(_id(job))
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while (status := client.get_job_status(_id(job)).value) in RUNNING:
        if time.monotonic() > deadline:
            raise ClusterError(f"the job did not stop within {STOP_TIMEOUT_S:g} s", got=_id(job))
        time.sleep(0.25)
    print(f"{_id(job)}: {status}; submitted again, it goes on from here")
    return 0


def _named(client: "JobSubmissionClient", name: str | None) -> "list[JobDetails]":
    """Submissions of a run, the newest first; all that itune made where no name is given."""
    ours = [job for job in client.list_jobs() if job.submission_id and "name" in (job.metadata or {})]
    found = sorted((job for job in ours if name in (None, _name(job))), key=_started, reverse=True)
    if name is not None and not found:
        names = sorted({_name(job) for job in ours})
        raise ClusterError(
            f"no run of this name was submitted{did_you_mean(name, names)}",
            got=name,
            allowed=", ".join(names) or "none was submitted here yet",
        )
    return found


def _line(job: "JobDetails") -> str:
    metadata = job.metadata or {}
    ended = (job.end_time or time.time() * 1000) / 1000
    took = f"{ended - _started(job):.0f} s" if job.start_time else "not started"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_started(job)))
    told = [f"{key} {metadata[key]}" for key in ("config", "commit") if key in metadata]
    failed = f"  {' '.join((job.message or '').split())[:200]}" if job.status.value == "FAILED" else ""
    return "  ".join([_name(job), job.status.value, f"since {since}", took, *told, _id(job)]) + failed


def _stages(job: "JobDetails") -> Iterable[str]:
    """What the run's artifacts say, where its output can be read from here."""
    root = (job.metadata or {}).get("output")
    if root is None:
        return
    try:
        run = Folder.at(root) / _name(job)
        for stage in run.names():
            folder = run / stage
            if folder.exists("manifest.json"):
                manifest = folder.read_json("manifest.json")
                rows = f"  {manifest['rows']:,} rows" if manifest.get("rows") is not None else ""
                yield f"{stage}: {manifest['status']}  {manifest.get('seconds', 0):.1f} s{rows}"
    except StorageError as error:
        yield f"its artifacts cannot be read from here: {error}"


def _name(job: "JobDetails") -> str:
    return (job.metadata or {})["name"]


def _id(job: "JobDetails") -> str:
    return str(job.submission_id)


def _started(job: "JobDetails") -> float:
    return (job.start_time or 0) / 1000
