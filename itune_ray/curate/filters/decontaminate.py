"""Decontaminate: rows that hold the text of a benchmark (methods D37)."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from itune_ray.config.curate import DecontaminateConfig
from itune_ray.curate.filters.base import KEEP, RowFilter, Verdict
from itune_ray.data.overlap import Item, OverlapIndex
from itune_ray.data.records import Record
from itune_ray.data.sources import read_source
from itune_ray.errors import DataError

QUERIES = (
    "question",
    "query",
    "prompt",
    "instruction",
    "problem",
    "ctx",
    "goal",
    "premise",
    "sentence",
    "input",
    "text",
)
"""Columns that hold what a benchmark asks, the likeliest first; upper and lower case are one."""
LABELS = ("answer", "target", "output", "completion")


class Decontaminate(RowFilter):
    """Drops rows of which some turn holds more than `threshold` of a benchmark row's tokens in shared n-grams.

    The benchmark row that overlaps most is named in `duplicate_of`, and the score is its covered share. A kept row that
    shares an n-gram says so in `meta.overlap`. The index is built once, on the driver, and travels to the workers.
    """

    def __init__(self, config: DecontaminateConfig):
        self._config = config
        self._read: dict[str, int] = {}
        self._unreadable = 0

    def prepare(self) -> None:
        _ = self._index

    def __getstate__(self) -> dict[str, Any]:
        self.prepare()
        return vars(self)

    @cached_property
    def _index(self) -> OverlapIndex:
        config = self._config
        items = list(self._items())
        index = OverlapIndex(items, config.ngram, common=config.common, query_ngrams=config.compare != "label")
        if not index.ngrams:
            raise DataError(
                f"no benchmark row has a text to compare ({len(items)} texts read)",
                got=", ".join(self._read),
                allowed="columns that exist in `fields`, and texts of at least 5 words",
                knob="filters.N.fields",
            )
        return index

    def facts(self) -> dict[str, Any]:
        """What the rows were compared with."""
        index = self._index
        return {
            "against": self._read,
            "unreadable": self._unreadable,
            "comparable": len(index.rows),
            "too_short": index.too_short,
            "ngrams": index.ngrams,
        }

    def keep(self, record: Record) -> Verdict:
        found = self._index.best(list(_texts(record, self._config.compare != "query")))
        if found is None:
            return KEEP
        if found.score > self._config.threshold:
            return Verdict(False, "contaminated", found.score, of=found.row)
        return Verdict(True, meta={"overlap": {"row": found.row, "score": round(found.score, 6)}})

    def _items(self) -> Iterator[Item]:
        for source in self._config.against:
            table = read_source(source)
            self._read[table.name] = len(table.records)
            self._unreadable += len(table.quarantined)
            for record in table.records:
                yield from self._items_of(record)

    def _items_of(self, record: Record) -> Iterator[Item]:
        if record.text is not None:
            yield Item(record.key, record.text)
            return
        if record.messages:
            queries = [m["content"] for m in record.prompt if m["role"] == "user"]
            label = record.response or ""
        else:
            queries = _columns(record.meta, self._config.fields, QUERIES)
            if not queries and not self._config.fields:
                queries = list(_strings(record.meta))
            label = "\n".join(_columns(record.meta, self._config.labels, LABELS))
        if self._config.compare == "query":
            yield from (Item(record.key, query) for query in queries)
        else:
            yield Item(record.key, "\n".join(queries), label)


def _columns(row: Mapping[str, Any], named: tuple[str, ...], usual: tuple[str, ...]) -> list[str]:
    """Texts of the named columns, one each; without names of the first usual column that is there."""
    folded = {name.casefold(): name for name in reversed(list(row))}
    names = named or tuple(folded[name] for name in usual if name in folded)[:1]
    return ["\n".join(_strings(row[name])) for name in names if row.get(name) is not None]


def _strings(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        inner: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
        for item in inner:
            yield from _strings(item)


def _texts(record: Record, joined: bool) -> Iterator[str]:
    """Texts of a row, each compared by itself; `joined` adds each turn with the one before it."""
    turns = [m["content"] for m in record.messages]
    yield from turns
    if joined:
        yield from (f"{before}\n{after}" for before, after in itertools.pairwise(turns))
    if record.rejected is not None:
        yield record.rejected
    if record.text is not None:
        yield record.text
    elif not turns:
        yield from _strings(record.meta)
