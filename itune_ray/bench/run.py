"""[Ray] A stage against its peer. Here the generate stage against bare vLLM: the best of some calls of `LLM.generate`,
then the stage as in a job."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from itune_ray import cluster
from itune_ray.bench.train import run as run_train
from itune_ray.config.bench import BenchJob
from itune_ray.config.shared import FileSource
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.engine.host import EngineHost
from itune_ray.errors import GenerationError
from itune_ray.generate.run import run as generate
from itune_ray.observe.progress import Progress


def run(job: BenchJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Measure; every call measures anew. Writes bench.json.

    Raises:
        GenerationError: The bare engine failed, with its last line.
        TrainError: A side of a train bench failed, with its last line.
    """
    if job.train is not None:
        return run_train(job, runs, stage, engines, progress)
    artifact = runs.artifact(stage, "bench", job, {"began": time.time()})
    records = [record for source in job.generation.prompts for record in read_source(source).records]
    progress.say(f"LLM.generate: {len(records)} prompts, {job.runs} times")
    bare = _bare(job)
    for number, one in enumerate(bare, start=1):
        progress.say(f"LLM.generate, run {number}: {one['tokens'] / one['seconds']:,.0f} tokens/s")
    whole = _whole(job, records, artifact, engines, progress)
    best = min(bare, key=lambda one: one["seconds"] / one["tokens"])
    facts = {
        "ratio": round(whole["tokens"] / whole["seconds"] / (best["tokens"] / best["seconds"]), 4),
        "stage": _told(whole),
        "bare": [_told(one) for one in bare],
        "rows": len(records),
        "cores": os.cpu_count(),
    }
    artifact.folder.write_json("bench.json", facts)
    artifact.finish(**facts)
    return artifact


def _told(one: dict[str, float]) -> dict[str, float]:
    return {
        "tokens": one["tokens"],
        "seconds": round(one["seconds"], 2),
        "tokens_per_s": round(one["tokens"] / one["seconds"], 1),
    }


def _bare(job: BenchJob) -> list[dict[str, float]]:
    given = {"stage": job.generation.model_dump(mode="json"), "runs": job.runs, "warm_up": job.warm_up}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "bench.json"
        file.write_text(json.dumps(given))
        command = [sys.executable, "-m", "itune_ray.bench.bare_vllm", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise GenerationError(f"LLM.generate failed: {words}", got=job.teacher.model.path, knob="stage.teacher")
    return json.loads(lines[-1])


def _whole(
    job: BenchJob, records: list[Record], artifact: Artifact, engines: EngineHost, progress: Progress
) -> dict[str, float]:
    """The stage, from reading its prompts to its finished tables, on an engine that has answered the same way before:
    the first prompts as a stage of their own."""
    cluster.connect(job.run.ray, progress.say)
    engines.pool(job.teacher)
    store = RunStore(artifact.path(), "stage")
    if first := records[: job.warm_up]:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "warm-up.jsonl"
            file.write_text("".join(json.dumps({"messages": list(record.prompt)}) + "\n" for record in first))
            warm = job.generation.model_copy(update={"prompts": (FileSource(path=str(file)),), "min_rows": 0})
            generate(warm, store, "warm-up", engines, progress)
    began = time.perf_counter()
    made = generate(job.generation, store, "generate", engines, progress)
    seconds = time.perf_counter() - began
    tokens: Any = made.manifest["tokens"]["generated"]
    return {"seconds": seconds, "tokens": tokens}
