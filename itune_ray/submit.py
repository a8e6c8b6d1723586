"""`itune submit`: the same command on a cluster, through Ray's job server.

The working directory travels as the job's runtime environment; data and artifacts never do: the job reads and writes
URIs or shared storage, and its output root must be given.
"""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import itune_ray
from itune_ray.config.base import digest
from itune_ray.config.shared import Job
from itune_ray.errors import ClusterError, ConfigError, StorageError
from itune_ray.observe.logs import QUIET_ENVIRONMENT, quiet_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = [".git", ".venv", "runs", "**/__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info"]
PASSED_ON = ("ITUNE_OUTPUT", "HF_TOKEN", "HF_HUB_OFFLINE", "ITUNE_TEST_DATA")
"""Variables of this shell that the job gets too, where they are set."""


def submit(job_name: str, file: str, overrides: Sequence[str], job: Job, address: str, wait: bool) -> int:
    """Send a job, follow its log, and return 0 when it ends SUCCEEDED, else 1.

    Raises:
        StorageError: No output root: the cluster throws the working directory away.
        ConfigError: The job file is not below the current folder, so it would not travel.
        ClusterError: No job server answers at the address.
    """
    if job.run.output is None and "ITUNE_OUTPUT" not in os.environ:
        raise StorageError(
            "a submitted job needs an output root that outlives it",
            allowed="an absolute path on shared storage or a URI",
            knob="output=... or ITUNE_OUTPUT",
        )
    entrypoint = " ".join(["python -m itune_ray", job_name, _travelling(file), *map(_quoted, overrides)])
    client = _client(address)
    submission = client.submit_job(
        entrypoint=entrypoint,
        submission_id=f"{job.name}-{digest(job.identity())}-{int(time.time())}",
        runtime_env=runtime_env(),
        metadata={"name": job.name, "config": digest(job.identity()), "version": itune_ray.__version__},
    )
    print(f"submitted {submission}  {address}", flush=True)
    return asyncio.run(_follow(client, submission)) if wait else 0


def runtime_env() -> dict[str, object]:
    """The current folder, the package where it is not in it, quiet libraries, and the variables that are passed on."""
    package = Path(itune_ray.__file__).parent
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    env: dict[str, object] = {
        "working_dir": os.getcwd(),
        "excludes": EXCLUDES,
        "env_vars": {**QUIET_ENVIRONMENT, **passed},
    }
    return env if package.parent == Path.cwd() else {**env, "py_modules": [str(package)]}


def _travelling(file: str) -> str:
    try:
        return _quoted(str(Path(file).resolve().relative_to(Path.cwd())))
    except ValueError:
        raise ConfigError(
            "the job file must lie below the current folder, which is what travels to the cluster", got=file
        ) from None


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _client(address: str) -> "JobSubmissionClient":
    quiet_environment()
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it reports every uploaded package
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"no job server answers: {' '.join(str(error).split())[:200]}",
            got=address,
            allowed="the dashboard's address, e.g. http://head:8265",
            knob="--address or RAY_API_SERVER_ADDRESS",
        ) from None


async def _follow(client: "JobSubmissionClient", submission: str) -> int:
    async for text in client.tail_job_logs(submission):
        print(text, end="", flush=True)
    info = client.get_job_info(submission)
    print(f"{submission}: {info.status.value}" + (f"  {info.message}" if info.message else ""), flush=True)
    return 0 if info.status.value == "SUCCEEDED" else 1
