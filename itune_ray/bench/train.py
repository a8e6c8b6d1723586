"""[Ray] The training loop against a peer, turn by turn, the stage on a Ray worker against the loop alone, and memory of
a step at a large vocabulary."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itune_ray import cluster
from itune_ray.bench.head import HeadTask
from itune_ray.bench.inputs import Inputs, write_inputs
from itune_ray.bench.train_loop import train_job
from itune_ray.bench.turns import Method, Side, Task, Turn, alternate
from itune_ray.config.bench import BenchJob, TrainBench
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, TrainError
from itune_ray.observe.progress import Progress

Say = Callable[[str], None]
POLL_S = 0.01
PEER_COMPILES = 3
"""Steps after which a compiled peer has met its shapes."""
PAIRS = 128
"""The most pairs of the part `dpo`, each of which both sides first score by the reference; steps take them in turn."""


def run(job: BenchJob, runs: RunStore, stage: str, engines: EngineHost, progress: Progress) -> Artifact:
    """Measure; every call measures anew. Writes bench.json.

    Raises:
        ConfigError: The peer's script is not there.
        TrainError: A side failed, with its last line.
    """
    assert job.train is not None
    bench = job.train
    if not Path(bench.peer).is_file():
        raise ConfigError("there is no such script", got=bench.peer, allowed="a file, from here", knob="train.peer")
    artifact = runs.artifact(stage, "bench", job, {"began": time.time()})
    logs = Path(artifact.path()) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in bench.parts:
            began, folder = time.perf_counter(), Path(scratch) / part
            if part == "memory":
                facts[part] = _memory(bench, folder)
            elif part == "ray":
                facts[part] = _ray(job, bench, folder, logs, engines, progress)
            else:
                facts[part] = _against_peer(bench, part, folder, logs, job.seed, progress.say)
            told = {k: v for k, v in facts[part].items() if not isinstance(v, list | dict)}
            progress.say(f"{part}, {time.perf_counter() - began:.0f} s: {json.dumps(told)}")
    facts = {"ratio": facts[bench.parts[0]]["ratio"], **facts, "cores": os.cpu_count()}
    artifact.folder.write_json("bench.json", facts)
    artifact.finish(**facts)
    return artifact


def _task(bench: TrainBench, method: Method, inputs: Inputs, steps: int) -> Task:
    return Task(
        method=method,
        folder=inputs.folder,
        documents_per_step=inputs.documents_per_step,
        rows_per_step=bench.rows_per_step,
        pack_length=bench.pack_length,
        micro_batch=bench.micro_batch,
        rank=bench.rank,
        threads=bench.threads,
        steps=steps,
        precision=bench.precision,
        compile=bench.compile,
        peer_compile=bench.peer_compile,
    )


def _environment(bench: TrainBench) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(bench.threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }


def _against_peer(bench: TrainBench, method: Method, folder: Path, logs: Path, seed: int, say: Say) -> dict[str, Any]:
    """Turns of the loop and of the peer at its best number of rows."""
    if method == "dpo":
        bench = bench.model_copy(update={"documents": min(bench.documents, PAIRS)})
    inputs = write_inputs(bench, folder, method == "dpo", seed)
    candidates = bench.peer_micro_batches[method]
    warm = PEER_COMPILES if bench.peer_compile else 1
    steps = bench.rounds * max(bench.steps, bench.peer_steps) + (warm + 1) * len(candidates) + 10
    file = folder / "task.json"
    _task(bench, method, inputs, steps).write(file)
    environment = _environment(bench)
    ours = [sys.executable, "-m", "itune_ray.bench.train_loop", str(file)]
    theirs = [sys.executable, bench.peer, str(file)]
    with (
        Side("loop", ours, logs / f"{method}-loop.txt", environment) as loop,
        Side("peer", theirs, logs / f"{method}-peer.txt", environment) as peer,
    ):
        tried = {size: _tried(peer, size, warm) for size in candidates}
        best = max(tried, key=lambda size: tried[size].rate)
        if best != candidates[-1]:
            peer.turn(warm, best)
        mine, other = alternate(lambda: loop.turn(bench.steps), lambda: peer.turn(bench.peer_steps, best), bench.rounds)
    other.append(tried[best])
    for turn in (*mine, *other):
        say(f"{method}, {'loop' if turn in mine else 'peer'}: {turn.rate:,.0f} tokens/s")
    return {
        "ratio": _ratio(mine, other, lambda turn: turn.rate),
        "cpu_ratio": _ratio(mine, other, lambda turn: turn.cpu_rate),
        "tokens_per_s": round(max(turn.rate for turn in mine), 1),
        "peer_tokens_per_s": round(max(turn.rate for turn in other), 1),
        "tokens_per_step": mine[0].tokens // mine[0].steps,
        "peer_tokens_per_step": other[0].tokens // other[0].steps,
        "peer_micro_batch": best,
        "parameters": inputs.parameters,
        "turns": [round(turn.rate, 1) for turn in mine],
        "peer_turns": [round(turn.rate, 1) for turn in other],
        "peer_tried": {str(size): round(turn.rate, 1) for size, turn in tried.items()},
        "losses": [round(mine[-1].loss, 4), round(other[-1].loss, 4)],
    }


def _tried(peer: Side, size: int, warm: int) -> Turn:
    """One step at so many rows, after some that allocate and compile."""
    peer.turn(warm, size)
    return peer.turn(1, size)


def _ratio(mine: Sequence[Turn], other: Sequence[Turn], rate: Callable[[Turn], float]) -> float:
    return round(max(map(rate, mine)) / max(map(rate, other)), 4)


def _ray(
    job: BenchJob, bench: TrainBench, folder: Path, logs: Path, engines: EngineHost, progress: Progress
) -> dict[str, Any]:
    """Full tuning by the loop alone and by the stage on one Ray worker, twice each, in turns: from the first step to
    the finished model (`seconds`), and with the start of processes, which both sides have (`whole_seconds`)."""
    from itune_ray.train.run import run as train

    cluster.connect(job.run.ray, progress.say)
    inputs = write_inputs(bench, folder, False, job.seed)
    task = _task(bench, "sft", inputs, bench.ray_steps)
    file = folder / "task.json"
    task.write(file)

    def alone(number: int) -> dict[str, float]:
        out = folder / f"alone-{number}"
        command = [sys.executable, "-m", "itune_ray.bench.train_loop", str(file), str(out)]
        return _timed(lambda: _called(command, _environment(bench), logs / f"ray-alone-{number}.txt"), out)

    def staged(number: int) -> dict[str, float]:
        store = RunStore(str(folder / f"staged-{number}"), "train")
        whole = train_job(task, run={"ray": job.run.ray.model_dump()})
        return _timed(lambda: train(whole, store, "train", engines, progress), folder / f"staged-{number}")

    sides = {"alone": alone, "staged": staged}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number, order in enumerate((("alone", "staged"), ("staged", "alone"))):
        for name in order:
            runs[name].append(sides[name](number))
            progress.say(f"ray, {name}: {json.dumps(runs[name][-1])}")

    def best(name: str, value: str) -> float:
        return min(one[value] for one in runs[name])

    return {
        "ratio": round(best("alone", "seconds") / best("staged", "seconds"), 4),
        "whole_ratio": round(best("alone", "whole_seconds") / best("staged", "whole_seconds"), 4),
        "steps": bench.ray_steps,
        **runs,
    }


def _timed(call: Callable[[], object], out: Path) -> dict[str, float]:
    """Seconds of a training, whole and from the moment at which its metrics file is opened for the first step."""
    began, opened, done = time.perf_counter(), list[float](), threading.Event()

    def watch() -> None:
        while not opened and not done.wait(POLL_S):
            if any(out.rglob("metrics.jsonl")):
                opened.append(time.perf_counter())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    call()
    ended = time.perf_counter()
    done.set()
    thread.join()
    if not opened:
        raise TrainError("the training wrote no metrics", got=str(out))
    return {"seconds": round(ended - opened[0], 3), "whole_seconds": round(ended - began, 3)}


def _memory(bench: TrainBench, folder: Path) -> dict[str, Any]:
    """Peaks of one step, each way in a process of its own; `ratio` is the peer's over ours."""
    folder.mkdir()
    file = folder / "task.json"
    HeadTask(bench.vocabulary, bench.tokens, int(bench.config["hidden_size"]), bench.threads).write(file)
    own = [sys.executable, "-m", "itune_ray.bench.head"]
    ways = {
        "fused": [*own, "fused", str(file)],
        "peer": [sys.executable, bench.peer, "--head", str(file)],
        "full": [*own, "full", str(file)],
    }
    found: dict[str, dict[str, float]] = {}
    for name, command in ways.items():
        printed = _called(command, _environment(bench), folder / f"{name}.txt")
        found[name] = json.loads(printed.strip().splitlines()[-1])
    peaks = {name: one["peak_mib"] for name, one in found.items()}
    return {
        "ratio": round(peaks["peer"] / peaks["fused"], 4),
        "of_peer": round(peaks["fused"] / peaks["peer"], 4),
        "of_full": round(peaks["fused"] / peaks["full"], 4),
        "vocabulary": bench.vocabulary,
        "tokens": bench.tokens,
        **found,
    }


def _called(command: Sequence[str], environment: dict[str, str], log: Path) -> str:
    with log.open("w") as errors:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    if done.returncode:
        words = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise TrainError(f"{Path(command[1]).name} failed: {words}", got=f"status {done.returncode}")
    return done.stdout
