"""The two ways to drive vLLM: `LLMEngine` stepped in this process, and `AsyncLLM` with a process of its own."""

import itertools
from typing import TYPE_CHECKING, Any, Protocol

from itune_ray.engine.base import EngineDiedError
from itune_ray.engine.grouped_lora import group_by_adapter
from itune_ray.engine.orphans import children_die_with_me
from itune_ray.engine.scoring import score_under_own_adapter
from itune_ray.engine.stepper import Stepper
from itune_ray.engine.virtual_prompts import Embeddings

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.lora.request import LoRARequest


def _mend_adapters(worker: Any) -> None:
    """In each worker's process: adapters on CPU that are fast, and right beside prompt log-probabilities."""
    group_by_adapter()
    score_under_own_adapter(worker.model_runner)


def _embeddings(model_config: Any) -> Embeddings:
    return Embeddings(model_config.get_vocab_size(), model_config.get_inputs_embeds_size())


class Backend(Protocol):
    """The two ways to drive vLLM."""

    scores_under_adapters: bool
    """Whether prompt log-probabilities are right beside an adapter on the head; see `scoring`."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt plus answer."""
        ...

    @property
    def embeddings(self) -> Embeddings:
        """The size of the embedding matrix."""
        ...

    async def complete(self, prompt: Any, params: Any, lora: "LoRARequest | None") -> Any:
        """The final output of one request."""
        ...

    async def add_lora(self, lora: "LoRARequest") -> None:
        """Load an adapter."""
        ...

    async def remove_lora(self, number: int) -> None:
        """Unload an adapter."""
        ...

    async def sleep(self) -> bool:
        """Give memory up until `wake`; False where there is no such mode."""
        ...

    async def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def status(self) -> str:
        """What the engine is doing."""
        ...

    def close(self) -> None:
        """Stop the engine."""
        ...


class InProcessBackend:
    """`LLMEngine` stepped by the event loop that asks it."""

    scores_under_adapters = True

    def __init__(self, args: "AsyncEngineArgs", threads: int):
        from vllm.v1.engine.llm_engine import LLMEngine

        with children_die_with_me():  # tensor parallel workers
            self._engine = LLMEngine.from_engine_args(args)
        if args.enable_lora:
            self._engine.collective_rpc(_mend_adapters)
        self._stepper = Stepper(self._engine, threads)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt plus answer."""
        return self._engine.vllm_config.model_config.max_model_len

    @property
    def embeddings(self) -> Embeddings:
        """The size of the embedding matrix."""
        return _embeddings(self._engine.vllm_config.model_config)

    async def complete(self, prompt: Any, params: Any, lora: "LoRARequest | None") -> Any:
        """The final output of one request."""
        return await self._stepper.complete(prompt, params, lora)

    async def add_lora(self, lora: "LoRARequest") -> None:
        """Load an adapter."""
        await self._stepper.call(lambda engine: engine.add_lora(lora))

    async def remove_lora(self, number: int) -> None:
        """Unload an adapter."""
        await self._stepper.call(lambda engine: engine.remove_lora(number))

    async def sleep(self) -> bool:
        """vLLM has no sleep mode on CPU."""
        return False

    async def wake(self) -> None:
        """Never asleep."""

    def status(self) -> str:
        """What the engine is doing."""
        return self._stepper.status()

    def close(self) -> None:
        """Stop stepping."""
        self._stepper.close()


class AsyncBackend:
    """`AsyncLLM`: the engine core in a process of its own, so that tokenising overlaps with the accelerator."""

    scores_under_adapters = False

    def __init__(self, args: "AsyncEngineArgs"):
        from vllm.v1.engine.async_llm import AsyncLLM

        with children_die_with_me():
            self._engine = AsyncLLM.from_engine_args(args)
        self._can_sleep = args.enable_sleep_mode
        self._numbers = itertools.count()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt plus answer."""
        return self._engine.vllm_config.model_config.max_model_len

    @property
    def embeddings(self) -> Embeddings:
        """The size of the embedding matrix."""
        return _embeddings(self._engine.vllm_config.model_config)

    async def complete(self, prompt: Any, params: Any, lora: "LoRARequest | None") -> Any:
        """The final output of one request; a cancelled caller aborts it."""
        from vllm.pooling_params import PoolingParams
        from vllm.v1.engine.exceptions import EngineDeadError

        name, final = str(next(self._numbers)), None
        verb: Any = self._engine.encode if isinstance(params, PoolingParams) else self._engine.generate
        try:
            async for output in verb(prompt, params, name, lora_request=lora):
                final = output
        except EngineDeadError as error:
            raise EngineDiedError(one_line(error)) from None
        return final

    async def add_lora(self, lora: "LoRARequest") -> None:
        """Load an adapter."""
        await self._engine.add_lora(lora)

    async def remove_lora(self, number: int) -> None:
        """Unload an adapter."""
        await self._engine.remove_lora(number)

    async def sleep(self) -> bool:
        """Weights to host memory, KV cache dropped (vLLM's level 1)."""
        if not self._can_sleep:
            return False
        await self._engine.sleep(level=1)
        return True

    async def wake(self) -> None:
        """Weights back to the device."""
        await self._engine.wake_up()

    def status(self) -> str:
        """What the engine is doing."""
        return f"{self._engine.get_num_unfinished_requests()} requests in the engine"

    def close(self) -> None:
        """Stop the engine's process."""
        self._engine.shutdown()


def one_line(error: BaseException) -> str:
    """An error's text on one line of at most 400 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
