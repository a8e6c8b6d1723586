"""Sharded checkpoints (torch DCP) that are either complete or not there.

A checkpoint is `checkpoint/step-NNNNNN/`: weights that are trained, optimizer state and the step. Nothing else is
needed for an exact resume: data order, learning rate and randomness are functions of (seed, step), so no sampler,
schedule or generator has state. The state is stored by parameter name, so another number of ranks can load it. The
marker file is written last, with a checksum of every other file; a folder without it is a crash's leftover, never read
and cleared at the next save, and one whose files are not as they were written is passed over for the one before.
"""

import contextlib
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from itune_ray.config.train import CheckpointConfig
from itune_ray.data.storage import PAUSES_S, Folder
from itune_ray.errors import StorageError, TrainError, UnreachableError, first_line
from itune_ray.model.sharding import snapshot
from itune_ray.train.checkpoint_files import Reader, Sums, Writer, is_whole, merged
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

JsonObject = dict[str, Any]
log = logging.getLogger(__name__)
MARKER = "complete.json"
SETTLE_S = 60.0
"""How long a run that ends in an error lets a checkpoint that is being written come to its end."""


class Checkpoints:
    """The checkpoints of one stage, by path or URI. To be made on all ranks at the same time.

    Args:
        model: What the run began with, by its content (`itune_ray.train.build.Built.origin`).
        timeout_s: Deadline of what ranks do together in the background.

    With `background` a save only copies the state to host memory; a thread writes it while training goes on, over a
    process group of its own. At most one is under way: the next save, and the end of the run, wait for it.
    """

    def __init__(self, folder: str, config: CheckpointConfig, world: World, model: str = "", timeout_s: float = 600.0):
        self._folder, self._config, self._world, self._model = Folder.at(folder), config, world, model
        self._group: Any = None
        if config.background and world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._damaged: set[int] = set()
        self._writing = _Background()

    def latest(self) -> int:
        """Optimizer steps done in the newest complete checkpoint; 0 without one."""
        return max(self._complete(), default=0)

    def newest_whole(self) -> int:
        """The same, passing over checkpoints with damaged files. Collective: each rank reads its share of them."""
        for step in sorted(self._world.gather(self._complete())[0], reverse=True):  # storages may list late
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

    def save(
        self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy, notes: JsonObject | None = None
    ) -> None:
        """Collective: all ranks write their shards, then rank 0 publishes, and drops what `keep` no longer covers.

        In the background it returns before that; an error is then raised by the next save or `wait`.

        Args:
            notes: Small things beside the state, equal on all ranks, to be had again from `notes`.
        """
        self.wait()
        state = strategy.state(model, optimizers)
        if not self._config.background:
            self._write(step, state, notes or {})
            return
        kept = snapshot(state)
        self._writing.start(lambda: self._write(step, kept, notes or {}))

    def notes(self, step: int) -> JsonObject:
        """What was noted when a checkpoint was saved; empty of step 0."""
        return json.loads(self._marker(step)).get("notes", {}) if step else {}

    def wait(self) -> None:
        """Until what was saved is published; raises what went wrong."""
        self._writing.wait()

    def settle(self) -> None:
        """Give a save that is under way some time, when the run has already failed."""
        self._writing.settle(SETTLE_S)

    def _write(self, step: int, state: dict[str, Any], notes: JsonObject) -> None:
        target = self.at(step)
        if self._world.is_main:
            for left in {step} | (set(self._steps()) - set(self._complete())):
                self.at(left).delete()
            target.fs.create_dir(target.path, recursive=True)
        self._barrier()
        said = {"step": step, "world": self._world.size, "model": self._model, "notes": notes}
        sums = self._gathered(self._written(step, target, state))
        if self._world.is_main:
            target.write_json(MARKER, {**said, "files": merged(sums)})
            for damaged in self._damaged - {step}:
                self.at(damaged).delete()
            self._damaged.clear()
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
        """Collective: read the state of a checkpoint into a placed model and its optimizers.

        Raises:
            TrainError: It is of another model, adapter or optimizer.
            UnreachableError: The storage cannot be read now.
        """
        began_with = json.loads(self._marker(step)).get("model", self._model)
        if began_with != self._model:
            raise TrainError(
                "the checkpoint is of a run that began with another model",
                got=f"content {began_with} in {self.at(step).uri}",
                allowed=f"content {self._model}; else another output folder",
                knob="model.path",
            )
        state = strategy.state(model, optimizers)
        try:
            with _quiet():
                load(state, storage_reader=Reader(self.at(step)), no_dist=_alone())
        except CheckpointException as error:
            if any(isinstance(cause, OSError) for cause, _ in error.failures.values()):
                raise UnreachableError(
                    f"the checkpoint cannot be read: {_of_storage(error)}", got=self.at(step).uri, knob="run.output"
                ) from error
            raise TrainError(
                f"the checkpoint cannot be resumed: {first_line(error)}",
                got=self.at(step).uri,
                allowed="a checkpoint of the same model, adapter and optimizer",
            ) from error
        strategy.load_state(model, optimizers, state)

    def _marker(self, step: int) -> bytes:
        """Of a step that rank 0 has listed as complete."""
        if not self.at(step).exists(MARKER):
            raise UnreachableError("this rank does not see a checkpoint that rank 0 sees", got=self.at(step).uri)
        return self.at(step).read_bytes(MARKER)

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if self.at(step).exists(MARKER)]

    def _damaged_files(self, step: int) -> list[str]:
        """Of this rank's share."""
        try:
            files: Sums = json.loads(self._marker(step))["files"]
        except (ValueError, KeyError, TypeError):
            return [MARKER]
        mine = sorted(files)[self._world.rank :: self._world.size]
        return [name for name in mine if not is_whole(self.at(step), name, files[name])]

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
