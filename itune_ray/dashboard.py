"""`itune dashboard`: Prometheus beside a running Ray on this machine, with this project's alert rules.

Ray's dashboard looks for Prometheus at port 9090 of its own machine (RAY_PROMETHEUS_HOST says otherwise, and must be
set when Ray starts): on the head of a cluster nothing else is needed. Grafana imports the files of `dashboards/`.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from itune_ray.errors import ClusterError

DISCOVERY = "prom_metrics_service_discovery.json"
"""Where Ray lists the metrics endpoints of all nodes, in its temporary folder."""
START_TIMEOUT_S = 30.0
RULES = Path(__file__).parents[1] / "dashboards" / "alerts.yaml"


@dataclass(frozen=True)
class Scraping:
    """A Prometheus that runs."""

    url: str
    endpoints: tuple[str, ...]
    """What it scraped when it started."""


def serve(ray_folder: str, port: int) -> int:
    """Run Prometheus until interrupted, and say where everything is."""
    with prometheus(Path(ray_folder), port) as running:
        print(f"Prometheus: {running.url}  ({len(running.endpoints)} endpoints of Ray)")
        print("Ray dashboard, with time series once it finds Prometheus: http://127.0.0.1:8265/#/metrics")
        if RULES.is_file():
            print(f"alerts: {running.url}/alerts")
            print(f"Grafana: import {RULES.parent}/*.json with this Prometheus as data source")
        else:
            print("an installed package has neither alerts nor Grafana boards: they are in dashboards/ of a clone")
        sys.stdout.flush()
        stop = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        stop.wait()
    return 0


@contextlib.contextmanager
def prometheus(ray_folder: Path, port: int, interval_s: float = 5.0) -> Iterator[Scraping]:
    """Prometheus on a port of this machine, scraping every node of the Ray that uses the folder.

    Raises:
        ClusterError: Prometheus is not installed or does not start, or no Ray runs there.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        raise ClusterError(
            "Prometheus is not installed",
            allowed="the command `prometheus` on PATH, e.g. apt-get install prometheus",
        )
    discovery = ray_folder / DISCOVERY
    if not discovery.is_file():
        raise ClusterError(
            "no Ray with a dashboard runs on this machine",
            got=str(discovery),
            allowed="the temporary folder of a running head",
            knob="--ray-folder",
        )
    endpoints = tuple(target for group in json.loads(discovery.read_text()) for target in group["targets"])
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="itune-prometheus-") as folder:
        process = _started(binary, Path(folder), discovery, port, interval_s)
        try:
            _wait_ready(process, url, Path(folder) / "log")
            yield Scraping(url, endpoints)
        finally:
            process.terminate()
            process.wait(30)


def _started(binary: str, folder: Path, discovery: Path, port: int, interval_s: float) -> subprocess.Popen[bytes]:
    config = {
        "global": {"scrape_interval": f"{interval_s:g}s", "evaluation_interval": f"{interval_s:g}s"},
        "rule_files": [str(RULES)] if RULES.is_file() else [],
        "scrape_configs": [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        binary,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(int(START_TIMEOUT_S / 0.1)):
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{url}/-/ready"):
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            break
    words = log.read_text(errors="replace").strip().splitlines()
    raise ClusterError(f"Prometheus did not start: {words[-1][:300] if words else 'it said nothing'}", knob="--port")
