"""Sharded checkpoints (torch DCP) that are either complete or not there.

A checkpoint is `checkpoint/step-NNNNNN/`: weights that are trained, optimizer state and the step. Nothing else is
needed for an exact resume: data order, learning rate and randomness are functions of (seed, step), so no sampler,
schedule or generator has state. The state is stored by parameter name, so another number of ranks can load it. The
marker file is written last; a folder without it is a crash's leftover, never read and cleared at the next save.
"""

import json
import posixpath
from typing import Any

import fsspec
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

from itune_ray.config.train import CheckpointConfig
from itune_ray.errors import TrainError
from itune_ray.train.optimizer import Optimizers
from itune_ray.train.strategies.base import Strategy
from itune_ray.train.world import World

MARKER = "complete.json"


class Checkpoints:
    """The checkpoints of one stage, by path or URI."""

    def __init__(self, folder: str, config: CheckpointConfig, world: World):
        self._fs, self._root = fsspec.core.url_to_fs(folder)
        self._local = "file" in self._fs.protocol
        self._uri, self._config, self._world = folder, config, world

    def latest(self) -> int:
        """Optimizer steps done in the newest complete checkpoint; 0 without one."""
        return max(self._complete(), default=0)

    def path(self, step: int) -> str:
        """Folder of a checkpoint, as the user writes it."""
        return posixpath.join(self._uri, f"step-{step:06d}")

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> str:
        """Collective: all ranks write their shards, then rank 0 publishes, and drops what `keep` no longer covers."""
        if self._world.is_main:
            self._remove_unfinished()
            self._fs.makedirs(self._inner(step), exist_ok=True)
        self._world.barrier()
        writer = FileSystemWriter(self._inner(step)) if self._local else FsspecWriter(self.path(step))
        dcp.save(strategy.state(model, optimizers), storage_writer=writer, no_dist=not dist.is_initialized())
        self._world.barrier()
        if self._world.is_main:
            with self._fs.open(posixpath.join(self._inner(step), MARKER), "w") as stream:
                json.dump({"step": step, "world": self._world.size}, stream)
            for old in sorted(self._complete())[: -self._config.keep]:
                self._fs.rm(self._inner(old), recursive=True)
        return self.path(step)

    def load(self, step: int, model: nn.Module, optimizers: Optimizers, strategy: Strategy) -> None:
        """Collective: read the state of a checkpoint into a placed model and its optimizers."""
        state = strategy.state(model, optimizers)
        reader = FileSystemReader(self._inner(step)) if self._local else FsspecReader(self.path(step))
        try:
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            raise TrainError(
                f"the checkpoint cannot be resumed: {str(error).splitlines()[0]}", got=self.path(step),
                allowed="a checkpoint of the same model, adapter and optimizer",
            ) from error
        strategy.load_state(model, optimizers, state)

    def _complete(self) -> list[int]:
        return [step for step, done in self._folders().items() if done]

    def _remove_unfinished(self) -> None:
        for step, done in self._folders().items():
            if not done:
                self._fs.rm(self._inner(step), recursive=True)

    def _folders(self) -> dict[int, bool]:
        """Step -> whether its marker is there."""
        if not self._fs.isdir(self._root):
            return {}
        self._fs.invalidate_cache()
        names = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
        steps = [int(name.removeprefix("step-")) for name in names if name.startswith("step-")]
        return {step: bool(self._fs.exists(posixpath.join(self._inner(step), MARKER))) for step in steps}

    def _inner(self, step: int) -> str:
        return posixpath.join(self._root, f"step-{step:06d}")


