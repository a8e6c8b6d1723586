"""Training in stages, each from the last, with a curriculum and replay: as a pipeline on real Ray."""

import json

import pyarrow.parquet as pq
import pytest
import tiny
from runs import losses

from itune_ray.config.base import validate
from itune_ray.config.pipeline import PipelineJob
from itune_ray.data.order import PackedTable
from itune_ray.observe.progress import Progress
from itune_ray.pipeline.run import run

STEPS = 3


def task(path, word: str) -> dict:
    """A curate step over 12 rows, easy to hard."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{word} {i}"},
                {"role": "assistant", "content": f"{word} " * (1 + i)},
            ]
        }
        for i in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = {"type": "file", "path": str(path), "name": word}
    return {
        "job": "curate",
        "inputs": [{"source": source}],
        "filters": [{"type": "curriculum", "difficulty": "length"}],
    }


@pytest.mark.soak
@pytest.mark.real
@pytest.mark.timeout(600)
def test_each_stage_starts_from_the_last_and_replays_what_came_before(tmp_path):
    import ray

    folder = str(tiny.llama(tmp_path / "model"))
    train = {
        **tiny.job(folder, steps=STEPS, batch=4, curriculum={"start": 0.4}).model_dump(mode="json"),
        "job": "train",
    }
    for key in ("name", "run", "seed"):
        del train[key]
    kept_a, kept_b = ({"source": {"type": "file", "path": f"step://curate-{task}/kept"}} for task in "ab")
    steps = {
        "curate-a": task(tmp_path / "a.jsonl", "river"),
        "curate-b": task(tmp_path / "b.jsonl", "stone"),
        "first": {**train, "model": {"path": folder, "attention": "eager"}, "data": [kept_a]},
        "second": {
            **train,
            "model": {"path": "step://first/model", "attention": "eager"},
            "data": [kept_a],
            "replay": {"data": [kept_b], "share": 0.25},
        },
    }
    settings = {"output": str(tmp_path / "runs"), "ray": {"dashboard": False}}
    job = validate(PipelineJob, {"name": "stages", "run": settings, "steps": steps}, where="test")
    try:
        with Progress(quiet=True) as progress:
            store = run("pipeline", job, progress)
    finally:
        ray.shutdown()
    done = {artifact.stage: artifact for artifact in store.opened}
    assert "replayed" not in done["first"].manifest
    assert done["second"].manifest["replayed"] == {"curate-b": 3}
    assert done["second"].manifest["funnel"]["accepted"] == 15
    old = set(pq.read_table(done["curate-b"].path("kept")).column("key").to_pylist())
    table = PackedTable(done["second"].path("order"))
    drawn = {key for step in range(STEPS) for row in table.rows(step) for key in row.keys}
    assert 1 <= len(drawn & old) <= 3
    before, after = (losses(tmp_path / "runs" / "stages" / f"{s}-{done[s].id}") for s in ("first", "second"))
    assert [step for step, _, _ in after] == [1, 2, 3]
    assert after[0][1] < before[0][1], "the second stage starts where the first has led"
