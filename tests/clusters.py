"""Free-standing Ray clusters for tests: own ports, own folder, stopped by their own pid and nothing else."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

RAY = Path(sys.executable).parent / "ray"
SEARCH_PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""As in an activated environment: the `python` of an entrypoint is the cluster's."""
HEAD_ID, HEAD_TYPE = "FAKE_HEAD_NODE_ID", "ray.head.default"
EMPTY = [
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
]
"""What a provider of type `external` has no defaults for."""
AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "runtime-env-agent-port",
)


@dataclass(frozen=True)
class Head:
    """A head that runs: its GCS address, the file that made it, its process, the environment of whoever joins it."""

    address: str
    file: str
    pid: int
    environment: Mapping[str, str]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def autoscaling(node_types: Mapping[str, Any], idle_s: float = 5.0) -> Iterator[Head]:
    """A head without work and Ray's own autoscaler, whose nodes are further raylets on this machine.

    Args:
        node_types: As in a cluster file: name -> resources, min_workers, max_workers.
        idle_s: Seconds after which an idle node is taken down.
    """
    folder = Path(tempfile.mkdtemp(prefix="ir", dir="/tmp"))
    port = free_port()
    config = {
        "cluster_name": "fake",
        "max_workers": 8,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "auth": {},
        "file_mounts": {},
        **{key: list[str]() for key in EMPTY},
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
        | {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in node_types.items()},
    }
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ,
        "PATH": SEARCH_PATH,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["start", "--head", "--block", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"]
    command += [f"--port={port}", f"--temp-dir={folder}", f"--autoscaling-config={file}"]
    with running(command, environment, folder) as pid:
        joining = {k: v for k, v in environment.items() if not k.startswith(("RAY_CLOUD", "RAY_OVERRIDE"))}
        yield Head(f"127.0.0.1:{port}", str(file), pid, joining)


@dataclass(frozen=True)
class JobServer:
    """A head that takes jobs: the addresses of its job server and of its GCS, its process, the environment of whoever
    talks to it."""

    address: str
    gcs: str
    pid: int
    environment: Mapping[str, str]
    folder: Path


def joining(token: str | None) -> dict[str, str]:
    """The environment of whoever talks to a cluster, with a token or without any."""
    environment = {**os.environ, "PATH": SEARCH_PATH, "RAY_AUTH_MODE": "token" if token else "disabled"}
    environment.pop("RAY_ADDRESS", None)
    return {**environment, "RAY_AUTH_TOKEN": token} if token else environment


@contextlib.contextmanager
def job_server(cpus: int = 8) -> Iterator[JobServer]:
    """A head with a dashboard that asks for a token."""
    folder = Path(tempfile.mkdtemp(prefix="ir", dir="/tmp"))
    dashboard, port, environment = free_port(), free_port(), joining(secrets.token_hex(32))
    command = ["start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}", f"--temp-dir={folder}"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"]
    command += [f"--{port}={free_port()}" for port in AGENT_PORTS]
    own = {"OMP_NUM_THREADS": "1", "RAY_metrics_report_interval_ms": "1000"}
    with running(command, environment | own, folder) as pid:
        address = f"http://127.0.0.1:{dashboard}"
        await_answer(f"{address}/api/version")
        yield JobServer(address, f"127.0.0.1:{port}", pid, environment, folder)


def await_answer(url: str, timeout_s: float = 90) -> None:
    """Until something answers there, if only that it wants a token."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {url}"
            time.sleep(0.25)


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Iterator[int]:
    """`ray COMMAND` as a process, killed with all its children at the end, and its folder removed."""
    log = folder.parent / f"{folder.name}.log"
    with open(log, "w") as out:
        head = subprocess.Popen([str(RAY), *command], env=dict(environment), stdout=out, stderr=out)
    try:
        yield head.pid
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        for child in psutil.wait_procs(children, timeout=3)[1]:  # the head itself gives them half a minute
            child.kill()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)


@dataclass
class Node:
    """A raylet that joined, with the workers it started."""

    process: subprocess.Popen[bytes]
    options: Sequence[str]

    def kill(self) -> None:
        """As a machine goes: the raylet and every process below it, at once."""
        doomed = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)


class Machines:
    """A head and further nodes on this machine that can be killed and added.

    Args:
        address: Of the head.
        environment: Of whoever joins it.
        folder: The head's.
    """

    def __init__(self, address: str, environment: Mapping[str, str], folder: Path):
        self.address, self.environment, self._folder = address, environment, folder
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, resources: Mapping[str, float], cpus: int = 4) -> None:
        """Join a node; it is known by the custom resource of its name too."""
        custom = json.dumps({name: 1, **resources})
        options = [f"--address={self.address}", "--block", f"--num-cpus={cpus}", "--num-gpus=0"]
        options += [f"--resources={custom}", f"--object-store-memory={100 * 2**20}"]
        options += ["--min-worker-port=0", "--max-worker-port=0"]  # several nodes share this machine's ports
        options += [f"--{port}={free_port()}" for port in AGENT_PORTS]
        log = open(self._log(name), "w")  # noqa: SIM115  the process's own
        process = subprocess.Popen(
            [str(RAY), "start", *options], env=dict(self.environment), stdout=log, stderr=log, start_new_session=True
        )
        self.nodes[name] = Node(process, options)

    def await_nodes(self, timeout_s: float = 60) -> None:
        """Until all that were added have joined."""
        deadline = time.monotonic() + timeout_s
        while not all("Ray runtime started" in self._log(name).read_text() for name in self.nodes):
            assert time.monotonic() < deadline, "a node did not join"
            time.sleep(0.1)

    def _log(self, name: str) -> Path:
        return self._folder.parent / f"{self._folder.name}.{name}.log"

    def close(self) -> None:
        """Kill what is left."""
        for node in self.nodes.values():
            if node.process.poll() is None:
                node.kill()
        for log in self._folder.parent.glob(f"{self._folder.name}.*.log"):
            log.unlink()


@contextlib.contextmanager
def machines(cpus: int = 2, env: Mapping[str, str] | None = None) -> Iterator[Machines]:
    """A head of its own, to which nodes can be added; all of them with these variables."""
    folder = Path(tempfile.mkdtemp(prefix="ir", dir="/tmp"))
    port = free_port()
    environment = {
        **os.environ,
        "PATH": SEARCH_PATH,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        # A dead node is noticed in seconds, as when its network goes: by default after half a minute.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        **(env or {}),
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["start", "--head", "--block", f"--num-cpus={cpus}", "--num-gpus=0", "--include-dashboard=false"]
    command += [f"--port={port}", f"--temp-dir={folder}", f"--object-store-memory={200 * 2**20}"]
    with running(command, environment, folder):
        cluster = Machines(f"127.0.0.1:{port}", environment, folder)
        wait_for_port(port)
        try:
            yield cluster
        finally:
            cluster.close()


def wait_for_port(port: int, timeout_s: float = 60) -> None:
    """Until something listens there."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert time.monotonic() < deadline, f"nothing listens at port {port}"
        time.sleep(0.1)
