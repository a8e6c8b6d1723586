"""A generate stage whose replicas, workers and driver are killed at seeded random moments, ten times in one run."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from test_generate_run import job_tree, start_driver

from itune_ray.data.ledger import Ledger
from itune_ray.data.storage import Folder

pytestmark = pytest.mark.soak

KILLS = 10
ROWS = 240
MAX_ATTEMPTS = 3
VICTIMS = {"replica": "ray::Replica", "worker": "ray::MapWorker"}


@dataclass
class Victims:
    """What was killed so far, and what was settled and asked by then."""

    folder: Path
    log: Path
    driver: subprocess.Popen[str]
    kills: list[str] = field(default_factory=list)
    settled_then: list[tuple[set[str], int]] = field(default_factory=list)
    """At each kill: inputs that were settled, and how many requests the log held."""

    def settled(self) -> set[str]:
        """Inputs that are settled by what is on disk."""
        ledgers = list(self.folder.glob("generate-*/ledger"))
        return Ledger(Folder.at(str(ledgers[0]))).settled(MAX_ATTEMPTS) if ledgers else set()

    def requests(self) -> list[str]:
        """Keys of the inputs that were asked for, in order."""
        return [line.split("/")[1] for line in self.log.read_text().split()] if self.log.exists() else []

    def kill(self, kind: str, rng: random.Random) -> bool:
        """Kill one process of that kind, if there is one."""
        try:
            children = psutil.Process(self.driver.pid).children(recursive=True)
            found = [p.pid for p in children if VICTIMS.get(kind, "?") in " ".join(p.cmdline())]
        except psutil.NoSuchProcess:
            return False
        pid = self.driver.pid if kind == "driver" else rng.choice(sorted(found)) if found else None
        if pid is None:
            return False
        before = self.settled()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        if kind == "driver":
            self.driver.wait()
            psutil.wait_procs(children, timeout=30)
            before = self.settled()
        self.settled_then.append((before, len(self.requests())))
        self.kills.append(kind)
        return True


@pytest.mark.timeout(1800)
def test_ten_kills_change_nothing(tmp_path, prompts_file):
    """The final table is the undisturbed one, settled rows reach no engine again, and failures are driven thrice."""
    engine = {"fail_rate": 0.03}  # not flaky_rate: every replica would fail such a request once
    common = {"workers": {"num": 2, "rows_per_block": 24, "blocks_in_flight": 1}, "max_attempts": MAX_ATTEMPTS}
    calm = start_driver(job_tree(prompts_file, "calm", engine, **common), tmp_path)
    assert calm.wait(timeout=300) == 0, said(calm)

    log = tmp_path / "requests"
    job = job_tree(prompts_file, "run", {**engine, "latency_s": 1.5, "request_log": str(log)}, **common)
    job["teacher"]["pool"] |= {"replicas": 2, "max_outstanding": 8, "max_restarts": KILLS}
    job["commit"] = {"rows": 4, "seconds": 0.5}
    rng = random.Random(20)
    plan = ["replica"] * 4 + ["worker"] * 3 + ["driver"] * 3
    rng.shuffle(plan)
    victims = Victims(tmp_path / "run", log, start_driver(job, tmp_path))
    deadline = time.monotonic() + 1500
    while plan:
        assert time.monotonic() < deadline
        goal = len(victims.settled()) + rng.randint(4, 20)
        while len(victims.settled()) < goal and victims.driver.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert victims.driver.poll() is None, f"ended after {victims.kills}: {said(victims.driver)}"
        time.sleep(rng.random())
        if victims.kill(plan[-1], rng) and plan.pop() == "driver":
            victims.driver = start_driver(job, tmp_path)
    assert victims.driver.wait(timeout=600) == 0, said(victims.driver)

    assert Counter(victims.kills) == {"replica": 4, "worker": 3, "driver": 3}
    asked = victims.requests()
    for kind, (settled, so_far) in zip(victims.kills, victims.settled_then, strict=True):
        assert not settled & set(asked[so_far:]), f"settled rows were asked again after a {kind} was killed"
    for table in ("accepted", "rejected", "failed"):
        assert rows_of(tmp_path / "run", table) == rows_of(tmp_path / "calm", table), table
    failed = rows_of(tmp_path / "run", "failed")
    assert failed
    assert {row["attempts"] for row in failed} == {MAX_ATTEMPTS}
    most = max(Counter(asked).values())
    assert most <= MAX_ATTEMPTS + KILLS


def said(driver: subprocess.Popen[str]) -> str:
    """The last words of a driver that has ended."""
    return driver.communicate()[1][-2000:]


def rows_of(run: Path, table: str) -> list[dict[str, Any]]:
    """A published table; a row that failed once and then did not may have been failed by a kill, so attempts of
    accepted rows are left out."""
    (folder,) = run.glob("generate-*")
    rows = pq.read_table(folder / table).to_pylist()
    return [
        {**row, "score": str(row["score"]), "attempts": row["attempts"] if table == "failed" else 0} for row in rows
    ]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that are all asked."""
    file = tmp_path_factory.mktemp("data") / "questions.jsonl"
    file.write_text("".join(f'{{"prompt": "question {i}"}}\n' for i in range(ROWS)))
    return file
