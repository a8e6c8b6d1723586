"""[Ray] Exact and near duplicates over Ray Data: map to keys, shuffle by key, decide per group (methods D26, D27).

The input is a table of (id, text) whose ids are the rows' ranks by the keep rule, best first: the smallest id of a
group stays, never the first one seen, so neither the order of the rows nor the number of blocks decides anything. Rows
travel through the shuffle in coarse partitions of many keys: one call per partition, not one per key.
"""

import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from itune_ray.data import minhash
from itune_ray.data.records import Record
from itune_ray.data.shingles import Hashes, Ids, ShingleSets, shingle_sets

if TYPE_CHECKING:
    import ray.data

TextKey = Literal["full", "prompt", "response"]
TEXT_SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Why a row makes way."""

    of: int
    """Id of the row that stays."""
    similarity: float
    """1.0 for exact duplicates."""


Duplicates = dict[int, Duplicate]
"""Loser's id -> whom it duplicates."""


# --- what is compared ----------------------------------------------------------------------------------------------


def exact_text(record: Record, key: TextKey) -> str | None:
    """What exact deduplication compares; None when the row has no such part.

    `full` is every turn with its role; `prompt` every turn before the final answer, so that a "go on" after two
    different talks is no duplicate; `response` the final answer.
    """
    if record.text is not None:
        return record.text if key != "response" else None
    if key == "response":
        return record.response
    turns = record.messages if key == "full" else record.prompt
    return "\x1e".join(f"{m['role']}\x1f{m['content']}" for m in turns) or None


def near_text(record: Record, key: TextKey) -> str | None:
    """What near deduplication compares: user turns (`prompt`), the final answer (`response`), or all but system turns
    (`full`); fixed system messages would make everything look alike."""
    if record.text is not None or key == "response":
        return exact_text(record, key)
    roles = {"user"} if key == "prompt" else {"user", "assistant", "tool"}
    return "\n".join(m["content"] for m in record.messages if m["role"] in roles) or None


def normalise(text: str, level: int) -> str:
    """NFKC; from level 1 on case and white space, from 2 punctuation, from 3 digits make no difference.

    Each level is a function of the one before, so a higher level never keeps more. A text that a level would empty
    ("!!!", "42") stays as the level before left it: emptied texts are not alike.
    """
    current = unicodedata.normalize("NFKC", text)
    for step in _LEVELS[:level]:
        current = step(current) or current
    return current


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text.casefold()).split())


def _without(category: str) -> Callable[[str], str]:
    def strip(text: str) -> str:
        return " ".join("".join(c for c in text if not unicodedata.category(c).startswith(category)).split())

    return strip


_LEVELS = (_fold, _without("P"), _without("Nd"))


# --- exact ---------------------------------------------------------------------------------------------------------


def exact_duplicates(texts: pa.Table, level: int, blocks: int | None = None) -> Duplicates:
    """Rows whose normalised text a better row has too.

    Args:
        texts: `TEXT_SCHEMA`.
        level: See `normalise`.
        blocks: Blocks of a Ray Dataset to spread the work over; None works in this process, with the same result.
    """
    if blocks is None:
        return _exact_of(_losers_by_digest(_digests(texts, level)))
    digests = _dataset(texts, blocks).map_batches(partial(_digests, level=level, partitions=blocks), **_BLOCKWISE)
    return _exact_of(_gathered(_grouped(digests, _losers_by_digest, blocks), _LOSER_SCHEMA))


_LOSER_SCHEMA = pa.schema([("id", pa.int64()), ("of", pa.int64())])


def _digests(texts: pa.Table, level: int, partitions: int = 1) -> pa.Table:
    keys = b"".join(
        hashlib.blake2b(normalise(text, level).encode(), digest_size=16).digest()
        for batch in texts.select(["text"]).to_batches(max_chunksize=ROWS_AT_ONCE)
        for text in batch["text"].to_pylist()
    )
    part = np.frombuffer(keys, ">u4")[::4] % partitions
    digests = pa.Array.from_buffers(pa.binary(16), texts.num_rows, [None, pa.py_buffer(keys)])
    return pa.table({"partition": part.astype(np.int32), "digest": digests, "id": texts["id"]})


def _losers_by_digest(rows: pa.Table) -> pa.Table:
    """In the order of (digest, id) a row loses to the first one of its digest."""
    ids = rows["id"].to_numpy()
    halves = np.frombuffer(b"".join(rows["digest"].to_pylist()), np.uint64).reshape(-1, 2)
    order = np.lexsort((ids, halves[:, 1], halves[:, 0]))
    ids, halves = ids[order], halves[order]
    leads = np.r_[True, (halves[1:] != halves[:-1]).any(axis=1)][: len(ids)]
    best = ids[np.flatnonzero(leads)][np.cumsum(leads) - 1] if len(ids) else ids
    return pa.table([ids[~leads], best[~leads]], schema=_LOSER_SCHEMA)


def _exact_of(losers: pa.Table) -> Duplicates:
    return {loser: Duplicate(of, 1.0) for loser, of in zip(*losers.to_pydict().values(), strict=True)}


# --- near ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearSettings:
    """MinHash-LSH settings, see `itune_ray.data.minhash`."""

    threshold: float = 0.7
    num_perm: int = 128
    bands: int = 32
    rows: int = 4
    ngram: int = 3
    min_tokens: int = 5


def near_duplicates(texts: pa.Table, settings: NearSettings, blocks: int | None = None) -> Duplicates:
    """Rows whose shingle set is similar, by true Jaccard similarity, to that of a better row that stays.

    Candidates come from MinHash-LSH, so a pair at the threshold is found with the probability that
    `minhash.collision_probability` tells. Texts of fewer than `min_tokens` words are not compared.

    Args:
        texts: `TEXT_SCHEMA`.
        settings: Shingles, signatures, bands and threshold.
        blocks: As in `exact_duplicates`.
    """
    ids, sets = _shingled(texts, settings, blocks)
    twins, firsts = minhash.identical(sets)
    pairs = _candidates(np.setdiff1d(np.arange(len(sets)), twins), sets, settings, blocks)
    similarity = _verify(pairs, sets, settings.threshold, blocks)
    near = minhash.leaders(pairs, similarity)
    found = {int(ids[i]): Duplicate(int(ids[of]), score) for i, (of, score) in near.items()}
    for twin, first in zip(ids[twins].tolist(), ids[firsts].tolist(), strict=True):
        found[twin] = found.get(first, Duplicate(first, 1.0))  # a twin of a row that made way follows it
    return found


def _shingled(texts: pa.Table, settings: NearSettings, blocks: int | None) -> tuple[Ids, ShingleSets]:
    """Ids in ascending order and the shingle set of each; rows too short to compare are left out."""
    if np.any(np.diff(texts["id"].to_numpy()) < 0):
        texts = texts.sort_by("id")
    arguments = {"ngram": settings.ngram, "min_tokens": settings.min_tokens}
    if blocks is None:
        return _compared(texts, **arguments)
    mapped = _dataset(texts, blocks).map_batches(partial(_shingle_table, **arguments), **_BLOCKWISE)
    table = _gathered(mapped, _SHINGLE_SCHEMA)
    if np.any(np.diff(table["id"].to_numpy()) < 0):
        table = table.sort_by("id")
    return table["id"].to_numpy(), _sets_of(table)


def _compared(texts: pa.Table, ngram: int, min_tokens: int) -> tuple[Ids, ShingleSets]:
    """Ids and shingle sets of the texts that are long enough."""
    batches = texts.select(["text"]).to_batches(max_chunksize=ROWS_AT_ONCE)
    sets = shingle_sets((text for batch in batches for text in batch["text"].to_pylist()), ngram, min_tokens)
    kept = np.flatnonzero(sets.sizes)
    return texts["id"].to_numpy()[kept], sets.take(kept)


_SHINGLE_SCHEMA = pa.schema([("id", pa.int64()), ("shingles", pa.large_list(pa.uint64()))])


def _shingle_table(texts: pa.Table, ngram: int, min_tokens: int) -> pa.Table:
    return _set_table(*_compared(texts, ngram, min_tokens))


ROWS_AT_ONCE = 4096
"""Texts that become Python strings at a time."""


def _set_table(identifiers: Ids, sets: ShingleSets) -> pa.Table:
    lists = pa.LargeListArray.from_arrays(sets.offsets, sets.values)
    return pa.table({"id": identifiers, "shingles": lists}).cast(_SHINGLE_SCHEMA)


def _sets_of(table: pa.Table) -> ShingleSets:
    """The inverse of `_set_table`."""
    chunks: list[Any] = table["shingles"].chunks
    lists: Any = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks or [_NO_SETS])
    offsets = np.cumsum(np.r_[0, np.asarray(lists.value_lengths())], dtype=np.int64)
    return ShingleSets(np.asarray(lists.flatten()), offsets)


_NO_SETS = pa.array([], _SHINGLE_SCHEMA.field("shingles").type)


def _candidates(distinct: Ids, sets: ShingleSets, settings: NearSettings, blocks: int | None) -> Ids:
    """Pairs of indices into `sets`, of the distinct sets only: crowds of equal texts would fill the buckets with pairs
    that say nothing."""
    if blocks is None:
        keys_NB = _keys(sets, settings)[distinct]
        found = [minhash.candidate_pairs(keys_N, distinct) for keys_N in np.ascontiguousarray(keys_NB.T)]
        return minhash.distinct_pairs(np.concatenate(found))
    rows = _set_table(distinct, sets.take(distinct))
    banded = _dataset(rows, blocks).map_batches(partial(_bands, settings=settings, partitions=blocks), **_BLOCKWISE)
    pairs = _gathered(_grouped(banded, _pairs_in_partition, blocks), _PAIR_SCHEMA)
    return minhash.distinct_pairs(_pairs_of(pairs))


def _keys(sets: ShingleSets, settings: NearSettings) -> Hashes:
    """Bucket keys [N, B]; the signatures themselves are needed for `SIGNED_AT_ONCE` texts at a time."""
    keys_NB = np.empty((len(sets), settings.bands), np.uint64)
    for first in range(0, len(sets), SIGNED_AT_ONCE):
        offsets = sets.offsets[first : first + SIGNED_AT_ONCE + 1]
        part = ShingleSets(sets.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        signed = minhash.signatures(part, settings.bands * settings.rows)
        keys_NB[first : first + len(part)] = minhash.band_hashes(signed, settings.bands, settings.rows)
    return keys_NB


SIGNED_AT_ONCE = 2**14
_PAIR_SCHEMA = pa.schema([("better", pa.int64()), ("worse", pa.int64())])


def _bands(rows: pa.Table, settings: NearSettings, partitions: int) -> pa.Table:
    keys = _keys(_sets_of(rows), settings).ravel()
    return pa.table(
        {
            "partition": (keys % np.uint64(partitions)).astype(np.int32),
            "band": keys,
            "id": np.repeat(rows["id"].to_numpy(), settings.bands),
        }
    )


def _pairs_in_partition(rows: pa.Table) -> pa.Table:
    pairs = minhash.candidate_pairs(rows["band"].to_numpy(), rows["id"].to_numpy())
    return pa.table({"better": pairs[:, 0], "worse": pairs[:, 1]}, schema=_PAIR_SCHEMA)


def _pairs_of(table: pa.Table) -> Ids:
    return np.stack([table["better"].to_numpy(), table["worse"].to_numpy()], axis=1)


def _verify(pairs: Ids, sets: ShingleSets, threshold: float, blocks: int | None) -> Any:
    if blocks is None or len(pairs) < VERIFY_IN_PROCESS:
        return minhash.verified(pairs, sets, threshold)
    import ray

    shared = ray.put(sets)
    table = pa.table({"better": pairs[:, 0], "worse": pairs[:, 1]}, schema=_PAIR_SCHEMA)
    checked = _dataset(table, blocks).map_batches(
        partial(_verified_pairs, shared=shared, threshold=threshold), **_BLOCKWISE
    )
    found = _gathered(checked, _CHECKED_SCHEMA).sort_by([("better", "ascending"), ("worse", "ascending")])
    return found["similarity"].to_numpy()


VERIFY_IN_PROCESS = 1_000_000
"""Pairs that this process compares as fast as tasks would start."""
_CHECKED_SCHEMA = pa.schema([*_PAIR_SCHEMA, ("similarity", pa.float64())])


def _verified_pairs(pairs: pa.Table, shared: Any, threshold: float) -> pa.Table:
    import ray

    similarity = minhash.verified(_pairs_of(pairs), ray.get(shared), threshold)
    return pairs.append_column("similarity", pa.array(similarity))


# --- Ray Data ------------------------------------------------------------------------------------------------------

_BLOCKWISE: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None}


def _dataset(table: pa.Table, blocks: int) -> "ray.data.Dataset":
    import ray.data

    return ray.data.from_arrow(list(slices(table, blocks)))


def slices(table: pa.Table, blocks: int) -> Iterator[pa.Table]:
    """The table cut into at most so many parts of about equal size, at least one."""
    size = max(1, math.ceil(table.num_rows / blocks))
    for start in range(0, max(1, table.num_rows), size):
        yield table.slice(start, size)


def _grouped(
    dataset: "ray.data.Dataset", decide: Callable[[pa.Table], pa.Table], partitions: int
) -> "ray.data.Dataset":
    """One reduce task per partition: Ray Data's default of 200 took 75 s for 4,000 rows on two cores."""
    return dataset.groupby("partition", num_partitions=partitions).map_groups(decide, batch_format="pyarrow")


def _gathered(dataset: "ray.data.Dataset", schema: pa.Schema) -> pa.Table:
    """All rows on the driver; an empty block carries no columns, so the schema is given."""
    batches: list[Any] = list(dataset.iter_batches(batch_format="pyarrow", batch_size=None))
    parts = [batch.select(schema.names).cast(schema) for batch in batches if batch.num_rows]
    return pa.concat_tables(parts or [schema.empty_table()])
