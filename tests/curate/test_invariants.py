"""Invariants of pure filters over random rows: nothing is lost, twice is once, and neither order nor blocks decide."""

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from itune_ray.config.base import validate
from itune_ray.config.curate import CurateJob
from itune_ray.curate import run as stage
from itune_ray.curate.verdicts import VERDICT_SCHEMA, Link, judge_block
from itune_ray.data.artifact import Artifact, RunStore
from itune_ray.data.dedup import slices
from itune_ray.data.records import Record, records_table
from itune_ray.engine.host import EngineHost
from itune_ray.observe.progress import Progress

LEAKED = "how many legs do twelve hens and three goats have when they stand in one yard together"
PIECES = (
    *("", " ", "the river", "The  River!", "eleven", "caf\u00e9", "cafe\u0301", "\u0420\u0435\u043a\u0430", "line\n"),
    *("{name}", "{{ x }}", "<|im_end|>", "```py", "```", "\u202e", "\ufffd", "\x00", "7", "42,5", "\U0001f600"),
    *("jane@mailhaven.org", "4111 1111 1111 1111", "192.168.0.1", "8.8.8.8", "DE89 3704 0044 0532 0130 00"),
    *("I can't help with that.", "As an AI language model", "build a bomb", LEAKED, LEAKED[:40], "so it goes\n" * 6),
)
texts = st.lists(st.sampled_from(PIECES), max_size=5).map(" ".join)
facts = st.fixed_dictionaries(
    {}, optional={"ratings": st.lists(st.sampled_from([1, 3, 4, 5, 9, "x", None]), max_size=2), "site": st.just("a")}
)


@st.composite
def rows(draw: st.DrawFn) -> list[Record]:
    """Rows with all that filters look for, some of them equal; the first one is rated, so that ratings are there."""
    made: list[Record] = []
    for position in range(draw(st.integers(1, 12))):
        turns = [{"role": "user", "content": draw(texts.filter(str.strip))}]
        turns.append({"role": "assistant", "content": draw(texts.filter(str.strip))})
        reason = draw(st.sampled_from([None, "stop", "length"]))
        made.append(
            Record(
                source="s",
                position=position,
                messages=tuple(turns),
                meta={**draw(facts), **({} if position else {"ratings": [4]})},
                finish_reason=reason,
            )
        )
    return made


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A benchmark that one piece is taken from."""
    file = tmp_path_factory.mktemp("bench") / "bench.jsonl"
    file.write_text(json.dumps({"question": LEAKED}) + "\n")
    return {"type": "file", "path": str(file), "format": "fields"}


FILTERS: tuple[dict[str, Any], ...] = (
    {"type": "length", "min_response": 6, "max_response": 80, "max_prompt": 90},
    {"type": "finish_reason"},
    {"type": "refusal"},
    {"type": "hygiene"},
    {"type": "pii"},
    {"type": "safety"},
    {"type": "language", "allowed": ["en"]},
    {"type": "human_rating", "threshold": 0.5},
    *({"type": "exact_dedup", "level": level, "key": key} for level in range(4) for key in ("full", "response")),
    {"type": "minhash_dedup", "threshold": 0.5, "min_tokens": 2},
    {"type": "decontaminate"},
    {"type": "semantic_dedup", "epsilon": 0.3},
    {"type": "select", "rows": 4},
    {"type": "select", "strategy": "longest", "rows": 4},
    {"type": "curriculum"},
)


def curated(records: Sequence[Record], filters: Sequence[dict[str, Any]], blocks: int = 1) -> Artifact:
    """The curate stage on these rows, its row filters applied here to so many blocks."""

    def verdicts(table: pa.Table, chain: Sequence[Link], state: stage.Run) -> pa.Table:
        batches = [judge_block(part, chain=chain) for part in slices(table, min(blocks, table.num_rows))]
        found = pa.concat_tables([batch.select(VERDICT_SCHEMA.names).cast(VERDICT_SCHEMA) for batch in batches])
        return found.sort_by([("row", "ascending"), ("link", "ascending")])

    root = Path(tempfile.mkdtemp(dir=ROOT[0]))
    pq.write_table(records_table(records), root / "in.parquet")
    inputs = [{"source": {"type": "file", "path": str(root / "in.parquet")}}]
    tree = {"name": "run", "inputs": inputs, "filters": list(filters), "min_rows": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_verdicts", verdicts)
        if blocks > 1:
            patch.setattr(stage, "ROWS_IN_FLIGHT", blocks)
        patch.setattr("itune_ray.curate.publish._check_min_rows", lambda *_: None)
        job = validate(CurateJob, tree, "x")
        return stage.run(job, RunStore(str(root), "run"), "curate", EngineHost(), Progress(quiet=True))


ROOT: list[Path] = []


@pytest.fixture(autouse=True)
def root(tmp_path: Path):
    """Where runs of this test go."""
    ROOT[:] = [tmp_path]


def table(artifact: Artifact, name: str) -> list[dict[str, Any]]:
    return artifact.folder.read_table(name).to_pylist()


def resolved(config: dict[str, Any], bench: dict[str, Any]) -> dict[str, Any]:
    return {**config, "against": [bench]} if config["type"] == "decontaminate" else config


@pytest.mark.parametrize("config", FILTERS, ids=lambda c: "-".join(map(str, c.values())))
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=rows())
def test_nothing_is_lost_and_twice_is_once(config, bench, records):
    """I2 and I4 for each filter: every row ends once, under a reason that is counted; what was kept is kept again."""
    config = resolved(config, bench)
    once = curated(records, [config])
    kept, rejected, failed = (table(once, name) for name in ("kept", "rejected", "failed"))
    assert not failed
    assert sorted(row["key"] for row in kept + rejected) == sorted(record.key for record in records)
    assert all(row["reason"] for row in rejected)
    assert once.manifest["funnel"]["rejected"] == Counter(row["reason"] for row in rejected)
    before = {record.key: record for record in records}
    for row in kept:
        assert row["messages"] == list(before[row["key"]].messages)
    if kept:
        again = curated([Record.from_row(row) for row in kept], [config])
        assert [row["key"] for row in table(again, "kept")] == [row["key"] for row in kept]
        assert not table(again, "rejected")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=rows(), order=st.randoms(use_true_random=False), blocks=st.integers(2, 12))
def test_neither_order_nor_blocks_decide(bench, records, order, blocks):
    """I1: the published tables of all filters together are the same bytes."""
    chain = [resolved(config, bench) for config in FILTERS if config["type"] not in ("exact_dedup", "language")]
    chain = [*chain[:6], {"type": "exact_dedup"}, *chain[6:]]
    shuffled = list(records)
    order.shuffle(shuffled)
    whole, cut = curated(records, chain), curated(shuffled, chain, blocks)
    for name in ("kept", "rejected", "failed"):
        assert whole.folder.read_bytes(f"{name}/part-0.parquet") == cut.folder.read_bytes(f"{name}/part-0.parquet")


ROW_FILTERS = [config for config in FILTERS[:7] if config["type"] != "language"]


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=rows(), order=st.permutations(ROW_FILTERS))
def test_the_order_of_row_filters_decides_only_the_reason(records, order):
    """A row is kept when every filter keeps it, whichever comes first."""
    kept = {row["key"] for row in table(curated(records, ROW_FILTERS), "kept")}
    assert {row["key"] for row in table(curated(records, order), "kept")} == kept
    alone = [{row["key"] for row in table(curated(records, [config]), "kept")} for config in ROW_FILTERS]
    assert kept == set.intersection(*alone)


def test_the_pieces_reach_every_reason(bench):
    """The rows above hold what filters look for: a property of rows without faults would prove nothing."""
    records = [
        Record(source="s", position=i, messages=({"role": "user", "content": a}, {"role": "assistant", "content": b}))
        for i, (a, b) in enumerate(itertools.product([p for p in PIECES if p.strip()], repeat=2))
    ]
    found = {
        row["reason"]
        for config in FILTERS[2:6] + FILTERS[-6:-4]
        for row in table(curated(records, [resolved(config, bench)]), "rejected")
    }
    assert found >= {"refusal", "template_slot", "chat_token", "control_characters", "pii_email", "pii_card", "pii_ip"}
    assert found >= {"pii_iban", "open_fence", "repeated_lines", "contaminated", "near_duplicate"}
