"""Preference tuning, inventions, pruning and sweeps on the page: there when their artifacts are, and their numbers."""

import csv
import io
import json
import math

import pytest
from invented import SKILL, Invented
from test_report import make, page_of, text_of

from itune_ray.config.base import validate
from itune_ray.config.compress import CompressJob
from itune_ray.config.curate import CurateJob
from itune_ray.config.generate import GenerateJob
from itune_ray.config.sweep import SweepJob
from itune_ray.config.train import TrainJob
from itune_ray.errors import ConfigError

CHAT = {"type": "playground", "split": "chat", "rows": 10}
TRAIN = {"model": {"path": "models/base", "peft": {"type": "lora"}}, "data": [{"source": CHAT}], "steps": 60}


def job(schema, **tree):
    return validate(schema, {"name": "quickstart", **tree}, "x")


def add_dpo(run):
    stage = run.add("dpo", "train", job(TrainJob, **TRAIN, objective={"type": "dpo"}), rows=300, tokens=9000)
    for step in range(1, 61):
        margin = 0.4 * (1 - math.exp(-step / 20))
        stage.log({"step": step, "loss": 0.6931 - margin / 3, "reward_margin": margin, "reward_accuracy": 0.8})
    lines = [
        {
            "step": s,
            "loss": 0.69,
            "reward_margin": s / 300,
            "reward_accuracy": a,
            "n": 120,
            "low": a - 0.08,
            "high": a + 0.08,
        }
        for s, a in ((0, 0.5), (30, 0.62), (60, 0.7))
    ]
    stage.folder.write_bytes("validation.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def add_invented(run):
    generate = job(GenerateJob, prompts=[CHAT], teacher={"model": {"path": "m"}}, recipe={"type": "self_instruct"})
    rounds = [
        {"round": 1, "calls": 50, "proposed": 40, "accepted": 31, "rejected": {"not_novel": 9}, "mean_similarity": 0.61}
    ]
    made = run.add("invent", "generate", generate, rows=31, rounds=rounds)
    source = {"source": {"type": "file", "path": made.path("accepted")}}
    curate = job(CurateJob, inputs=[source], filters=[{"type": "grader"}])
    rejected = {"ungradable": 6, "wrong_answer": 5}
    run.add(
        "curate-invented",
        "curate",
        curate,
        rows=20,
        funnel={"in": 31, "accepted": 20, "rejected": rejected, "failed": {}},
    )


def add_aligned(run):
    recipe = {"type": "reflective_learning"}
    generate = job(GenerateJob, prompts=[CHAT], teacher={"model": {"path": "m"}}, recipe=recipe)
    matrix = {"levels": ["easy", "expert"], "mean": [[0.5, 0.75, 1.0], [0.0, 0.125, 0.25]], "rows": [9, 9, 4]}
    run.add("reflect", "generate", generate, rows=9, alignment=matrix)


def add_pruned(run):
    stage = run.add("prune", "compress", job(CompressJob, model={"path": "m"}, calibration={"data": [CHAT]}))
    parts = {"total": 1000, "embedding": 100, "attention": 300, "mlp": 590, "norm": 10, "head": 0}
    after = {"total": 777, "embedding": 100, "attention": 225, "mlp": 442, "norm": 10, "head": 0}
    shape = {"heads": 4, "kv_heads": 4, "channels": 352}
    facts = {
        "parameters": {"before": parts, "after": after, "removed_share": 0.223},
        "bytes": {"before": 2000, "after": 1554},
        "shape": {"before": shape, "after": {"heads": 3, "kv_heads": 3, "channels": 264}},
        "tokens_per_s": {"before": 3411.0, "after": 3977.0, "prompts": 128, "tokens": 48},
    }
    stage.folder.write_json("compression.json", facts)


def trial(key, rank, sparsity, value, parameters, steps=150):
    axes = {"train.model.peft.rank": rank, "compress.method.sparsity": sparsity}
    score = {"value": value, "low": value - 0.03, "high": value + 0.03, "n": 500}
    rungs = [{"step": step, "value": value * step / steps} for step in (50, 150) if step <= steps]
    ended = "completed" if steps == 150 else "stopped"
    return {
        "key": key,
        "axes": axes,
        "steps": steps,
        "ended": ended,
        "score": score,
        "rungs": rungs,
        "parameters": parameters,
        "trainable": rank * 900,
        "tokens_per_s": 3e9 / parameters,
        "artifact": None,
    }


def add_sweep(run):
    train = {"model": {"path": "m", "peft": {"type": "lora"}}, "data": [{"source": CHAT}], "steps": 150}
    evaluate = {"benchmarks": [{"type": "playground", "rows": 500}]}
    stage = run.add(
        "sweep", "sweep", job(SweepJob, axes={"train.model.peft.rank": [2, 16]}, train=train, evaluate=evaluate)
    )
    trials = [
        trial("a", 2, 0.0, 0.79, 890_000),
        trial("b", 16, 0.0, 0.85, 890_000),
        trial("c", 2, 0.5, 0.61, 490_000, 50),
        trial("d", 16, 0.5, 0.77, 490_000),
    ]
    stage.folder.write_json(
        "sweep.json",
        {
            "metric": "exact match",
            "higher_is_better": True,
            "axes": list(trials[0]["axes"]),
            "trials": trials,
            "pareto": ["b", "d"],
            "engine_starts": 2,
            "shapes": 2,
        },
    )


def test_a_run_without_them_has_none_of_these_sections(run):
    _, folder = make(run)
    page = page_of(folder)
    for heading in ("<h2>Pruning", "<h2>Sweep", "Instructions invented", "held-out pairs"):
        assert heading not in page


def test_each_section_shows_its_artifacts_numbers(run):
    for add in (add_dpo, add_invented, add_pruned, add_sweep):
        add(run)
    _, folder = make(run)
    text = text_of(page_of(folder))
    assert "70.0 % [62.0 – 78.0] held-out pairs ranked right, n = 120" in text
    assert "31 new instructions accepted 80.6 % valid by the inverse parser 64.5 % valid and answered right" in text
    assert "22.3 % of all parameters removed" in text
    assert "3,411 → 3,977 tokens/s of vLLM, 128 prompts" in text
    assert "kv heads 4 → 3" in text
    assert "4 trials 1 stopped early 2 for 2 model shapes engines started" in text
    assert "16 0.0 85.0 % 82.0 – 88.0 · n 500 150 completed unbeaten 890,000 14,400" in text
    assert page_of(folder).count("<svg") >= 8


def test_the_alignment_matrix_is_a_heat_map(run):
    add_aligned(run)
    _, folder = make(run)
    page = page_of(folder)
    assert "Replies aligned with the instruction, reflect" in text_of(page)
    svg = page[page.index("Mean alignment of the student") :].split("</svg>")[0]
    for cell in ("0.50", "0.75", "1.00", "0.00", "0.12", "0.25", "easy", "expert", "n = 4"):
        assert f">{cell}<" in svg.replace("> ", ">").replace(" <", "<"), cell
    assert svg.count("var(--after)") == 6


def test_tables_hold_what_the_sections_show(run):
    for add in (add_dpo, add_invented, add_pruned, add_sweep):
        add(run)
    artifact, _ = make(run, pairs=(("base", "sft"),))
    lines = list(csv.DictReader(io.StringIO(artifact.folder.read_bytes("tables.csv").decode())))

    def values(table, name, **where):
        found = [line for line in lines if (line["table"], line["name"]) == (table, name)]
        return [line for line in found if all(line[key] == value for key, value in where.items())]

    accuracy = values("validation", "reward_accuracy", slice="60")
    assert [(a["value"], a["low"], a["n"]) for a in accuracy] == [("0.7", "0.62", "120")]
    assert len(values("training", "reward_margin", stage="dpo")) == 60
    assert [line["value"] for line in values("compression", "parameters/total")] == ["1000", "777"]
    assert [line["value"] for line in values("compression", "tokens_per_s")] == ["3411.0", "3977.0"]
    (best,) = values("sweep", "exact match", slice="train.model.peft.rank=16, compress.method.sparsity=0.0")
    assert (best["value"], best["n"]) == ("0.85", "500")
    pair = values("pairs", "difference", model="sft", slice="base")[0]
    assert float(pair["low"]) <= float(pair["value"]) <= float(pair["high"])


def test_pairs_of_models_are_stated_and_a_wrong_name_is_one_line(run):
    _, folder = make(run, pairs=(("base", "sft"), ("teacher", "base")))
    text = text_of(page_of(folder))
    assert "base → sft exact match" in text
    assert "teacher → base" in text
    assert "falls" in text
    with pytest.raises(ConfigError, match=r"no stage scored this model; did you mean 'sft'\?; got 'sftt'"):
        make(run, pairs=(("base", "sftt"),))


def test_many_models_go_down_the_table(run, monkeypatch):
    for number in range(3):
        monkeypatch.setitem(SKILL, f"model-{number}", 0.9)
        run.evaluate(f"score-{number}", [f"model-{number}"], [Invented("exact match", 60)], took=1.0)
    _, folder = make(run)
    page = page_of(folder)
    assert "<thead><tr><th>Model</th>" in page
    assert "<tr><td>model-2</td>" in page
