"""vLLM behind the engine contract: `LLMEngine` stepped in-process on CPU, `AsyncLLM` on accelerators.

vLLM is imported only when an engine is built. Measured on CPU: a per-request seed with chunked prefill kills the
engine, so chunking is off there and the seeds stay; thread binding costs a factor of 20 in-process, so it is off too.
"""

import asyncio
import dataclasses
import gc
import os
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itune_ray.config.shared import ModelRef, Thinking, ThinkingBudget, VllmEngineConfig
from itune_ray.data.fingerprint import named
from itune_ray.data.hub import read_config, resolve
from itune_ray.data.thinking import CLOSE, OPEN, answer_of
from itune_ray.engine.adapters import AdapterSlots
from itune_ray.engine.backends import AsyncBackend, Backend, InProcessBackend, one_line
from itune_ray.engine.base import Completion, EngineDiedError, FinishReason, Request, Sample, Sampling
from itune_ray.engine.prompts import BadPromptError, PromptEncoder
from itune_ray.engine.token_rows import servable_adapter
from itune_ray.engine.virtual_prompts import VirtualPrompt, VirtualPrompts
from itune_ray.errors import ITuneError, ModelError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
CPU_ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
CPU_HEAD_DIMS = frozenset({32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""What vLLM's CPU attention can do; another size loads, and dies at the first request."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be started with."""
LORA_SLOTS_SPARE = 1
"""With every slot taken, vLLM answers base-model rows of a mixed batch with the last adapter, silently."""
_FINISHED: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


class VllmEngine:
    """One vLLM engine with one base model.

    Args:
        config: Engine settings.
        model: The base model; its `adapter` is not used here, requests name theirs.
        threads: OpenMP threads on CPU.
        can_sleep: Start it so that `sleep` can free its memory on an accelerator.

    Raises:
        ModelError: vLLM cannot load the model, in one line.
    """

    def __init__(self, config: VllmEngineConfig, model: ModelRef, threads: int = 1, can_sleep: bool = False):
        for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}.items():
            os.environ.setdefault(name, value)
        folder = resolve(model.path, revision=model.revision)
        tokenizer = resolve(model.tokenizer, kind="tokenizer").path if model.tokenizer else folder.path
        self.name = f"{named(model.path)}@{folder.revision or folder.fingerprint}"
        encoder = load_tokenizer(tokenizer, model)
        self._backend = _load(config, model, folder.path, tokenizer, threads, can_sleep)
        self._prompts = PromptEncoder(encoder, model.chat_template, self._backend.max_model_len, model.thinking)
        self._thinking: Thinking = model.thinking
        self._base, self._max_rank = Path(folder.path), config.max_adapter_rank
        self._virtual = VirtualPrompts(self._backend.embeddings) if config.prompt_embeds else None
        self._embedded = 0
        self._has_head_adapters = False  # stays: vLLM leaves an unloaded adapter's weights in its slot
        self._scratch = tempfile.TemporaryDirectory(prefix="itune-adapters-")
        self._loaded: dict[int, LoRARequest] = {}
        self._adapters = AdapterSlots(config.max_adapters, self._load_adapter, self._backend.remove_lora)

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete each request; same length and order. Raises `EngineDiedError` when the engine itself is gone."""
        return list(await asyncio.gather(*(self._complete(request) for request in requests)))

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """One vector per text; the engine must be started with `extra: {runner: pooling, convert: embed}`."""
        from vllm import PoolingParams

        async def one(text: str) -> list[float]:
            ids = self._prompts.encode(Request(id="", sampling=Sampling(), text=text))
            output = await self._backend.complete(_tokens(ids), PoolingParams(task="embed"), None)
            self._embedded += len(output.prompt_token_ids)
            return output.outputs.data.float().tolist()

        return list(await asyncio.gather(*map(one, texts)))

    def take_embedded(self) -> int:
        """Tokens of the texts embedded since this was asked last."""
        taken, self._embedded = self._embedded, 0
        return taken

    def status(self) -> str:
        """What it is doing, for the message of a deadline."""
        return self._backend.status()

    async def sleep(self) -> bool:
        """Move the weights to host memory and drop the KV cache; False where vLLM has no sleep mode, as on CPU."""
        return await self._backend.sleep()

    async def wake(self) -> None:
        """Undo `sleep`."""
        await self._backend.wake()

    def close(self) -> None:
        """Stop the engine, and remove the adapters that were rewritten for it."""
        self._backend.close()
        self._scratch.cleanup()

    async def _complete(self, request: Request) -> Completion:
        try:
            ids = self._prompts.encode(request)
            virtual = self._virtual_prompt(request.adapter, ids)
            prompt = _tokens(ids) if virtual is None else virtual.before(ids)
            async with self._lora(request.adapter if virtual is None else None) as lora:
                self._check_scoring(request.sampling)
                params = sampling_params(request.sampling, self._budget(request))
                output = await self._backend.complete(prompt, params, lora)
        except EngineDiedError:
            raise
        except (BadPromptError, ITuneError) as error:
            return Completion(id=request.id, error=str(error))
        except Exception as error:  # noqa: BLE001  vLLM refuses a single request with many kinds of errors
            return Completion(id=request.id, error=f"invalid_request: {one_line(error)}")
        completion = completion_of(request, output, 0 if virtual is None else len(virtual.embeddings))
        return without_thoughts(completion) if request.messages and self._thinking == "strip" else completion

    def _budget(self, request: Request) -> int | None:
        return self._thinking.budget if request.messages and isinstance(self._thinking, ThinkingBudget) else None

    def _check_scoring(self, sampling: Sampling) -> None:
        """Where nothing corrects it (`scoring`), an adapter on the head would leak into other rows' prompts."""
        if sampling.prompt_logprobs is not None and self._has_head_adapters and not self._backend.scores_under_adapters:
            raise BadPromptError(
                "unsupported: prompt log-probabilities beside an adapter that trains token rows; serve the merged model"
            )

    def _virtual_prompt(self, adapter: str | None, ids: list[int]) -> VirtualPrompt | None:
        """The adapter as embeddings before the text, where the engine takes such; else None."""
        if adapter is None or self._virtual is None:
            return None
        self._virtual.check(ids)
        virtual = self._virtual.of(adapter)
        self._prompts.check_length(len(virtual.embeddings) + len(ids))
        return virtual

    @asynccontextmanager
    async def _lora(self, adapter: str | None) -> AsyncIterator["LoRARequest | None"]:
        if adapter is None:
            yield None
            return
        async with self._adapters.hold(adapter) as number:
            yield self._loaded[number]

    async def _load_adapter(self, number: int, adapter: str) -> None:
        folder = resolve(adapter, kind="adapter")
        scratch = Path(self._scratch.name) / str(number)
        path = servable_adapter(Path(folder.path), self._base, scratch, self._max_rank)
        self._has_head_adapters |= path == scratch
        self._loaded[number] = _lora_request(number, f"{adapter}@{folder.fingerprint}", str(path))
        try:
            await self._backend.add_lora(self._loaded[number])
        except (EngineDiedError, ITuneError):
            raise
        except Exception as error:  # whatever an adapter's files can cause
            raise ModelError(f"vLLM cannot load the adapter: {one_line(error)}", got=adapter) from error


def load_tokenizer(folder: str, model: ModelRef) -> Any:
    """The model's tokenizer; lengths are checked against the engine's context, not against its own idea of one."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # missing and damaged files each raise their own kind
        raise ModelError(
            f"the tokenizer cannot be loaded: {one_line(error)}", got=folder, knob="model.tokenizer"
        ) from error
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def _load(
    config: VllmEngineConfig, model: ModelRef, folder: str, tokenizer: str, threads: int, can_sleep: bool
) -> Backend:
    """Build the engine; whatever stops vLLM becomes one `ModelError` line."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ModelError(
            f"vLLM is not installed: {error}", allowed="`pip install itune-ray[cpu]` or `[gpu]`", knob="engine.type"
        ) from None
    on_cpu = current_platform.is_cpu()
    if on_cpu:
        os.environ.update({k: v for k, v in CPU_ENVIRONMENT.items() if k not in os.environ})
        check_head_dim(folder, model.path)
        check_experts(config, folder, model.path)
    try:
        from vllm.config import ReasoningConfig, StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        given = engine_args(config, model, folder, tokenizer, on_cpu)
        given |= {"enable_sleep_mode": True} if can_sleep and not on_cpu else {}
        if isinstance(model.thinking, ThinkingBudget):
            given["reasoning_config"] = ReasoningConfig(reasoning_start_str=OPEN, reasoning_end_str=CLOSE)
        # White space between JSON's tokens is where a small model stays until `max_tokens`.
        structure = {"backend": "xgrammar", "disable_any_whitespace": True}
        given["structured_outputs_config"] = StructuredOutputsConfig(
            **{**structure, **given.get("structured_outputs_config", {})}
        )
        args = AsyncEngineArgs(**given)
        gc.freeze()  # vLLM collects while it starts: 1.2 of 8.5 s go through what is imported by now
        return InProcessBackend(args, threads) if on_cpu else AsyncBackend(args)
    except Exception as error:  # a wrong path, config, dtype, size or memory each raise their own kind
        raise _load_error(error, model.path) from error


def engine_args(config: VllmEngineConfig, model: ModelRef, folder: str, tokenizer: str, on_cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `AsyncEngineArgs` for this engine."""
    args: dict[str, Any] = {
        "model": folder,
        "tokenizer": tokenizer,
        "dtype": model.dtype,
        "trust_remote_code": model.trust_remote_code,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "seed": 0,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "max_logprobs": config.max_logprobs,
        "enable_prompt_embeds": config.prompt_embeds,
        "disable_log_stats": True,
        "enforce_eager": on_cpu if config.enforce_eager is None else config.enforce_eager,
    }
    parallel = config.tensor_parallel * config.pipeline_parallel > 1
    if on_cpu:
        args |= {"enable_chunked_prefill": False, "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30)}
        args |= {"distributed_executor_backend": "mp"} if parallel else {}
    else:
        args |= {"gpu_memory_utilization": config.gpu_memory_utilization}
        args |= {"distributed_executor_backend": "ray"} if parallel else {}
    if config.max_adapters:
        slots = config.max_adapters + LORA_SLOTS_SPARE
        rank = next((r for r in LORA_RANKS if r >= config.max_adapter_rank), LORA_RANKS[-1])
        args |= {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": rank}
    return args | config.extra


def sampling_params(sampling: Sampling, thinking_budget: int | None = None) -> Any:
    """vLLM's `SamplingParams`; only the final output is asked for.

    vLLM refuses n greedy samples, which are all the same: one is drawn, and `completion_of` gives it n times.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=1 if sampling.temperature == 0 else sampling.n,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        thinking_token_budget=thinking_budget,
        ignore_eos=sampling.ignore_end,
        stop=list(sampling.stop),
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        logprob_token_ids=list(sampling.logprob_token_ids) or None,
        structured_outputs=_structure(sampling),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _structure(sampling: Sampling) -> Any:
    """vLLM's `StructuredOutputsParams`, or None."""
    if not sampling.choice and sampling.json_schema is None and sampling.regex is None:
        return None
    from vllm.sampling_params import StructuredOutputsParams

    return StructuredOutputsParams(
        json=sampling.json_schema, regex=sampling.regex, choice=list(sampling.choice) or None
    )


def completion_of(request: Request, output: Any, virtual: int = 0) -> Completion:
    """The contract's completion from vLLM's `RequestOutput`, without the first `virtual` positions of the prompt."""
    outputs = sorted(output.outputs, key=lambda part: part.index)
    odd = [str(part.finish_reason) for part in outputs if part.finish_reason not in _FINISHED]
    if odd:
        return Completion(id=request.id, error=f"the engine ended the request with `{odd[0]}`", retryable=True)
    samples = tuple(
        Sample(
            text=part.text,
            token_ids=tuple(part.token_ids),
            finish_reason=_FINISHED[part.finish_reason],
            logprobs=None if part.logprobs is None else tuple(_values(entry) for entry in part.logprobs),
        )
        for part in outputs
    )
    return Completion(
        id=request.id,
        samples=samples * (request.sampling.n // len(samples)),
        prompt_token_ids=tuple(output.prompt_token_ids or ())[virtual:],
        prompt_logprobs=_prompt_logprobs(output.prompt_logprobs, virtual),
        num_cached_tokens=output.num_cached_tokens or 0,
    )


def without_thoughts(completion: Completion) -> Completion:
    """The completion whose texts are without thoughts; its tokens and their log-probabilities are all that was
    generated."""
    samples = tuple(dataclasses.replace(sample, text=answer_of(sample.text)) for sample in completion.samples)
    return dataclasses.replace(completion, samples=samples)


def _prompt_logprobs(
    entries: Sequence[Mapping[int, Any] | None] | None, virtual: int
) -> tuple[dict[int, float] | None, ...] | None:
    """None for the first of the text, as without a virtual prompt, though it follows from that."""
    if entries is None:
        return None
    return (None, *(None if entry is None else _values(entry) for entry in entries[virtual + 1 :]))


def _values(entry: Mapping[int, Any]) -> dict[int, float]:
    return {token: value.logprob for token, value in entry.items()}


def _tokens(ids: list[int]) -> Any:
    from vllm.inputs import tokens_input

    return tokens_input(ids)


def _lora_request(number: int, name: str, folder: str) -> "LoRARequest":
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=folder)


def check_head_dim(folder: str, got: str) -> None:
    """Refuse a model that would load on CPU and die at its first request."""
    config = read_config(folder)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    if head_dim is not None and head_dim not in CPU_HEAD_DIMS:
        raise ModelError(
            f"vLLM's CPU attention has no head_dim {head_dim}",
            got=got,
            allowed=f"head_dim in {sorted(CPU_HEAD_DIMS)}, or a GPU",
            knob="model.path",
        )


def check_experts(config: VllmEngineConfig, folder: str, got: str) -> None:
    """Refuse adapters over a mixture of experts on CPU: with LoRA on, vLLM runs experts by Triton alone, whatever the
    adapter changes, so the engine would load and die at its first request."""
    found = read_config(folder)
    counts = [found.get(name) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    if config.max_adapters and max(counts) > 0:
        raise ModelError(
            "vLLM on CPU serves no adapters over a mixture of experts",
            got=got,
            allowed="the merged model with max_adapters=0, or a GPU",
            knob="engine.max_adapters",
        )


def _load_error(error: Exception, path: str) -> ModelError:
    text = one_line(error)
    if "root cause above" in text:  # raised by the engine core's own process, which wrote the reason to its log
        text += " (in the replica's log, below the Ray session's logs/)"
    too_long = "KV cache" in text or "max_model_len" in text
    knob = "engine.max_model_len or engine.kv_cache_gb" if too_long else "model.path"
    return ModelError(f"vLLM cannot load the model: {text}", got=path, knob=knob)
