"""The union of sources with provenance and weights, D = D_manual ∪ D_distill ∪ D_self (survey eq. 5, methods D07).

The union is one of sets: content that several sources hold stays in one of them, the one of highest priority. Equal
rows *within* a source are left alone; that is what deduplication is for. A weight is not applied by copying rows: it
travels with the row, and `epoch_multiplicity` says how often a pass over the data uses it.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import chain
from typing import TypedDict

from itune_ray.config.shared import MixturePart
from itune_ray.data.ledger import Outcome
from itune_ray.data.records import Record, row_rng
from itune_ray.data.sources import SourceTable, told_apart
from itune_ray.errors import DataError


def epoch_multiplicity(weight: float, key: str, seed: int, epoch: int = 0) -> int:
    """How often an epoch uses a row of this weight: ⌊w⌋ times, and once more with probability w − ⌊w⌋.

    A pure function of its arguments, so every worker, rank and resumed run draws the same; the remainder is drawn anew
    in each epoch, so w = 0.5 sees other halves in turn and its mean over epochs is w.
    """
    whole = int(weight)
    return whole + int(row_rng(seed, "train.mixture", key, epoch).random() < weight - whole)


# --- rates ---------------------------------------------------------------------------------------------------------


def temperature_rates(sizes: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Shares p_i ∝ n_i^(1/T): T = 1 is proportional, T → ∞ equal among the sources that have rows (methods D38).

    Raises:
        DataError: No source has rows.
    """
    return normalised([size ** (1 / temperature) if size else 0.0 for size in sizes])


def capped_rates(sizes: Sequence[float], cap: float) -> list[float]:
    """Examples-proportional shares with a cap, r_i = min(n_i, K) / Σ_j min(n_j, K) (T5, FLAN)."""
    return normalised([min(size, cap) for size in sizes])


def normalised(amounts: Sequence[float]) -> list[float]:
    """Amounts as shares that sum to 1; raises `DataError` where there is nothing to share."""
    total = math.fsum(amounts)
    if total <= 0:
        raise DataError("no source has rows to mix", got=list(amounts))
    return [amount / total for amount in amounts]


def largest_remainder(rates: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each its share rounded down or up (Hare quotas).

    What rounding down leaves goes to the largest remainders, of equal ones to the earlier. Exact in fractions, so that
    equal shares are equal.
    """
    exact = [Fraction(rate) for rate in rates]
    whole = sum(exact)
    if not whole:
        return [0] * len(rates)
    parts = [rate * total / whole for rate in exact]
    counts = [math.floor(part) for part in parts]
    for index in sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))[: total - sum(counts)]:
        counts[index] += 1
    return counts


def capped_quotas(rates: Sequence[float], total: int, sizes: Sequence[int]) -> list[int]:
    """Quotas by rate of which none exceeds its source's size: what a small source cannot give, the others give by
    their rates. They sum to `total`, or to all rows where there are fewer."""
    counts = [0] * len(rates)
    open_parts = [i for i, size in enumerate(sizes) if size]
    left = min(total, sum(sizes))
    while left and open_parts:
        wanted = largest_remainder([rates[i] for i in open_parts], left)
        full = [i for i, want in zip(open_parts, wanted, strict=True) if want >= sizes[i]]
        if not full:
            for i, want in zip(open_parts, wanted, strict=True):
                counts[i] = want
            break
        for i in full:
            counts[i] = sizes[i]
            left -= sizes[i]
        open_parts = [i for i in open_parts if i not in full]
        if not any(rates[i] for i in open_parts):
            break
    return counts


def mixture_weights(sizes: Sequence[float], rates: Sequence[float]) -> list[float]:
    """The weight w_i = r_i Σ_j n_j / n_i of each source's rows, by which an epoch of Σ_j n_j rows holds its share of
    them; 0 for a source without rows."""
    total = math.fsum(sizes)
    return [rate * total / size if size else 0.0 for size, rate in zip(sizes, rates, strict=True)]


# --- the union -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Member:
    """A row of the union."""

    record: Record
    part: int
    """Index of the mixture part it came from."""
    duplicate_of: str | None = None
    """Key of the row of another part that holds the same content and stays in its place."""


@dataclass(frozen=True)
class Mixture:
    """The rows of all parts, sorted by key: the order of the parts decides nothing."""

    names: tuple[str, ...]
    """Per part the name of its source."""
    parts: tuple[MixturePart, ...]
    members: tuple[Member, ...]
    quarantined: tuple[tuple[int, Outcome], ...]
    """(part, outcome) of the rows that could not be read."""

    @property
    def rows_in(self) -> int:
        """All rows that were read, unreadable ones included."""
        return len(self.members) + len(self.quarantined)


def unite(parts: Sequence[MixturePart], tables: Sequence[SourceTable]) -> Mixture:
    """The union of what was read for each part.

    A row's weight becomes its part's weight times the weight it had. Rows that share a key are told apart, see
    `itune_ray.data.sources.told_apart`.

    Raises:
        DataError: Two parts share a name, or still a row key.
    """
    _check_names([table.name for table in tables])
    tables = told_apart(tables)
    rows = [
        (record if part.weight == 1 else replace(record, weight=record.weight * part.weight), index)
        for index, (part, table) in enumerate(zip(parts, tables, strict=True))
        for record in table.records
    ]
    rows.sort(key=lambda row: row[0].key)
    quarantined = tuple((index, outcome) for index, table in enumerate(tables) for outcome in table.quarantined)
    _check_keys(chain(((r.key, i) for r, i in rows), ((o.input_key, i) for i, o in quarantined)), tables)
    losers = collisions([record for record, _ in rows], [part for _, part in rows], [part.priority for part in parts])
    members = tuple(Member(record, part, losers.get(record.key)) for record, part in rows)
    return Mixture(tuple(t.name for t in tables), tuple(parts), members, quarantined)


def collisions(records: Sequence[Record], part_of: Sequence[int], priorities: Sequence[int]) -> dict[str, str]:
    """Key of each row whose content another part holds, with the key of the row that stays.

    Of the parts that share a content, the one whose best row comes first by (priority descending, key) wins.
    """
    if len(set(part_of)) < 2:
        return {}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        groups[record.content_hash].append(index)
    losers: dict[str, str] = {}
    for group in groups.values():
        if len({part_of[index] for index in group}) > 1:
            best = min(group, key=lambda index: (-priorities[part_of[index]], records[index].key))
            losers |= {records[i].key: records[best].key for i in group if part_of[i] != part_of[best]}
    return losers


class MixRow(TypedDict):
    """One part in mix_report.json."""

    source: str
    rows_in: int
    """Rows read."""
    kept: int
    weight: float
    planned_share: float
    """What the weights ask for: Σ weight of the part's rows over that of all rows."""
    share: float
    """The same over what was kept: filters change the mixture, and this says by how much."""
    rows_per_epoch: int
    """Kept rows times their multiplicity in epoch 0."""


def mix_report(
    mixture: Mixture, kept: Iterable[Member], seed: int, planned: Sequence[float] | None = None
) -> list[MixRow]:
    """Planned and realised shares of each part.

    Args:
        planned: What was planned after filtering, where that is not what the parts' weights ask for.
    """
    rows_in = Counter(m.part for m in mixture.members) + Counter(part for part, _ in mixture.quarantined)
    mass_in, mass_kept = defaultdict[int, float](float), defaultdict[int, float](float)
    kept_rows, used = Counter[int](), Counter[int]()
    for member in mixture.members:
        mass_in[member.part] += member.record.weight
    for member in kept:
        mass_kept[member.part] += member.record.weight
        kept_rows[member.part] += 1
        used[member.part] += epoch_multiplicity(member.record.weight, member.record.key, seed)
    return [
        {
            "source": name,
            "rows_in": rows_in[i],
            "kept": kept_rows[i],
            "weight": mixture.parts[i].weight,
            "planned_share": _share(mass_in[i], sum(mass_in.values())) if planned is None else planned[i],
            "share": _share(mass_kept[i], sum(mass_kept.values())),
            "rows_per_epoch": used[i],
        }
        for i, name in enumerate(mixture.names)
    ]


def _share(amount: float, total: float) -> float:
    return amount / total if total else 0.0


def _check_names(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError("two inputs have the same name", got=twice[0], knob="inputs.N.source.name")


def _check_keys(keyed: Iterable[tuple[str, int]], tables: Sequence[SourceTable]) -> None:
    seen: dict[str, int] = {}
    for key, part in keyed:
        if key in seen:
            both = f"{tables[seen[key]].name} and {tables[part].name}"
            raise DataError(f"two rows have the same key, in {both}", got=key, knob="inputs.N.source.name")
        seen[key] = part
