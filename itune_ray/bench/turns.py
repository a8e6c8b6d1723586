"""Two sides of a comparison that take turns: each is a process that works when told to, so that whatever else the
machine does meets both alike.

A side is started with one argument, a file with the JSON of its `Task`. It prints one JSON line when it is ready and
one per turn, and ends when its input does. `Work` is the side's end of this, `Side` the end of who measures.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from itune_ray.errors import TrainError

Method = Literal["sft", "lora", "dpo"]


@dataclass(frozen=True)
class Task:
    """What both sides do: the same model, documents, dtype and tokens per step."""

    method: Method
    folder: str
    """`model/` with weights and tokenizer, `documents.jsonl`: {input_ids, labels} or {prompt, chosen, rejected}, and
    `records.jsonl`, the same as chats."""
    documents_per_step: int
    """Chats, or pairs."""
    rows_per_step: int
    """Packed rows that so many chats fill."""
    pack_length: int
    micro_batch: int
    """Of our side, which the other is free to choose."""
    rank: int
    """Of the LoRA adapter."""
    threads: int
    steps: int
    """The most steps that will be asked for."""
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = True
    """Our side's layers."""
    peer_compile: bool = False
    """The other side's model."""

    @classmethod
    def read(cls, file: str) -> Self:
        """The task of a side."""
        return cls(**json.loads(Path(file).read_text()))

    def write(self, file: Path) -> None:
        """For `read`."""
        file.write_text(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Turn:
    """What a side did in one turn."""

    steps: int
    tokens: int
    """Of documents, padding not counted."""
    seconds: float
    cpu_seconds: float
    """Of all threads of the process."""
    loss: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens per second of processor time."""
        return self.tokens / self.cpu_seconds


@dataclass(frozen=True)
class Order:
    """What a side is told to do next."""

    steps: int
    micro_batch: int | None = None
    """Only for a side that chooses its own."""


class Work:
    """In the side's process: counts what is done and says so when the turn is over.

    The process's output is the channel; what libraries print goes to stderr.
    """

    def __init__(self) -> None:
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._order: Order | None = None
        self._steps = self._tokens = 0
        self._began = self._cpu_began = 0.0

    def ready(self, **facts: Any) -> Order | None:
        """Say so, and wait for the first order."""
        self._say({"ready": True, **facts})
        return self._next()

    def step(self, tokens: int, loss: float) -> Order | None:
        """Count a step. At the end of a turn waits for the next order and returns it; None within a turn.

        Raises:
            EOFError: No more is wanted.
        """
        assert self._order is not None
        self._steps += 1
        self._tokens += tokens
        if self._steps < self._order.steps:
            return None
        seconds, cpu = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        self._say(dataclasses.asdict(Turn(self._steps, self._tokens, seconds, cpu, loss)))
        return self._next()

    def _next(self) -> Order:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        self._order = Order(**json.loads(line))
        self._steps = self._tokens = 0
        self._began, self._cpu_began = time.perf_counter(), time.process_time()
        return self._order

    def _say(self, facts: dict[str, Any]) -> None:
        self._channel.write(json.dumps(facts) + "\n")
        self._channel.flush()


class Side:
    """A side's process, from who measures.

    Raises:
        TrainError: The process ended before it was told to, with its last line.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, env: dict[str, str]):
        self.name, self._log = name, log
        self._errors = log.open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=env
        )
        self.facts = self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def turn(self, steps: int, micro_batch: int | None = None) -> Turn:
        """Let it work for so many steps."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(dataclasses.asdict(Order(steps, micro_batch))) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return Turn(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise self._ended()
        return json.loads(line)

    def _ended(self) -> TrainError:
        words = (self._log.read_text().strip().splitlines() or ["no output"])[-1]
        return TrainError(f"the side {self.name} ended: {words}", got=f"status {self._process.returncode}")


def alternate(ours: Callable[[], Turn], theirs: Callable[[], Turn], rounds: int) -> tuple[list[Turn], list[Turn]]:
    """Turns of both sides, one after the other, the first to begin changing."""
    mine: list[Turn] = []
    other: list[Turn] = []
    for number in range(rounds):
        if number % 2:
            other.append(theirs())
            mine.append(ours())
        else:
            mine.append(ours())
            other.append(theirs())
    return mine, other
