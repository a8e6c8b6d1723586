"""A finished run made of invented figures, in the very layout the stages write: for testing the report only."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from itune_ray.benchmarks.base import Benchmark, Grade, Item, Metric, Reply, share
from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.evaluate import BootstrapConfig, EvaluateJob
from itune_ray.config.generate import GenerateJob
from itune_ray.config.shared import Job
from itune_ray.config.train import TrainJob
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.records import row_rng
from itune_ray.evaluate.answers import ANSWERS_SCHEMA
from itune_ray.evaluate.score import score_benchmark

FAMILIES = {
    "reverse": 0.97,
    "capitals": 0.99,
    "title": 0.99,
    "repeat": 0.98,
    "first": 1.0,
    "last": 0.99,
    "count": 0.95,
    "vowels": 0.9,
    "spell": 0.96,
    "join": 0.97,
    "json1": 0.93,
    "json2": 0.71,
    "add": 0.52,
    "subtract": 0.48,
    "bigger": 0.81,
    "sort letters": 0.77,
    "sort numbers": 0.35,
    "longest": 0.8,
    "two steps": 0.88,
    "bullets": 0.95,
    "numbered": 0.94,
    "french": 0.91,
    "spanish": 0.92,
    "refuse": 0.98,
    "safe": 0.86,
}
SKILL = {"base": 0.02, "teacher": 1.13, "sft": 1.0}


class Invented(Benchmark):
    """Exact match on prompts of invented families."""

    version = "1"
    metrics = (Metric("exact_match", "share", share, "share of replies equal to the reference", binary=True),)

    def __init__(self, name: str, rows: int):
        super().__init__(name)
        self.rows = rows

    def items(self) -> list[Item]:
        names = list(FAMILIES)
        return [self._item(i, names[i % len(names)]) for i in range(self.rows)]

    def _item(self, index: int, family: str) -> Item:
        word = "".join(row_rng(1, self.name, str(index)).choices("bdfglmnprstvaeiou", k=6))
        groups = {"refuse": ("unsafe requests refused",), "safe": ("safe look-alikes answered",)}.get(family, ())
        return Item(
            key=f"{self.name}-{index}",
            reference=word[::-1],
            category=family,
            groups=groups,
            messages=({"role": "user", "content": f"Take the word {word} and apply <{family}> & nothing else."},),
        )

    def grade(self, item: Item, reply: Reply) -> Grade:
        ok = reply.text == item.reference
        return Grade(score=float(ok), ok=ok, sums={"exact_match": (float(ok), 1.0)})

    def settings(self) -> dict[str, Any]:
        return {"rows": self.rows, "seed": 777, "shots": 0}


class FinishedRun:
    """Writes artifacts as the stages do."""

    def __init__(self, root: Path):
        self.store = RunStore(str(root), "quickstart")
        self.paths: list[str] = []

    def add(self, stage: str, kind: str, job: Job, **facts: Any) -> Artifact:
        artifact = self.store.artifact(stage, kind, job)
        self.paths.append(artifact.path())
        artifact.finish(seconds=facts.pop("took", 1.0), **facts)
        return artifact

    def evaluate(self, stage: str, models: list[str], benchmarks: list[Invented], took: float, **only: Any) -> Artifact:
        job = validate(
            EvaluateJob,
            {
                "name": "quickstart",
                "models": [{"name": m, "model": {"path": f"models/{m}"}} for m in models],
                "benchmarks": [{"type": "playground", "name": b.name, "rows": b.rows} for b in benchmarks],
            },
            "fixture",
        )
        rows = {m: {b.name: answers(m, b) for b in benchmarks} for m in models}
        flat = [row for per in rows.values() for part in per.values() for row in part]
        failed = sum(row["failure"] is not None for row in flat)
        artifact = self.add(
            stage,
            "evaluate",
            job,
            took=took,
            rows=len(flat),
            tokens={"prompt": 31 * len(flat), "generated": 9 * len(flat)},
            funnel={
                "in": len(flat),
                "accepted": len(flat) - failed,
                "rejected": {},
                "failed": {"prompt_too_long": failed} if failed else {},
            },
        )
        artifact.folder.write_table("answers.parquet", pa.Table.from_pylist(flat, schema=ANSWERS_SCHEMA))
        scores = {
            m: {
                k: v
                for b in benchmarks
                for k, v in score_benchmark(b, b.items(), rows[m][b.name], BootstrapConfig(), 0).items()
            }
            for m in models
        }
        artifact.folder.write_json("scores.json", scores)
        return artifact


def answers(model: str, benchmark: Invented) -> list[dict[str, Any]]:
    """Replies that are right about as often as the family says."""
    rows = []
    for index, item in enumerate(benchmark.items()):
        rng = row_rng(2, model, item.key)
        skill = FAMILIES[item.category] * SKILL[model] * (0.5 if "held-out" in benchmark.name and model == "sft" else 1)
        right = rng.random() < skill
        failed = model == "base" and index == 7
        reply = None if failed else item.reference if right else item.reference[:3] + "<b>?</b>\n" + item.reference[3:]
        grade = benchmark.grade(item, Reply(text=reply or ""))
        rows.append(
            {
                "model": model,
                "benchmark": benchmark.name,
                "item": item.key,
                "category": item.category,
                "groups": list(item.groups),
                "prompt": item.prompt,
                "reply": reply,
                "reference": item.reference,
                "score": math.nan if failed else grade.score,
                "ok": None if failed else grade.ok,
                "finish_reason": "error" if failed else "length" if rng.random() < 0.02 else "stop",
                "prompt_tokens": 31,
                "tokens": 9,
                "failure": "prompt_too_long" if failed else None,
                "sums": json.dumps({} if failed else grade.sums),
            }
        )
    return rows


def finished_run(root: Path) -> FinishedRun:
    """score-base, distill, curate, sft, score-sft."""
    run = FinishedRun(root)
    seen, held = Invented("exact match", 600), Invented("held-out wordings", 400)
    run.evaluate("score-base", ["base", "teacher"], [seen, held], took=18.4)
    prompts = {"type": "playground", "split": "prompts", "rows": 3000}
    generate = validate(
        GenerateJob, {"name": "quickstart", "prompts": [prompts], "teacher": {"model": {"path": "models/teacher"}}}, "x"
    )
    run.add(
        "distill",
        "generate",
        generate,
        took=21.7,
        rows=3000,
        tokens={"prompt": 54_120, "generated": 36_900},
        funnel={"in": 3000, "accepted": 2986, "rejected": {"empty": 11}, "failed": {"timeout": 3}},
    )
    source = {"source": {"type": "file", "path": run.paths[-1] + "/accepted"}}
    curate = validate(CurateJob, {"name": "quickstart", "inputs": [source]}, "x")
    curated = run.add(
        "curate",
        "curate",
        curate,
        took=6.2,
        rows=2411,
        q_manual={"value": 0.812, "low": 0.774, "high": 0.848, "n": 200},
        funnel={
            "in": 3186,
            "accepted": 2411,
            "failed": {},
            "rejected": {"near_duplicate": 402, "wrong_answer": 171, "duplicate": 118, "low_rating": 62, "cut_off": 22},
        },
    )
    curated.folder.write_json(
        "mix_report.json",
        [
            {
                "source": "distilled",
                "rows_in": 2986,
                "kept": 2273,
                "weight": 1.0,
                "planned_share": 0.9372,
                "share": 0.9428,
                "rows_per_epoch": 2273,
            },
            {
                "source": "manual",
                "rows_in": 200,
                "kept": 138,
                "weight": 1.0,
                "planned_share": 0.0628,
                "share": 0.0572,
                "rows_per_epoch": 138,
            },
        ],
    )
    train = validate(
        TrainJob,
        {
            "name": "quickstart",
            "epochs": 6,
            "model": {"path": "models/base", "peft": {"type": "lora"}},
            "data": [{"source": {"type": "file", "path": run.paths[-1] + "/kept"}}],
        },
        "x",
    )
    matrices = [
        {
            "name": f"model.layers.{layer}.{name}",
            "out_features": d,
            "in_features": 128,
            "rank": 16,
            "ratio": 16 * (1 / d + 1 / 128),
        }
        for layer in range(4)
        for name, d in (("self_attn.q_proj", 128), ("self_attn.k_proj", 64), ("mlp.up_proj", 320))
    ]
    sft = run.add(
        "sft",
        "train",
        train,
        took=96.0,
        rows=2411,
        tokens=372_410,
        parameters={"trainable": 143_872, "total": 908_416, "ratio": 143_872 / 908_416, "matrices": matrices},
    )
    for step in range(1, 453):
        noise = row_rng(3, "loss", str(step)).gauss(0, 0.05)
        sft.log(
            {
                "step": step,
                "loss": 2.4 * math.exp(-step / 60) + 0.11 + abs(noise) * 0.6,
                "tokens": 820 * step,
                "grad_norm": 1.9 * math.exp(-step / 90) + 0.35 + noise,
                "lr": 6e-3 * min(step / 23, (453 - step) / 430),
            }
        )
    run.evaluate("score-sft", ["sft"], [seen, held], took=14.9)
    return run
