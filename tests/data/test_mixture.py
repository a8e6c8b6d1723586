"""The union of sources: nothing lost, nothing depending on the order, weights as promised."""

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune_ray.config.shared import FileSource, MixturePart
from itune_ray.data.formats import quarantine
from itune_ray.data.mixture import (
    Member,
    capped_quotas,
    capped_rates,
    epoch_multiplicity,
    largest_remainder,
    mix_report,
    mixture_weights,
    normalised,
    temperature_rates,
    unite,
)
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


def test_inputs_of_one_name_are_refused():
    with pytest.raises(DataError, match=r"same name.*inputs\.N\.source\.name"):
        unite([part(), part()], [table("a", ["x"]), table("a", ["y"])])


def test_a_stage_unites_with_the_one_it_was_made_from():
    """D_t+1 = D_t and what is new (survey eq. 4), where new rows kept the keys of those they were made from."""
    seeds = table("seeds", ["x", "y", "z"])
    made = SourceTable("evolve", table("seeds", ["x, but harder", "y"]).records, [])
    expected = {
        "seeds/seeds:0:0": None,
        "evolve/seeds:0:0": None,
        "seeds/seeds:1:0": "evolve/seeds:1:0",
        "evolve/seeds:1:0": None,
        "seeds:2:0": None,
    }
    for tables in ([seeds, made], [made, seeds]):
        members = unite([part(), part()], tables).members
        renamed = {m.record.key: m.record.meta.get("renamed_from") for m in members}
        assert renamed == {key: "seeds" if "/" in key else None for key in expected}
        assert {m.record.key: m.duplicate_of for m in members} == expected


def test_a_key_that_stays_taken_is_refused():
    odd = SourceTable("c", [Record(source="b/a", position=0, text="w")], [])
    tables = [table("a", ["x"]), SourceTable("b", table("a", ["y"]).records, []), odd]
    with pytest.raises(DataError, match=r"same key, in .*inputs\.N\.source\.name"):
        unite([part(), part(), part()], tables)


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


# --- rates ---------------------------------------------------------------------------------------------------------

sizes_of = st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any)


def test_rates_of_the_specification():
    assert capped_rates([392702, 2490, 7473, 500], 3000) == pytest.approx([0.3337, 0.2770, 0.3337, 0.0556], abs=5e-5)
    sizes = [100_000, 10_000, 1_000]
    assert temperature_rates(sizes, 3) == pytest.approx([0.5954, 0.2764, 0.1283], abs=5e-5)
    assert temperature_rates(sizes, 1) == pytest.approx([0.9009, 0.0901, 0.009], abs=5e-5)
    flan = {"flan2021": 0.4, "t0": 0.32, "niv2": 0.2, "cot": 0.05, "dialog": 0.03}
    assert normalised(list(flan.values())) == pytest.approx(list(flan.values()))


@given(sizes_of)
def test_temperature_goes_from_proportional_to_equal(sizes):
    there = sum(map(bool, sizes))
    assert temperature_rates(sizes) == pytest.approx([size / sum(sizes) for size in sizes])
    assert temperature_rates(sizes, math.inf) == pytest.approx([bool(size) / there for size in sizes])
    assert sum(temperature_rates(sizes, 3)) == pytest.approx(1)
    assert capped_rates(sizes, 10**6) == pytest.approx(temperature_rates(sizes))


def test_nothing_cannot_be_shared():
    for rates in (lambda: temperature_rates([0, 0]), lambda: capped_rates([0], 5), lambda: normalised([])):
        with pytest.raises(DataError, match="no source has rows"):
            rates()


@settings(max_examples=100)
@given(sizes_of, st.integers(0, 500))
def test_quotas_sum_up_and_are_within_one_of_their_share(sizes, total):
    quotas = largest_remainder(sizes, total)
    assert sum(quotas) == total
    assert all(abs(q - total * size / sum(sizes)) < 1 for q, size in zip(quotas, sizes, strict=True))


def test_quotas_of_rounding():
    assert largest_remainder([0.1, 0.2, 0.7], 10) == [1, 2, 7], "0.1 + 0.2 + 0.7 is no 1 in floating point"
    assert largest_remainder([1, 1, 1], 10) == [4, 3, 3], "of equal remainders the earlier"
    assert largest_remainder([0.5, 0.3, 0.2], 1) == [1, 0, 0]
    assert largest_remainder([0.0, 0.0], 3) == [0, 0]


@settings(max_examples=100)
@given(sizes_of, st.integers(0, 3000), st.sampled_from([1, 3, math.inf]))
def test_capped_quotas_take_no_more_than_there_is(sizes, total, temperature):
    quotas = capped_quotas(temperature_rates(sizes, temperature), total, sizes)
    assert all(0 <= q <= size for q, size in zip(quotas, sizes, strict=True))
    assert sum(quotas) == min(total, sum(sizes))


def test_a_small_source_hands_its_share_on():
    assert capped_quotas([0.5, 0.25, 0.25], 100, [1000, 1000, 4]) == [64, 32, 4]
    assert capped_quotas([0.5, 0.5], 10, [3, 4]) == [3, 4]


@given(sizes_of, st.sampled_from([1, 2, 5]))
def test_weights_realise_the_rates_over_as_many_rows(sizes, temperature):
    rates = temperature_rates(sizes, temperature)
    weights = mixture_weights(sizes, rates)
    mass = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    assert sum(mass) == pytest.approx(sum(sizes))
    assert [m / sum(mass) for m in mass] == pytest.approx(rates)
    if temperature == 1:
        assert all(weight == pytest.approx(1) for weight, size in zip(weights, sizes, strict=True) if size)
