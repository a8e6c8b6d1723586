"""The acceptance pipeline of the data engine, from seeds and a labelled table to a mixture and a preference set."""

import csv
import json
from pathlib import Path
from typing import Any

import tiny
from models import words

LEAKED = [
    "A carpenter cuts a plank of ninety centimetres into five equal parts, so how long is each of the parts?",
    "Which river runs through the capital of the country that lies to the west of the old mountain pass?",
    "Name the chemical element with the symbol that was taken from the Latin word for a heavy grey metal.",
]
PROBES = {
    "cut": 3,
    "empty": 2,
    "error": 2,
    "long": 1,
    "refuse": 3,
    "email": 2,
    "card": 2,
    "slot": 2,
    "token": 1,
    "garbage": 2,
    "poor": 3,
    "brief": 2,
    "twice": 5,
    "near": 2,
}
"""Prompts planted among those that are answered, by what is wrong with them or with their answers."""


def write_inputs(folder: Path) -> None:
    """Seeds, a labelled table, probes, a benchmark and pairs, each with its planted faults; and a model that scores."""
    tiny.llama(folder / "scorer", max_position_embeddings=2048)
    seeds: list[Any] = [
        {"instruction": f"Tell {words(7, 'seed', i)}.", "output": f"It is {words(9, 'told', i)}.", "ratings": [5, 4]}
        for i in range(50)
    ]
    seeds += [{"instruction": f"Tell {words(7, 'bad', i)}.", "output": "No.", "ratings": [1, 2]} for i in range(5)]
    seeds += [{"instruction": 7, "output": "x"}, {"instruction": " ", "output": "x"}, {"instruction": "Why so?"}]
    lines = [*map(json.dumps, seeds), "{broken", '{"instruction": "half a line']
    (folder / "seeds.jsonl").write_text("\n".join(lines) + "\n")
    with (folder / "labelled.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([words(12, "text", i), ("calm", "cross", "glad")[i % 3]] for i in range(200))
        table.writerows([[words(12, "odd", i), "purple"] for i in range(3)])
        table.writerows([["", "calm"]] * 2)
    (folder / "probes.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in probes()))
    (folder / "bench.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in LEAKED))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs()))


def probes() -> list[str]:
    """The planted prompts: those of a kind differ in a number, but for duplicates and near duplicates."""
    made: list[str] = []
    for kind, count in PROBES.items():
        for number in range(count):
            tail = {"twice": "", "near": ("", "now")[number % 2], "long": " on" * 3000}.get(kind, f"{number} in brief")
            made.append(f"Probe {kind} {tail}".strip())
    return made + [f"Please solve this. {text}" for text in LEAKED]


def pairs() -> list[dict[str, str]]:
    """Sixteen pairs whose answer is the longer one, three judged by their place, and one without a verdict."""
    good = [
        {"prompt": f"Say {words(4, i)}", "chosen": f"It is {words(9, 'a', i)}", "rejected": f"No {words(2, 'b', i)}"}
        for i in range(16)
    ]
    placed = [{"prompt": f"Ask {words(4, i)}", "chosen": "Many places here", "rejected": "Places"} for i in range(3)]
    return [*good, *placed, {"prompt": "Ask for it", "chosen": "It is nothing much", "rejected": "Yes"}]


def pipeline(name: str, inputs: Path, url: str, workers: int) -> dict[str, Any]:
    """The job file."""
    model = {
        "model": {"path": "scripted"},
        "engine": {"type": "http", "url": url, "api_key_env": None, "max_retries": 0},
        "pool": {"cpus_each": 0.25, "max_outstanding": 32},
    }
    scorer = {
        "model": {"path": str(inputs / "scorer"), "dtype": "float32"},
        "engine": {"type": "vllm", "kv_cache_gb": 0.1, "request_log": str(inputs / f"{name}-{workers}.requests")},
        "pool": {"max_outstanding": 1},  # each sequence alone: then no batch moves the last bits of its loss
    }
    crew = {"num": workers, "cpus_each": 0.25, "rows_per_block": 40}
    made = {"job": "generate", "teacher": model, "workers": crew, "commit": {"rows": 64, "seconds": 1.0}}

    def file(path: str, **more: Any) -> dict[str, Any]:
        return {"type": "file", "path": path if path.startswith("step://") else str(inputs / path), **more}

    def part(path: str, **more: Any) -> dict[str, Any]:
        return {"source": file(path, **more)}

    return {
        "name": name,
        "seed": 11,
        "steps": {
            "templates": {
                "job": "generate",
                "prompts": [file("labelled.csv", format="fields")],
                "recipe": {"type": "templates", "options": ["calm", "cross", "glad"]},
                "workers": crew,
            },
            "gate": {
                "job": "curate",
                "inputs": [part("seeds.jsonl"), part("step://templates/accepted", name="labelled")],
                "filters": [{"type": "human_rating", "only": ["seeds"]}],
            },
            "propose": {
                **made,
                "prompts": [file("step://gate/kept")],
                "recipe": {"type": "self_instruct", "rounds": 3, "calls": 18, "target": 200, "blocked": []},
            },
            "evolve": {
                **made,
                "prompts": [file("step://propose/accepted", limit=60)],
                "recipe": {"type": "evol_instruct", "rounds": 2},
            },
            "answer": {
                **made,
                "prompts": [file("step://evolve/accepted"), file("probes.jsonl", format="prompt")],
                "max_attempts": 2,
            },
            "clean": {
                "job": "curate",
                "inputs": [part("step://answer/accepted"), part("step://propose/accepted")],
                "filters": [
                    {"type": "finish_reason"},
                    {"type": "hygiene"},
                    {"type": "pii"},
                    {"type": "refusal"},
                    {"type": "judge", "judge": model},
                    {"type": "ifd", "model": scorer, "definition": "perplexity_ratio", "high": None},
                    {"type": "ifd", "model": scorer, "definition": "loss_ratio", "high": None},
                    {"type": "exact_dedup"},
                    {"type": "minhash_dedup"},
                    {"type": "decontaminate", "against": [file("bench.jsonl", format="fields")]},
                    {
                        "type": "judge",
                        "judge": model,
                        "template": "complexity",
                        "dimension": "complexity",
                        "threshold": 0,
                        "planted": 0,
                    },
                    {"type": "deita", "complexity": "score.judge_2", "quality": "score.judge_1", "rows": 150},
                ],
            },
            "mosaic": {
                "job": "generate",
                "prompts": [file("step://clean/kept")],
                "teacher": {"model": {"path": "words"}, "engine": {"type": "fake"}},
                "recipe": {"type": "mosaic", "epochs": 1},
            },
            "mix": {
                "job": "curate",
                "inputs": [part("step://clean/kept"), part("step://mosaic/accepted"), part("step://gate/kept")],
                "max_repeats": 10,
                "mixing": {"type": "manual", "rates": {"clean": 0.5, "mosaic": 0.3, "gate": 0.2}},
            },
            "prefer": {
                **made,
                "prompts": [file("pairs.jsonl")],
                "recipe": {"type": "compare", "keep": ["win"]},
            },
        },
    }
