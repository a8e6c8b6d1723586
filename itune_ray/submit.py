"""[Ray] `itune submit`: the same command on a cluster, through Ray's job server.

The working directory travels as the job's runtime environment; data and artifacts never do: the job reads and writes
URIs or shared storage, and its output root must be given.
"""

import asyncio
import logging
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import itune_ray
from itune_ray.config.base import digest
from itune_ray.config.roles import SHARE
from itune_ray.config.shared import Job
from itune_ray.errors import ClusterError, ConfigError, StorageError
from itune_ray.observe.logs import QUIET_ENVIRONMENT, quiet_environment

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXCLUDES = [".git", ".venv", "runs", "**/__pycache__", ".pytest_cache", ".ruff_cache", "*.egg-info"]
PASSED_ON = ("ITUNE_OUTPUT", "ITUNE_MODEL_MIRROR", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "ITUNE_TEST_DATA")
"""Variables of this shell that the job gets too, where they are set."""


def submit(
    job_name: str, file: str, overrides: Sequence[str], job: Job, address: str, wait: bool, driver: str | None = None
) -> int:
    """Send a job, follow its log, and return 0 when it ends SUCCEEDED, else 1.

    Args:
        driver: Custom resource of the nodes on which the driver is to run, `cpu-data` for example; none: the head,
            which has no GPU to block.

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
    client = connect_to(address)
    submission = client.submit_job(
        entrypoint=entrypoint,
        submission_id=f"{job.name}-{digest(job.identity())}-{time.time_ns() // 10**6}",
        runtime_env=runtime_env(),
        metadata=_metadata(job),
        entrypoint_resources={driver: SHARE} if driver else None,
    )
    print(f"submitted {submission}  {address}", flush=True)
    return asyncio.run(follow(client, submission)) if wait else 0


def _metadata(job: Job) -> dict[str, str]:
    """What the dashboard and `itune status` show of a submission."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    dirty = "+changes" if commit and _git("status", "--porcelain") else ""
    output = job.run.output or os.environ["ITUNE_OUTPUT"]
    facts = {"name": job.name, "config": digest(job.identity()), "version": itune_ray.__version__, "output": output}
    return {**facts, "commit": commit + dirty} if commit else facts


def _git(*arguments: str) -> str:
    """What git says of the current folder; nothing where it is no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


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


def connect_to(address: str) -> "JobSubmissionClient":
    """The cluster's job server; where it asks for a token, Ray takes it from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.

    Raises:
        ClusterError: Nothing answers at the address, or it wants another token.
    """
    quiet_environment()
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it reports every uploaded package
    try:
        return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the cluster asks for another token: {' '.join(str(error).split())[:200]}",
            got=address,
            allowed="RAY_AUTH_MODE=token with the cluster's own token",
            knob="RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise ClusterError(
            f"no job server answers: {' '.join(str(error).split())[:200]}",
            got=address,
            allowed="the dashboard's address, e.g. http://head:8265",
            knob="--address or RAY_API_SERVER_ADDRESS",
        ) from None


async def follow(client: "JobSubmissionClient", submission: str) -> int:
    """Print a submission's log until it ends; 0 when it SUCCEEDED."""
    async for text in client.tail_job_logs(submission):
        print(text, end="", flush=True)
    info = client.get_job_info(submission)
    print(f"{submission}: {info.status.value}" + (f"  {info.message}" if info.message else ""), flush=True)
    return 0 if info.status.value == "SUCCEEDED" else 1
