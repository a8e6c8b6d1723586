"""Sharded checkpoints (torch DCP) that are either complete or not there.

A checkpoint is `checkpoint/step-NNNNNN/`: weights that are trained, optimizer state and the step. Nothing else is
needed for an exact resume: data order, learning rate and randomness are functions of (seed, step), so no sampler,
schedule or generator has state. The state is stored by parameter name, so another number of ranks can load it. The
marker file is written last; a folder without it is a crash's leftover, never read and cleared at the next save.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from itune_ray.config.train import CheckpointConfig
from itune_ray.data.storage import PAUSES_S, Folder
from itune_ray.errors import StorageError, TrainError
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

MARKER = "complete.json"


class Checkpoints:
    """The checkpoints of one stage, by path or URI."""

    def __init__(self, folder: str, config: CheckpointConfig, world: World):
        self._folder, self._config, self._world = Folder.at(folder), config, world

    def latest(self) -> int:
        """Optimizer steps done in the newest complete checkpoint; 0 without one."""
        return max(self._complete(), default=0)

    def at(self, step: int) -> Folder:
        """Folder of one checkpoint."""
        return self._folder / f"step-{step:06d}"

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> None:
        """Collective: all ranks write their shards, then rank 0 publishes, and drops what `keep` no longer covers."""
        target = self.at(step)
        if self._world.is_main:
            self._remove_unfinished()
            target.fs.create_dir(target.path, recursive=True)
        self._world.barrier()
        for pause in (*PAUSES_S, None):
            try:
                with _quiet():
                    save(strategy.state(model, optimizers), storage_writer=_Writer(target), no_dist=_alone())
                break
            except (CheckpointException, OSError) as error:  # on every rank, whichever one it happened to
                reason = _of_storage(error)
                if reason is None:
                    raise
                if pause is None:
                    raise StorageError(
                        f"the checkpoint of step {step} cannot be written: {reason}", got=target.uri, knob="run.output"
                    ) from None
                time.sleep(pause)
        self._world.barrier()
        if self._world.is_main:
            target.write_json(MARKER, {"step": step, "world": self._world.size})
            for old in sorted(self._complete())[: -self._config.keep]:
                self.at(old).delete()

    def load(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> None:
        """Collective: read the state of a checkpoint into a placed model and its optimizers."""
        state = strategy.state(model, optimizers)
        try:
            with _quiet():
                load(state, storage_reader=_Reader(self.at(step)), no_dist=_alone())
        except (CheckpointException, RuntimeError, OSError) as error:
            raise TrainError(
                f"the checkpoint cannot be resumed: {str(error).splitlines()[0]}",
                got=self.at(step).uri,
                allowed="a checkpoint of the same model, adapter and optimizer",
            ) from error
        strategy.load_state(model, optimizers, state)

    def _complete(self) -> list[int]:
        return [step for step in self._steps() if self.at(step).exists(MARKER)]

    def _remove_unfinished(self) -> None:
        for step in set(self._steps()) - set(self._complete()):
            self.at(step).delete()

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


class _Writer(FileSystemWriter):
    """DCP's writer over the project's storage."""

    def __init__(self, folder: Folder):
        super().__init__(folder.path, sync_files=folder.is_local)
        if not folder.is_local:
            self.fs, self.path = _ArrowFileSystem(folder.fs), folder.path


class _Reader(FileSystemReader):
    """DCP's reader over the project's storage."""

    def __init__(self, folder: Folder):
        super().__init__(folder.path)
        if not folder.is_local:
            self.fs, self.path = _ArrowFileSystem(folder.fs), folder.path


class _ArrowFileSystem(FileSystemBase):
    """What DCP asks of a filesystem, answered by pyarrow (s3://, gs://)."""

    def __init__(self, fs: pafs.FileSystem):
        self._fs = fs

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        opened = self._fs.open_input_file(str(path)) if "r" in mode else self._fs.open_output_stream(str(path))
        with opened as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self._fs.move(str(path), str(new_path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self._fs.create_dir(str(path), recursive=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return self._fs.get_file_info(str(path)).type != pafs.FileType.NotFound

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self._fs.delete_file(str(path))
