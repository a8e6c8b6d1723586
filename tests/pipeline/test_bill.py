"""Every token that an engine read or wrote is on the run's bill, whoever asked, by the engine's own count."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from models import Endpoint

from itune_ray.config.base import validate
from itune_ray.config.pipeline import PipelineJob
from itune_ray.engine.usage import TokenCount, Usage
from itune_ray.observe import metrics
from itune_ray.observe.progress import Progress
from itune_ray.pipeline.run import run

ROWS = 6


class Heard:
    """A sink that adds up tokens by stage and kind."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, str], float] = {}

    def record(self, metric, value, tags) -> None:
        if metric.name == "itune_tokens_total":
            key = tags["stage"], tags["kind"]
            self.tokens[key] = self.tokens.get(key, 0) + value


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    served = Endpoint()
    yield served
    served.close()


def steps(url: str, prompts: Path) -> dict:
    """A judge inside a recipe, a judge of a filter, and a benchmark."""
    engine = {"type": "http", "url": url, "api_key_env": None, "max_retries": 0}
    model = {"model": {"path": "scripted"}, "engine": engine, "pool": {"cpus_each": 0.25}}
    file = {"type": "file", "path": str(prompts), "format": "prompt"}
    return {
        "best": {
            "job": "generate",
            "prompts": [file],
            "teacher": model,
            "sampling": {"temperature": 1.0},
            "recipe": {"type": "best_of_n", "samples": 3, "scorer": {"type": "judge", "judge": model}},
            "workers": {"num": 1, "cpus_each": 0.25},
        },
        "judged": {
            "job": "curate",
            "inputs": [{"source": {"type": "file", "path": "step://best/accepted"}}],
            "filters": [{"type": "judge", "judge": model, "planted": 0}],
        },
        "asked": {
            "job": "evaluate",
            "models": [{"name": "m", **model}],
            "benchmarks": [{"type": "playground", "rows": 8}],
            "workers": {"num": 1, "cpus_each": 0.25},
        },
    }


def accepted(root: Path) -> list[dict]:
    """The rows that the recipe made."""
    (stage,) = (root / "runs" / "bill").glob("best-*")
    return pq.read_table(stage / "accepted").to_pylist()


@pytest.mark.real
def test_the_bill_is_what_the_endpoint_counted(tmp_path, endpoint):
    import ray

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say something of {i}."}) + "\n" for i in range(ROWS)))
    tree = {"name": "bill", "output": str(tmp_path / "runs"), "steps": steps(endpoint.url, prompts)}
    heard = Heard()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        with Progress(quiet=True) as progress, metrics.sent_to(heard):
            run("pipeline", validate(PipelineJob, tree, "x"), progress)
    finally:
        ray.shutdown()
    spent = json.loads((tmp_path / "runs" / "bill" / "spent.json").read_text())["tokens"]
    assert spent == endpoint.model.spent == sum(heard.tokens.values())
    assert {stage for stage, _ in heard.tokens} == {"best", "judged", "asked"}
    answers = sum(len(row["messages"][-1]["content"].split()) for row in accepted(tmp_path))
    said_by_judges = ROWS * len(["5", "Good."])  # the three answers to a prompt are equal: one judgement
    assert heard.tokens["best", "generated"] == 3 * answers + said_by_judges


def test_a_replica_is_counted_once_however_often_it_is_asked():
    heard, count = Heard(), TokenCount()
    with metrics.sent_to(heard):
        for usage in (Usage("a", 10, 4), Usage("a", 10, 4), Usage("a", 30, 5), Usage("a", 10, 4), Usage("b", 3, 1)):
            count.add(usage)
    assert sorted(heard.tokens.values()) == [5 + 1, 30 + 3]
