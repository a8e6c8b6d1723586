"""vLLM's `LLMEngine` stepped by a thread of this process: on CPU faster than a second process, and nothing to orphan.

One asyncio future per request, continuous batching: requests join between two steps. While there is nothing to do the
thread blocks on an event and takes no CPU.
"""

import asyncio
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from itune_ray.engine.base import EngineDiedError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

SWITCH_S = 0.0005
"""The stepping thread lets go of the interpreter at every kernel, and waits for so long to have it back."""

_Waiting = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Stepper:
    """Owns the engine: every call into it happens on one thread, since `LLMEngine` is not thread-safe.

    Args:
        engine: The engine.
        threads: OpenMP threads of its kernels.
    """

    def __init__(self, engine: "LLMEngine", threads: int = 1):
        self._engine, self._threads = engine, threads
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._waiting: dict[str, _Waiting] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._died: str | None = None
        self.steps = 0
        sys.setswitchinterval(SWITCH_S)
        self._thread = threading.Thread(target=self._run, daemon=True, name="vllm-step")
        self._thread.start()

    async def complete(self, prompt: Any, params: Any, lora: "LoRARequest | None" = None) -> Any:
        """The final `RequestOutput` (or `PoolingRequestOutput`) of one request; a cancelled caller aborts it.

        Raises:
            EngineDiedError: A step failed, with the engine's words.
        """
        name = str(next(self._numbers))
        future = self._future(name)
        self._post(lambda: self._try(name, lambda: self._engine.add_request(name, prompt, params, lora_request=lora)))
        try:
            return await future
        except asyncio.CancelledError:
            self._post(lambda: self._abort(name))
            raise

    async def call(self, function: Callable[["LLMEngine"], Any]) -> Any:
        """Run a function of the engine between two steps."""
        name = f"call-{next(self._numbers)}"
        future = self._future(name)
        self._post(lambda: self._try(name, lambda: self._settle({name: function(self._engine)})))
        return await future

    def status(self) -> str:
        """What it is doing, for the message of a deadline."""
        return self._died or f"{len(self._waiting)} requests in the engine, {self.steps} steps so far"

    def close(self) -> None:
        """Stop the thread after the step it is in."""
        self._closed = True
        self._wake.set()
        self._thread.join(timeout=30)

    def _future(self, name: str) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting[name] = (loop, future)
        if self._died is not None:  # checked after registering, or a death in between would be waited for in vain
            self._waiting.pop(name, None)
            raise EngineDiedError(self._died)
        return future

    def _post(self, action: Callable[[], None]) -> None:
        self._inbox.append(action)
        self._wake.set()

    # --- on the stepping thread ---

    def _run(self) -> None:
        from torch._C import set_num_threads  # vLLM makes torch.set_num_threads do nothing

        # A thread's number of OpenMP threads is its own, and vLLM's attention dies when it changes between two kernels.
        set_num_threads(self._threads)
        while not self._closed:
            try:
                if not self._engine.has_unfinished_requests():
                    self._wake.wait()
                self._wake.clear()
                while self._inbox:
                    self._inbox.popleft()()
                if self._engine.has_unfinished_requests():
                    self.steps += 1
                    self._settle({output.request_id: output for output in self._engine.step() if output.finished})
            except Exception as error:  # noqa: BLE001  whatever kills a step kills all that waits for it, with its words
                self._die(f"{type(error).__name__}: {error}")
                return

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """A refused request fails alone: vLLM validates before it schedules."""
        try:
            action()
        except Exception as error:  # noqa: BLE001  handed to the one who asked
            self._settle({name: error})

    def _abort(self, name: str) -> None:
        self._waiting.pop(name, None)
        self._engine.abort_request([name])

    def _settle(self, results: dict[str, Any]) -> None:
        done = [(*self._waiting.pop(name), result) for name, result in results.items() if name in self._waiting]
        if done:
            done[0][0].call_soon_threadsafe(_resolve, done)

    def _die(self, reason: str) -> None:
        self._died = " ".join(reason.split())
        self._settle({name: EngineDiedError(self._died) for name in list(self._waiting)})


def _resolve(done: list[tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Any]]) -> None:
    for _, future, result in done:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
