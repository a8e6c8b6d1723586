"""`LLM.generate` on the prompts of a generate job, in a process of its own: `python -m itune_ray.bench.bare_vllm FILE`.

FILE is JSON: `stage` (a generate job), `runs` and `warm_up`. The output ends in a list of {seconds, tokens}.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import VllmEngineConfig
from itune_ray.data.hub import resolve
from itune_ray.data.records import Record, row_seed
from itune_ray.data.sources import read_source
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.llm import sampling_of
from itune_ray.engine.prompts import PromptEncoder
from itune_ray.engine.vllm import CPU_ENVIRONMENT, ENVIRONMENT, engine_args, load_tokenizer, sampling_params

SEED_STAGE = "generate"


def main(file: str) -> None:
    """Measure and print."""
    given = json.loads(Path(file).read_text())
    job = GenerateJob.model_validate(given["stage"])
    records = [record for source in job.prompts for record in read_source(source).records]
    print(json.dumps(measure(job, records, given["runs"], given["warm_up"])))


def measure(job: GenerateJob, records: list[Record], runs: int, warm_up: int) -> list[dict[str, float]]:
    """Seconds and generated tokens of each run, tokenisation on both sides of the engine included."""
    assert job.teacher is not None
    threads = max(1, int(job.teacher.pool.cpus_each))
    os.environ.update({**ENVIRONMENT, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)})
    from torch._C import set_num_threads  # vLLM makes torch.set_num_threads do nothing
    from vllm import LLM
    from vllm.platforms import current_platform

    engine, model = job.teacher.engine, job.teacher.model
    assert isinstance(engine, VllmEngineConfig)
    folder = resolve(model.path, revision=model.revision).path
    tokenizer = resolve(model.tokenizer, kind="tokenizer").path if model.tokenizer else folder
    on_cpu = current_platform.is_cpu()
    llm = LLM(**engine_args(engine, model, folder, tokenizer, on_cpu))
    if on_cpu:
        set_num_threads(threads)
    length = llm.llm_engine.vllm_config.model_config.max_model_len
    encoder = PromptEncoder(load_tokenizer(tokenizer, model), model.chat_template, length, model.thinking)
    sampling = sampling_of(job.sampling)
    _run(llm, encoder, sampling, job.seed, records[:warm_up])
    return [_run(llm, encoder, sampling, job.seed, records) for _ in range(runs)]


def _run(llm: Any, encoder: PromptEncoder, sampling: Sampling, seed: int, records: list[Record]) -> dict[str, float]:
    from vllm.inputs import tokens_input

    began = time.perf_counter()
    prompts: list[Any] = []
    params: list[Any] = []
    for record in records:
        prompts.append(tokens_input(encoder.encode(Request(id="", sampling=sampling, messages=record.prompt))))
        params.append(sampling_params(dataclasses.replace(sampling, seed=row_seed(seed, SEED_STAGE, record.key))))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(len(part.token_ids) for output in outputs for part in output.outputs)}


if __name__ == "__main__":
    main(sys.argv[1])
