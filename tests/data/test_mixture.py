"""The union of sources: nothing lost, nothing depending on the order, weights as promised."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.config.shared import FileSource, MixturePart
from itune_ray.data.formats import quarantine
from itune_ray.data.mixture import Member, epoch_multiplicity, mix_report, unite
from itune_ray.data.order import Order
from itune_ray.data.records import Record
from itune_ray.data.sources import SourceTable
from itune_ray.errors import DataError


def table(name: str, contents: list[str], unread: int = 0) -> SourceTable:
    records = [Record(source=name, position=i, text=content) for i, content in enumerate(contents)]
    start = len(contents)
    bad = [quarantine(Record(source=name, position=start + i), "broken_json", None) for i in range(unread)]
    return SourceTable(name, records, bad)


def part(weight: float = 1.0, priority: int = 0) -> MixturePart:
    return MixturePart(source=FileSource(path="x"), weight=weight, priority=priority)


def test_the_higher_priority_keeps_shared_content():
    mixture = unite([part(), part(priority=1)], [table("a", ["x", "y"]), table("b", ["y", "z"])])
    lost = {member.record.key: member.duplicate_of for member in mixture.members if member.duplicate_of}
    assert lost == {"a:1:0": "b:0:0"}


def test_at_equal_priority_the_smaller_key_keeps_it():
    for tables in ([table("a", ["y"]), table("b", ["y"])], [table("b", ["y"]), table("a", ["y"])]):
        mixture = unite([part(), part()], tables)
        assert {m.record.key: m.duplicate_of for m in mixture.members} == {"a:0:0": None, "b:0:0": "a:0:0"}


def test_equal_rows_within_a_source_are_left_alone():
    mixture = unite([part(), part()], [table("a", ["x", "x"]), table("b", ["z"])])
    assert all(member.duplicate_of is None for member in mixture.members)
    both = unite([part(), part(priority=1)], [table("a", ["x", "x"]), table("b", ["x", "x"])])
    assert [m.record.key for m in both.members if m.duplicate_of is None] == ["b:0:0", "b:1:0"]


texts = st.lists(st.sampled_from("uvwxyz"), max_size=6)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=4), st.randoms())
def test_the_union_loses_nothing_and_depends_on_no_order(sources, random):
    made = [(part(priority=p), table(f"s{i}", contents, unread)) for i, (contents, p, unread) in enumerate(sources)]
    mixture = unite([p for p, _ in made], [t for _, t in made])
    assert mixture.rows_in == sum(t.rows_in for _, t in made)
    random.shuffle(made)
    shuffled = unite([p for p, _ in made], [t for _, t in made])
    ends = {m.record.key: m.duplicate_of for m in mixture.members}
    assert ends == {m.record.key: m.duplicate_of for m in shuffled.members}
    kept = {m.record.text for m in mixture.members if m.duplicate_of is None}
    assert kept == {record.text for _, t in made for record in t.records}
    for text in kept:
        assert len({m.part for m in mixture.members if m.record.text == text and m.duplicate_of is None}) == 1
    assert all(ends[of] is None for of in ends.values() if of), "a row makes way only for one that stays"


@pytest.mark.parametrize("second", [table("a", ["y"]), SourceTable("b", table("a", ["y"]).records, [])])
def test_sources_that_cannot_be_told_apart_are_refused(second):
    with pytest.raises(DataError, match=r"same (name|key).*inputs\.N\.source\.name"):
        unite([part(), part()], [table("a", ["x"]), second])


def test_weights_multiply_along_the_way():
    curated = SourceTable("a", [Record(source="a", position=0, text="x", weight=0.5)], [])
    (member,) = unite([part(weight=3.0)], [curated]).members
    assert member.record.weight == 1.5


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0, 1.75, 2.0, 3.5])
def test_multiplicity_has_the_weight_as_its_mean(weight):
    counts = [epoch_multiplicity(weight, f"k:{i}:0", seed=3) for i in range(4000)]
    assert set(counts) <= {math.floor(weight), math.ceil(weight)}
    spread = math.sqrt((weight % 1) * (1 - weight % 1) / len(counts))
    assert abs(sum(counts) / len(counts) - weight) <= 4 * spread


def test_each_epoch_draws_its_own_remainder():
    first, second = ({k for k in range(200) if epoch_multiplicity(0.5, f"k:{k}:0", 3, epoch)} for epoch in (0, 1))
    assert first != second
    assert first == {k for k in range(200) if epoch_multiplicity(0.5, f"k:{k}:0", 3, 0)}


def test_the_trainer_uses_rows_exactly_as_often():
    keys, weights = [f"k:{i}:0" for i in range(60)], [0.3 * (i % 9) for i in range(60)]
    for epoch in (0, 2):
        used = Counter(Order(keys, weights, seed=5, batch=4).epoch(epoch))
        assert [used[i] for i in range(60)] == [
            epoch_multiplicity(w, k, 5, epoch) for k, w in zip(keys, weights, strict=True)
        ]


def test_the_report_says_planned_and_realised():
    mixture = unite(
        [part(weight=2.0), part(weight=0.5)], [table("a", list("abcd")), table("b", list("efghijkl"), unread=2)]
    )
    kept = [member for member in mixture.members if member.record.text not in ("a", "b")]
    first, second = mix_report(mixture, kept, seed=0)
    assert (first["rows_in"], first["kept"], second["rows_in"], second["kept"]) == (4, 2, 10, 8)
    assert first["planned_share"] == pytest.approx(8 / 12)
    assert first["share"] == pytest.approx(4 / 8)
    assert first["rows_per_epoch"] == 4
    assert second["rows_per_epoch"] == sum(epoch_multiplicity(0.5, m.record.key, 0) for m in kept if m.part == 1)


def test_a_report_of_nothing_kept_divides_by_nothing():
    mixture = unite([part()], [table("a", ["x"])])
    none: list[Member] = []
    assert mix_report(mixture, none, 0)[0]["share"] == 0.0
