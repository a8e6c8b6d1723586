"""Every objective and every parameter-efficient method learns: the playground's jobs of this folder, one by one, in a
table of measured figures.

`make matrix`, or `python jobs/train/matrix.py dpo-playground houlsby` for some. Each job runs by the loop in a process
of its own, without Ray, and is scored before and after: by the share of held-out rows it gets right where its objective
counts that (preferences, rewards, classes), else by exact match on fresh instructions of the playground, answered
greedily through transformers. It has learned where the two 95 % intervals (Wilson) do not meet. A job that is done is
not run again; figures are in OUTPUT/NAME/result.json, the table in OUTPUT/matrix.md.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from itune_ray.config.base import load_job, validate
from itune_ray.config.train import TrainJob
from itune_ray.data.intervals import wilson

HERE = Path(__file__).parent
ASKED = 200
"""Instructions of the playground that are answered."""
TEACHER_ROWS = 3200
"""Chats that a teacher's distributions are made for."""
PROPORTIONS = ("reward_accuracy", "accuracy")
"""Shares of held-out rows that objectives report."""


def playground_jobs() -> list[Path]:
    """The files of jobs that need nothing but this machine."""
    return [file for file in sorted(HERE.glob("*.yaml")) if "playground://" in file.read_text()]


def main() -> int:
    """Run, and print the table; returns 1 where a job failed or has not learned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="job files without .yaml; default: all")
    parser.add_argument("--output", default="runs/matrix")
    parser.add_argument("--one", action="store_true", help="run the one job in this process")
    parser.add_argument("--steps", type=int, help="cut jobs to so many steps of few rows: a test that they run")
    asked = parser.parse_args()
    names = asked.names or [file.stem for file in playground_jobs()]
    output = Path(asked.output).absolute()
    if asked.one:
        run_job(HERE / f"{names[0]}.yaml", output / names[0], asked.steps, base_scores=output / "bases.json")
        return 0
    for name in names:
        if not (output / name / "result.json").exists():
            again = [sys.executable, __file__, name, "--one", "--output", str(output)]
            subprocess.run([*again, *(["--steps", str(asked.steps)] if asked.steps else [])], check=False)
    results = [json.loads(file.read_text()) for file in sorted(output.glob("*/result.json"))]
    text = table(results)
    (output / "matrix.md").write_text(text + "\n")
    print(text)
    found = {result["name"] for result in results if result["learned"]}
    return 0 if found.issuperset(names) else 1


def run_job(file: Path, out: Path, steps: int | None = None, base_scores: Path | None = None) -> dict[str, Any]:
    """Train and score a job; writes and returns its figures. `base_scores` keeps what bases answered for other jobs."""
    import torch

    from itune_ray.train.loop import train_local
    from itune_ray.train.metrics import read_metrics
    from itune_ray.train.rows import read_held_out, read_rows
    from itune_ray.train.validation import LOG

    job = load_job(TrainJob, file)
    out.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        job = shortened(job, steps)
    if job.objective.type == "kd":
        job = with_distributions(job, out, 16 if steps else TEACHER_ROWS)
    began = time.perf_counter()
    held_out = [] if job.validation is None else read_held_out(job.validation)[0]
    torch.set_num_threads(1)
    outcome = train_local(job, read_rows(job)[0], str(out), held_out=held_out)
    minutes = (time.perf_counter() - began) / 60
    rows, metrics = read_metrics(str(out), LOG), read_metrics(str(out))
    if rows and "low" in rows[-1]:
        name = next(name for name in PROPORTIONS if name in rows[-1])
        scores = [(row[name], row["low"], row["high"]) for row in (rows[0], rows[-1])]
    else:
        name, asked = "exact match", 4 if steps else ASKED
        right = (
            base_matches(job, asked, base_scores),
            exact_matches(job, outcome.model_path, outcome.adapter_path, asked),
        )
        scores = [(count / asked, *wilson(count, asked)) for count in right]
    losses = rows or metrics
    report = outcome.parameters
    result = {
        "name": file.stem,
        "objective": job.objective.type,
        "method": job.model.peft.name,
        "trainable": report.trainable,
        "share": report.ratio,
        "steps": outcome.steps,
        "score": name,
        "before": scores[0],
        "after": scores[1],
        "learned": scores[1][1] > scores[0][2],
        "loss": (losses[0]["loss"], losses[-1]["loss"]),
        "minutes": minutes,
    }
    (out / "result.json").write_text(json.dumps(result))
    return result


def shortened(job: TrainJob, steps: int) -> TrainJob:
    """A few steps of few rows of the same job."""
    tree = job.model_dump(mode="json")
    held_out, replay = tree["validation"] or {"data": [], "replayed": []}, tree["replay"] or {"data": []}
    for part in [*tree["data"], *replay["data"], *held_out["data"], *held_out["replayed"]]:
        source = part["source"]
        holder = source["args"] if "rows" in source.get("args", {}) else source
        if "rows" in holder:
            holder["rows"] = 16
    return validate(TrainJob, {**tree, "steps": steps, "epochs": None, "batch": 4}, where=job.name)


def with_distributions(job: TrainJob, out: Path, count: int) -> TrainJob:
    """The job on rows that the playground's teacher made, top k over its answers' tokens."""
    import pyarrow.parquet as pq

    from itune_ray.data.records import records_table

    folder = out / "distributions"
    folder.mkdir(exist_ok=True)
    k = job.objective.k if job.objective.type == "kd" else 1
    pq.write_table(records_table(list(_distributions(count, k))), folder / "part-0.parquet")
    tree = job.model_dump(mode="json")
    tree["data"] = [{"source": {"type": "file", "path": str(folder)}}]
    return validate(TrainJob, tree, where=job.name)


def _distributions(count: int, k: int) -> Iterator[Any]:
    import torch

    from itune_ray.config.shared import ModelRef
    from itune_ray.data.chat import ChatRenderer
    from itune_ray.data.hub import local_model_folder
    from itune_ray.data.records import TopK
    from itune_ray.model.load import load_model
    from itune_ray.model.tokenizer import load_tokenizer
    from itune_ray.playground.sets import rows

    folder = local_model_folder(ModelRef(path="playground://teacher")).path
    model: Any = load_model(folder, dtype=torch.float32, attention="sdpa")
    renderer = ChatRenderer(load_tokenizer(folder))
    for record in rows("chat", count, seed=21):
        ids, supervised = renderer.training_ids(record.messages)
        places = tuple(i for i, flag in enumerate(supervised) if flag and i > 0)
        with torch.no_grad():
            log_p = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        top = log_p[torch.tensor(places) - 1].topk(k)
        teacher = TopK(
            input_ids=tuple(ids),
            positions=places,
            k=k,
            ids=top.indices.numpy().astype("<i4").tobytes(),
            log_probs=top.values.numpy().astype("<f2").tobytes(),
            tokenizer=renderer.vocabulary_hash,
        )
        yield dataclasses.replace(record, teacher=teacher)


def base_matches(job: TrainJob, asked: int, kept: Path | None) -> int:
    """What the job's base answers exactly: the same for every job, so it is asked once."""
    known: dict[str, int] = json.loads(kept.read_text()) if kept is not None and kept.exists() else {}
    key = f"{asked} of {job.model.reference().model_dump_json()}"
    if key not in known:
        known[key] = exact_matches(job, None, None, asked)
        if kept is not None:
            kept.write_text(json.dumps(known))
    return known[key]


def exact_matches(job: TrainJob, model_path: str | None, adapter_path: str | None, asked: int) -> int:
    """Fresh instructions that a model answers exactly, greedily; without paths the job's base does."""
    import torch

    from itune_ray.data.hub import local_model_folder
    from itune_ray.model.load import load_model
    from itune_ray.model.peft.saved import load_adapted
    from itune_ray.playground.sets import rows
    from itune_ray.train.renderer import load_renderer

    base = local_model_folder(job.model.reference()).path
    model: Any = load_model(model_path or base, dtype=torch.float32, attention="sdpa")
    if model_path is None and adapter_path is not None:
        model = load_adapted(model, adapter_path)
    model.eval()
    renderer = load_renderer(job.model)
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for record in rows("test", asked, seed=77):
        ids = renderer.prompt_ids(record.prompt)
        by_length[len(ids)].append((ids, str(record.response)))
    right = 0
    for length, same in by_length.items():  # of one length, so that nothing is padded
        prompts = torch.tensor([ids for ids, _ in same])
        with torch.no_grad():
            written = model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=48,
                eos_token_id=renderer.tokenizer.eos_token_id,
                pad_token_id=renderer.tokenizer.eos_token_id,
            )
        replies = renderer.tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
        right += sum(reply.strip() == answer.strip() for reply, (_, answer) in zip(replies, same, strict=True))
    return right


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), one process with one thread.",
        "",
        "| job | objective | method | trained | steps | score | before | after | learned | loss | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        before, after = (_share(*row[name]) for name in ("before", "after"))
        cells = (
            row["name"],
            row["objective"],
            row["method"],
            f"{row['trainable']:,} ({100 * row['share']:.2f} %)",
            row["steps"],
            row["score"].replace("_", " "),
            before,
            after,
            "yes" if row["learned"] else "no",
            f"{row['loss'][0]:.3f} → {row['loss'][1]:.3f}",
            f"{row['minutes']:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _share(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
