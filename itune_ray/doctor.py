"""[Ray] `itune doctor`: what works on this machine, one line per check."""

import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from itune_ray.config.shared import ModelRef, PoolConfig, RayConfig, ServedModel, VllmEngineConfig
from itune_ray.data.artifact import PACKAGES
from itune_ray.errors import ITuneError, TrainError
from itune_ray.observe.logs import Output, quiet_environment

GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    found: str


def examine(model: str) -> int:
    """Run every check and print it; returns 0 when all are well, else 1."""
    quiet_environment()
    log = Path(tempfile.gettempdir()) / "itune-logs" / "doctor.log"
    console = Console(file=Output(log).terminal, highlight=False)
    checks: dict[str, Callable[[str], str]] = {
        "python": lambda _: sys.version.split()[0],
        "packages": _packages,
        "memory": _memory,
        "gpus": _gpus,
        "model": _model,
        "loss invariance": _invariance,
        "ray": _ray,
        "vllm": _vllm,
    }
    failed = 0
    for name, check in checks.items():
        done = _checked(name, check, model)
        failed += not done.ok
        console.print(f"{'ok  ' if done.ok else 'FAIL'}  {done.name:<16} {done.found}", markup=False, soft_wrap=True)
    console.print(f"log: {log}", markup=False)
    return int(failed > 0)


def _checked(name: str, check: Callable[[str], str], model: str) -> Check:
    started = time.time()
    try:
        found = check(model)
    except ITuneError as error:
        return Check(name, False, str(error))
    except Exception as error:  # noqa: BLE001  a diagnosis must go on after any fault and name it
        return Check(name, False, " ".join(f"{type(error).__name__}: {error}".split())[:300])
    return Check(name, True, f"{found}  ({time.time() - started:.1f} s)")


def _packages(_: str) -> str:
    found: list[str] = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _memory(_: str) -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f} GiB, {psutil.cpu_count()} cores"


def _gpus(_: str) -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on CPU"
    free = [torch.cuda.mem_get_info(i)[0] / GIB for i in range(torch.cuda.device_count())]
    return ", ".join(f"{torch.cuda.get_device_name(i)} {gib:.0f} GiB free" for i, gib in enumerate(free))


def _model(model: str) -> str:
    """Parameters from config.json alone, and what of them fits here."""
    import psutil
    import torch

    from itune_ray.model.load import count_parameters

    parameters = count_parameters(ModelRef(path=model))
    gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info(0)[0] if gpu else psutil.virtual_memory().available
    # Serving: bf16 weights. LoRA: bf16 base, optimizer of the small part. Full: fp32 master, gradient, two moments.
    needs = {"serve": 2 * parameters, "LoRA": 2.5 * parameters, "full": 16 * parameters}
    verdicts = [
        f"{kind} {'fits' if need < 0.8 * free else 'does not fit'} ({need / GIB:.2f} GiB)"
        for kind, need in needs.items()
    ]
    return f"{model}: {parameters:,} parameters; weights and optimizer alone: {', '.join(verdicts)}"


def _invariance(model: str) -> str:
    from itune_ray.train.invariance import check_invariance

    report = check_invariance(ModelRef(path=model))
    if not report.ok:
        raise TrainError(report.summary())
    return report.summary()


def _ray(_: str) -> str:
    from itune_ray.cluster import connect

    connect(RayConfig(dashboard=False))
    import ray

    total = ray.cluster_resources()
    return f"started with {total.get('CPU', 0):g} logical CPUs, {total.get('GPU', 0):g} GPUs"


def _vllm(model: str) -> str:
    import asyncio

    import torch

    from itune_ray.engine.base import Request, Sampling
    from itune_ray.engine.host import EngineHost

    gpus = 1.0 if torch.cuda.is_available() else 0.0
    served = ServedModel(model=ModelRef(path=model), engine=VllmEngineConfig(), pool=PoolConfig(gpus_each=gpus))
    engines = EngineHost()
    try:
        request = Request(id="doctor", text="The", sampling=Sampling(max_tokens=8))
        completion = asyncio.run(engines.pool(served).client.generate([request]))[0]
    finally:
        engines.close()
    if completion.error:
        raise RuntimeError(completion.error)
    return f"loaded {model} and generated {len(completion.samples[0].token_ids)} tokens"
