"""Driving inputs to their end without Ray: nothing lost, nothing asked twice, whatever the stream does."""

import asyncio
import random

import pyarrow as pa
import pytest
from generate_recipe import Echo

from itune_ray.config.generate import CommitConfig, GenerateJob
from itune_ray.config.recipes import RespondConfig
from itune_ray.config.shared import CustomSource, FakeEngineConfig, ModelRef, ServedModel
from itune_ray.data.ledger import Ledger, Outcome
from itune_ray.data.records import Record, records_table
from itune_ray.data.storage import Folder
from itune_ray.engine.base import Sampling
from itune_ray.engine.fake import FakeEngine
from itune_ray.engine.llm import EngineLlm
from itune_ray.errors import DataError, GenerationError
from itune_ray.generate.drive import check_conserved, check_keys, drive, quarantine
from itune_ray.generate.recipes import load_recipe
from itune_ray.generate.run import _read
from itune_ray.generate.worker import INPUTS_PER_PARCEL, RecipeWorker, outcomes_of, pack, unpack
from itune_ray.observe.progress import Progress

COMMIT = CommitConfig(rows=16, seconds=60.0)


class CountingEngine(FakeEngine):
    """Remembers what reached it."""

    def __init__(self, config=None):
        super().__init__(config)
        self.asked: list[str] = []

    async def generate(self, requests):
        self.asked += [request.id.split("/")[1] for request in requests]
        return await super().generate(requests)


class DriverKilledError(Exception):
    """The driver is killed."""


def prompts(count: int = 60) -> list[Record]:
    turns = [({"role": "user", "content": f"question {i}"},) for i in range(count)]
    unusable = {5: (), 6: ({"role": "user", "content": "long " * 600},)}
    return [Record(source="s", position=i, messages=unusable.get(i, turn)) for i, turn in enumerate(turns)]


def worker(engine, recipe=None, samples=2) -> RecipeWorker:
    llm = EngineLlm(engine, model="m@1", sampling=Sampling(temperature=1.0), seed=1, stage="generate")
    return RecipeWorker(recipe or load_recipe(RespondConfig(samples=samples)), llm)


def through(runner: RecipeWorker, block: int = 8, stop_after: int | None = None):
    """A stream without Ray: block after block, and an interruption after so many parcels."""

    def stream(pending):
        given = 0
        for start in range(0, len(pending), block):
            for parcel in runner(records_table(pending[start : start + block])):
                if stop_after is not None and given == stop_after:
                    raise DriverKilledError
                given += 1
                yield unpack(parcel["parcel"][0])

    return stream


def ledger_at(path) -> Ledger:
    return Ledger(Folder.at(path))


def content(ledger: Ledger) -> list[dict]:
    """The final table; the score, NaN throughout, as text, since NaN equals nothing."""
    return [{**row, "score": str(row["score"])} for row in ledger.table().to_pylist()]


def test_every_input_ends_in_its_rows(tmp_path):
    ledger = ledger_at(tmp_path)
    tally = drive(prompts(), ledger, through(worker(FakeEngine())), commit=COMMIT, max_attempts=3)
    check_conserved(ledger, 60, 0, 2)
    reasons = [row["reason"] for row in content(ledger) if row["status"] == "rejected"]
    assert sorted(reasons) == ["no_prompt"] * 2 + ["prompt_too_long"] * 2
    assert tally.inputs == 60
    assert tally.generated_tokens > tally.prompt_tokens > 0


@pytest.mark.parametrize("block", [1, 7, 64])
def test_block_size_and_order_change_nothing(tmp_path, block):
    calm, other = ledger_at(tmp_path / "calm"), ledger_at(tmp_path / "other")
    drive(prompts(), calm, through(worker(FakeEngine()), 16), commit=COMMIT, max_attempts=3)
    shuffled = prompts()
    random.Random(block).shuffle(shuffled)
    jittery = FakeEngineConfig(latency_s=0.005)
    drive(shuffled, other, through(worker(FakeEngine(jittery)), block), commit=COMMIT, max_attempts=3)
    assert content(calm) == content(other)


def test_what_is_settled_never_reaches_the_engine_again(tmp_path):
    calm, killed = ledger_at(tmp_path / "calm"), tmp_path / "killed"
    drive(prompts(), calm, through(worker(FakeEngine())), commit=COMMIT, max_attempts=3)

    with pytest.raises(DriverKilledError):
        drive(prompts(), ledger_at(killed), through(worker(FakeEngine()), stop_after=5), commit=COMMIT, max_attempts=3)
    settled = ledger_at(killed).settled(3)
    assert {"s:5:0", "s:6:0"} <= settled, "the rejected rows must be among the settled for this test to mean anything"
    assert 0 < len(settled) < 60

    engine = CountingEngine()
    drive(prompts(), ledger_at(killed), through(worker(engine)), commit=COMMIT, max_attempts=3)
    assert sorted(engine.asked) == sorted({r.key for r in prompts()} - settled)
    assert content(ledger_at(killed)) == content(calm)

    idle = CountingEngine()
    drive(prompts(), ledger_at(killed), through(worker(idle)), commit=COMMIT, max_attempts=3)
    assert idle.asked == []


def test_failed_rows_are_driven_again_a_bounded_number_of_times(tmp_path):
    ledger, engine = ledger_at(tmp_path), CountingEngine(FakeEngineConfig(flaky_rate=0.3, fail_rate=0.1))
    drive(prompts(), ledger, through(worker(engine)), commit=COMMIT, max_attempts=3)
    check_conserved(ledger, 60, 0, 2)
    rows = content(ledger)
    failed = {row["input_key"] for row in rows if row["status"] == "failed"}
    mended = {row["input_key"] for row in rows if row["status"] == "accepted" and row["attempts"] == 2}
    assert failed
    assert mended
    assert all(engine.asked.count(key) == 3 for key in failed)
    assert {row["attempts"] for row in rows if row["status"] == "failed"} == {3}

    again = CountingEngine()
    drive(prompts(), ledger, through(worker(again)), commit=COMMIT, max_attempts=3)
    assert again.asked == [], "attempts are spent"
    drive(prompts(), ledger, through(worker(again)), commit=COMMIT, max_attempts=4)
    assert set(again.asked) == failed, "more attempts allowed: driven again"


def test_a_stream_that_repeats_and_loses_rows_is_mended(tmp_path):
    calm, torn = ledger_at(tmp_path / "calm"), ledger_at(tmp_path / "torn")
    drive(prompts(), calm, through(worker(FakeEngine())), commit=COMMIT, max_attempts=3)
    whole, first = through(worker(FakeEngine())), [True]

    def stream(pending):
        parcels = list(whole(pending))
        if first.pop() if first else False:
            parcels = [parcels[0], *parcels[:3], parcels[4]]
        yield from parcels

    drive(prompts(), torn, stream, commit=COMMIT, max_attempts=3)
    assert content(torn) == content(calm)


def test_a_stream_that_gives_nothing_ends_the_stage(tmp_path):
    with pytest.raises(GenerationError, match="gave back none of 60 rows"):
        drive(prompts(), ledger_at(tmp_path), lambda pending: iter(()), commit=COMMIT, max_attempts=3)


def test_a_recipe_that_raises_fails_its_row_only(tmp_path):
    ledger = ledger_at(tmp_path)
    drive(prompts(20), ledger, through(worker(FakeEngine(), Echo())), commit=COMMIT, max_attempts=2)
    rows = {row["key"]: row for row in content(ledger)}
    assert rows["s:13:0"]["cause"] == "ValueError: unlucky row"
    assert sum(row["status"] == "accepted" for row in rows.values()) == 19


def test_a_recipe_that_returns_too_few_rows_is_told(tmp_path):
    class Half(Echo):
        rows_per_input = 2

    (first, second) = asyncio.run(outcomes_of(Half(), prompts(1)[0], None))
    assert first.cause == "the recipe returned 1 outcomes, not 2"
    assert first.record.key != second.record.key


def test_a_pool_that_is_gone_ends_the_stage(tmp_path):
    class Gone(FakeEngine):
        async def generate(self, requests):
            raise GenerationError("every replica of the pool is dead")

    with pytest.raises(GenerationError, match="every replica"):
        drive(prompts(), ledger_at(tmp_path), through(worker(Gone())), commit=COMMIT, max_attempts=3)


def test_quarantined_rows_are_kept_once(tmp_path):
    broken = [Outcome(record=Record(source="q", position=0), input_key="q:0:0", status="rejected", reason="bad_json")]
    quarantine(ledger_at(tmp_path), broken, 3)
    quarantine(ledger_at(tmp_path), broken, 3)
    ledger = ledger_at(tmp_path)
    drive(prompts(8), ledger, through(worker(FakeEngine(), samples=1)), commit=COMMIT, max_attempts=3)
    check_conserved(ledger, 8, 1, 1)
    with pytest.raises(DataError, match="rows were lost"):
        check_conserved(ledger, 9, 1, 1)


def test_colliding_keys_are_refused():
    with pytest.raises(DataError, match=r"same key.*s:3:0"):
        check_keys([*prompts(5), prompts(5)[3]])


def seeds() -> list[Record]:
    return prompts(4)


def evolved() -> list[Record]:
    """A later payload, whose rows kept the keys of those they were made from."""
    return [*prompts(2), Record(source="new", position=0, messages=({"role": "user", "content": "new"},))]


def test_two_payloads_whose_keys_meet_are_told_apart():
    sources = [CustomSource(import_path=f"{__name__}:{name}") for name in ("seeds", "evolved")]
    teacher = ServedModel(model=ModelRef(path="any"), engine=FakeEngineConfig())
    records, _ = _read(GenerateJob(name="x", prompts=sources, teacher=teacher), Progress(quiet=True))
    assert [(r.key, r.meta.get("renamed_from")) for r in records] == [
        ("seeds/s:0:0", "s"),
        ("seeds/s:1:0", "s"),
        ("s:2:0", None),
        ("s:3:0", None),
        ("evolved/s:0:0", "s"),
        ("evolved/s:1:0", "s"),
        ("new:0:0", None),
    ]
    with pytest.raises(DataError, match=r"same key.*prompts\[\]\.name"):
        _read(GenerateJob(name="x", prompts=[sources[0], sources[0]], teacher=teacher), Progress(quiet=True))


def test_parcels_keep_outcomes_whole():
    rows = prompts(INPUTS_PER_PARCEL + 4)
    outcomes = [o for row in rows for o in asyncio.run(outcomes_of(Echo(), row, None))]
    assert [str(o) for o in unpack(pack(outcomes))] == [str(o) for o in outcomes]
    parcels = list(worker(FakeEngine(), Echo())(records_table(rows)))
    assert [pa.ipc.open_stream(p["parcel"][0]).read_all().num_rows for p in parcels] == [INPUTS_PER_PARCEL, 4]
