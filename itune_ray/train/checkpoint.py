"""Sharded checkpoints (torch DCP) that are either complete or not there.

A checkpoint is `checkpoint/step-NNNNNN/`: weights that are trained, optimizer state and the step. Nothing else is
needed for an exact resume: data order, learning rate and randomness are functions of (seed, step), so no sampler,
schedule or generator has state. The state is stored by parameter name, so another number of ranks can load it. The
marker file is written last, with a checksum of every other file; a folder without it is a crash's leftover, never read
and cleared at the next save, and one whose files are not as they were written is passed over for the one before.
"""

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from itune_ray.config.train import CheckpointConfig
from itune_ray.data.storage import PAUSES_S, Folder
from itune_ray.errors import StorageError, TrainError, first_line
from itune_ray.model.sharding import snapshot
from itune_ray.train.checkpoint_files import Reader, Sums, Writer, is_whole, merged
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

log = logging.getLogger(__name__)
MARKER = "complete.json"
SETTLE_S = 60.0
"""How long a run that ends in an error lets a checkpoint that is being written come to its end."""


class Checkpoints:
    """The checkpoints of one stage, by path or URI. To be made on all ranks at the same time.

    With `background` a save only copies the state to host memory; a thread writes it while training goes on, over a
    process group of its own. At most one is under way: the next save, and the end of the run, wait for it.
    """

    def __init__(self, folder: str, config: CheckpointConfig, world: World):
        self._folder, self._config, self._world = Folder.at(folder), config, world
        self._group: Any = dist.new_group(backend="gloo") if config.background and world.size > 1 else None
        self._damaged: set[int] = set()
        self._writing = _Background()

    def latest(self) -> int:
        """Optimizer steps done in the newest complete checkpoint; 0 without one."""
        return max(self._complete(), default=0)

    def newest_whole(self) -> int:
        """The same, passing over checkpoints with damaged files. Collective: each rank reads its share of them."""
        for step in sorted(self._complete(), reverse=True):
            damaged = self._damaged_files(step)
            if not self._world.sum([len(damaged)])[0]:
                return step
            self._damaged.add(step)
            if damaged:
                told = "the checkpoint of step %d is damaged (%s) and passed over: %s"
                log.warning(told, step, ", ".join(damaged), self.at(step).uri)
        return 0

    def at(self, step: int) -> Folder:
        """Folder of one checkpoint."""
        return self._folder / f"step-{step:06d}"

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> None:
        """Collective: all ranks write their shards, then rank 0 publishes, and drops what `keep` no longer covers.

        In the background it returns before that; an error is then raised by the next save or `wait`.
        """
        self.wait()
        state = strategy.state(model, optimizers)
        if not self._config.background:
            self._write(step, state)
            return
        kept = snapshot(state)
        self._writing.start(lambda: self._write(step, kept))

    def wait(self) -> None:
        """Until what was saved is published; raises what went wrong."""
        self._writing.wait()

    def settle(self) -> None:
        """Give a save that is under way some time, when the run has already failed."""
        self._writing.settle(SETTLE_S)

    def _write(self, step: int, state: dict[str, Any]) -> None:
        target = self.at(step)
        if self._world.is_main:
            self._remove_unfinished()
            target.fs.create_dir(target.path, recursive=True)
        self._barrier()
        sums = self._gathered(self._written(step, target, state))
        if self._world.is_main:
            target.write_json(MARKER, {"step": step, "world": self._world.size, "files": merged(sums)})
            for old in sorted(self._complete())[: -self._config.keep]:
                self.at(old).delete()
        self._barrier()  # whoever goes on finds it published

    def _written(self, step: int, target: Folder, state: dict[str, Any]) -> Sums:
        for pause in (*PAUSES_S, None):
            writer = Writer(target)
            try:
                with _quiet():
                    save(state, storage_writer=writer, process_group=self._group, no_dist=_alone())
                return writer.sums
            except (CheckpointException, OSError) as error:  # on every rank, whichever one it happened to
                reason = _of_storage(error)
                if reason is None:
                    raise
                if pause is None:
                    raise StorageError(
                        f"the checkpoint of step {step} cannot be written: {reason}", got=target.uri, knob="run.output"
                    ) from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _barrier(self) -> None:
        if self._world.size > 1:
            dist.barrier(group=self._group)

    def _gathered(self, sums: Sums) -> list[Sums]:
        """Of all ranks, on each: nobody is past this before everybody has written."""
        if self._world.size == 1:
            return [sums]
        parts: list[Any] = [None] * self._world.size
        dist.all_gather_object(parts, sums, group=self._group)
        return parts

    def load(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> None:
        """Collective: read the state of a checkpoint into a placed model and its optimizers."""
        state = strategy.state(model, optimizers)
        try:
            with _quiet():
                load(state, storage_reader=Reader(self.at(step)), no_dist=_alone())
        except (CheckpointException, RuntimeError, OSError) as error:
            raise TrainError(
                f"the checkpoint cannot be resumed: {first_line(error)}",
                got=self.at(step).uri,
                allowed="a checkpoint of the same model, adapter and optimizer",
            ) from error
        strategy.load_state(model, optimizers, state)

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if self.at(step).exists(MARKER)]

    def _damaged_files(self, step: int) -> list[str]:
        """Of this rank's share."""
        try:
            files: Sums = self.at(step).read_json(MARKER)["files"]
        except (StorageError, KeyError, TypeError):
            return [MARKER]
        mine = sorted(files)[self._world.rank :: self._world.size]
        return [name for name in mine if not is_whole(self.at(step), name, files[name])]

    def _remove_unfinished(self) -> None:
        for step in (set(self._steps()) - set(self._complete())) | self._damaged:
            self.at(step).delete()
        self._damaged.clear()

    def _steps(self) -> list[int]:
        return [int(name.removeprefix("step-")) for name in self._folder.names() if name.startswith("step-")]


def _of_storage(error: BaseException) -> str | None:
    """What the storage said, where that is what went wrong; torch's writer only says that a file came out too short."""
    causes = [failed for failed, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if isinstance(cause, OSError):
            return cause.strerror or " ".join(str(cause).split())[:200]
        if isinstance(cause, RuntimeError) and "inline_container" in str(cause):
            return "a file could not be written whole; is the disk full?"
    return None


def _alone() -> bool:
    return not dist.is_initialized()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Background:
    """One piece of work at a time on a thread that dies with the process."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  raised below, in the thread that can end the run
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def settle(self, timeout_s: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout_s)
