"""The acceptance pipeline of the data engine: the global invariants, and every planted fault under its reason."""

import json
import math
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from acceptance import PROBES, pipeline, write_inputs
from models import Endpoint
from pydantic import TypeAdapter
from runs import table_hash
from transformers import AutoModelForCausalLM, AutoTokenizer

from itune_ray.config.base import validate
from itune_ray.config.curate import AnyFilter
from itune_ray.config.pipeline import PipelineJob
from itune_ray.config.shared import FileSource
from itune_ray.curate.filters import load_filter
from itune_ray.curate.filters.base import GroupFilter, RowFilter
from itune_ray.data.chat import ChatRenderer
from itune_ray.data.dedup import TEXT_SCHEMA
from itune_ray.data.ledger import Ledger
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.data.storage import Folder
from itune_ray.observe.progress import Progress
from itune_ray.pipeline.run import run

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

INPUTS = re.compile(r"(?:seeds|labelled|probes|pairs):\d+:0|self-instruct:\d+:0")
"""Keys of what was read, and of the calls that proposed."""


@dataclass(frozen=True)
class Finished:
    """The folder of a run and what it was made from."""

    folder: Path
    inputs: Path
    endpoint: Endpoint
    spent: int
    """Tokens that the endpoint read and wrote for it, by its own count."""

    def stage(self, name: str) -> Path:
        """The one artifact of a step."""
        (folder,) = self.folder.glob(f"{name}-*")
        return folder

    def manifest(self, name: str) -> dict[str, Any]:
        """What the step says of itself."""
        return json.loads((self.stage(name) / "manifest.json").read_text())

    def rows(self, name: str, table: str) -> list[dict[str, Any]]:
        """A published table."""
        return pq.read_table(self.stage(name) / table).to_pylist()

    def ended(self, name: str) -> dict[str, int]:
        """Rows that were not accepted, by reason or cause."""
        funnel = self.manifest(name)["funnel"]
        return {**funnel["rejected"], **funnel["failed"]}

    def hashes(self) -> dict[str, str]:
        """Hash of every published table."""
        tables = [folder.parent for folder in self.folder.glob("*/*/part-0.parquet")]
        return {str(folder.relative_to(self.folder)): table_hash(folder) for folder in tables}


STEPS = tuple(pipeline("x", Path(), "http://x", 1)["steps"])


def scored_tokens(folder: Path) -> int:
    """Tokens of the sequences that were scored for IFD, with the one token that each brings."""
    (ledger,) = (folder / "ledger-ifd").iterdir()
    rows = Ledger(Folder.at(ledger)).table().select(["num_prompt_tokens", "num_tokens"]).to_pylist()
    return sum(row["num_prompt_tokens"] + row["num_tokens"] for row in rows)


def kept(step: str, folder: Path) -> str:
    """Name of the table of rows that go on."""
    return "kept" if (folder / "kept").exists() else "accepted"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Finished]]:
    """The pipeline run with one and with four recipe workers."""
    import ray

    root = tmp_path_factory.mktemp("acceptance")
    write_inputs(root)
    endpoint = Endpoint()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        finished: dict[int, Finished] = {}
        for workers in (1, 4):
            tree = {**pipeline("data", root, endpoint.url, workers), "output": str(root / str(workers))}
            with Progress(quiet=True) as progress:
                run("pipeline", validate(PipelineJob, tree, "x"), progress)
            spent = endpoint.model.spent - sum(earlier.spent for earlier in finished.values())
            finished[workers] = Finished(root / str(workers) / "data", root, endpoint, spent)
        yield finished
    finally:
        ray.shutdown()
        endpoint.close()


@pytest.fixture
def done(runs: dict[int, Finished]) -> Finished:
    """One of the two runs."""
    return runs[4]


def test_workers_change_no_table(runs):
    """I1; the tables of all steps, those of rejected and failed rows among them."""
    one, four = runs[1].hashes(), runs[4].hashes()
    assert len(one) == 3 * len(STEPS)
    assert one == four


def test_every_row_of_every_stage_is_accounted_for(done):
    """I2, per reason and against the tables themselves."""
    for step in STEPS:
        funnel = done.manifest(step)["funnel"]
        assert funnel["in"] == funnel["accepted"] + sum(funnel["rejected"].values()) + sum(funnel["failed"].values())
        assert len(done.rows(step, kept(step, done.stage(step)))) == funnel["accepted"]
        rejected = Counter(row["reason"] for row in done.rows(step, "rejected"))
        failed = Counter(row["cause"] for row in done.rows(step, "failed"))
        assert (rejected, failed) == (Counter(funnel["rejected"]), Counter(funnel["failed"]))
    made = {step: done.manifest(step)["rows"] for step in STEPS}
    assert done.manifest("clean")["funnel"]["in"] == made["answer"] + made["propose"]
    assert done.manifest("mix")["funnel"]["in"] == made["clean"] + made["mosaic"] + made["gate"]


@pytest.mark.parametrize("workers", [1, 4])
def test_the_bill_is_what_the_endpoint_counted(runs, workers):
    """Of every call: proposals, rewrites and their checks, answers, judges in filters and in a recipe, and scoring."""
    folder = runs[workers].folder
    spent = json.loads((folder / "spent.json").read_text())["tokens"]
    scored = scored_tokens(folder)
    assert runs[workers].spent > scored > 0
    assert spent == runs[workers].spent + scored


def test_parents_are_rows_of_an_earlier_round(done):
    """I3: a parent is an input, a row of an earlier step, or one of the same step and an earlier round."""
    known: set[str] = set()
    for step in STEPS:
        rows = done.rows(step, kept(step, done.stage(step)))
        rounds = {row["key"]: row["round"] for row in rows}
        for row in rows:
            for parent in row["parents"]:
                earlier = rounds.get(parent, row["round"]) < row["round"]
                assert earlier or parent in known or INPUTS.fullmatch(parent), (step, row["key"], parent)
        known |= set(rounds)
        if step == "mosaic":
            composed = [parent for row in rows for parent in row["parents"]]
            assert sorted(composed) == sorted(row["key"] for row in done.rows("clean", "kept")), "each row once"


def test_pure_filters_find_nothing_the_second_time(done):
    """I4: what was kept is kept again."""
    tree = pipeline("x", done.inputs, "http://x", 1)["steps"]["clean"]["filters"]
    records = read_source(FileSource(path=str(done.stage("clean") / "kept"))).records
    assert records
    applied = 0
    for config in (TypeAdapter(AnyFilter).validate_python(filter) for filter in tree):
        filter = load_filter(config)
        filter.prepare()
        if isinstance(filter, RowFilter):
            assert all(filter.keep(record).keep for record in records), config.type
        elif isinstance(filter, GroupFilter):
            texts = [{"id": i, "text": text} for i, r in enumerate(records) if (text := filter.text(r)) is not None]
            assert not filter.duplicates(pa.Table.from_pylist(texts, schema=TEXT_SCHEMA), None), config.type
        else:
            continue
        applied += 1
    assert applied == 7


def test_what_is_kept_can_be_trained_on(done):
    """I6: no empty answer, no slot of a template, no token of a chat template."""
    rows = [*done.rows("mix", "kept"), *done.rows("prefer", "accepted")]
    assert rows
    for row in rows:
        assert row["messages"][-1]["role"] == "assistant"
        assert row["rejected"] is None or row["rejected"].strip()
        for turn in row["messages"]:
            assert turn["content"].strip()
            assert not re.search(r"\{[a-z_]\w*\}|<\|\w+\|>", turn["content"])


def test_faults_of_the_inputs_are_counted_where_they_are_read(done):
    assert done.ended("templates") == {"no_label": 3, "no_text": 2}
    assert done.ended("gate") == {
        "bad_row": 1, "broken_json": 2, "empty_prompt": 1, "low_rating": 5, "no_answer": 1,
    }  # fmt: skip
    assert done.manifest("gate")["rows"] == 50 + 200


def test_faults_of_the_model_are_counted_by_what_it_did(done):
    proposed, evolved = done.ended("propose"), done.ended("evolve")
    assert proposed["not_novel"] == len(done.endpoint.model.faults["over-similar"])
    assert evolved == {"unchanged": len(done.endpoint.model.faults["unchanged"])}
    assert done.manifest("propose")["rows"] >= 200
    answered = done.ended("answer")
    causes = {cause: count for cause, count in answered.items() if cause.startswith("http_500")}
    assert list(causes.values()) == [PROBES["error"]]
    assert {row["attempts"] for row in done.rows("answer", "failed")} == {2}
    assert answered == {"empty": PROBES["empty"], "http_400": PROBES["long"], **causes}


def test_faults_of_answers_are_counted_by_the_filter_that_finds_them(done):
    ended = done.ended("clean")
    scored_low = ended.pop("not_selected")
    assert ended == {
        "finish_length": PROBES["cut"],
        "template_slot": PROBES["slot"],
        "chat_token": PROBES["token"],
        "pii_email": PROBES["email"],
        "pii_card": PROBES["card"],
        "refusal": PROBES["refuse"],
        "no_score": PROBES["garbage"],
        "low_score": PROBES["poor"],
        "short_answer": PROBES["brief"],
        "duplicate": PROBES["twice"] - 1,
        "near_duplicate": PROBES["near"] - 1,
        "contaminated": 3,
    }
    assert done.manifest("clean")["rows"] == 150
    assert scored_low == done.manifest("clean")["funnel"]["in"] - 150 - sum(ended.values())
    rejected = {row["key"]: row for row in done.rows("clean", "rejected")}
    of = {row["duplicate_of"] for row in rejected.values() if row["reason"] == "contaminated"}
    assert of == {"bench:0:0", "bench:1:0", "bench:2:0"}
    assert {row["raw"] for row in rejected.values() if row["reason"] == "no_score"} == {"What a nice answer."}


def test_difficulty_is_that_of_the_model_by_both_definitions(done):
    """IFD by vLLM's prompt log-probabilities against a forward pass of transformers; each sequence scored once."""
    rows = [row for row in done.rows("clean", "kept") if math.isfinite(row["score_ifd_1"])]
    assert len(rows) == 150
    for row in rows:
        conditioned, direct = row["score_ifd_1_conditioned"], row["score_ifd_1_direct"]
        assert row["score_ifd_1"] == pytest.approx(math.exp(conditioned - direct), abs=1e-12)
        assert row["score_ifd_2"] == pytest.approx(conditioned / direct, abs=1e-12)
    for row in rows[::30]:
        assert (row["score_ifd_1_conditioned"], row["score_ifd_1_direct"]) == pytest.approx(losses(done, row), abs=1e-4)
    first, second = (step for step in done.manifest("clean")["filters"] if step["filter"].startswith("ifd"))
    assert first["ended"] == first["no_score"] + PROBES["brief"] == PROBES["brief"]
    assert second["ended"] == 0
    asked = (done.inputs / "data-4.requests").read_text().splitlines()
    contents = first["rated"] - (PROBES["twice"] - 1)
    assert len(asked) == len(set(asked)) == 2 * contents, "equal contents once, and the second filter asks nothing"


def losses(done: Finished, row: dict[str, Any]) -> tuple[float, float]:
    """s(A|Q) and s(A) of a row by transformers."""
    model = AutoModelForCausalLM.from_pretrained(done.inputs / "scorer").eval()
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(done.inputs / "scorer"))
    tokens = renderer.answer_tokens(Record.from_row(row).messages)

    def loss(context: list[int]) -> float:
        labels = torch.tensor([[-100] * len(context) + tokens.answer])
        with torch.no_grad():
            return float(model(torch.tensor([context + tokens.answer]), labels=labels).loss)

    return loss(tokens.prompt), loss(tokens.opening)


def test_the_mixture_holds_the_shares_it_was_asked_for(done):
    rows = done.rows("mix", "kept")
    mass: Counter[str] = Counter()
    for row in rows:
        mass[row["input"]] += row["weight"]
    shares = {name: amount / sum(mass.values()) for name, amount in mass.items()}
    report = {entry["source"]: entry for entry in json.loads((done.stage("mix") / "mix_report.json").read_text())}
    assert shares == pytest.approx({"clean": 0.5, "mosaic": 0.3, "gate": 0.2})
    assert {name: entry["share"] for name, entry in report.items()} == pytest.approx(shares)


def test_the_preference_set_holds_the_pairs_with_a_winner(done):
    rows = done.rows("prefer", "accepted")
    assert len(rows) == 16
    assert all(row["rejected"] for row in rows)
    assert done.ended("prefer") == {"no_verdict": 1, "tie": 3}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_at_each_stage_the_run_ends_as_if_undisturbed(itune, runs, wait_until):
    """I5: the driver is killed once in every step, each time after the step has begun and before it has ended."""
    calm = runs[4]
    file = itune.write(pipeline("killed", calm.inputs, calm.endpoint.url, 4))
    folder = itune.root / "killed"
    landed: list[str] = []
    for step in STEPS:
        driver = itune.start("pipeline", file)
        wait_until(lambda step=step: bool(list(folder.glob(f"{step}-*"))), f"{step} has begun", timeout=300)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        (stage,) = folder.glob(f"{step}-*")
        manifest = stage / "manifest.json"
        if not manifest.exists() or json.loads(manifest.read_text())["status"] == "running":
            landed.append(step)
    status, seen = itune.run("pipeline", file, timeout=600)
    assert status == 0, seen
    assert len(landed) >= len(STEPS) - 2, "the kills must land within the steps"
    assert Finished(folder, calm.inputs, calm.endpoint, 0).hashes() == calm.hashes()
