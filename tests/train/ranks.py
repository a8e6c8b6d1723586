"""Runs a function on several gloo ranks, in processes that share nothing with the test but a temporary folder."""

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STRATEGIES = {
    "ddp": {"type": "ddp"},
    "fsdp2": {"type": "fsdp2"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3, "persist_below": 0},
}
"""Name -> `strategy` of a job. DeepSpeed believes in one process group per process: run it through `run_ranks` only."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` on every rank; results by rank, or the first rank's traceback as the failure."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all ranks
    context.set_forkserver_preload(["itune_ray.train.loop", "itune_ray.train.strategies.deepspeed"])
    with tempfile.TemporaryDirectory() as folder:  # the store removes its file itself
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/store", send, function, args), daemon=True)
            for rank, (_, send) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        try:
            results = [_receive(receive, timeout) for receive, _ in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [text for ok, text in results if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _receive(pipe: Any, timeout: float) -> tuple[bool, Any]:
    return pipe.recv() if pipe.poll(timeout) else (False, f"a rank hung for {timeout} s")


def _rank(rank: int, world: int, store: str, send: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        send.send((True, function(*args)))
    except BaseException:  # noqa: BLE001  the traceback belongs in the test's output
        send.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    dist.destroy_process_group()
