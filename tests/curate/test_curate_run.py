"""The curate stage from files to artifact; what needs a Ray session runs in one."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.config.shared import FileSource
from itune_ray.curate import run as stage
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.records import Record, records_table
from itune_ray.data.sources import read_source
from itune_ray.engine.base import Completion, Sample
from itune_ray.engine.host import EngineHost
from itune_ray.errors import ConfigError, DataError, GenerationError
from itune_ray.observe.progress import Progress


def curate(root: Path, inputs: list[dict[str, Any]], filters: tuple[dict[str, Any], ...] = (), **more: Any) -> Artifact:
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": list(filters), **more}, "x")
    return stage.run(job, RunStore(str(root), "run"), "curate", EngineHost(), Progress(quiet=True))


def write(file: Path, rows: list[Any]) -> dict[str, Any]:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return {"source": {"type": "file", "path": str(file)}}


def qa(question: str, answer: Any, **meta: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **meta}


def ends(artifact: Artifact) -> dict[str, tuple[str, str | None]]:
    """Key -> (status, reason or cause) over the three published tables."""
    rows = [row for folder in ("kept", "rejected", "failed") for row in artifact.folder.read_table(folder).to_pylist()]
    found = {row["key"]: (row["status"], row["reason"] or row["cause"]) for row in rows}
    assert len(found) == len(rows)
    return found


def bytes_of(artifact: Artifact) -> dict[str, bytes]:
    return {name: artifact.folder.read_bytes(f"{name}/part-0.parquet") for name in ("kept", "rejected", "failed")}


# --- without Ray ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_ray(monkeypatch):
    """Touching Ray fails the test."""
    monkeypatch.setattr(stage, "_connect", lambda state: pytest.fail("Ray was touched"))
    monkeypatch.setattr(stage.cluster, "connect", lambda *_: pytest.fail("Ray was touched"))


def test_rows_made_to_provoke_are_kept_only_where_the_job_says_so(tmp_path, no_ray):
    rows = [qa("q", "a"), qa("r", "b", unsafe=True), qa("s", "c", unsafe=False)]
    source = write(tmp_path / "in.jsonl", rows)
    assert ends(curate(tmp_path, [source]))["in:1:0"] == ("rejected", "unsafe")
    assert {end[0] for end in ends(curate(tmp_path, [source], keep_unsafe=True)).values()} == {"accepted"}


def test_bad_input_is_accounted_for_and_never_ends_the_stage(tmp_path, no_ray):
    rows = [qa("q", "a"), "{broken", qa("r", ""), qa("s", 3), qa("", "a"), qa("t", "b")]
    artifact = curate(tmp_path, [write(tmp_path / "in.jsonl", rows)])
    assert ends(artifact) == {
        "in:0:0": ("accepted", None),
        "in:1:0": ("rejected", "broken_json"),
        "in:2:0": ("rejected", "no_answer"),
        "in:3:0": ("rejected", "bad_row"),
        "in:4:0": ("rejected", "empty_prompt"),
        "in:5:0": ("accepted", None),
    }
    assert artifact.manifest["funnel"] == {
        "in": 6,
        "accepted": 2,
        "failed": {},
        "rejected": {"bad_row": 1, "broken_json": 1, "empty_prompt": 1, "no_answer": 1},
    }
    assert artifact.manifest["sources"] == [{"source": "in", "layout": "alpaca", "revision": None, "rows": 6}]


def test_the_union_resolves_collisions_and_reports_the_mixture(tmp_path, no_ray):
    manual = write(tmp_path / "manual.jsonl", [qa("q", "a"), qa("r", "b")]) | {"weight": 2.0, "priority": 1}
    artifact = curate(tmp_path, [write(tmp_path / "auto.jsonl", [qa("q", "a"), qa("s", "c")]), manual])
    assert ends(artifact)["auto:0:0"] == ("rejected", "duplicate_of_source")
    rejected = artifact.folder.read_table("rejected").to_pylist()
    assert [row["duplicate_of"] for row in rejected] == ["manual:0:0"]
    report = {row["source"]: row for row in artifact.folder.read_json("mix_report.json")}
    assert report["manual"]["share"] == pytest.approx(4 / 5)
    assert report["manual"]["planned_share"] == pytest.approx(4 / 6)
    assert report["manual"]["rows_per_epoch"] == 4
    weights = {row["key"]: row["weight"] for row in artifact.folder.read_table("kept").to_pylist()}
    assert weights == {"auto:1:0": 1.0, "manual:0:0": 2.0, "manual:1:0": 2.0}


def test_asking_again_does_nothing_and_reads_nothing(tmp_path, no_ray, monkeypatch):
    inputs = [write(tmp_path / "in.jsonl", [qa("q", "a")])]
    first = curate(tmp_path, inputs)
    monkeypatch.setattr(stage, "read_source", lambda _: pytest.fail("a source was read"))
    second = curate(tmp_path, inputs)
    assert second.complete
    assert second.manifest["finished"] == first.manifest["finished"]


def test_too_few_rows_is_an_error_that_names_the_biggest_reason(tmp_path, no_ray):
    rows = [qa("q", "a"), qa("r", ""), qa("s", ""), "{"]
    inputs = [write(tmp_path / "in.jsonl", rows)]
    with pytest.raises(DataError, match=r"only 1 of 4 rows.*`no_answer` \(2 rows\).*rejected.*at least 3.*`min_rows`"):
        curate(tmp_path, inputs, min_rows=3)
    with pytest.raises(DataError, match="only 1 of 4 rows"):
        curate(tmp_path, inputs, min_rows=3)
    (folder,) = (tmp_path / "run").glob("curate-*")
    assert pq.read_table(folder / "rejected").num_rows == 3, "the rejects are there to be looked at"
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"


def test_small_tables_are_deduplicated_on_the_driver(tmp_path, no_ray):
    rows = [qa("Q!", "a"), qa("q", "A "), qa("other", "a")]
    filters = ({"type": "exact_dedup", "level": 2},)
    artifact = curate(tmp_path, [write(tmp_path / "in.jsonl", rows)], filters)
    assert ends(artifact)["in:1:0"] == ("rejected", "duplicate")
    kept = [{"source": {"type": "file", "path": artifact.path("kept")}}]
    again = curate(tmp_path, kept, filters)
    assert again.manifest["funnel"] == {"in": 2, "accepted": 2, "rejected": {}, "failed": {}}
    assert set(ends(again)) == {"in:0:0", "in:2:0"}, "rows keep their keys over stages"


def test_the_order_of_rows_and_inputs_decides_nothing(tmp_path, no_ray):
    rows = [Record(source="s", position=i, text=f"w{i % 7} w{i % 5} a b c d") for i in range(60)]
    filters = ({"type": "exact_dedup"}, {"type": "minhash_dedup", "threshold": 0.5})
    published = []
    for seed in (1, 2):
        random.Random(seed).shuffle(rows)
        halves = [rows[:25], rows[25:]]
        random.Random(seed).shuffle(halves)
        inputs = []
        for number, half in enumerate(halves):
            file = tmp_path / f"{seed}-{number}.parquet"
            pq.write_table(records_table(half), file)
            inputs.append({"source": {"type": "file", "path": str(file)}})
        artifact = curate(tmp_path / str(seed), inputs, filters)
        assert artifact.manifest["funnel"]["rejected"]
        published.append({key: end for key, end in ends(artifact).items() if end[1] != "duplicate_of_source"})
        texts = [row["text"] for row in artifact.folder.read_table("kept").to_pylist()]
        assert len(texts) == len(set(texts))
    assert {k for k, (s, _) in published[0].items() if s == "accepted"} == {
        k for k, (s, _) in published[1].items() if s == "accepted"
    }


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ([{"type": "human_rating"}], DataError, "needs meta.ratings"),
        ([{"type": "grader", "grader": "x"}], ConfigError, "grader"),
        ([{"type": "length", "only": ["inn"]}], ConfigError, "did you mean 'in'"),
    ],
)
def test_what_cannot_work_is_told_before_ray_starts(tmp_path, no_ray, filters, error, message):
    with pytest.raises(error, match=message):
        curate(tmp_path, [write(tmp_path / "in.jsonl", [qa("q", "a")])], tuple(filters))


# --- over Ray ------------------------------------------------------------------------------------------------------

SENTENCE = "please write a short story about a brave little dog who finds a lost kitten in the big city"


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # inherited by workers; a runtime_env starts them anew
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def rich_rows() -> list[Any]:
    rows: list[Any] = [qa(f"question number {i}", f"answer {i}", ratings=[1 + i % 5]) for i in range(40)]
    rows += [
        qa("Question number 3", "Answer 3"),
        qa("question number 5", "x" * 60),
        qa("anything", "I can't help with that."),
    ]
    rows += [qa(SENTENCE, "ok"), qa(SENTENCE.replace("city", "town"), "ok"), qa("boom", "boom"), "{broken"]
    return rows


RICH = (
    {"type": "length", "max_response": 50},
    {"type": "refusal"},
    {"type": "human_rating", "threshold": 0.25},
    {"type": "custom", "import_path": "test_curate_run:Fragile"},
    {"type": "exact_dedup"},
    {"type": "minhash_dedup", "threshold": 0.6, "bands": 32, "rows": 4},
)


class Fragile:
    def keep(self, record: Record) -> bool:
        if record.response == "boom":
            raise RuntimeError("odd row")
        return True


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_result_is_the_same_for_any_number_of_blocks(tmp_path, ray_session, monkeypatch):
    inputs = [write(tmp_path / "in.jsonl", rich_rows())]
    whole = curate(tmp_path / "whole", inputs, RICH, blocks=1)
    monkeypatch.setattr(stage, "ROWS_PER_BLOCK", 5)
    monkeypatch.setattr(stage, "SHUFFLE_ROWS", 0)
    cut = curate(tmp_path / "cut", inputs, RICH, blocks=3)  # each more starts another worker process
    assert bytes_of(whole) == bytes_of(cut)
    assert whole.id == cut.id
    facts = ["funnel", "rows", "filters", "q_manual", "sources"]
    assert [whole.manifest[f] for f in facts] == [cut.manifest[f] for f in facts]
    assert whole.manifest["funnel"] == {
        "in": 47,
        "accepted": 33,
        "failed": {"custom: RuntimeError: odd row": 1},
        "rejected": {
            "broken_json": 1,
            "duplicate": 1,
            "long_response": 1,
            "low_rating": 8,
            "near_duplicate": 1,
            "refusal": 1,
        },
    }
    q = whole.manifest["q_manual"]
    assert (q["value"], q["n"], q["unrated"]) == (0.8, 40, 4)
    near = [row for row in whole.folder.read_table("rejected").to_pylist() if row["reason"] == "near_duplicate"]
    assert near[0]["duplicate_of"] == "in:43:0"
    assert 0.6 <= near[0]["score"] < 1
    kept = whole.folder.read_table("kept")
    assert "score_human_rating" in kept.column_names
    assert len(read_source(FileSource(path=whole.path("kept"))).records) == 33


@pytest.mark.real
@pytest.mark.timeout(900)
def test_what_filters_add_and_what_a_row_repeats_are_published(tmp_path, ray_session, monkeypatch):
    leaked = "A farmer keeps twelve hens and three goats, so how many legs are in the yard?"
    bench = tmp_path / "bench.jsonl"
    bench.write_text(json.dumps({"stem": "x"}) + "\n" + json.dumps({"stem": leaked}) + "\n")
    against = [{"type": "file", "path": str(bench), "format": "fields"}]
    rows = [
        qa("Where was the house that we saw on the other day?", "It was on the other side of the river.", id=1),
        qa(f"Solve this: {leaked}", "There are thirty-six legs in the yard.", id=2),
        qa("Where was the house?", "La maison que nous avons vue était de l'autre côté de la rivière.", id=3),
    ]
    filters = (
        {"type": "language", "allowed": ["en"]},
        {"type": "custom", "import_path": "test_curate_run:NeedsLanguage"},
        {"type": "decontaminate", "against": against},
        {"type": "exact_dedup"},
    )
    inputs = [write(tmp_path / "in.jsonl", rows)]
    whole = curate(tmp_path / "whole", inputs, filters, blocks=1)
    monkeypatch.setattr(stage, "ROWS_PER_BLOCK", 1)
    assert bytes_of(whole) == bytes_of(curate(tmp_path / "cut", inputs, filters, blocks=3))
    assert ends(whole) == {
        "in:0:0": ("accepted", None),
        "in:1:0": ("rejected", "contaminated"),
        "in:2:0": ("rejected", "language_fra"),
    }
    rejected = {row["key"]: row for row in whole.folder.read_table("rejected").to_pylist()}
    assert (rejected["in:1:0"]["duplicate_of"], rejected["in:1:0"]["score"]) == ("bench:1:0", 1.0)
    assert json.loads(rejected["in:2:0"]["meta"])["lang"] == "fra"
    (kept,) = read_source(FileSource(path=whole.path("kept"))).records
    assert (kept.meta["id"], kept.meta["lang"], kept.meta["lang_prompt"]) == (1, "eng", "eng")
    facts = {entry["filter"]: entry for entry in whole.manifest["filters"]}
    assert facts["decontaminate"]["against"] == {"bench": 2}
    assert (facts["decontaminate"]["comparable"], facts["decontaminate"]["too_short"]) == (1, 1)
    bench.write_text(json.dumps({"stem": leaked + " Say why."}) + "\n")
    assert curate(tmp_path / "whole", inputs, filters, blocks=1).id != whole.id


class NeedsLanguage:
    def keep(self, record: Record) -> bool:
        return record.meta["lang"] == "eng"


@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_filter_that_no_worker_can_load_is_one_clear_error(tmp_path, ray_session, monkeypatch):
    (tmp_path / "only_here.py").write_text("class Here:\n    def keep(self, record): return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    filters = ({"type": "custom", "import_path": "only_here:Here"},)
    with pytest.raises(DataError, match=r"a filter broke: .*only_here") as caught:
        curate(tmp_path, [write(tmp_path / "in.jsonl", [qa("q", "a")])], filters)
    assert "\n" not in str(caught.value)


class FakeHost:
    """An engine host whose judge rates an answer with the number that it holds."""

    def __init__(self) -> None:
        self.asked = 0
        self.held: dict[str, float] = {}

    def leave(self, own: Any) -> None:
        pass

    def pool(self, served: Any) -> Any:
        return SimpleNamespace(client=SimpleNamespace(llm=lambda *_: self))

    async def generate(self, messages: Any, *, key: str, sampling: Any = None, n: int = 1) -> Completion:
        from runs import rated_answer  # not above: Ray's workers import this module too, and know no other test folder

        self.asked += 1
        text = rated_answer(messages).split("\n")[0]
        return Completion(id=key, samples=(Sample(text=text, token_ids=(1,), finish_reason="stop"),))


@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_changed_threshold_asks_the_judge_nothing(tmp_path, ray_session):
    inputs = [write(tmp_path / "in.jsonl", [qa(f"q{i}", f"{i % 6}") for i in range(30)] + [qa("q", "no number")])]

    def judged(host: FakeHost, **more: Any) -> Artifact:
        filters = [{"type": "judge", "judge": {"model": {"path": "some/judge"}}, **more}]
        job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
        return stage.run(job, RunStore(str(tmp_path), "run"), "curate", host, Progress(quiet=True))  # type: ignore[arg-type]

    first = FakeHost()
    artifact = judged(first, threshold=4.0)
    assert first.asked == 31 + 12, "and some once more, with words planted"
    assert artifact.manifest["funnel"]["rejected"] == {"low_score": 20, "no_score": 1}
    assert artifact.manifest["tokens"]["generated"] == 31 + 12
    assert set(artifact.folder.read_table("kept")["score_judge"].to_pylist()) == {4.0, 5.0}
    second = FakeHost()
    stricter = judged(second, threshold=5.0)
    assert second.asked == 0
    assert stricter.id != artifact.id
    assert stricter.manifest["rows"] == 5
    with pytest.raises(GenerationError, match=r"1 of 31 replies.*max_parse_fail"):
        judged(FakeHost(), max_parse_fail=0.01)
    assert judged(FakeHost(), dimension="style").manifest["rows"] == 5


@pytest.mark.real
@pytest.mark.timeout(900)
def test_the_judge_asks_through_a_real_pool(tmp_path, ray_session):
    """The fake engine's words hold no score: every reply is kept beside its row."""
    judge = {"model": {"path": "any"}, "engine": {"type": "fake"}, "pool": {"cpus_each": 0.5}}
    filters = [{"type": "judge", "judge": judge, "max_parse_fail": 1.0}]
    inputs = [write(tmp_path / "in.jsonl", [qa(f"q{i}", f"a{i}") for i in range(20)])]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
    engines = EngineHost()
    try:
        with pytest.raises(DataError, match=r"only 0 of 20 rows are kept; most were ended by `no_score` \(20 rows\)"):
            stage.run(job, RunStore(str(tmp_path), "run"), "curate", engines, Progress(quiet=True))
        assert engines.pool(job.filters[0].judge).requests == 20 + 12  # type: ignore[union-attr]
    finally:
        engines.close()
    (folder,) = (tmp_path / "run").glob("curate-*")
    assert all(row["raw"] for row in pq.read_table(folder / "rejected").to_pylist())


@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_real_pool_embeds(tmp_path, ray_session):
    served = {"model": {"path": "any"}, "engine": {"type": "fake"}, "pool": {"cpus_each": 0.5}}
    embedder = {"type": "model", "served": served, "batch": 2}
    filters = [{"type": "semantic_dedup", "embedder": embedder, "epsilon": 1e-6, "key": "response"}]
    inputs = [write(tmp_path / "in.jsonl", [qa(f"q{i}", f"a{i % 3}") for i in range(9)])]
    job = validate(CurateJob, {"name": "run", "inputs": inputs, "filters": filters}, "x")
    engines = EngineHost()
    try:
        artifact = stage.run(job, RunStore(str(tmp_path), "run"), "curate", engines, Progress(quiet=True))
    finally:
        engines.close()
    assert artifact.manifest["funnel"]["rejected"] == {"semantic_duplicate": 6}
