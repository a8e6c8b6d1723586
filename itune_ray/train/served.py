"""[Ray] The last part of the export gate: vLLM is asked for the same log-probabilities, by every route it has.

Models are served in fp32, as the other sides compute; a LoRA adapter of a bf16 training in bf16, since vLLM's GPU
kernels take adapters of 16 bits alone.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from itune_ray.config.adaptation import SUPPORT
from itune_ray.config.shared import ModelRef, ServedModel, VllmEngineConfig
from itune_ray.config.train import TrainJob
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Sampling
from itune_ray.engine.host import EngineHost
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import ModelError
from itune_ray.model.gate import ExportRefusedError, LogProbs, check_routes
from itune_ray.train.gate import read_report, refuse, write_report
from itune_ray.train.outcome import NAME as OUTCOME
from itune_ray.train.outcome import TrainOutcome


def check_served(job: TrainJob, outcome: TrainOutcome, stage_dir: str, engines: EngineHost) -> dict[str, float]:
    """Route -> gap of vLLM to the trained model, added to gate.json.

    Raises:
        ExportRefusedError: One is above the tolerance; model/ and adapter/ are gone then.
        ITuneError: The engine cannot be started, or does not score a document; what was written stays.
    """
    assert job.gate is not None
    assert job.gate.vllm is not None
    report = read_report(stage_dir)
    gaps: dict[str, float] = {}
    try:
        for route, model in routes_of(job, outcome):
            lora = SUPPORT[job.model.peft.name].route == "adapter" and model.adapter is not None
            in_bf16 = job.precision == "bf16" and lora
            ref = model.model_copy(update={"dtype": "bfloat16" if in_bf16 else "float32"})
            served = ServedModel(model=ref, engine=_engine(job), pool=job.gate.vllm.pool)
            llm = engines.pool(served).client.llm(Sampling(), stage="gate", adapter=ref.adapter)
            scores = asyncio.run(served_scores(llm, report.documents))
            gaps |= check_routes(report.trained, {route: scores}, report.tolerance)
    except ExportRefusedError:
        refuse((outcome.model_path, outcome.adapter_path))
        Folder.at(stage_dir).delete(OUTCOME)  # asked again, the stage is exported again
        raise
    write_report(replace(report, gaps=report.gaps | gaps), stage_dir)
    return gaps


def routes_of(job: TrainJob, outcome: TrainOutcome) -> list[tuple[str, ModelRef]]:
    """Route -> the model to serve: the adapter over its base where vLLM takes it, and the merged model.

    An engine without room for adapters (`gate.vllm.engine.max_adapters=0`) is not asked about one of LoRA's.
    """
    route = SUPPORT[job.model.peft.name].route
    no_room = job.gate is not None and job.gate.vllm is not None and job.gate.vllm.engine.max_adapters == 0
    takes = route == "prompt embeds" or (route == "adapter" and not no_room)
    found: list[tuple[str, ModelRef]] = []
    if takes and outcome.adapter_path is not None and job.model.path and not job.model.added_tokens:
        found.append(("vllm adapter", job.model.reference().model_copy(update={"adapter": outcome.adapter_path})))
    if outcome.model_path is not None:
        found.append(("vllm merged", ModelRef(path=outcome.model_path)))
    return found


def _engine(job: TrainJob) -> VllmEngineConfig:
    """The gate's engine; of a method whose adapter is sent as embeddings, one that takes them."""
    assert job.gate is not None
    assert job.gate.vllm is not None
    if SUPPORT[job.model.peft.name].route != "prompt embeds":
        return job.gate.vllm.engine
    return job.gate.vllm.engine.model_copy(update={"prompt_embeds": True, "max_adapters": 0})


async def served_scores(llm: EngineLlm, documents: Sequence[Sequence[int]]) -> LogProbs:
    """Log-probabilities of every token but a document's first, as the engine tells them."""
    asked = [llm.score(ids, key=str(i), top=0) for i, ids in enumerate(documents)]
    found: LogProbs = []
    for ids, completion in zip(documents, await asyncio.gather(*asked), strict=True):
        if completion.error is not None or completion.prompt_logprobs is None:
            raise ModelError(f"vLLM does not score what was trained: {completion.error}", got=llm.model, knob="gate")
        entries = completion.prompt_logprobs[1:]
        found.append([(entry or {})[token] for token, entry in zip(ids[1:], entries, strict=True)])
    return found
