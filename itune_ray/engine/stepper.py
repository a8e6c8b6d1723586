"""vLLM's `LLMEngine` stepped by a task of the event loop: on CPU faster than a second process, and nothing to orphan.

Requests join between two steps, where the loop also does all else that it has to. On a thread of its own a step was
slower: it lets go of the interpreter at every kernel, and the loop's thread took it (docs/decisions.md, "One thread
for the engine and its callers").
"""

import asyncio
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from itune_ray.engine.base import EngineDiedError
from itune_ray.errors import GenerationError, ITuneError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

CLOSE_S = 30.0
"""Longest wait of `close` for a step."""
TURNS = 8
"""Rounds of the event loop between two steps: an answer goes through a few tasks before its caller asks again."""


class Stepper:
    """Owns the engine, which is not thread-safe: every call into it happens on the thread of the loop that asks.

    Args:
        engine: The engine.
        threads: OpenMP threads of its kernels.
    """

    def __init__(self, engine: "LLMEngine", threads: int = 1):
        self._engine, self._threads = engine, threads
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
        self._busy = threading.Lock()
        self._closed = False
        self._died: str | None = None
        self.steps = 0

    async def complete(self, prompt: Any, params: Any, lora: "LoRARequest | None" = None) -> Any:
        """The final `RequestOutput` (or `PoolingRequestOutput`) of one request; a cancelled caller aborts it.

        Raises:
            EngineDiedError: A step failed, with the engine's words.
            GenerationError: The engine was closed.
        """
        name = str(next(self._numbers))
        with self._busy:
            self._check()
            try:
                self._engine.add_request(name, prompt, params, lora_request=lora)
            except Exception:
                self._engine.abort_request([name])  # vLLM notes a request before it refuses it
                raise
        answer = self._waiting[name] = asyncio.get_running_loop().create_future()
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.ensure_future(self._run())
        try:
            return await answer
        except asyncio.CancelledError:
            if self._waiting.pop(name, None) is not None and self._died is None:
                self._engine.abort_request([name])
            raise

    async def call(self, function: Callable[["LLMEngine"], Any]) -> Any:
        """Run a function of the engine between two steps."""
        self._use_threads()
        with self._busy:
            self._check()
            return function(self._engine)

    def status(self) -> str:
        """What it is doing, for the message of a deadline."""
        return self._died or f"{len(self._waiting)} requests in the engine, {self.steps} steps so far"

    def close(self) -> None:
        """Stop after the step it is in, for which it waits at most `CLOSE_S`; from any thread."""
        self._closed = True  # before the wait: a stepping loop could take the lock again and again
        if self._busy.acquire(timeout=CLOSE_S):
            self._busy.release()

    def _check(self) -> None:
        if self._died is not None:
            raise EngineDiedError(self._died)
        if self._closed:
            raise GenerationError("the engine was closed")

    def _use_threads(self) -> None:
        """A thread's number of OpenMP threads is its own, and vLLM's attention dies when it changes between two
        kernels."""
        from torch._C import set_num_threads  # vLLM makes torch.set_num_threads do nothing

        set_num_threads(self._threads)

    async def _run(self) -> None:
        """Step until nothing is left to do."""
        self._use_threads()
        try:
            while self._engine.has_unfinished_requests():
                with self._busy:
                    self._check()
                    self.steps += 1
                    outputs = self._engine.step()
                for output in outputs:
                    answer = self._waiting.pop(output.request_id, None) if output.finished else None
                    if answer is not None and not answer.done():
                        answer.set_result(output)
                for _ in range(TURNS):
                    await asyncio.sleep(0)
        except GenerationError as error:  # closed
            self._fail(error)
        except Exception as error:  # noqa: BLE001  whatever kills a step kills all that waits for it, with its words
            self._died = " ".join(f"{type(error).__name__}: {error}".split())
            self._fail(EngineDiedError(self._died))

    def _fail(self, error: ITuneError) -> None:
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(error)
