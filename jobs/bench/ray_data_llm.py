"""The bench job's prompts through `ray.data.llm` with the same engine arguments and environment, start included; then
through `itune generate`, start included too.

`python jobs/bench/ray_data_llm.py jobs/bench/generate.yaml [a.b=c ...]`. Both are given messages, and render and
tokenise them: theirs by the stages that it has for that by default (it puts the tokenizer's first token before the
text). Theirs runs once more on ready token ids, those that our engine sees, without these stages. Each side is a
process of its own; the last line is one JSON object: `ratio` is our tokens per second over theirs, `ratio_by_rows` the
same by prompts, `ratio_on_ids` by tokens over theirs on token ids.
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

SEED_STAGE = "generate"


def theirs(job: BenchJob, out: str, on_ids: bool) -> int:
    """Prompts to Parquet by Ray's own processor; returns the tokens generated.

    Args:
        on_ids: Render and tokenise here, instead of in its stages.
    """
    import pyarrow.parquet as pq
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from itune_ray.data.hub import resolve
    from itune_ray.data.records import Record, row_seed
    from itune_ray.data.sources import read_source
    from itune_ray.engine.base import Request, Sampling
    from itune_ray.engine.prompts import PromptEncoder
    from itune_ray.engine.vllm import CPU_ENVIRONMENT, ENVIRONMENT, engine_args, load_tokenizer

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
        chat_template_stage=not on_ids and {"chat_template": model.chat_template},
        tokenize_stage=not on_ids,
        batch_size=256,
        concurrency=1,
        accelerator_type=None,
        placement_group_config={"bundles": [{"CPU": 1}]},
    )
    sampling = stage.sampling

    def before(row: dict[str, Any]) -> dict[str, Any]:
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": row["seed"],
        }
        return {("tokenized_prompt" if on_ids else "messages"): row["asked"], "sampling_params": params}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {"text": row["generated_text"], "tokens": row["num_generated_tokens"]}

    records = [record for source in stage.prompts for record in read_source(source).records]
    encoder = PromptEncoder(load_tokenizer(folder, model), model.chat_template, engine.max_model_len or 2**30)

    def asked(record: Record) -> Any:
        if on_ids:
            return encoder.encode(Request(id="", sampling=Sampling(), messages=record.prompt))
        return [dict(message) for message in record.prompt]

    rows = [{"asked": asked(r), "seed": row_seed(job.seed, SEED_STAGE, r.key)} for r in records]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 256))
    build_processor(config, preprocess=before, postprocess=after)(dataset).write_parquet(out)
    return sum(pq.read_table(out)["tokens"].to_pylist())


def ours(job: BenchJob, out: str) -> list[str]:
    """The same by `itune generate`, without the dashboard too: the command."""
    ray = job.run.ray.model_copy(update={"dashboard": False})
    settings = job.generation.model_copy(update={"run": job.run.model_copy(update={"output": out, "ray": ray})})
    Path(out).mkdir()
    file = Path(out) / "job.json"  # which is YAML too
    file.write_text(settings.model_dump_json())
    return [sys.executable, "-m", "itune_ray", "generate", str(file), "--quiet"]


def generated(out: str) -> int:
    """Tokens that our side generated."""
    (manifest,) = Path(out).glob("*/generate-*/manifest.json")
    return json.loads(manifest.read_text())["tokens"]["generated"]


def main() -> None:
    """All sides, one after the other."""
    if sys.argv[1] == "--side":
        side, out, *rest = sys.argv[2:]
        tokens = theirs(load_job(BenchJob, Path(rest[0]), rest[1:]), out, on_ids=side == "theirs_on_ids")
        print(json.dumps({"tokens": tokens}))
        return
    job = load_job(BenchJob, Path(sys.argv[1]), sys.argv[2:])
    told: dict[str, Any] = {}
    for side in ("theirs", "theirs_on_ids", "ours"):
        with tempfile.TemporaryDirectory() as scratch:
            out = f"{scratch}/rows"
            command = (
                ours(job, out) if side == "ours" else [sys.executable, __file__, "--side", side, out, *sys.argv[1:]]
            )
            began = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
            seconds = time.perf_counter() - began
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            tokens = generated(out) if side == "ours" else json.loads(done.stdout.strip().splitlines()[-1])["tokens"]
            told[side] = {"seconds": round(seconds, 1), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
    speed = {side: figures["tokens_per_s"] for side, figures in told.items()}
    ratios = {
        "ratio": speed["ours"] / speed["theirs"],
        "ratio_by_rows": told["theirs"]["seconds"] / told["ours"]["seconds"],
        "ratio_on_ids": speed["ours"] / speed["theirs_on_ids"],
    }
    print(json.dumps({**{name: round(ratio, 2) for name, ratio in ratios.items()}, **told}))


if __name__ == "__main__":
    main()
