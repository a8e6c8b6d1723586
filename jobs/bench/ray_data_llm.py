"""The bench job's prompts through `ray.data.llm` with the same engine arguments and environment, start included; then
through `itune generate`, start included too. Theirs is given token ids, so that both engines see the same prompts;
ours renders and tokenises as always.

`python jobs/bench/ray_data_llm.py [jobs/bench/generate.yaml] [a.b=c ...]`. Each side is a process of its own; the last
line is one JSON object, whose `ratio` is our tokens per second over theirs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from itune_ray.config.base import load_job
from itune_ray.config.bench import BenchJob
from itune_ray.config.shared import VllmEngineConfig
from itune_ray.data.hub import resolve
from itune_ray.data.records import row_seed
from itune_ray.data.sources import read_source
from itune_ray.engine.base import Request, Sampling
from itune_ray.engine.prompts import PromptEncoder
from itune_ray.engine.vllm import CPU_ENVIRONMENT, ENVIRONMENT, engine_args, load_tokenizer

SEED_STAGE = "generate"


def theirs(job: BenchJob, out: str) -> int:
    """Prompts to Parquet by Ray's own processor; returns the characters written."""
    import pyarrow.parquet as pq
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    stage = job.generation
    engine, model = job.teacher.engine, job.teacher.model
    assert isinstance(engine, VllmEngineConfig)
    folder = resolve(model.path).path
    args = engine_args(engine, model, folder, folder, on_cpu=True)
    args.pop("model")
    threads = max(1, int(job.teacher.pool.cpus_each))
    environment = {**ENVIRONMENT, **CPU_ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment})
    config = vLLMEngineProcessorConfig(
        model_source=folder,
        engine_kwargs=args,
        chat_template_stage=False,
        tokenize_stage=False,
        batch_size=256,
        concurrency=1,
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    sampling = stage.sampling

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "tokenized_prompt": row["ids"],
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                "seed": row["seed"],
            },
        }

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row["generated_text"], "tokens": row["num_generated_tokens"]}

    records = [record for source in stage.prompts for record in read_source(source).records]
    encoder = PromptEncoder(load_tokenizer(folder, model), model.chat_template, engine.max_model_len or 2**30)
    rows = [
        {
            "ids": encoder.encode(Request(id="", sampling=Sampling(), messages=record.prompt)),
            "seed": row_seed(job.seed, SEED_STAGE, record.key),
        }
        for record in records
    ]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 256))
    build_processor(config, preprocess=before, postprocess=after)(dataset).write_parquet(out)
    return sum(pq.read_table(out)["tokens"].to_pylist())


def ours(job: BenchJob, out: str) -> int:
    """The same by `itune generate`."""
    from itune_ray.observe.progress import Progress
    from itune_ray.pipeline.run import run

    settings = job.generation.model_copy(update={"run": job.run.model_copy(update={"output": out})})
    store = run("generate", settings, Progress(quiet=True))
    return store.opened[-1].manifest["tokens"]["generated"]


def main() -> None:
    """Both sides, one after the other."""
    if sys.argv[1] == "--side":
        side, out, *rest = sys.argv[2:]
        job = load_job(BenchJob, Path(rest[0]), rest[1:])
        print(json.dumps({"tokens": {"theirs": theirs, "ours": ours}[side](job, out)}))
        return
    told: dict[str, Any] = {}
    for side in ("theirs", "ours"):
        with tempfile.TemporaryDirectory() as out:
            began = time.perf_counter()
            command = [sys.executable, __file__, "--side", side, f"{out}/rows", *sys.argv[1:]]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
            seconds = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            tokens = json.loads(done.stdout.strip().splitlines()[-1])["tokens"]
            told[side] = {"seconds": round(seconds, 1), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
    print(json.dumps({"ratio": round(told["ours"]["tokens_per_s"] / told["theirs"]["tokens_per_s"], 2), **told}))


if __name__ == "__main__":
    main()
