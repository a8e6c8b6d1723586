"""The ledger: every input ends once, resuming loses and repeats nothing, commits are durable or absent."""

import math
import threading
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.data import ledger as ledger_module
from itune_ray.data.ledger import Committer, Funnel, Ledger, Outcome, funnel_of
from itune_ray.data.records import Record
from itune_ray.data.storage import Folder
from itune_ray.errors import DataError, StorageError


def outcome(position: int, status: str = "accepted", attempts: int = 1, sample: int = 0, **facts) -> Outcome:
    record = Record(
        source="s", position=position, sample=sample, messages=({"role": "user", "content": str(position)},)
    )
    reason = {"rejected": {"reason": "bad"}, "failed": {"cause": "dead"}}.get(status, {})
    return Outcome(record=record, input_key=f"s:{position}:0", status=status, attempts=attempts, **{**reason, **facts})


def test_an_outcome_survives_the_ledger(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    given_ = outcome(3, "rejected", score=0.25, raw="what it said")
    ledger.commit([given_])
    (row,) = ledger.table().to_pylist()
    assert Outcome.from_row(row) == given_
    ledger.commit([outcome(4)])
    assert math.isnan(Outcome.from_row(ledger.table().to_pylist()[1]).score)


def test_a_later_commit_replaces_all_outcomes_of_an_input(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    ledger.commit([outcome(0, "failed", sample=i) for i in range(3)])
    ledger.commit([outcome(0, attempts=2)])
    assert ledger.table()["status"].to_pylist() == ["accepted"]


def test_failed_inputs_are_open_until_their_attempts_are_spent(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    ledger.commit(
        [outcome(0), outcome(1, "rejected"), outcome(2, "failed", attempts=2), outcome(3, "failed", attempts=3)]
    )
    assert ledger.settled(max_attempts=3) == {"s:0:0", "s:1:0", "s:3:0"}
    assert ledger.attempts() == {"s:2:0": 2, "s:3:0": 3}


def test_one_failed_sample_keeps_its_input_open(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    ledger.commit([outcome(0, sample=0), outcome(0, "failed", sample=1)])
    assert ledger.settled(2) == set()
    assert ledger.settled(1) == {"s:0:0"}


def test_a_second_driver_goes_on_where_the_first_stopped_even_with_a_gap(tmp_path):
    folder = Folder.at(tmp_path)
    first = Ledger(folder)
    for position in range(3):
        first.commit([outcome(position)])
    folder.delete("commit-000001.parquet")
    second = Ledger(folder)
    second.commit([outcome(9)])
    assert second.table()["input_key"].to_pylist() == ["s:0:0", "s:2:0", "s:9:0"]


def test_a_torn_commit_is_as_if_it_had_never_been(tmp_path):
    folder = Folder.at(tmp_path)
    Ledger(folder).commit([outcome(0)])
    (tmp_path / ".commit-000001.parquet.deadbeef.partial").write_bytes(b"PAR1")
    (tmp_path / "commit-000001.parquet.tmp").write_bytes(b"PAR1")
    ledger = Ledger(folder)
    assert ledger.settled(1) == {"s:0:0"}
    ledger.commit([outcome(1)])
    assert ledger.settled(1) == {"s:0:0", "s:1:0"}


def test_publish_splits_by_status_and_sorts_by_key(tmp_path):
    ledger = Ledger(Folder.at(tmp_path / "ledger"))
    ledger.commit([outcome(2), outcome(1, "rejected")])
    ledger.commit([outcome(0), outcome(3, "failed", cause="")])
    funnel = ledger.publish(Folder.at(tmp_path), {"accepted": "kept"})
    assert funnel == Funnel(4, 2, {"bad": 1}, {"unknown": 1})
    target = Folder.at(tmp_path)
    assert target.read_table("kept")["key"].to_pylist() == ["s:0:0", "s:2:0"]
    assert target.read_table("failed").num_rows == 1
    assert target.read_table("rejected")["reason"].to_pylist() == ["bad"]


def test_a_funnel_that_does_not_balance_cannot_be_made():
    with pytest.raises(DataError, match="does not balance: 3 rows in, 2 out"):
        Funnel(3, 1, {"x": 1}, {})


inputs = st.integers(1, 12)
plans = st.lists(
    st.lists(
        st.tuples(st.integers(0, 11), st.sampled_from(["accepted", "rejected", "failed"]), st.integers(1, 3)),
        max_size=6,
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(inputs, plans, st.integers(1, 3))
def test_whatever_is_driven_and_killed_each_input_ends_exactly_once(tmp_path_factory, num_inputs, plan, samples):
    """Drive random inputs to random ends over several drivers, each a fresh Ledger; then finish the rest."""
    folder = Folder.at(tmp_path_factory.mktemp("ledger"))
    keys = {f"s:{i}:0" for i in range(num_inputs)}
    attempts: Counter[int] = Counter()
    engine_calls: Counter[int] = Counter()

    def drive(position: int, status: str) -> list[Outcome]:
        engine_calls[position] += 1
        attempts[position] += 1
        return [outcome(position, status, attempts=attempts[position], sample=s) for s in range(samples)]

    for batch in plan:
        ledger = Ledger(folder)
        settled = ledger.settled(max_attempts=2)
        wanted = {p: status for p, status, _ in batch if p < num_inputs and f"s:{p}:0" not in settled}
        ledger.commit([o for p, status in wanted.items() for o in drive(p, status)])
    ledger = Ledger(folder)
    rest = sorted(keys - ledger.settled(max_attempts=2))
    ledger.commit([o for key in rest for o in drive(int(key.split(":")[1]), "accepted")])

    table = Ledger(folder).table()
    assert Counter(table["input_key"].to_pylist()) == dict.fromkeys(keys, samples)
    assert len(set(table["key"].to_pylist())) == table.num_rows
    assert table["key"].to_pylist() == sorted(table["key"].to_pylist())
    funnel = funnel_of(table)
    assert funnel.rows_in == num_inputs * samples
    assert Ledger(folder).settled(max_attempts=2) == keys
    assert max(engine_calls.values()) <= 2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["accepted", "failed"])), max_size=3)), st.booleans()
)
def test_merging_commits_changes_nothing(tmp_path_factory, plan, stop_short):
    """Against a dictionary, with every three commits merged; with `stop_short` the small files outlive their merge."""
    folder, known = Folder.at(tmp_path_factory.mktemp("merged")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger_module, "MERGED", 3)
        if stop_short:
            patch.setattr(Folder, "delete", lambda self, name="": None)
        for number, batch in enumerate(plan, start=1):
            made = {position: outcome(position, status, attempts=number) for position, status in batch}
            Ledger(folder).commit(list(made.values()))
            known |= {f"s:{position}:0": one for position, one in made.items()}
        ledger = Ledger(folder)
        assert [Outcome.from_row(row).attempts for row in ledger.table().to_pylist()] == [
            known[key].attempts for key in sorted(known)
        ]
        assert ledger.attempts() == {key: one.attempts for key, one in known.items() if one.status == "failed"}
        assert ledger.settled(3) == {k for k, one in known.items() if one.status != "failed" or one.attempts >= 3}
        if not stop_short:
            assert len(folder.names()) <= 2 + len(plan) // 3


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["accepted", "rejected", "failed"]), min_size=1, max_size=20), st.integers(1, 7))
def test_how_rows_are_cut_into_commits_does_not_show(tmp_path_factory, statuses, size):
    whole = Ledger(Folder.at(tmp_path_factory.mktemp("a")))
    cut = Ledger(Folder.at(tmp_path_factory.mktemp("b")))
    outcomes = [outcome(i, status) for i, status in enumerate(statuses)]
    whole.commit(outcomes)
    for start in range(0, len(outcomes), size):
        cut.commit(list(reversed(outcomes[start : start + size])))
    assert whole.table().drop_columns(["score"]).equals(cut.table().drop_columns(["score"]))  # NaN is not NaN


def test_the_committer_commits_by_number(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    with Committer(ledger, rows=3, seconds=1e6) as committer:
        for position in range(7):
            committer.add([outcome(position)])
        assert len(Ledger(Folder.at(tmp_path)).settled(1)) == 6
    assert len(ledger.settled(1)) == 7


def test_the_committer_commits_by_time_while_nothing_comes(tmp_path, wait_until):
    with Committer(Ledger(Folder.at(tmp_path)), rows=10**6, seconds=0.05) as committer:
        committer.add([outcome(0)])
        wait_until(lambda: len(Ledger(Folder.at(tmp_path)).settled(1)) == 1, "the timer has committed", timeout=20)


def test_an_error_of_the_stage_still_commits_what_is_done(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    with pytest.raises(RuntimeError, match="engine"), Committer(ledger, rows=100) as committer:  # noqa: PT012  the block is the stage
        committer.add([outcome(0)])
        raise RuntimeError("engine")
    assert ledger.settled(1) == {"s:0:0"}


def test_an_input_driven_twice_lands_in_two_commits(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))
    with Committer(ledger, rows=100) as committer:
        committer.add([outcome(0, "failed")])
        committer.add([outcome(0, attempts=2)])
    assert ledger.table()["status"].to_pylist() == ["accepted"]


def test_a_storage_that_breaks_stops_the_stage(tmp_path, wait_until):
    ledger = Ledger(Folder.at(tmp_path / "a"))
    (tmp_path / "a").write_text("in the way")
    before = threading.active_count()
    with pytest.raises(StorageError), Committer(ledger, rows=1000, seconds=0.02) as committer:  # noqa: PT012  the block is the stage
        committer.add([outcome(0)])
        time.sleep(0.2)
        committer.add([outcome(1)])
        pytest.fail("the timer's error must reach the thread that adds")
    wait_until(lambda: threading.active_count() == before, "the timer has ended", timeout=10)


def test_concurrent_adders_lose_nothing(tmp_path):
    ledger = Ledger(Folder.at(tmp_path))

    def add(start: int) -> None:
        for position in range(start, start + 50):
            committer.add([outcome(position)])

    with Committer(ledger, rows=7, seconds=0.01) as committer:
        threads = [threading.Thread(target=add, args=(i * 50,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ledger.settled(1) == {f"s:{i}:0" for i in range(200)}
