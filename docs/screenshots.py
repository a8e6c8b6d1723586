"""The pictures of docs/dashboard/: Ray's own dashboard while a run works on a cluster of this machine.

`python docs/screenshots.py [--job jobs/pipeline/quickstart.yaml]` needs `chromium` on PATH. It starts a head of its own
and submits the job to it, from the root of a clone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OUT = Path(__file__).parent / "dashboard"
PAGES = {"generate": ("actors", "cluster"), "train": ("jobs/pictures", "actors")}
"""Kind of stage -> pages to take while it works."""
PATIENCE_S = 12.0
"""A stage is looked at when it has been under way for so long."""
SIZE = "1500,1000"


def picture(url: str, file: Path) -> None:
    """One page, after it has had time to fetch what it shows."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={SIZE}", "--virtual-time-budget=15000"]
        subprocess.run([*command, f"--screenshot={file}", url], check=True, capture_output=True, timeout=120)
    print(file, flush=True)


def main() -> None:
    """Submit, and look."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", default="jobs/pipeline/quickstart.yaml")
    arguments = parser.parse_args()
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PATH": search}
    import ray
    from ray.job_submission import JobSubmissionClient

    from itune_ray.submit import runtime_env

    started = ray.init(num_cpus=8, include_dashboard=True, dashboard_port=8266, log_to_driver=False)
    dashboard, output = f"http://{started.dashboard_url}", Path(tempfile.mkdtemp(prefix="itune-pictures-"))
    client = JobSubmissionClient(dashboard)
    entrypoint = f"python -m itune_ray pipeline {arguments.job} name=pictures output={output}"
    job = client.submit_job(entrypoint=entrypoint, submission_id="pictures", runtime_env=runtime_env())
    left, seen = dict(PAGES), dict[str, float]()
    try:
        while left and client.get_job_status(job).value in ("PENDING", "RUNNING"):
            time.sleep(1)
            for kind in running(output / "pictures") & left.keys():
                if time.time() - seen.setdefault(kind, time.time()) > PATIENCE_S:
                    for page in left.pop(kind):
                        picture(f"{dashboard}/#/{page}", OUT / f"{kind}-{page.partition('/')[0]}.png")
    finally:
        client.stop_job(job)
        ray.shutdown()
        shutil.rmtree(output, ignore_errors=True)


def running(run: Path) -> set[str]:
    """Kinds of the stages that are under way."""
    manifests = [json.loads(file.read_text()) for file in run.glob("*/manifest.json")]
    return {facts["job"] for facts in manifests if facts["status"] == "running"}


if __name__ == "__main__":
    main()
